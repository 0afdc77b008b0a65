"""Parameters that are divided over ranks before a call: DTensors, as ``fully_shard`` makes them.

NOTE [rows]
    Here alone is said which parameters are DTensors, and of which kind they may be: those of
    placement ``Shard(0)`` on a mesh of one dimension. torch.func's transforms do not go through a DTensor (pytorch issue
    134462), so a call differentiates whole, plain tensors, which it gathers first; what crosses back are each rank's rows, and
    these become a DTensor again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _cut, _tree
from gradacc._cut import Cut
from gradacc._shard import Shard, ShardFacts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class Home(NamedTuple):
    """Where a DTensor's rows are."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size

    @property
    def cut(self) -> Cut:
        """Which elements are whose."""
        return _cut.of_rows(self.shape, self.mesh.size())

    def facts(self) -> ShardFacts:
        """Of this rank's part."""
        rank, world = self.mesh.get_local_rank(), self.mesh.size()
        name = self.mesh.get_group().group_name if world > 1 else ""
        return ShardFacts(tuple(self.shape), *self.cut.part(rank), rank, world, name)

    def dtensor(self, part: Tensor) -> Tensor:
        """The DTensor of which ``part``, flat, are this rank's rows."""
        from torch.distributed.tensor import DTensor

        row = self.shape[1:]
        rows = self.cut.part(self.mesh.get_local_rank())[1] // max(1, row.numel())
        stride = torch.empty(self.shape, device="meta").stride()
        local = part.view(rows if row.numel() else self.shape[0], *row)
        made: Tensor = DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )
        return made


Homes = Sequence[Home | None]
"""Of each leaf of the parameters, None of one that is whole; empty where all are."""


def is_dtensor(leaf: Any) -> bool:
    """Whether it is one. It can only exist where its module was imported; importing it here would slow every start."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


def home(name: str, path: str, leaf: Any, group: dist.ProcessGroup | None) -> Home:
    """Of a DTensor, which is divided over the ranks of ``group`` (None: there is nobody else).

    Raises:
        TypeError: it is divided in a way that is not known.
        ValueError: it is divided over other ranks.
    """
    problem = _problem(leaf)
    if problem is not None:
        raise TypeError(f"{name}: {path} is a DTensor {told(leaf)}: {problem}")
    found = Home(leaf.device_mesh, tuple(leaf.placements), leaf.shape)
    world = 1 if group is None else group.size()
    if found.mesh.size() != world or (group is not None and found.mesh.get_group().group_name != group.group_name):
        raise ValueError(
            f"{name}: {path} is a DTensor of shape {tuple(leaf.shape)} on the mesh {leaf.device_mesh}, and the group is "
            f"another one of {world} ranks. Pass the mesh: gradacc.reduce_scatter(mesh), gradacc.optim.sharded(optimizer, mesh)"
        )
    return found


def _problem(leaf: Any) -> str | None:
    """Why its division is not known, and the way out."""
    if leaf.device_mesh.ndim != 1:
        return (
            f"its mesh has {leaf.device_mesh.ndim} dimensions (HSDP, tensor parallelism), and one is supported. Pass "
            "fully_shard a mesh of one dimension"
        )
    if leaf.device.type != leaf.device_mesh.device_type:
        return (
            f"its rows are on {leaf.device} (a CPUOffloadPolicy), where its mesh is of {leaf.device_mesh.device_type}. Leave "
            "offload_policy out of fully_shard"
        )
    (placement,) = leaf.placements
    if placement.is_replicate():
        return "it is whole on every rank. Pass to_local() of it, whose gradient is a gradacc.Shard"
    if placement.is_partial():
        return "it is a sum that has not been added up. Pass redistribute(mesh, [Shard(0)]) of it"
    if type(placement) is not sys.modules["torch.distributed.tensor"].Shard or placement.dim != 0:
        return (
            "rows are supported, Shard(0). Leave shard_placement_fn out, or pass redistribute(mesh, [Shard(0)]) of it"
        )
    return None


def told(leaf: Any) -> str:
    """Its shape and placements, in words."""
    return f"of shape {tuple(leaf.shape)} and placements {tuple(leaf.placements)}"


def local(leaf: Any) -> Tensor:
    """This rank's rows of a DTensor, flat: a view where they are contiguous."""
    with torch.no_grad():
        rows: Tensor = leaf.to_local().detach()
    return rows.reshape(-1)


def homes(name: str, leaves: Sequence[Any], paths: Sequence[str], group: dist.ProcessGroup | None) -> list[Home | None]:
    """Of each leaf, None of one that is no DTensor. Errors as of `home`."""
    return [
        home(name, path, leaf, group) if is_dtensor(leaf) else None for leaf, path in zip(leaves, paths, strict=True)
    ]


def cuts(leaves: Sequence[tuple[torch.Size, torch.dtype]], rows: Sequence[bool], world: int) -> list[Cut]:
    """How tensors are divided over ranks: those that are DTensors by rows, and the others evenly."""
    others = [leaf for leaf, by_rows in zip(leaves, rows, strict=True) if not by_rows]
    even = iter(_cut.cuts([shape.numel() for shape, _ in others], [dtype for _, dtype in others], world))
    pairs = zip(leaves, rows, strict=True)
    return [_cut.of_rows(shape, world) if by_rows else next(even) for (shape, _), by_rows in pairs]


def group_of(leaf: Any) -> dist.ProcessGroup | None:
    """Over which a DTensor is divided; None where there is nobody else, or several of them."""
    mesh = leaf.device_mesh
    return mesh.get_group() if mesh.ndim == 1 and mesh.size() > 1 else None


def as_shards(name: str, tree: Any, root: str) -> Any:
    """``tree`` with a `Shard` in the place of every DTensor: this rank's rows of it."""
    leaves, treedef = _tree.flatten(tree)
    if not any(map(is_dtensor, leaves)):
        return tree
    shards = []
    for leaf, path in zip(leaves, _tree.paths(treedef, root), strict=True):
        if is_dtensor(leaf):
            found = home(name, path, leaf, group_of(leaf))
            leaf = Shard(local(leaf), found.facts())
        shards.append(leaf)
    return _tree.unflatten(treedef, shards)
