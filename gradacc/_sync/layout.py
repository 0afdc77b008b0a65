"""What there is to pack beside gradients: the same on every rank, or an error that says where it differs.

A layout is `Sums` whose numbers are replaced by `Spec`s: what a rank without a micro-batch learns from the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradacc import _parts, _sums, _tree
from gradacc._dtypes import is_inexact
from gradacc._options import Options
from gradacc._parts import Average, Combined, Part, Pieces
from gradacc._sums import Sums


@dataclass(frozen=True)
class Spec:
    """One thing that is summed; ``dtype`` None is a Python number."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    weighted: bool
    """Whether it counts in shares of the rank's unit (NOTE [units]), or is a sum by itself."""
    whole: bool = field(default=False, compare=False)
    """Of a Python number: whether it is an int."""
    is_loss: bool = False
    """Whether it is what a loss is, or the total of a mean that is a part of it."""
    gathered: bool = False
    """Whether each rank's is wanted, in a place of its own, and not their sum: NOTE [moments cross] in ``wire.py``."""


@dataclass(frozen=True)
class Local:
    """What is concatenated, and stays on its rank."""

    dtype: torch.dtype
    trailing: tuple[int, ...] = field(compare=False)
    """The shape behind the batch dimension."""


Layout: TypeAlias = Sums


def of(sums: Sums) -> Layout:
    """The layout of a rank's sums, which has seen a micro-batch."""
    value = _sums.map_parts(functools.partial(_specs, is_loss=True), sums.value)
    aux, dropped, carry = [_sums.map_parts(_specs, tree) for tree in (sums.aux, sums.dropped, sums.carry)]
    return Sums(value=value, aux=aux, weight=None, unit=None, dropped=dropped, carry=carry, differentiated=True)


def specs(layout: Layout) -> list[Spec]:
    """Of all that crosses beside gradients, in the order of `_sums.numbers`."""
    return _sums.numbers(layout)[0]


def targets(options: Options, specs: Sequence[Spec]) -> int:
    """How many gradients there are of each parameter: NOTE [several means] in ``_sums.py``."""
    return 1 if options.counted else sum(spec.is_loss for spec in specs)


def restore(layout: Layout, summed: Sequence[Any], local: Sums, like: Tensor, fixed: tuple[Any, Any, bool]) -> Sums:
    """The union's sums, of what was summed, and of what is ``fixed``: weight, unit, and whether anybody had anything.

    What is concatenated is ``local``'s own.
    """
    specs, rest, pieces = _sums.numbers(layout)
    numbers = [_restored(value, spec, like.device) for value, spec in zip(summed, specs, strict=True)]
    weight, unit, differentiated = fixed
    if local.value is None:
        pieces = [[torch.empty((0, *piece.trailing), dtype=piece.dtype, device=like.device)] for (piece,) in pieces]
    else:
        pieces = _sums.numbers(local)[2]
    structure = dataclasses.replace(rest, differentiated=differentiated)
    return _sums.of_all_ranks(_sums.with_numbers(structure, numbers, pieces, weight, unit))


def _restored(value: Tensor, spec: Spec, device: torch.device) -> Any:
    """What was summed, as what was sent: a Python number, or a tensor of its dtype and on ``device``."""
    if spec.dtype is None:
        number = float(value.item())
        # A whole number above 2 ** 53 came as a float: `_mean.with_plain_weight`.
        return int(number) if spec.whole and number.is_integer() and abs(number) < 2.0**53 else number
    # Of the records: a number, which needs no copy to the device.
    if value.is_cpu and not value.ndim:
        narrow = value.to(spec.dtype) if is_inexact(value) else value
        return torch.full((), narrow.item(), dtype=spec.dtype, device=device)
    return value.to(device=device, dtype=spec.dtype)


def difference(one: Layout, other: Layout) -> str | None:
    """The first difference between two ranks, or between two calls."""
    (losses, structure), (others, other_structure) = _sums.parts_of(one.value), _sums.parts_of(other.value)
    if structure != other_structure or list(map(type, losses)) != list(map(type, others)):
        return f"loss_fn returned {_kind(one.value)}, and {_kind(other.value)}"
    for a, b in zip(losses, others, strict=True):
        if _facts(a) != _facts(b):
            return f"the loss is {_words(a)}, and {_words(b)}"
    return _difference_of_trees("aux", one.aux, other.aux) or _difference_of_trees("carry", one.carry, other.carry)


def _difference_of_trees(root: str, one: Any, other: Any) -> str | None:
    parts, treedef = _sums.flatten_parts(one)
    others, othertree = _sums.flatten_parts(other)
    if treedef != othertree:
        return f"{root} has the structure {treedef}, and {othertree}"
    if treedef is None:
        return None
    for path, a, b in zip(_tree.paths(treedef, root), parts, others, strict=True):
        if _facts(a) != _facts(b):
            return f"{path} is {_words(a)}, and {_words(b)}"
    return None


def _specs(part: Part, is_loss: bool = False) -> Part:
    if isinstance(part, Pieces):
        first = part.tensors[0]
        return Pieces([Local(first.dtype, tuple(first.shape[1:]))])
    first, *rest = _parts.numbers(part)
    if isinstance(part, Combined):
        each = [dataclasses.replace(_spec(number, False), gathered=True) for number in (first, *rest)]
        return _parts.with_numbers(part, iter(each))
    weighted = isinstance(part, Average)
    return _parts.with_numbers(part, iter([_spec(first, weighted, is_loss), *(_spec(n, weighted) for n in rest)]))


def _spec(value: Any, weighted: bool, is_loss: bool = False) -> Spec:
    if isinstance(value, Tensor):
        return Spec(value.dtype, tuple(value.shape), weighted, is_loss=is_loss)
    return Spec(None, (), weighted, whole=isinstance(value, int), is_loss=is_loss)


def _facts(part: Any) -> tuple[Any, ...]:
    return type(part), getattr(part, "dtype", None), _tree.flatten(part)[0]


def _kind(value: Any) -> str:
    _, structure = _sums.parts_of(value)
    return _sums.kind(value) if structure is None else f"{_sums.kind(value)} as {structure}"


def _words(part: Any) -> str:
    if isinstance(part, Pieces):
        return f"concatenated of {part.tensors[0].dtype}"
    shown = " over ".join(
        f"{'a number' if spec.dtype is None else spec.dtype} of shape {spec.shape}" for spec in _tree.flatten(part)[0]
    )
    return f"{shown} of {part.dtype}"
