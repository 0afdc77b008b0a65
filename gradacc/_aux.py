"""``aux``: what a loss returns beside itself, put together as the large batch would have returned it, leaf by leaf.

NOTE [copies of aux]
    What is concatenated at the end is held until then, one piece a micro-batch. Each is copied when its micro-batch is done:
    the loss may write the next one's into the same buffer, with or without a graph, and a slice (``logits[:, -1]``) would
    keep all of what it was cut from.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _batch, _parts, _tree
from gradacc._describe import describe
from gradacc._mean import Mean, with_plain_weight
from gradacc._parts import Average, Part, Pieces, Total


class Aux(NamedTuple):
    """One micro-batch's aux: leaves (a `Mean` is one), structure."""

    leaves: list[Any]
    treedef: _tree.TreeDef | None
    """None where there is no aux."""


def flatten(aux: Any) -> Aux:
    """Leaves and structure; no aux (None) has none."""
    return Aux([], None) if aux is None else Aux(*_tree.flatten(aux, lambda leaf: isinstance(leaf, Mean)))


def parts(name: str, aux: Aux, share: float | Tensor | None, sizes: tuple[int, ...]) -> list[Part]:
    """Each leaf as what is summed of it.

    Arguments:
        share: the micro-batch's weight over the unit of the call; 0 drops averages; None where there is no weight to average
            with.
        sizes: of its batch dimension: a tensor with such a leading dimension is concatenated.
    """
    return [_part(name, leaf, share, sizes, aux, index) for index, leaf in enumerate(aux.leaves)]


def _part(name: str, leaf: Any, share: float | Tensor | None, sizes: tuple[int, ...], aux: Aux, index: int) -> Part:
    """Six arguments: what a message about one leaf names."""
    if isinstance(leaf, Mean):
        mean = with_plain_weight(leaf)
        if can_be_summed(mean):
            return Total(summable(mean), leaf.total.dtype)
    elif isinstance(leaf, Tensor) and (_batch.is_dense(leaf) or leaf.layout == torch.sparse_coo):
        if leaf.ndim > 0 and leaf.shape[0] in sizes:
            # NOTE [copies of aux]
            return Pieces([leaf.clone()])
        if leaf.ndim == 0 and leaf.is_floating_point() and share is not None:
            return Average(_parts.times_share(leaf, share), leaf.dtype)
    assert aux.treedef is not None
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


def can_be_summed(mean: Mean) -> bool:
    """Whether it is a tensor over a finite number or a tensor, of shapes that go together."""
    total: Any = mean.total
    weight: Any = mean.weight
    if not isinstance(total, Tensor):
        return False
    if not isinstance(weight, Tensor):
        return isinstance(weight, (int, float)) and -math.inf < weight < math.inf
    return broadcast(total, weight) is not None


def broadcast(a: Tensor, b: Tensor) -> torch.Size | None:
    """The shape of both together; None where there is none."""
    try:
        shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]  # torch's
    except RuntimeError:
        return None
    return shape


def summable(mean: Mean) -> Mean:
    """A new Mean in what is summed, of the same shapes; what has weight 0 is made exactly 0, whatever its total says."""
    total, weight = _parts.widened(mean.total), mean.weight
    if not isinstance(weight, Tensor):
        return Mean(total.clone() if weight else torch.zeros_like(total), weight)
    return Mean(torch.where(_is_nothing(weight, total), torch.zeros_like(total), total), _parts.widened(weight).clone())


def _is_nothing(weight: Tensor, total: Tensor) -> Tensor:
    """Of each total, in its shape or a narrower one, whether all weights that divide it are 0."""
    shape = total.shape if weight.ndim == 0 else broadcast(weight, total)
    if shape == total.shape:
        return weight == 0
    assert shape is not None
    return (weight != 0).expand(shape).to(torch.int64).sum_to_size(total.shape) == 0
