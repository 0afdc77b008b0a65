"""What is summed beside the gradients: value, weight and aux; and what each micro-batch counts for.

NOTE [cotangents and shares]
    What a micro-batch's loss is differentiated with is cut in two: a *cotangent*, that goes through the backward pass, and a
    *share*, that an engine applies where it adds to the buffer. A share may be any number (7 examples of 20). In half
    precision one that went through the backward pass would be rounded, each one differently (two gradients that cancel
    would not), so there an engine asks for a *narrow* contribution: its cotangents differ by powers of two only, which round
    nothing, and its shares are applied in float32. See NOTE [units] in ``_units.py``.

NOTE [weights that are not read]
    On a CPU a weight is a Python number, and decides: a micro-batch of weight 0 has no backward pass, a negative or NaN weight
    is an error. On an accelerator reading it would wait for the micro-batch's forward pass, each time, with nothing
    queued behind it. There (and under a transform, where it may have no one value) it stays a 0-dim tensor. The micro-batch
    of weight 0 is computed like any other, and what it contributes is replaced by 0 (`Contribution.keeps`), as NaN times 0 is
    NaN. And a weight that is negative, infinite or NaN becomes NaN, which makes value and gradients NaN; with ``sync``, where
    numbers are read once a call, it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _dtypes, _tree, _units
from gradacc._loss import Outcome
from gradacc._mean import Mean
from gradacc._options import Options


class Contribution(NamedTuple):
    """``buffer = growth * buffer + cotangent * share * gradient``; NOTE [cotangents and shares].

    Without defaults: with ``dynamic=True`` Dynamo holds a float that is one symbolic.
    """

    cotangent: float | Tensor
    """Goes through the backward pass."""

    share: float | Tensor
    """Of this micro-batch."""

    growth: float | Tensor
    """Not 1 where the unit has grown; NOTE [units] in ``_units.py``."""

    keeps: Tensor | None
    """Where the weight is not read, whether it is not 0: else nothing is added, whatever the gradient says."""


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


def contribution(options: Options, sums: Sums, outcome: Outcome, narrow: bool) -> Contribution | None:
    """What a micro-batch's gradient counts for; None: exactly nothing. ``narrow``: NOTE [cotangents and shares]."""
    if options.reduction == "sum":
        return Contribution(1.0, 1.0, 1.0, None)
    one, weight = unit(sums, outcome), outcome.weight
    if one is None or weight is None or (not isinstance(weight, Tensor) and not weight):
        return None
    if not isinstance(outcome.value, Mean):
        return Contribution(1.0, weight / one, 1.0, None)
    own = _units.near(one, weight, outcome.target.dtype) if narrow else one
    return Contribution(
        1.0 / own,
        own / one if narrow else 1.0,
        _growth(sums, one),
        weight != 0 if isinstance(weight, Tensor) else None,
    )


