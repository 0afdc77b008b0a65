"""What there is to pack beside gradients: the same on every rank, or an error that says where it differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradacc import _aux, _fold, _tree
from gradacc._mean import Mean
from gradacc._options import Options


@dataclass(frozen=True)
class Spec:
    """One thing that is summed; ``dtype`` None is a Python number."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    weighted: bool
    """Whether it counts in shares of the rank's unit (NOTE [units]), or is a sum by itself."""
    whole: bool = field(default=False, compare=False)
    """Of a Python number: whether it is an int."""


@dataclass(frozen=True)
class Leaf:
    """A leaf of aux: an average, a `Mean`, or (no specs) concatenated, which stays on its rank."""

    dtype: torch.dtype
    specs: tuple[Spec, ...]
    trailing: tuple[int, ...] = field(default=(), compare=False)
    """Of what is concatenated, the shape behind the batch dimension."""


@dataclass(frozen=True)
class Layout:
    """What a loss returns, without its tensors; what a rank without a micro-batch learns from the others."""

    is_mean: bool
    dtype: torch.dtype
    value: tuple[Spec, ...]
    aux: Any
    """A tree of `Leaf`. Not its treedef: a class may be known to the other rank only when it meets it."""

    def specs(self) -> list[Spec]:
        """Of all that crosses beside gradients, in order."""
        return [*self.value, *(spec for leaf in _tree.flatten(self.aux)[0] for spec in leaf.specs)]


def of(options: Options, sums: _fold.Sums) -> Layout:
    """The layout of a rank's sums, which has seen a micro-batch."""
    kind = sums.kind
    assert kind is not None
    assert sums.aux is not None
    value = _mean_specs(sums.value) if kind.is_mean else (_spec(sums.value, weighted=options.reduction == "mean"),)
    return Layout(kind.is_mean, kind.dtype, value, _tree.unflatten(kind.aux, [_leaf(part) for part in sums.aux]))


def restore(layout: Layout, summed: list[Any], local: _fold.Sums, like: Tensor) -> _fold.Sums:
    """The union's kind, value and aux, from the sums of `_fold.numbers`; concatenated leaves are ``local``'s own."""
    leaves, treedef = _tree.flatten(layout.aux)
    aux: list[Any] = []
    for i, leaf in enumerate(leaves):
        if len(leaf.specs) == 2:
            aux.append(_aux.Total(Mean(like, like), leaf.dtype))
        elif leaf.specs:
            aux.append(_aux.Average(like, leaf.dtype))
        elif local.aux is not None:
            aux.append(local.aux[i])
        else:
            aux.append([torch.empty((0, *leaf.trailing), dtype=leaf.dtype, device=like.device)])
    kind = _fold.Kind(layout.is_mean, layout.dtype, treedef)
    return _fold.with_numbers(
        _fold.Sums(kind=kind, value=Mean(like, like) if layout.is_mean else like, aux=aux), summed
    )


def difference(one: Layout, other: Layout) -> str | None:
    """The first difference between two ranks, or between two calls."""
    if one.is_mean is not other.is_mean:
        return f"loss_fn returned {_kind(one)}, and {_kind(other)}"
    if (one.dtype, one.value) != (other.dtype, other.value):
        return f"the loss is {one.dtype} ({_show(one.value)}), and {other.dtype} ({_show(other.value)})"
    leaves, treedef = _tree.flatten(one.aux)
    others, othertree = _tree.flatten(other.aux)
    if treedef != othertree:
        return f"aux has the structure {treedef}, and {othertree}"
    for path, a, b in zip(_tree.paths(treedef, "aux"), leaves, others, strict=True):
        if a != b:
            return f"{path} is {_leaf_title(a)}, and {_leaf_title(b)}"
    return None


def _mean_specs(mean: Mean) -> tuple[Spec, ...]:
    return tuple(_spec(value, weighted=False) for value in (mean.total, mean.weight))


def _spec(value: Any, *, weighted: bool) -> Spec:
    if isinstance(value, Tensor):
        return Spec(value.dtype, tuple(value.shape), weighted)
    return Spec(None, (), weighted, whole=isinstance(value, int))


def _leaf(part: _aux.Partial) -> Leaf:
    if isinstance(part, _aux.Total):
        return Leaf(part.dtype, _mean_specs(part.mean))
    if isinstance(part, _aux.Average):
        return Leaf(part.dtype, (_spec(part.total, weighted=True),))
    return Leaf(part[0].dtype, (), tuple(part[0].shape[1:]))


def _kind(layout: Layout) -> str:
    return "a Mean" if layout.is_mean else "a tensor"


def _leaf_title(leaf: Leaf) -> str:
    return f"{_show(leaf.specs) or 'concatenated'} of {leaf.dtype}"


def _show(specs: tuple[Spec, ...]) -> str:
    return " over ".join(f"{'a number' if s.dtype is None else s.dtype} of shape {s.shape}" for s in specs)
