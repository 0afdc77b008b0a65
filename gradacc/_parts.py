"""Parts: what is summed beside the gradients, each on its way to what the large batch would have returned.

===========  =================================================  ==========================================
part         of                                                 the large batch's
===========  =================================================  ==========================================
`Average`    a loss that is a mean, a 0-dim float of ``aux``    ``total * unit / W``; see NOTE [units]
`Sum`        a loss that is a sum                               ``total``
`Total`      a `Mean`                                           `Mean` of both sums
`Pieces`     what has a batch dimension                         concatenation
`Latest`     a tensor of a carry                                that of the last micro-batch
`Combined`   `Moments` of a carry                               `Moments` of all numbers
===========  =================================================  ==========================================

Each is a node of a tree: its numbers are leaves, and the dtype that it came in, and is returned in, is structure.

NOTE [parts without their trees]
    Dynamo traces optree's functions line by line, and a call would flatten the same few parts a dozen times: two thirds of all
    that it traces. So `numbers` and `with_numbers` know what the numbers of a part are, in the order of its leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradacc import _dtypes, _order, _tree
from gradacc._mean import Mean
from gradacc._moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class Average:
    """The sum of share x value."""

    total: Any
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The sum of values."""

    total: Any
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """The sum of totals, and of weights; ``dtype`` is that of the totals."""

    mean: Mean
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Tensors of one micro-batch each, in order."""

    tensors: list[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Latest:
    """What is handed from one micro-batch to the next."""

    tensor: Any


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Moments of everything so far; ``dtype`` is that of the means."""

    moments: Moments
    dtype: torch.dtype


_tree.register_with_facts(Average, ("total",), "dtype")
_tree.register_with_facts(Sum, ("total",), "dtype")
_tree.register_with_facts(Total, ("mean",), "dtype")
_tree.register(Pieces, lambda part: (part.tensors,), ("tensors",))
_tree.register(Latest, lambda part: (part.tensor,), ("tensor",))
_tree.register_with_facts(Combined, ("moments",), "dtype")

Part: TypeAlias = Average | Sum | Total | Pieces | Latest | Combined


def is_part(node: Any) -> bool:
    """A part is a leaf here."""
    return isinstance(node, (Average, Sum, Total, Pieces, Latest, Combined))


def numbers(part: Part) -> list[Any]:
    """What is summed in it and is a number: its leaves, but pieces. NOTE [parts without their trees]"""
    if isinstance(part, Pieces):
        return []
    if isinstance(part, Latest):
        return [part.tensor]
    if isinstance(part, Combined):
        return [part.moments.count, part.moments.mean, part.moments.m2]
    return [part.mean.total, part.mean.weight] if isinstance(part, Total) else [part.total]


def with_numbers(part: Part, left: Iterator[Any]) -> Part:
    """The same part with the next ones that are ``left``; the inverse of `numbers`."""
    if isinstance(part, Pieces):
        return part
    if isinstance(part, Total):
        return Total(Mean(next(left), next(left)), part.dtype)
    if isinstance(part, Latest):
        return Latest(next(left))
    if isinstance(part, Combined):
        return Combined(Moments(next(left), next(left), next(left)), part.dtype)
    return type(part)(next(left), part.dtype)


def widened(tensor: Tensor) -> Tensor:
    """In what is summed: floats of at least 32 bits; counts (integers and bools) in int64."""
    if _dtypes.is_inexact(tensor):
        return _dtypes.widened(tensor)
    return tensor.to(torch.int64)


def times_share(tensor: Tensor, share: float | Tensor) -> Tensor:
    """A new tensor ``share * tensor``, in what is summed; exactly 0 for a share of 0, NaNs too."""
    own = widened(tensor)
    if isinstance(share, Tensor):
        # Two 0-dim tensors have the wider dtype.
        return torch.where(share == 0, 0.0, own * share).to(own.dtype)
    return own * share if share else torch.zeros_like(own)


def times(part: Part, share: float | Tensor) -> Part:
    """The same in another unit: an average times ``share``."""
    if not isinstance(part, Average) or (isinstance(share, float) and share == 1.0):
        return part
    return Average((part.total * share).to(part.total.dtype), part.dtype)


def add(name: str, a: Part, b: Part, path: Callable[[], str]) -> Part:
    """The sum of two; ``path`` says where they are, for a message."""
    if isinstance(a, Average) and isinstance(b, Average):
        return Average(a.total + b.total, a.dtype)
    if isinstance(a, Sum) and isinstance(b, Sum):
        return Sum(a.total + b.total, a.dtype)
    if isinstance(a, Total) and isinstance(b, Total):
        if _shapes(a.mean) != _shapes(b.mean):
            raise ValueError(
                f"{name}: {path()} is a Mean of shapes {_shapes(a.mean)} (total, weight) in one micro-batch and "
                f"{_shapes(b.mean)} in another, which are not added. Sum over the examples first: Mean(total.sum(0), weight)"
            )
        return Total(a.mean + b.mean, a.dtype)
    if isinstance(a, Pieces) and isinstance(b, Pieces):
        if a.tensors and b.tensors and a.tensors[0].shape[1:] != b.tensors[0].shape[1:]:
            raise ValueError(
                f"{name}: {path()} has shape {tuple(a.tensors[0].shape)} in one micro-batch and "
                f"{tuple(b.tensors[0].shape)} in another, which cannot be concatenated. Pad it to one shape, reduce it to "
                "one row an example, or return a Mean"
            )
        return Pieces(a.tensors + b.tensors)
    if isinstance(a, Combined) and isinstance(b, Combined):
        return Combined(a.moments + b.moments, a.dtype)
    raise TypeError(
        f"{name}: {path()} is not of the same kind in every micro-batch (0-dim in one, with a batch dimension in another)"
    )


def final(part: Part, factor: float | Tensor) -> Any:
    """What the large batch would have returned; ``factor`` is the unit over the total weight."""
    if isinstance(part, Average):
        divided = isinstance(factor, float) and factor == 1.0
        return (part.total if divided else part.total * factor).to(part.dtype)
    if isinstance(part, Sum):
        return part.total.to(part.dtype)
    if isinstance(part, Total):
        total, dtype = part.mean.total, part.dtype
        # Counts stay int64, which holds any of them.
        return Mean(total.to(dtype) if dtype.is_floating_point or dtype.is_complex else total, part.mean.weight)
    if isinstance(part, Combined):
        count, mean, m2 = numbers(part)
        return Moments(count, mean.to(part.dtype), m2.to(part.dtype))
    if isinstance(part, Latest):
        return part.tensor
    return joined(part.tensors)


def restored(part: Part, orders: Sequence[_order.Order], what: str) -> Part:
    """Pieces as one, in the order of the batch; ``orders``: of each micro-batch; ``what`` begins a message."""
    if not isinstance(part, Pieces):
        return part
    _order.check_rows(what, [piece.shape[0] for piece in part.tensors], orders)
    return Pieces([_order.restored(joined(part.tensors), orders)])


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces as one tensor, a new one."""
    return torch.cat(list(pieces))


def _shapes(mean: Mean) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(mean.total.shape), tuple(mean.weight.shape) if isinstance(mean.weight, Tensor) else ()
