"""What a function returns for one piece: its leaves, and what the caller says becomes of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _batch, _dtypes, _order, _tree, _where
from gradacc._describe import describe
from gradacc._mean import Mean, as_pooled

WAYS = ("concat", "sum", "mean", "max", "min", "stack")


class Outs(NamedTuple):
    """What a caller says of the output."""

    name: str
    out: Any
    """A pytree prefix of the output: one of `WAYS`, or a reducer."""
    dims: Any
    """A pytree prefix of the output: ints."""
    dtype: torch.dtype | None
    """What is summed in."""


class Leaf(NamedTuple):
    """One leaf of the output."""

    path: str
    out: Any
    dim: int


class Output(NamedTuple):
    """The output of a piece."""

    leaves: list[Any]
    treedef: _tree.TreeDef
    pooled: tuple[bool, ...]
    """Of each `Mean` in it, whether ``+`` made it."""


class Place(NamedTuple):
    """One piece among all."""

    piece: int
    """How many are before it."""
    size: int | None
    """Its examples."""
    total: int | None
    """All examples,"""
    pieces: int | None
    """and all pieces; None where they come from an iterable."""
    order: _order.Order | None = None
    """Where its examples are in the batch, where they are not in its order."""

    @property
    def share(self) -> float:
        """Of all examples; where their number is not known, its own number of them."""
        if self.total is not None:
            return self.size / self.total if self.total and self.size is not None else 1.0
        return float("nan") if self.size is None else float(self.size)


def is_reducer(value: Any) -> bool:
    """Whether it is a reducer, a way of the caller's own: ``init(leaf)``, ``update(state, leaf)``, ``finalize(state)``."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update", "finalize"))


def is_entry(value: Any) -> bool:
    """What is no node of a prefix."""
    return isinstance(value, str) or is_reducer(value)


def is_of_ways(out: Any) -> bool:
    """Whether all entries of a prefix are `WAYS`, and none a reducer."""
    return isinstance(out, str) or not any(is_reducer(entry) for entry in _tree.flatten(out, is_entry)[0])


def flatten(output: Any, drop: Callable[[Tensor], Tensor] | None = None) -> Output:
    """Leaves and structure; a `Mean` is two leaves, and its total exactly 0 where its weight is.

    ``drop``: a zero in the place of a total, without its gradient, where that can be known of each piece.
    """
    nodes, outer = _tree.flatten(output, is_mean)
    means = [node for node in nodes if is_mean(node)]
    if means:
        nodes = [_without_nothing(node, drop) if is_mean(node) else node for node in nodes]
        output = _tree.unflatten(outer, nodes)
    leaves, treedef = _tree.flatten(output)
    return Output(leaves, treedef, tuple(mean._pooled for mean in means))


def _without_nothing(mean: Mean, drop: Callable[[Tensor], Tensor] | None) -> Mean:
    """A micro-batch of weight 0 contributes exactly 0, and no gradient, whatever its total is."""
    total, weight = mean.total, mean.weight
    if not isinstance(total, Tensor):
        return mean
    if not isinstance(weight, Tensor) or (
        drop is not None and weight.ndim == 0 and weight.is_cpu and _where.is_readable(weight)
    ):
        nothing = torch.zeros_like if drop is None else drop
        return mean if weight else Mean(nothing(total), weight)
    return Mean(torch.where(weight == 0, 0, total), weight) if weight.ndim == 0 else mean


def detached(output: Output) -> Output:
    """In other tensors, so that it is seen whether somebody else holds their memory."""
    return output._replace(leaves=[leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in output.leaves])


def unflatten(leaves: Sequence[Any], like: Output) -> Any:
    """The inverse, of what pieces returned together."""
    tree = _tree.unflatten(like.treedef, leaves)
    if any(like.pooled):
        pooled = iter(like.pooled)
        nodes, treedef = _tree.flatten(tree, is_mean)
        nodes = [as_pooled(node) if is_mean(node) and next(pooled) else node for node in nodes]
        tree = _tree.unflatten(treedef, nodes)
    return tree


def is_mean(node: Any) -> bool:
    """A mean that has not been divided: its total and weight add up without being told."""
    return isinstance(node, Mean)


