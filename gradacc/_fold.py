"""What is summed beside the gradients: value, weight and aux; and what each micro-batch counts for.

NOTE [units]
    The large batch's gradient is ``sum_i w_i g_i / W``: ``g_i`` the gradient of micro-batch i's mean, ``w_i`` its weight,
    ``W = sum_i w_i``. The buffer holds ``sum_i (w_i / unit) g_i`` and is multiplied once, at the end, by ``unit / W``.
    Where W is known beforehand (we split the batch, and the mean is over examples) the unit is W, and the last pass over
    the gradients falls away. Otherwise it is the first weight that is not zero: everything stays in the range of a mean
    (a sum over a hundred thousand tokens would overflow float16), and where there is one micro-batch the result is the
    undivided one, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _tree, _validate
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._outcome import Outcome


class Sums(NamedTuple):
    """The fold's state beside the gradients; see NOTE [units]."""

    known: int | None
    """The number of examples of all micro-batches, where it is known beforehand."""
    like: Outcome | None = None
    """The first outcome: it says what types to return."""
    value: Tensor | Mean | None = None
    """Sum of share x loss; of losses where they are sums; of `Mean`s."""
    weight: float | Tensor = 0.0
    unit: float | Tensor | None = None
    aux: list[_aux.Partial] | None = None
    differentiated: bool = False
    """Whether any micro-batch had something to contribute."""


def seed(options: Options, sums: Sums, outcome: Outcome) -> float | Tensor | None:
    """The factor of a micro-batch's gradient in the buffer; None (where it can be read) or 0: it contributes nothing."""
    if options.reduction == "sum":
        return 1.0
    unit, weight = _unit(sums, outcome), outcome.weight
    numerator = 1.0 if isinstance(outcome.value, Mean) else weight
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, numerator / unit)
    return numerator / unit if weight else None


def absorb(options: Options, sums: Sums, outcome: Outcome, sizes: frozenset[int]) -> Sums:
    """``sums`` and one more micro-batch."""
    like = sums.like or outcome
    _validate.same_kind(options, like.value, outcome.value, like.aux.treedef, outcome.aux.treedef)
    unit, weight = _unit(sums, outcome), outcome.weight
    share = None if weight is None else weight / unit if isinstance(weight, Tensor) or weight else 0.0
    value: Any  # a Mean or a Tensor in every micro-batch, which `same_kind` has checked
    if isinstance(outcome.value, Mean):
        value = _aux.summable(outcome.value)
    else:
        value = _aux.scaled(outcome.value, float(weight != 0) if options.reduction == "sum" else share)
    return sums._replace(
        like=like,
        value=value if sums.value is None else sums.value + value,
        weight=sums.weight + (0.0 if weight is None else weight),
        unit=unit,
        aux=_aux.absorb(options.name, sums.aux, outcome.aux, share, sizes),
        differentiated=sums.differentiated or options.reduction == "sum" or isinstance(weight, Tensor) or bool(weight),
    )


def absorb_nothing(options: Options, sums: Sums, outcome: Outcome, sizes: frozenset[int]) -> Sums:
    """``sums`` and an empty batch, which only says what types to return."""
    return absorb(options, sums, outcome._replace(weight=0.0), sizes)._replace(differentiated=False)


def factor(sums: Sums) -> float | Tensor:
    """``unit / W``, what is left to multiply at the end: NaN for a mean of nothing."""
    unit, weight = sums.unit, sums.weight
    return unit / weight if unit is not None and (isinstance(weight, Tensor) or weight) else math.nan


def gradient_factor(options: Options, sums: Sums) -> float | Tensor:
    """What the buffer is multiplied by at the end: the gradient of nothing is zero."""
    if options.reduction == "sum" or not sums.differentiated:
        return 1.0
    rest = factor(sums)
    return torch.where(sums.weight == 0, 0.0, rest) if isinstance(sums.weight, Tensor) else rest


def finalize(options: Options, sums: Sums, like: Tensor) -> tuple[Tensor | Mean, Any]:
    """The large batch's value and aux; ``like``: a parameter, of whose dtype and device a value of nothing is."""
    if sums.like is None:
        _validate.nothing_with_aux(options)
        number = 0.0 if options.reduction == "sum" else math.nan
        return torch.full((), number, dtype=like.dtype.to_real(), device=like.device), None
    rest, example = factor(sums), sums.like.value
    aux = _tree.unflatten(sums.like.aux.treedef, _aux.finalize(sums.aux or [], rest))
    if isinstance(example, Mean):
        assert isinstance(sums.value, Mean)
        return _aux.restored(sums.value, example.total.dtype), aux
    assert isinstance(sums.value, Tensor)
    return (sums.value * (1.0 if options.reduction == "sum" else rest)).to(example.dtype), aux


def _unit(sums: Sums, outcome: Outcome) -> Any:
    if sums.unit is not None:
        return sums.unit
    if sums.known and not isinstance(outcome.value, Mean):
        return float(sums.known)
    weight = outcome.weight
    return torch.where(weight == 0, 1.0, weight) if isinstance(weight, Tensor) else weight or None
