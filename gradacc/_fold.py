"""What is summed beside the gradients: value, weight and aux; and what each micro-batch counts for.

NOTE [units]
    The large batch's gradient is ``sum_i w_i g_i / W``: ``g_i`` the gradient of micro-batch i's mean, ``w_i`` its weight,
    ``W = sum_i w_i``. The buffer holds ``sum_i (w_i / unit) g_i`` and is multiplied once, at the end, by ``unit / W``.
    Where W is known beforehand (we split the batch, and the mean is over examples) the unit is W, and the last pass over
    the gradients falls away. Otherwise it is the first weight that is not zero: everything stays in the range of a mean
    (a sum over a hundred thousand tokens would overflow float16), and where there is one micro-batch the result is the
    undivided one, bit for bit.

NOTE [cotangents and shares]
    What a micro-batch's loss is differentiated with is cut in two: a *cotangent*, the same for all micro-batches, that
    goes through the backward pass, and a *share*, that differs between them. In half precision a share that went through
    the backward pass would be rounded, each one differently (two gradients that cancel would not), so an engine applies
    it where it adds to the buffer, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _dtypes, _tree, _validate
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._outcome import Contribution, Outcome


class Kind(NamedTuple):
    """What ``loss_fn`` returns, without its tensors: the same for every micro-batch."""

    is_mean: bool
    dtype: torch.dtype
    aux: _tree.TreeDef


class Sums(NamedTuple):
    """The fold's state beside the gradients; see NOTE [units]."""

    known: int | None = None
    """The number of examples of all micro-batches, where it is known beforehand."""
    kind: Kind | None = None
    """Of the first micro-batch; None before it."""
    value: Any = None
    """Sum of share x loss (a tensor); of losses where they are sums; of `Mean`s."""
    weight: float | Tensor = 0.0
    unit: float | Tensor | None = None
    aux: list[_aux.Partial] | None = None
    differentiated: bool = False
    """Whether any micro-batch had something to contribute."""


def contribution(options: Options, sums: Sums, outcome: Outcome) -> Contribution | None:
    """What a micro-batch's gradient counts for; None (where it can be read) or a share of 0: exactly nothing."""
    if options.reduction == "sum":
        return Contribution(1.0, 1.0)
    one, weight = unit(sums, outcome), outcome.weight
    if one is None or weight is None or (not isinstance(weight, Tensor) and not weight):
        return None
    if isinstance(outcome.value, Mean):
        return Contribution(1.0 / one, (weight != 0).to(weight.dtype) if isinstance(weight, Tensor) else 1.0)
    return Contribution(1.0, weight / one)


def update(options: Options, sums: Sums, outcome: Outcome, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and one more micro-batch."""
    kind = Kind(isinstance(outcome.value, Mean), outcome.target.dtype, outcome.aux.treedef)
    first = sums.kind or kind
    _validate.same_kind(options, first.is_mean, kind.is_mean, first.aux, kind.aux)
    one, weight = unit(sums, outcome), outcome.weight
    share: float | Tensor | None
    if weight is None:
        share = None
    elif isinstance(weight, Tensor) or weight:
        share = weight / one
    else:
        share = 0.0
    if isinstance(outcome.value, Mean):
        value: Any = _aux.summable(outcome.value)
    elif options.reduction == "sum":
        value = _aux.scaled(outcome.value, 0.0 if not isinstance(share, Tensor) and share == 0.0 else 1.0)
    else:
        value = _aux.scaled(outcome.value, share)
    return sums._replace(
        kind=first,
        value=value if sums.value is None else sums.value + value,
        weight=sums.weight + (0.0 if weight is None else weight),
        unit=one,
        aux=_aux.absorb(options.name, sums.aux, outcome.aux, share, sizes),
        differentiated=sums.differentiated or options.reduction == "sum" or isinstance(weight, Tensor) or bool(weight),
    )


def update_with_nothing(options: Options, sums: Sums, outcome: Outcome, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and an empty batch, which only says what types to return."""
    return update(options, sums, outcome._replace(weight=0.0), sizes)._replace(differentiated=False)


def merge(options: Options, a: Sums, b: Sums) -> tuple[Sums, tuple[float | Tensor, float | Tensor]]:
    """Two sums as one, in the larger of their units; and each one's share: what its gradients are multiplied by."""
    if a.kind is None or b.kind is None:
        return (b if a.kind is None else a), (1.0, 1.0)
    _validate.same_kind(options, a.kind.is_mean, b.kind.is_mean, a.kind.aux, b.kind.aux)
    one: Any
    shares: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    if a.unit is None or b.unit is None:
        one = b.unit if a.unit is None else a.unit
    else:
        units: Any = a.unit, b.unit
        one = torch.maximum(*units) if isinstance(a.unit, Tensor) else max(units)
        shares = a.unit / one, b.unit / one
    if a.kind.is_mean or options.reduction == "sum":
        value = a.value + b.value
    else:
        value = (a.value * shares[0] + b.value * shares[1]).to(a.value.dtype)
    merged = Sums(
        kind=a.kind,
        value=value,
        weight=a.weight + b.weight,
        unit=one,
        aux=_aux.merge(options.name, a.aux or [], b.aux or [], shares, a.kind.aux),
        differentiated=a.differentiated or b.differentiated,
    )
    return merged, (1.0, 1.0) if options.reduction == "sum" else shares


def numbers(sums: Sums) -> list[Any]:
    """Everything that is summed (tensors and Python numbers), but the weight and what is concatenated."""
    found: list[Any] = [sums.value.total, sums.value.weight] if isinstance(sums.value, Mean) else [sums.value]
    for part in sums.aux or ():
        if isinstance(part, _aux.Total):
            found += [part.mean.total, part.mean.weight]
        elif isinstance(part, _aux.Average):
            found.append(part.total)
    return found


def with_numbers(sums: Sums, numbers: Iterable[Any]) -> Sums:
    """The same with other `numbers`."""
    left = iter(numbers)
    value = Mean(next(left), next(left)) if isinstance(sums.value, Mean) else next(left)
    aux: list[_aux.Partial] = []
    for part in sums.aux or ():
        if isinstance(part, _aux.Total):
            aux.append(part._replace(mean=Mean(next(left), next(left))))
        elif isinstance(part, _aux.Average):
            aux.append(part._replace(total=next(left)))
        else:
            aux.append(part)
    return sums._replace(value=value, aux=aux)


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
    if sums.kind is None:
        _validate.nothing_with_aux(options)
        number = 0.0 if options.reduction == "sum" else math.nan
        return torch.full((), number, dtype=_dtypes.real(like.dtype), device=like.device), None
    rest = factor(sums)
    aux = _tree.unflatten(sums.kind.aux, _aux.finalize(sums.aux or [], rest))
    if sums.kind.is_mean:
        return _aux.restored(sums.value, sums.kind.dtype), aux
    divided = options.reduction == "sum" or (isinstance(rest, float) and rest == 1.0)
    return (sums.value if divided else sums.value * rest).to(sums.kind.dtype), aux


def unit(sums: Sums, outcome: Outcome) -> Any:
    if sums.unit is not None:
        return sums.unit
    if sums.known and not isinstance(outcome.value, Mean):
        return sums.known
    weight = outcome.weight
    return torch.where(weight == 0, 1.0, weight) if isinstance(weight, Tensor) else weight or None