def update(options: Options, sums: Sums, outcome: Outcome, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and one more micro-batch."""
    kind = Kind(isinstance(outcome.value, Mean), outcome.target.dtype, outcome.aux.treedef)
    first = sums.kind or kind
    _check_kind(options, first.is_mean, kind.is_mean, first.aux, kind.aux)
    one, weight = unit(sums, outcome), outcome.weight
    share: float | Tensor | None
    if weight is None:
        share = None
    elif isinstance(weight, Tensor) or weight:
        share = weight / one
    else:
        share = 0.0
    if isinstance(outcome.value, Mean):
        assert weight is not None
        value: Any = _summand(outcome.value, weight)
    elif options.reduction == "sum":
        value = _aux.scaled(outcome.value, 1.0)
    else:
        value = _aux.scaled(outcome.value, share)
    sofar = None if sums.aux is None else _aux.times(sums.aux, _growth(sums, one))
    return sums._replace(
        kind=first,
        value=value if sums.value is None else sums.value + value,
        weight=sums.weight + (0.0 if weight is None else weight),
        unit=one,
        aux=_aux.absorb(options.name, sofar, outcome.aux, share, sizes),
        differentiated=sums.differentiated or options.reduction == "sum" or isinstance(weight, Tensor) or bool(weight),
    )


def update_with_nothing(options: Options, sums: Sums, outcome: Outcome, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and an empty batch, which only says what types to return; its value is 0, of weight 0."""
    value = _tree.map_tensors(torch.zeros_like, outcome.value)
    if isinstance(value, Mean) and not isinstance(value.weight, Tensor):
        value = Mean(value.total, value.weight * 0)
    nothing = outcome._replace(value=value, weight=0.0)
    return update(options, sums, nothing, sizes)._replace(differentiated=False)


def merge(options: Options, a: Sums, b: Sums) -> tuple[Sums, tuple[float | Tensor, float | Tensor]]:
    """Two sums as one, in the larger of their units; and each one's share: what its gradients are multiplied by."""
    if a.kind is None or b.kind is None:
        return (b if a.kind is None else a), (1.0, 1.0)
    _check_kind(options, a.kind.is_mean, b.kind.is_mean, a.kind.aux, b.kind.aux)
    one: Any
    shares: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    if a.unit is None or b.unit is None:
        one = b.unit if a.unit is None else a.unit
    else:
        one = _units.larger(a.unit, b.unit)
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
        _check_without_aux(options)
        number = 0.0 if options.reduction == "sum" else math.nan
        return torch.full((), number, dtype=_dtypes.real(like.dtype), device=like.device), None
    rest = factor(sums)
    aux = _tree.unflatten(sums.kind.aux, _aux.finalize(sums.aux or [], rest))
    if sums.kind.is_mean:
        return _aux.restored(sums.value, sums.kind.dtype), aux
    divided = options.reduction == "sum" or (isinstance(rest, float) and rest == 1.0)
    return (sums.value if divided else sums.value * rest).to(sums.kind.dtype), aux


def unit(sums: Sums, outcome: Outcome) -> Any:
    """Of ``sums`` and this micro-batch, NOTE [units]; None where nothing has a weight yet."""
    weight = outcome.weight
    if not isinstance(outcome.value, Mean):
        return sums.unit if sums.unit is not None else sums.known or weight or None
    assert weight is not None
    if not isinstance(weight, Tensor) and not weight:
        return sums.unit
    dtype = outcome.target.dtype
    return _units.first(weight, dtype) if sums.unit is None else _units.grown(sums.unit, weight, dtype)


def _check_kind(options: Options, first: bool, is_mean: bool, aux_first: _tree.TreeDef, aux: _tree.TreeDef) -> None:
    """All micro-batches return the same kind of value and the same structure of aux."""
    if first is not is_mean:
        raise TypeError(
            f"{options.name}: loss_fn returned a Mean for one micro-batch and a tensor for another; return one of them always"
        )
    if aux_first != aux:
        raise ValueError(
            f"{options.name}: aux has another structure in another micro-batch: {aux_first}, then {aux}; "
            "return the same one always (None is an empty one)"
        )


def _check_without_aux(options: Options) -> None:
    """Without a single micro-batch there is no aux to return."""
    if options.has_aux:
        raise ValueError(f"{options.name}: no micro-batch arrived, so nothing says what aux is; has_aux=True needs one")


def _growth(sums: Sums, one: Any) -> Any:
    """What has been summed is multiplied by, where the unit has grown."""
    old: Any = sums.unit
    return 1.0 if old is None or old is one else old / one


def _summand(mean: Mean, weight: float | Tensor) -> Mean:
    """A new `Mean` in what is summed, of a checked ``weight``: its total is 0 where that is 0, and NaN where that is NaN."""
    total, own = _aux.wide(mean.total), mean.weight
    if isinstance(weight, Tensor):
        total = torch.where(weight > 0, total, weight * 0.0).to(total.dtype)  # two 0-dim tensors have the wider dtype
    else:
        total = total.clone() if weight else torch.zeros_like(total)
    return Mean(total, _aux.wide(own).clone() if isinstance(own, Tensor) else own)
