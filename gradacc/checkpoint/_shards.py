"""Tensors that are divided over ranks: what a `gradacc.Shard` in a tree is in a checkpoint.

NOTE [parts]
    A leaf of a `Shard`, or a DTensor (NOTE [rows]), is a rank's part of a tensor. Its key is that of the whole tensor in a
    tree without `Shard`s (no ``.values`` in it), and so is its title. In the files it is one tensor of one dimension, in a
    chunk for each rank that has elements of it. A leaf without dimensions (a step count) is one that all ranks have.
    Whoever loads takes the elements that it asks for, out of whichever chunks have them, or out of the whole tensor; so how
    many ranks have saved is nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _rows, _shard, _tree
from gradacc._rows import Home
from gradacc._shard import Shard, ShardFacts
from gradacc._sync import group as groups

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem


class Span(NamedTuple):
    """Which elements of a tensor a rank has."""

    shape: tuple[int, ...]
    offset: int
    length: int
    owners: str
    """Whom they are divided over, in words."""

    @property
    def numel(self) -> int:
        """Of the whole tensor."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A leaf that is a part: NOTE [parts]. Its values are a tensor."""

    values: Any
    facts: ShardFacts
    home: Home | None = None
    """Of a DTensor, whose rows they are."""

    def of(self, values: Tensor) -> Tensor:
        """What stands in a tree for these values."""
        return values if self.home is None else self.home.dtensor(values)

    @property
    def span(self) -> Span:
        """Its elements."""
        group = f" (process group {self.facts.group!r})" if self.facts.group else ""
        return Span(self.facts.shape, self.facts.offset, self.facts.length, f"{self.facts.world} ranks{group}")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """What DCP's planner asks for: a chunk of a tensor of one dimension; none where there is nothing in it."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        numel = self.span.numel
        if numel and not self.facts.length:
            return []  # of two chunks that begin at one place DCP writes one
        offset = torch.Size([self.facts.offset])
        chunk = ChunkStorageMetadata(offset, torch.Size([self.facts.length]))
        data = TensorWriteData(chunk, TensorProperties(self.values.dtype), torch.Size([numel]))
        return [WriteItem(MetadataIndex(fqn, offset), WriteItemType.SHARD, tensor_data=data)]


def _of_dtensor(name: str, path: str, leaf: Any) -> Part:
    home = _rows.home(name, path, leaf, _rows.group_of(leaf))
    return Part(_rows.local(leaf), home.facts(), home)


def flatten(name: str, tree: Any, root: str) -> tuple[list[str], list[Any]]:
    """Leaves, and their paths: what is inside of a `Shard` is at its path, and a `Part` where it is one."""
    nodes, outer = _tree.flatten(tree, _shard.is_shard)
    paths: list[str] = []
    leaves: list[Any] = []
    for path, node in zip(_tree.paths(outer, root), nodes, strict=True):
        if isinstance(node, Shard):
            own, inner = _tree.flatten(node.values)
            paths += [path + inside for inside in _tree.paths(inner)]
            leaves += [Part(leaf, node.facts) if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in own]
        else:
            paths.append(path)
            leaves.append(_of_dtensor(name, path, node) if _rows.is_dtensor(node) else node)
    return paths, leaves


def check(name: str, path: str, part: Part) -> Part:
    """``part``, if it has the elements that it should.

    Raises:
        ValueError: it has not.
    """
    span, found = part.span, tuple(part.values.shape)
    if found != (span.length,) or span.offset < 0 or span.offset + span.length > span.numel:
        raise ValueError(
            f"{name}: {path} is a tensor of shape {found} in a gradacc.Shard of elements {span.offset} to "
            f"{span.offset + span.length} of a tensor of shape {span.shape}; it must have these elements, in one dimension, "
            "or no dimension. Pass what gradacc.reduce_scatter and gradacc.optim.sharded return"
        )
    return part


def check_tiled(name: str, spans: Sequence[dict[str, Span]]) -> None:
    """A ValueError where ranks have not, together, all of a tensor; or two have some elements, but not the same ones.

    ``spans``: of all ranks, by key.
    """
    found: dict[str, dict[tuple[int, int], tuple[Span, int]]] = {}
    for rank, own in enumerate(spans):
        for key, span in own.items():
            found.setdefault(key, {}).setdefault((span.offset, span.length), (span, rank))
    for key, pieces in found.items():
        end, last = 0, 0
        for (offset, length), (span, rank) in sorted(pieces.items()):
            if length == 0:
                continue
            if offset < end:
                both = f"elements {offset} to {min(end, offset + length)} of tree{key}, a tensor of shape {span.shape}"
                raise ValueError(
                    f"{name}: ranks {last} and {rank} both have {both}; parts must be the same, or apart. {_FIX}"
                )
            _check_hole(name, key, span, (end, offset), len(spans))
            end, last = offset + length, rank
        some = next(iter(pieces.values()))[0]
        _check_hole(name, key, some, (end, some.numel), len(spans))


def _check_hole(name: str, key: str, span: Span, between: tuple[int, int], ranks: int) -> None:
    if between[0] < between[1]:
        raise ValueError(
            f"{name}: elements {between[0]} to {between[1]} of tree{key}, a tensor of shape {span.shape} that is divided over "
            f"{span.owners}, are on none of the ranks that save: {ranks}, all of the default process group. {_FIX}"
        )


_FIX = (
    "All ranks that gradacc.optim.sharded has divided a state over must call save, each with what its own init or step "
    "returned"
)


def check_here(name: str, path: str, facts: ShardFacts) -> None:
    """A ValueError where this process is not the rank of the process group that the part is made for."""
    if not facts.group:
        return
    group = groups.of_name(facts.group)
    if group is None:
        problem = f"there is no process group {facts.group!r}"
    else:
        found = group.rank(), group.size()
        del group  # the error would hold it: NOTE [the end of a process] in `_sync/group.py`
        if found == (facts.rank, facts.world):
            return
        problem = f"this process is rank {found[0]} of {found[1]} of process group {facts.group!r}"
    raise ValueError(
        f"{name}: {path} is for rank {facts.rank} of {facts.world}, but {problem}. Pass what the optimizer's init(params) "
        "returns now, which divides the state over the ranks that there are"
    )
