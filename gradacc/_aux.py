"""``aux``: what a loss returns beside itself, put together as the large batch would have returned it, leaf by leaf.

NOTE [copies of aux]
    What is concatenated at the end is held until then, one piece a micro-batch. Each is copied when its micro-batch is done:
    the loss may write the next one's into the same buffer, with or without a graph, and a slice (``logits[:, -1]``) would
    keep all of what it was cut from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _batch, _dtypes, _tree
from gradacc._describe import describe
from gradacc._mean import Mean, with_plain_weight


class Aux(NamedTuple):
    """One micro-batch's aux: leaves (a `Mean` is one), structure."""

    leaves: list[Any]
    treedef: _tree.TreeDef


class Average(NamedTuple):
    """A 0-dim float on its way to the weighted mean: ``total`` is the sum of share x value."""

    total: Tensor
    dtype: torch.dtype


class Total(NamedTuple):
    """A `Mean` on its way to the sum; ``dtype`` is that of its total."""

    mean: Mean
    dtype: torch.dtype


Partial = Average | Total | list[Tensor]
"""A leaf so far: one of the three kinds."""


def is_mean(leaf: Any) -> bool:
    """`Mean` is a leaf here."""
    return isinstance(leaf, Mean)


def flatten(aux: Any) -> Aux:
    """Leaves and structure; no aux (None) has no leaves."""
    return Aux(*_tree.flatten(aux, is_mean))


def absorb(
    name: str, sofar: list[Partial] | None, aux: Aux, share: float | Tensor | None, sizes: tuple[int, ...]
) -> list[Partial]:
    """``sofar`` and one more micro-batch, in place where there is something.

    Arguments:
        share: its weight over the unit of the call; 0 drops averages; None where there is no weight to average with.
        sizes: of its batch dimension: a tensor with such a leading dimension is concatenated.
    """
    kinds = [_partial(name, leaf, share, sizes, aux, i) for i, leaf in enumerate(aux.leaves)]
    if sofar is None:
        return kinds
    return [_add(name, a, b, aux.treedef, i) for i, (a, b) in enumerate(zip(sofar, kinds, strict=True))]


def merge(
    name: str,
    a: Sequence[Partial],
    b: Sequence[Partial],
    shares: tuple[float | Tensor, float | Tensor],
    treedef: _tree.TreeDef,
) -> list[Partial]:
    """Two sums as one: averages times the share of theirs; what is concatenated, ``a``'s first."""
    pairs = zip(times(a, shares[0]), times(b, shares[1]), strict=True)
    return [_add(name, one, other, treedef, i) for i, (one, other) in enumerate(pairs)]


def times(parts: Sequence[Partial], share: float | Tensor) -> list[Partial]:
    """The same in another unit: averages times ``share``."""
    if isinstance(share, float) and share == 1.0:
        return list(parts)
    return [_times(part, share) for part in parts]


def pack(parts: Sequence[Partial]) -> tuple[list[Tensor | Mean], list[torch.dtype]]:
    """Each leaf so far as one tensor or `Mean`, in memory of its own; and the dtype that it came in."""
    leaves: list[Tensor | Mean] = []
    dtypes: list[torch.dtype] = []
    for part in parts:
        if isinstance(part, list):
            joined = torch.cat(part)
            leaves.append(joined)
            dtypes.append(joined.dtype)
        else:
            leaves.append(part.mean if isinstance(part, Total) else part.total)
            dtypes.append(part.dtype)
    return leaves, dtypes


def unpack(leaves: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Partial]:
    """The inverse of `pack`."""
    return [
        Total(leaf, dtype) if isinstance(leaf, Mean) else [leaf] if leaf.ndim else Average(leaf, dtype)
        for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]


def finalize(sofar: Sequence[Partial], factor: float | Tensor) -> list[Any]:
    """The large batch's leaves; averages are multiplied by ``factor`` = unit / total weight."""
    return [_final(partial, factor) for partial in sofar]


