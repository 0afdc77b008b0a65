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

NOTE [several means]
    Of a loss that is the sum of several means, ``sum_t total_t / weight_t``, the gradient is ``sum_t G_t / W_t``: each total's
    gradient is summed by itself, in the unit 1, into gradients of its own, as nobody knows one ``W_t`` over another before the
    last micro-batch (and rank). They are what a `Buffer` has one behind the other. Where the weights have been counted
    beforehand (``weights=``), the totals over them are one loss, which is a sum: one target, one gradient. What a micro-batch
    weighs besides, for averages in aux, is its number of examples.

NOTE [weights that are not read]
    On a CPU a weight is a Python number, and decides: a micro-batch of weight 0 has no backward pass, a negative or NaN weight
    is an error. On an accelerator reading it would wait for the micro-batch's forward pass, each time, with nothing
    queued behind it. There (and under a transform, where it may have no one value) it stays a 0-dim tensor. The micro-batch
    of weight 0 is computed like any other, and what it contributes is replaced by 0 (`Pass.keeps`), as NaN times 0 is
    NaN. And a weight that is negative, infinite or NaN becomes NaN, which makes value and gradients NaN; with ``sync``, where
    numbers are read once a call, it is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _carry, _dtypes, _moments, _order, _parts, _tree, _units, _where
from gradacc._loss import Outcome, Terms
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._parts import Average, Combined, Latest, Part, Pieces, Sum, Total, is_part


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sums:
    """NOTE [one pytree]. Every field is named where one is made: most can be None, and one more would take another's place."""

    value: Any
    """A part; of several means, a tuple, list or dict of them; None before the first micro-batch."""
    aux: Any
    """A tree of parts; None where there is none."""
    weight: Any
    """Of all micro-batches: a Python number, or a 0-dim tensor where it is not read."""
    unit: Any
    """NOTE [units]; None where nothing has had a weight yet."""
    dropped: Sum | None = None
    """How many micro-batches were dropped; None where none may be, or before the first one."""
    carry: Any = None
    """A list of parts, one for each leaf of the carry (a tree of them where they cross); None where there is none."""
    differentiated: bool
    """Whether any micro-batch had something to contribute: structure."""


_tree.register_with_facts(Sums, ("value", "aux", "weight", "unit", "dropped", "carry"), "differentiated")

NOTHING = Sums(value=None, aux=None, weight=0.0, unit=None, differentiated=False)
"""Before the first micro-batch."""


def nothing(carry: list[Part] | None) -> Sums:
    """The same with a carry."""
    return NOTHING if carry is None else replace(NOTHING, carry=carry)


class Pass(NamedTuple):
    """What one target counts for: NOTE [cotangents and factors]."""

    cotangent: float | Tensor
    """Goes through the backward pass."""

    factor: float | Tensor
    """Of its gradients; 1 where not narrow."""

    keeps: Tensor | None
    """Where the weight is not read, whether it is not 0: else nothing is added, whatever the gradient says."""


class Contribution(NamedTuple):
    """What one micro-batch counts for: ``buffer = growth * buffer + cotangent * factor * gradient``, the last of each `Pass`.

    Without defaults: with ``dynamic=True`` Dynamo holds a float that is one symbolic.
    """

    counts: bool
    """Whether there is anything to differentiate; where not, it contributes exactly nothing."""

    unit: Any
    """Of the sums with this micro-batch."""

    growth: float | Tensor
    """What has been summed is multiplied by: not 1 where the unit has grown."""

    share: float | Tensor | None
    """Its weight in that unit, of averages; None where nothing says it (the loss is a sum)."""

    passes: Sequence[Pass | None]
    """Of each target; None where it contributes exactly nothing."""

    dropped: int | Tensor | None
    """Whether it was dropped, 1 or 0; None where none may be."""

    narrow: bool
    """Whether a number of the backward pass has fewer digits than the buffer."""


