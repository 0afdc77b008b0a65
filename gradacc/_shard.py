"""`Shard`: a rank's part of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _tree


class ShardFacts(NamedTuple):
    """What a `Shard` is a part of: structure, compared where two trees are."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: int
    """Where the part begins, in elements of the whole tensor in row-major order."""
    length: int
    """Its elements."""
    rank: int
    """Of the ranks that have a part each, which one this is."""
    world: int
    """How many they are."""
    group: str
    """The name of their process group; empty where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A rank's part of a tensor: what `gradacc.reduce_scatter` returns in the place of a gradient.

    .. code-block:: text

        values = whole.reshape(-1)[offset : offset + length]

    It is a pytree node with one child, so what maps trees of tensors (``torch.utils._pytree``, optree in our namespace) maps
    its values. In an optimizer's state the child is what that keeps of a parameter: a tensor, or a dict of them.

    Arguments:
        values: one-dimensional, of ``length`` elements (none, where there are more ranks than elements).
        facts: the global shape, offset, length, and which of how many ranks it is on.

    Example:
        >>> import torch, gradacc
        >>> grad_fn = gradacc.accumulate(lambda w, x: (x @ w).mean(), steps=2, sync=gradacc.reduce_scatter())
        >>> grad_fn(torch.ones(3), torch.ones(4, 3))          # one process: the part is the whole
        Shard(shape=(3,), offset=0, values=tensor([1., 1., 1.]))
    """

    values: Any
    facts: ShardFacts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.facts.shape

    @property
    def offset(self) -> int:
        """Where the part begins, in elements of the whole tensor in row-major order."""
        return self.facts.offset

    @property
    def length(self) -> int:
        """Its elements."""
        return self.facts.length

    def __repr__(self) -> str:
        return f"Shard(shape={self.shape}, offset={self.offset}, values={self.values})"


_tree.register_with_facts(Shard, ("values",), "facts")


def is_shard(node: Any) -> bool:
    """For `flatten`: a `Shard` as a leaf."""
    return isinstance(node, Shard)


def shards(tree: Any) -> list[Shard]:
    """All that are in a tree."""
    return [leaf for leaf in _tree.flatten(tree, is_shard)[0] if isinstance(leaf, Shard)]


def of_whole(whole: Tensor) -> Shard:
    """Where there is nobody to share with."""
    facts = ShardFacts(tuple(whole.shape), 0, whole.numel(), 0, 1, "")
    return Shard(whole.reshape(-1), facts)


def whole_like(shard: Shard) -> Tensor:
    """A tensor of the whole one's shape, dtype and device, whose numbers say nothing."""
    return torch.empty((), dtype=shard.values.dtype, device=shard.values.device).expand(shard.shape)


def part_of(leaf: Tensor, facts: ShardFacts) -> Tensor:
    """Its elements of that part, one-dimensional: a view where the tensor's memory is contiguous."""
    return leaf.reshape(-1).narrow(0, facts.offset, facts.length)