def wide(tensor: Tensor) -> Tensor:
    """In what is summed: floats of at least 32 bits; counts (integers and bools) in int64."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.to(_dtypes.wide(tensor.dtype))
    return tensor.to(torch.int64)


def scaled(tensor: Tensor, share: float | Tensor | None) -> Tensor:
    """A new tensor ``share * tensor``, in what is summed; exactly 0 for a share of 0, NaNs too."""
    assert share is not None
    if isinstance(share, Tensor):
        own = wide(tensor)
        return torch.where(share == 0, 0.0, own * share).to(own.dtype)  # two 0-dim tensors have the wider dtype
    return wide(tensor) * share if share else torch.zeros_like(wide(tensor))


def summable(mean: Mean) -> Mean:
    """A new Mean in what is summed, of the same shapes; what has weight 0 is made exactly 0, whatever its total says."""
    total, weight = wide(mean.total), mean.weight
    if not isinstance(weight, Tensor):
        return Mean(total.clone() if weight else torch.zeros_like(total), weight)
    return Mean(torch.where(_is_nothing(weight, total), torch.zeros_like(total), total), wide(weight).clone())


def _is_nothing(weight: Tensor, total: Tensor) -> Tensor:
    """Of each total, in its shape or a narrower one, whether all weights that divide it are 0."""
    if weight.ndim == 0 or (shape := _broadcast(weight, total)) == total.shape:
        return weight == 0
    return (weight != 0).expand(shape).to(torch.int64).sum_to_size(total.shape) == 0


def restored(mean: Mean, dtype: torch.dtype) -> Mean:
    """A sum with its total in the dtype that it came in; counts stay int64, which holds any of them."""
    return Mean(mean.total.to(dtype) if dtype.is_floating_point or dtype.is_complex else mean.total, mean.weight)


def _partial(
    name: str, leaf: Any, share: float | Tensor | None, sizes: tuple[int, ...], aux: Aux, index: int
) -> Partial:
    if isinstance(leaf, Mean):
        mean = with_plain_weight(leaf)
        if _can_be_summed(mean):
            return Total(summable(mean), leaf.total.dtype)
    elif isinstance(leaf, Tensor) and (_batch.is_dense(leaf) or leaf.layout == torch.sparse_coo):
        if leaf.ndim > 0 and leaf.shape[0] in sizes:
            return [leaf.clone()]  # NOTE [copies of aux]
        if leaf.ndim == 0 and leaf.is_floating_point() and share is not None:
            return Average(scaled(leaf, share), leaf.dtype)
    path = _tree.paths(aux.treedef, "aux")[index]
    if isinstance(leaf, Mean):
        raise TypeError(
            f"{name}: {path} is a Mean of {describe(leaf.total)} and {describe(leaf.weight)}; its total must be a tensor "
            "(torch.as_tensor), and its weight a finite number or a tensor, of a shape that goes with the total's"
        )
    if isinstance(leaf, Tensor) and not _batch.is_dense(leaf):
        raise TypeError(
            f"{name}: {path} is {describe(leaf)} and layout {leaf.layout}, which cannot be concatenated; return it dense"
        )
    what = f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else describe(leaf)
    batch = " or ".join(map(str, sorted(sizes))) or "unknown"
    raise TypeError(
        f"{name}: {path} is {what}; it is not known what the large batch would have returned. Say it with "
        "gradacc.Mean(total, weight) (both are added), return a tensor with a leading batch dimension "
        f"(concatenated; the micro-batch's size is {batch}), or a 0-dim floating tensor (averaged)"
    )


def _can_be_summed(mean: Mean) -> bool:
    total: Any = mean.total
    weight: Any = mean.weight
    if not isinstance(total, Tensor):
        return False
    if not isinstance(weight, Tensor):
        return isinstance(weight, (int, float)) and -math.inf < weight < math.inf
    try:
        _broadcast(total, weight)
    except RuntimeError:
        return False
    return True


def _broadcast(a: Tensor, b: Tensor) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]  # torch's
    return shape


def _times(part: Partial, share: float | Tensor) -> Partial:
    return Average((part.total * share).to(part.total.dtype), part.dtype) if isinstance(part, Average) else part


def _add(name: str, a: Partial, b: Partial, treedef: _tree.TreeDef, index: int) -> Partial:
    if isinstance(a, Total) and isinstance(b, Total):
        if _shapes(a.mean) != _shapes(b.mean):
            raise ValueError(
                f"{name}: {_tree.paths(treedef, 'aux')[index]} is a Mean of shapes {_shapes(a.mean)} (total, weight) in one "
                f"micro-batch and {_shapes(b.mean)} in another, which are not added. Sum over the examples first: "
                "Mean(total.sum(0), weight)"
            )
        return Total(a.mean + b.mean, a.dtype)
    if isinstance(a, Average) and isinstance(b, Average):
        return Average(a.total + b.total, a.dtype)
    if isinstance(a, list) and isinstance(b, list):
        if a[0].shape[1:] != b[0].shape[1:] if a and b else False:
            raise ValueError(
                f"{name}: {_tree.paths(treedef, 'aux')[index]} has shape {tuple(a[0].shape)} in one micro-batch and "
                f"{tuple(b[0].shape)} in another, which cannot be concatenated. Pad it to one shape, or return a Mean"
            )
        return a + b
    raise TypeError(
        f"{name}: {_tree.paths(treedef, 'aux')[index]} is not of the same kind in every micro-batch "
        "(0-dim in one, with a batch dimension in another)"
    )


def _shapes(mean: Mean) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(mean.total.shape), tuple(mean.weight.shape) if isinstance(mean.weight, Tensor) else ()


def _final(partial: Partial, factor: float | Tensor) -> Any:
    if isinstance(partial, Total):
        return restored(partial.mean, partial.dtype)
    if isinstance(partial, Average):
        return (partial.total * factor).to(partial.dtype)
    return torch.cat(partial)