def contribution(options: Options, sums: Sums, outcome: Outcome, known: int | None, narrow: bool) -> Contribution:
    """What a micro-batch counts for, beside ``sums``; ``known``: the number of examples of all, where that is known."""
    if sums.value is not None:
        # Before gradients of one kind are added to those of another.
        check_kind(options.name, sums.value, outcome.value)
    if isinstance(outcome.value, Terms):
        return _contribution_of_terms(options, outcome, outcome.value, narrow)
    dropped = 0 if options.nonfinite == "drop" else None
    weight, unit = outcome.weight, _unit(sums, outcome, known)
    nothing = not isinstance(weight, Tensor) and not weight
    share = None if weight is None else 0.0 if nothing else weight / unit
    if options.reduction == "sum":
        return Contribution(True, unit, 1.0, share, [Pass(1.0, 1.0, None)], dropped, narrow)
    if nothing:
        return Contribution(False, unit, 1.0, share, [None], dropped, narrow)
    assert weight is not None
    assert share is not None
    if not isinstance(outcome.value, Mean):
        cotangent, factor = (1.0, share) if narrow else (share, 1.0)
        return Contribution(True, unit, 1.0, share, [Pass(cotangent, factor, None)], dropped, narrow)
    own = _units.near(unit, weight, outcome.targets[0].dtype) if narrow else unit
    growth = 1.0 if sums.unit is None or sums.unit is unit else sums.unit / unit
    keeps = weight != 0 if isinstance(weight, Tensor) else None
    passes = [Pass(1.0 / own, own / unit if narrow else 1.0, keeps)]
    return Contribution(True, unit, growth, share, passes, dropped, narrow)


def _contribution_of_terms(options: Options, outcome: Outcome, terms: Terms, narrow: bool) -> Contribution:
    """NOTE [several means]"""
    share = None if outcome.weight is None else outcome.weight / 1.0
    something = [isinstance(weight, Tensor) or weight != 0.0 for weight in terms.weights]
    passes: list[Pass | None] = []
    if options.counted:
        passes.append(Pass(1.0, 1.0, None) if any(something) else None)
    else:
        for mean, weight, counts in zip(terms.means, terms.weights, something, strict=True):
            own = _units.near(1.0, weight, mean.total.dtype) if narrow and counts else 1.0
            keeps = weight != 0 if isinstance(weight, Tensor) else None
            passes.append(Pass(1.0 / own, own, keeps) if counts else None)
    dropped = 0 if options.nonfinite == "drop" else None
    return Contribution(any(something), 1.0, 1.0, share, passes, dropped, narrow)


