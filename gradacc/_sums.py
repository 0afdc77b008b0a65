"""What is summed beside the gradients: value, aux and weight; and what each micro-batch counts for.

NOTE [one pytree]
    `Sums` is one pytree. Its leaves are numbers: what a compiled loop carries, what crosses between ranks, and what a
    checkpoint holds. What they stand for (of a mean or of a sum, in which dtype it came) is structure.

NOTE [cotangents and factors]
    What a micro-batch's loss is differentiated with is cut in two: a *cotangent*, that goes through the backward pass, and a
    *factor*, that an engine applies where it adds to the buffer. Their product may be any number (7 examples of 20). In half
    precision one that went through the backward pass would be rounded, each one differently (two gradients that cancel
    would not), so there a contribution is *narrow*: its cotangents differ by powers of two only, which round nothing, and its
    factors are applied in float32. See NOTE [units] in ``_units.py``.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _dtypes, _parts, _tree, _units
from gradacc._loss import Outcome
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._parts import Average, Part, Pieces, Sum, Total, is_part


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """NOTE [one pytree]"""

    value: Part | None
    """None before the first micro-batch."""
    aux: Any
    """A tree of parts."""
    weight: Any
    """Of all micro-batches: a Python number, or a 0-dim tensor where it is not read."""
    unit: Any
    """NOTE [units]; None where nothing has had a weight yet."""
    differentiated: bool
    """Whether any micro-batch had something to contribute: structure."""


_tree.register_with_facts(Sums, ("value", "aux", "weight", "unit"), "differentiated")

NOTHING = Sums(None, None, 0.0, None, False)
"""Before the first micro-batch."""


class Contribution(NamedTuple):
    """What one micro-batch counts for: ``buffer = growth * buffer + cotangent * factor * gradient``.

    NOTE [cotangents and factors]. Without defaults: with ``dynamic=True`` Dynamo holds a float that is one symbolic.
    """

    counts: bool
    """Whether there is anything to differentiate; where not, it contributes exactly nothing."""

    unit: Any
    """Of the sums with this micro-batch."""

    growth: float | Tensor
    """What has been summed is multiplied by: not 1 where the unit has grown."""

    share: float | Tensor | None
    """Its weight in that unit, of averages; None where nothing says it (the loss is a sum)."""

    cotangent: float | Tensor
    """Goes through the backward pass."""

    factor: float | Tensor
    """Of its gradients; 1 where not narrow."""

    keeps: Tensor | None
    """Where the weight is not read, whether it is not 0: else nothing is added, whatever the gradient says."""

    narrow: bool
    """Whether a number of the backward pass has fewer digits than the buffer."""


def contribution(options: Options, sums: Sums, outcome: Outcome, known: int | None, narrow: bool) -> Contribution:
    """What a micro-batch counts for, beside ``sums``; ``known``: the number of examples of all, where that is known."""
    weight, unit = outcome.weight, _unit(sums, outcome, known)
    nothing = not isinstance(weight, Tensor) and not weight
    share = None if weight is None else 0.0 if nothing else weight / unit
    if options.reduction == "sum":
        return Contribution(True, unit, 1.0, share, 1.0, 1.0, None, narrow)
    if nothing:
        return Contribution(False, unit, 1.0, share, 0.0, 0.0, None, narrow)
    assert weight is not None
    assert share is not None
    if not isinstance(outcome.value, Mean):
        cotangent, factor = (1.0, share) if narrow else (share, 1.0)
        return Contribution(True, unit, 1.0, share, cotangent, factor, None, narrow)
    own = _units.near(unit, weight, outcome.target.dtype) if narrow else unit
    growth = 1.0 if sums.unit is None or sums.unit is unit else sums.unit / unit
    keeps = weight != 0 if isinstance(weight, Tensor) else None
    return Contribution(True, unit, growth, share, 1.0 / own, own / unit if narrow else 1.0, keeps, narrow)


def add(options: Options, sums: Sums, outcome: Outcome, counts: Contribution, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and one more micro-batch, whose tensors have these sizes along their split dimension."""
    name, weight = options.name, 0.0 if outcome.weight is None else outcome.weight
    value = _value(options, outcome, counts.share)
    parts = _aux.parts(name, outcome.aux, counts.share, sizes)
    if sums.value is None:
        return Sums(value, unflatten_aux(outcome.aux.treedef, parts), weight, counts.unit, counts.counts)
    _check_kind(name, sums.value, value)
    return Sums(
        _parts.add(name, _parts.times(sums.value, counts.growth), value, str),
        _merged_aux(name, (sums.aux, counts.growth), (parts, outcome.aux.treedef)),
        sums.weight + weight,
        counts.unit,
        sums.differentiated or counts.counts,
    )