def described(outs: Outs, like: Output) -> list[Leaf]:
    """What becomes of each leaf."""
    output = _tree.unflatten(like.treedef, like.leaves)
    nodes, _ = _tree.flatten(output, is_mean)
    each = []
    for option, prefix in (("out", outs.out), ("out_dims", outs.dims)):
        try:
            each.append(_tree.broadcast_prefix(prefix, output, is_mean, is_entry))
        except ValueError as error:
            raise ValueError(
                f"{outs.name}: {option}={prefix} is not a pytree prefix of what func returned: {error}"
            ) from error
    paths, found = iter(_tree.paths(like.treedef, "output")), []
    for node, way, dim in zip(nodes, *each, strict=True):
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"{outs.name}: out_dims has {describe(dim)}; an entry is an int")
        if is_mean(node) and way not in ("concat", "sum"):
            said = repr(way) if isinstance(way, str) else describe(way)
            raise ValueError(
                f"{outs.name}: out has {said} for a gradacc.Mean, which adds up; leave it out, or say 'sum'"
            )
        if is_mean(node):
            found += [Leaf(next(paths), "sum", dim) for _ in _tree.flatten(node)[0]]
        else:
            found.append(Leaf(next(paths), way, dim))
    return found


def check_alike(outs: Outs, first: Output, other: Output) -> None:
    """Every piece returns the same structure."""
    if first.treedef != other.treedef:
        raise ValueError(
            f"{outs.name}: func returned {first.treedef} for one piece and {other.treedef} for another; what is put together "
            "has one structure"
        )


def check_leaf(outs: Outs, leaf: Leaf, value: Any, place: Place) -> None:
    """Whether what func returned can be put together as it is said."""
    if leaf.out not in WAYS and not is_reducer(leaf.out):
        raise ValueError(
            f"{outs.name}: out has {describe(leaf.out) if not isinstance(leaf.out, str) else repr(leaf.out)} for {leaf.path}; "
            f"it must be one of {', '.join(map(repr, WAYS))}, or have the functions init, update and finalize"
        )
    if leaf.out == "mean" and place.total is None and place.size is None:
        raise ValueError(
            f"{outs.name}: {leaf.path} is averaged with the numbers of examples, and the tensors of a piece have different "
            "sizes along in_dims; return gradacc.Mean(total, weight)"
        )
    if not isinstance(value, Tensor):
        known = (bool, int, float, complex, str) if leaf.out == "concat" else (bool, int, float, complex)
        if isinstance(value, known) or is_reducer(leaf.out):
            return
        raise TypeError(
            f"{outs.name}: {leaf.path} is {describe(value)}, of which there is no {leaf.out!r}; return a tensor"
        )
    if leaf.out in ("concat", "stack") and not _batch.is_dense(value):
        raise TypeError(
            f"{outs.name}: {leaf.path} is {describe(value)} and layout {value.layout}, which cannot be put together by "
            f"{leaf.out!r}; return it dense"
        )
    if leaf.out == "concat":
        if value.ndim == 0:
            raise ValueError(
                f"{outs.name}: {leaf.path} is a 0-dim tensor, which cannot be concatenated: say what the whole would have "
                "returned, out='sum', 'mean' (weighted by examples), 'max', 'min', or 'stack' for one a piece; or return "
                "gradacc.Mean(total, weight)"
            )
        _check_dim(outs, leaf, value.ndim, value)
    if leaf.out == "stack":
        _check_dim(outs, leaf, value.ndim + 1, value)
    if leaf.out == "mean" and not _dtypes.is_inexact(value):
        raise TypeError(
            f"{outs.name}: {leaf.path} is a tensor of {value.dtype}, whose mean would be rounded; return it as a floating "
            "tensor, or gradacc.Mean(total, weight)"
        )


def _check_dim(outs: Outs, leaf: Leaf, ndim: int, value: Tensor) -> None:
    if not -ndim <= leaf.dim < ndim:
        raise ValueError(f"{outs.name}: out_dims has {leaf.dim} for {leaf.path}, {describe(value)}")