def add(options: Options, sums: Sums, outcome: Outcome, counts: Contribution, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and one more micro-batch, whose tensors have these sizes along their split dimension."""
    name, weight = options.name, weight_of(outcome)
    value = _value(options, outcome, counts.share)
    parts = _aux.parts(name, outcome.aux, counts.share, sizes)
    # What an empty batch returned, for its types, has none.
    carry = _carry.add(sums.carry, outcome.carry, counts.dropped) if outcome.carry else sums.carry
    if sums.value is None:
        treedef = outcome.aux.treedef
        return Sums(
            value=value,
            aux=None if treedef is None else _tree.unflatten(treedef, parts),
            weight=weight,
            unit=counts.unit,
            dropped=_dropped(counts, outcome),
            carry=carry,
            differentiated=counts.counts,
        )
    return Sums(
        value=_merged_value(name, (sums.value, counts.growth), (value, 1.0)),
        aux=_merged_aux(name, (sums.aux, counts.growth), (parts, outcome.aux.treedef)),
        weight=sums.weight + weight,
        unit=counts.unit if counts.unit is not None else sums.unit,
        dropped=_sum_of(sums.dropped, _dropped(counts, outcome)),
        carry=carry,
        differentiated=sums.differentiated or counts.counts,
    )


def weight_of(outcome: Outcome) -> float | Tensor:
    """What a micro-batch weighs; of several means, of whose examples nothing is known, the same as any other."""
    if outcome.weight is None:
        return 1.0 if isinstance(outcome.value, Terms) else 0.0
    return outcome.weight


def add_types(options: Options, sums: Sums, outcome: Outcome, known: int | None, sizes: tuple[int, ...]) -> Sums:
    """``sums`` and an empty batch, which only says what types to return; its value is 0, of weight 0."""
    nothing = outcome._replace(value=_times_zero(outcome.value), weight=0.0, carry=())
    counts = contribution(options, sums, nothing, known, narrow=False)._replace(counts=False)
    return add(options, sums, nothing, counts, sizes)


def merge(options: Options, a: Sums, b: Sums) -> tuple[Sums, tuple[float | Tensor, float | Tensor]]:
    """Two sums as one, in the larger of their units; and each one's share: what its gradients are multiplied by."""
    if a.value is None or b.value is None:
        return (b if a.value is None else a), (1.0, 1.0)
    name = options.name
    check_kind(name, a.value, b.value)
    one: Any
    shares: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    if a.unit is None or b.unit is None:
        one = b.unit if a.unit is None else a.unit
    else:
        one = _units.larger(a.unit, b.unit)
        shares = a.unit / one, b.unit / one
    parts, treedef = flatten_parts(b.aux)
    merged = Sums(
        value=_merged_value(name, (a.value, shares[0]), (b.value, shares[1])),
        aux=_merged_aux(name, (a.aux, shares[0]), ([_parts.times(part, shares[1]) for part in parts], treedef)),
        weight=a.weight + b.weight,
        unit=one,
        dropped=_sum_of(a.dropped, b.dropped),
        carry=None if a.carry is None else _carry.merge(name, a.carry, b.carry),
        differentiated=a.differentiated or b.differentiated,
    )
    return merged, (1.0, 1.0) if options.reduction == "sum" else shares


def restored(name: str, sums: Sums, orders: Sequence[_order.Order | None]) -> Sums:
    """``sums`` with what is concatenated in the order of the batch; ``orders``: of each micro-batch that was added."""
    known = [order for order in orders if order is not None]
    if not known or sums.aux is None:
        return sums
    parts, treedef = flatten_parts(sums.aux)
    assert treedef is not None
    paths = _tree.paths(treedef, "aux")
    found = [_parts.restored(part, known, f"{name}: {path}") for part, path in zip(parts, paths, strict=True)]
    return replace(sums, aux=_tree.unflatten(treedef, found))


def numbers(sums: Sums) -> tuple[list[Any], Sums, list[list[Any]]]:
    """What is summed and is a number (in the order of the leaves), but weight and unit; and the rest.

    The rest: the sums without weight and unit, whose pieces are empty, and these pieces. `with_numbers` is the inverse.
    """
    parts, _ = parts_of(sums.aux)
    pieces = [part.tensors for part in parts if isinstance(part, Pieces)]
    aux = map_parts(lambda part: Pieces([]) if isinstance(part, Pieces) else part, sums.aux) if pieces else sums.aux
    every = [*parts_of(sums.value)[0], *parts, *parts_of(sums.dropped)[0], *parts_of(sums.carry)[0]]
    found = [number for part in every for number in _parts.numbers(part)]
    return found, replace(sums, aux=aux, weight=None, unit=None), pieces


def with_numbers(rest: Sums, numbers: Sequence[Any], pieces: Sequence[list[Any]], weight: Any, unit: Any) -> Sums:
    """Sums of the structure ``rest`` with these `numbers`, pieces, weight and unit."""
    left, own = iter(numbers), iter(pieces)

    def full(part: Part) -> Part:
        return Pieces(next(own)) if isinstance(part, Pieces) else _parts.with_numbers(part, left)

    trees = (rest.value, rest.aux, rest.dropped, rest.carry)
    value, aux, dropped, carry = [map_parts(full, tree) for tree in trees]
    return replace(rest, value=value, aux=aux, weight=weight, unit=unit, dropped=dropped, carry=carry)


def of_all_ranks(sums: Sums) -> Sums:
    """Of sums whose moments are each rank's, stacked: combined."""

    def whole(part: Part) -> Part:
        return Combined(_moments.stacked(*_parts.numbers(part)), part.dtype) if isinstance(part, Combined) else part

    return replace(sums, carry=map_parts(whole, sums.carry))


def flatten_parts(tree: Any) -> tuple[list[Part], _tree.TreeDef | None]:
    """The parts of a tree of them, and its structure; none of None. NOTE [parts without their trees]"""
    return ([], None) if tree is None else _tree.flatten(tree, is_part)


def parts_of(tree: Any) -> tuple[list[Part], _tree.TreeDef | None]:
    """The same of any tree, but that one part alone has no structure: NOTE [parts without their trees] in ``_parts.py``."""
    return ([tree], None) if is_part(tree) else flatten_parts(tree)


def map_parts(func: Callable[[Part], Any], tree: Any) -> Any:
    """A tree of parts with ``func`` of each; None stays None."""
    if tree is None or is_part(tree):
        return None if tree is None else func(tree)
    parts, treedef = _tree.flatten(tree, is_part)
    return _tree.unflatten(treedef, [func(part) for part in parts])


def dtypes(sums: Sums) -> list[torch.dtype]:
    """Of the loss; of each mean of several, and of none before the first micro-batch."""
    return [part.dtype for part in parts_of(sums.value)[0] if not isinstance(part, (Pieces, Latest))]


def factor(sums: Sums) -> float | Tensor:
    """``unit / W``, what is left to multiply at the end: NaN for a mean of nothing."""
    unit, weight = sums.unit, sums.weight
    if isinstance(weight, Tensor):
        # One that is not read, and has overflowed: no share of it is 0.
        return math.nan if unit is None else torch.where(weight == math.inf, math.nan, unit / weight)
    found: float | Tensor = unit / weight if unit is not None and weight else math.nan
    return found


def gradient_factors(options: Options, sums: Sums) -> list[float | Tensor]:
    """What each target's gradients are multiplied by at the end: the gradient of nothing is zero."""
    if options.reduction == "sum" or not sums.differentiated:
        return [1.0 for _ in range(1 if options.counted else len(parts_of(sums.value)[0]) or 1)]
    if is_part(sums.value):
        rest = factor(sums)
        return [torch.where(sums.weight == 0, 0.0, rest) if isinstance(sums.weight, Tensor) else rest]
    if options.counted:
        return [sums.unit]
    return [_unit_over(sums.unit, part.mean.weight) for part in parts_of(sums.value)[0] if isinstance(part, Total)]


def read(weight: float | Tensor) -> float | Tensor:
    """A weight as a number, where it can be read for nothing."""
    return weight.item() if isinstance(weight, Tensor) and weight.is_cpu and not _where.transforming() else weight


def _unit_over(unit: float | Tensor, weight: float | Tensor) -> float | Tensor:
    """``unit / weight``; 0 for a weight of 0."""
    weight = read(weight)
    if isinstance(weight, Tensor):
        wide = weight if weight.device.type == "mps" else weight.to(torch.float64)
        return torch.where(wide == 0, 0.0, unit / wide)
    return unit / weight if weight else 0.0


def dropped(sums: Sums, like: Tensor) -> Tensor:
    """How many micro-batches were dropped."""
    if sums.dropped is None:
        return torch.zeros((), dtype=torch.int64, device=like.device)
    number: Tensor = sums.dropped.total
    return number


def finalize(options: Options, sums: Sums, like: Tensor) -> tuple[Any, Any]:
    """The large batch's value and aux; ``like``: a parameter, of whose dtype and device a value of nothing is."""
    if sums.value is None:
        if options.has_aux:
            raise ValueError(
                f"{options.name}: no micro-batch arrived, so nothing says what aux is; has_aux=True needs one"
            )
        number = 0.0 if options.reduction == "sum" else math.nan
        return torch.full((), number, dtype=_dtypes.real_dtype(like.dtype), device=like.device), None
    _check_weight(options.name, sums)
    final = functools.partial(_parts.final, factor=factor(sums))
    return map_parts(final, sums.value), map_parts(final, sums.aux)


def _check_weight(name: str, sums: Sums) -> None:
    """The sum of all weights is a number, where it is read: the quotient by infinity is 0, and no gradient."""
    weight = sums.weight
    if isinstance(weight, Tensor) or torch.compiler.is_compiling():
        return
    found = [weight] + [part.mean.weight for part in parts_of(sums.value)[0] if isinstance(part, Total)]
    if any(number == math.inf for number in found if not isinstance(number, Tensor) or number.is_cpu):
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
    dtype = outcome.targets[0].dtype
    return _units.first(weight, dtype) if sums.unit is None else _units.grown(sums.unit, weight, dtype)


def _value(options: Options, outcome: Outcome, share: float | Tensor | None) -> Any:
    value, dtype = outcome.value, outcome.targets[0].dtype
    if isinstance(value, Terms):
        pairs = zip(value.means, value.weights, strict=True)
        totals = [Total(_summand(mean, weight), mean.total.dtype) for mean, weight in pairs]
        return _tree.unflatten(value.treedef, totals)
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
    sofar, treedef = flatten_parts(aux)
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


def _dropped(counts: Contribution, outcome: Outcome) -> Sum | None:
    if counts.dropped is None:
        return None
    one = torch.zeros((), dtype=torch.int64, device=outcome.targets[0].device) + counts.dropped
    return Sum(one, torch.int64)


def _sum_of(a: Sum | None, b: Sum | None) -> Sum | None:
    return None if a is None or b is None else Sum(a.total + b.total, a.dtype)


def _merged_value(name: str, one: tuple[Any, float | Tensor], other: tuple[Any, float | Tensor]) -> Any:
    """Two values of the same kind as one, each times a share."""
    (a, share), (b, by) = one, other
    if is_part(a):
        return _parts.add(name, _parts.times(a, share), _parts.times(b, by), str)
    parts, treedef = _tree.flatten(a, is_part)
    pairs = zip(parts, _tree.flatten(b, is_part)[0], strict=True)
    return _tree.unflatten(treedef, [_checked(name, x, _parts.add(name, x, y, str)) for x, y in pairs])


def _checked(name: str, before: Part, after: Part) -> Part:
    """A term with one more micro-batch: whole numbers that are more than int64 holds begin again below 0."""
    assert isinstance(before, Total)
    assert isinstance(after, Total)
    old, new = before.mean.weight, after.mean.weight
    if not isinstance(new, Tensor) or new.is_floating_point() or not new.is_cpu or _where.transforming():
        return after
    if bool(new < old):
        raise ValueError(
            f"{name}: the weights of a Mean are integers and add up to more than int64 holds. Return them as floating numbers"
        )
    return after


def _times_zero(value: Any) -> Any:
    """The value of nothing, of the same types."""
    if isinstance(value, Terms):
        means = [_times_zero(mean) for mean in value.means]
        return Terms(means, [0.0 for _ in means], value.treedef)
    if isinstance(value, Mean):
        weight = torch.zeros_like(value.weight) if isinstance(value.weight, Tensor) else value.weight * 0
        return Mean(torch.zeros_like(value.total), weight)
    return torch.zeros_like(value)


def check_kind(name: str, one: Any, other: Any) -> None:
    """All micro-batches return the same kind of value."""
    first, second = kind(one), kind(other)
    if first != second:
        raise TypeError(
            f"{name}: loss_fn returned {first} for one micro-batch and {second} for another; return one of them always"
        )
    if first == _SEVERAL:
        first, second = _structure(one), _structure(other)
        if first != second:
            raise ValueError(
                f"{name}: loss_fn returned several means as {first} for one micro-batch and as {second} for another; return "
                "the same always (of what a micro-batch has none of, a Mean of weight 0)"
            )


_SEVERAL = "several Means"


def kind(value: Any) -> str:
    """Of a value that is summed, or that a loss returned."""
    if isinstance(value, (Mean, Total)):
        return "a Mean"
    return "a tensor" if isinstance(value, Tensor) or is_part(value) else _SEVERAL


def _structure(several: Any) -> Any:
    return several.treedef if isinstance(several, Terms) else _tree.flatten(several, is_part)[1]