def add_types(options: Options, sums: Sums, outcome: Outcome, known: int | None, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and an empty batch, which only says what types to return; its value is 0, of weight 0."""
    value = _tree.map_tensors(torch.zeros_like, outcome.value)
    if isinstance(value, Mean) and not isinstance(value.weight, Tensor):
        value = Mean(value.total, value.weight * 0)
    nothing = outcome._replace(value=value, weight=0.0)
    counts = contribution(options, sums, nothing, known, narrow=False)._replace(counts=False)
    return add(options, sums, nothing, counts, sizes)


def merge(options: Options, a: Sums, b: Sums) -> tuple[Sums, tuple[float | Tensor, float | Tensor]]:
    """Two sums as one, in the larger of their units; and each one's share: what its gradients are multiplied by."""
    if a.value is None or b.value is None:
        return (b if a.value is None else a), (1.0, 1.0)
    name = options.name
    _check_kind(name, a.value, b.value)
    one: Any
    shares: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    if a.unit is None or b.unit is None:
        one = b.unit if a.unit is None else a.unit
    else:
        one = _units.larger(a.unit, b.unit)
        shares = a.unit / one, b.unit / one
    parts, treedef = flatten_aux(b.aux)
    merged = Sums(
        _parts.add(name, _parts.times(a.value, shares[0]), _parts.times(b.value, shares[1]), str),
        _merged_aux(name, (a.aux, shares[0]), ([_parts.times(part, shares[1]) for part in parts], treedef)),
        a.weight + b.weight,
        one,
        a.differentiated or b.differentiated,
    )
    return merged, (1.0, 1.0) if options.reduction == "sum" else shares


def numbers(sums: Sums) -> tuple[list[Any], Sums, list[list[Any]]]:
    """What is summed and is a number (in the order of the leaves), but weight and unit; and the rest.

    The rest: the sums without weight and unit, whose pieces are empty, and these pieces. `with_numbers` is the inverse.
    """
    parts, treedef = flatten_aux(sums.aux)
    pieces = [part.tensors for part in parts if isinstance(part, Pieces)]
    aux = unflatten_aux(treedef, [Pieces([]) if isinstance(part, Pieces) else part for part in parts])
    found = [number for part in _with_value(sums, parts) for number in _parts.numbers(part)]
    return found, Sums(sums.value, aux, None, None, sums.differentiated), pieces


def with_numbers(rest: Sums, numbers: Sequence[Any], pieces: Sequence[list[Any]], weight: Any, unit: Any) -> Sums:
    """Sums of the structure ``rest`` with these `numbers`, pieces, weight and unit."""
    parts, treedef = flatten_aux(rest.aux)
    left, own = iter(numbers), iter(pieces)
    value = None if rest.value is None else _parts.with_numbers(rest.value, left)
    full = [Pieces(next(own)) if isinstance(part, Pieces) else _parts.with_numbers(part, left) for part in parts]
    return Sums(value, unflatten_aux(treedef, full), weight, unit, rest.differentiated)


def flatten_aux(aux: Any) -> tuple[list[Part], _tree.TreeDef | None]:
    """The parts of a tree of them, and its structure; None where there is no aux. NOTE [parts without their trees]"""
    return ([], None) if aux is None else _tree.flatten(aux, is_part)


def unflatten_aux(treedef: _tree.TreeDef | None, leaves: Sequence[Any]) -> Any:
    """The inverse of `flatten_aux`."""
    return None if treedef is None else _tree.unflatten(treedef, leaves)


def dtype(sums: Sums) -> torch.dtype | None:
    """Of the loss; None before the first micro-batch."""
    return None if sums.value is None or isinstance(sums.value, Pieces) else sums.value.dtype


def factor(sums: Sums) -> float | Tensor:
    """``unit / W``, what is left to multiply at the end: NaN for a mean of nothing."""
    unit, weight = sums.unit, sums.weight
    if isinstance(weight, Tensor):
        # One that is not read, and has overflowed: no share of it is 0.
        return math.nan if unit is None else torch.where(weight == math.inf, math.nan, unit / weight)
    found: float | Tensor = unit / weight if unit is not None and weight else math.nan
    return found


def gradient_factor(options: Options, sums: Sums) -> float | Tensor:
    """What the buffer is multiplied by at the end: the gradient of nothing is zero."""
    if options.reduction == "sum" or not sums.differentiated:
        return 1.0
    rest = factor(sums)
    return torch.where(sums.weight == 0, 0.0, rest) if isinstance(sums.weight, Tensor) else rest


def finalize(options: Options, sums: Sums, like: Tensor) -> tuple[Tensor | Mean, Any]:
    """The large batch's value and aux; ``like``: a parameter, of whose dtype and device a value of nothing is."""
    if sums.value is None:
        if options.has_aux:
            raise ValueError(
                f"{options.name}: no micro-batch arrived, so nothing says what aux is; has_aux=True needs one"
            )
        number = 0.0 if options.reduction == "sum" else math.nan
        return torch.full((), number, dtype=_dtypes.real_dtype(like.dtype), device=like.device), None
    _check_weight(options.name, sums)
    rest = factor(sums)
    parts, treedef = flatten_aux(sums.aux)
    return _parts.final(sums.value, rest), unflatten_aux(treedef, [_parts.final(part, rest) for part in parts])


def _with_value(sums: Sums, parts: Sequence[Part]) -> list[Part]:
    """In the order of the leaves."""
    return list(parts) if sums.value is None else [sums.value, *parts]


def _check_weight(name: str, sums: Sums) -> None:
    """The sum of all weights is a number, where it is read: the quotient by infinity is 0, and no gradient."""
    weight = sums.weight
    if isinstance(weight, Tensor) or torch.compiler.is_compiling():
        return
    if weight == math.inf:
        raise ValueError(
            f"{name}: the weights of all micro-batches add up to more than float64 holds (1.8e308). Divide totals and weights "
            "by the same number"
        )
    own = sums.value.mean.weight if isinstance(sums.value, Total) else None
    if isinstance(own, Tensor) and not own.is_floating_point() and weight >= 2.0**63:
        raise ValueError(
            f"{name}: the weights of all micro-batches are integers and add up to {weight:g}, more than int64 holds. Return "
            "them as floating numbers"
        )


def _unit(sums: Sums, outcome: Outcome, known: int | None) -> Any:
    """Of ``sums`` and this micro-batch, NOTE [units]; None where nothing has a weight yet."""
    weight = outcome.weight
    if not isinstance(outcome.value, Mean):
        return sums.unit if sums.unit is not None else known or weight or None
    assert weight is not None
    if not isinstance(weight, Tensor) and not weight:
        return sums.unit
    dtype = outcome.target.dtype
    return _units.first(weight, dtype) if sums.unit is None else _units.grown(sums.unit, weight, dtype)


def _value(options: Options, outcome: Outcome, share: float | Tensor | None) -> Part:
    value, dtype = outcome.value, outcome.target.dtype
    if isinstance(value, Mean):
        assert outcome.weight is not None
        return Total(_summand(value, outcome.weight), dtype)
    if options.reduction == "sum":
        return Sum(_parts.times_share(value, 1.0), dtype)
    assert share is not None
    return Average(_parts.times_share(value, share), dtype)


def _summand(mean: Mean, weight: float | Tensor) -> Mean:
    """A new `Mean` in what is summed, of a checked ``weight``: its total is 0 where that is 0, and NaN where that is NaN."""
    total, own = _parts.widened(mean.total), mean.weight
    if isinstance(weight, Tensor):
        # Two 0-dim tensors have the wider dtype.
        total = torch.where(weight > 0, total, weight * 0.0).to(total.dtype)
    else:
        total = total.clone() if weight else torch.zeros_like(total)
    return Mean(total, _parts.widened(own).clone() if isinstance(own, Tensor) else own)


def _merged_aux(name: str, one: tuple[Any, float | Tensor], other: tuple[Sequence[Part], _tree.TreeDef | None]) -> Any:
    """A tree of parts times a share, and more parts of the same structure."""
    (aux, share), (parts, structure) = one, other
    sofar, treedef = flatten_aux(aux)
    if treedef is None and structure is None:
        return None
    if treedef is None or structure is None or treedef != structure:
        raise ValueError(
            f"{name}: aux has another structure in another micro-batch: {treedef}, then {structure}; "
            "return the same one always (None is an empty one)"
        )
    return _tree.unflatten(
        treedef,
        [
            _parts.add(name, _parts.times(a, share), b, lambda index=index: _tree.paths(treedef, "aux")[index])  # type: ignore[misc]
            for index, (a, b) in enumerate(zip(sofar, parts, strict=True))
        ],
    )


def _check_kind(name: str, one: Part, other: Part) -> None:
    """All micro-batches return the same kind of value."""
    if isinstance(one, Total) is not isinstance(other, Total):
        raise TypeError(
            f"{name}: loss_fn returned a Mean for one micro-batch and a tensor for another; return one of them always"
        )
