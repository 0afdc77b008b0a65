"""DTensors: what a rank's part of one is, and over which ranks it was summed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _dtypes, _rows, _tree
from gradacc._options import Sync
from gradacc._reduce import ReduceScatter
from gradacc._sums import Sums
from gradacc._sync import group as groups


def found(name: str, leaves: Sequence[Tensor], treedef: _tree.TreeDef, sync: Sync | None) -> dict[int, Any]:
    """Which of a tree's leaves are DTensors, checked: they are sums over the ranks whose weights are counted."""
    shards: dict[int, Any] = {i: leaf for i, leaf in enumerate(leaves) if _rows.is_dtensor(leaf)}
    for i, leaf in shards.items():
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{name}: {_tree.paths(treedef, 'sums')[i]} is a DTensor, which is not available in a compiled function; make "
                "the call outside of it"
            )
        problem = _problem(name, leaf, sync)
        if problem is not None:
            raise ValueError(f"{name}: {_tree.paths(treedef, 'sums')[i]} is a DTensor {problem}")
    return shards


def _problem(name: str, leaf: Any, sync: Sync | None) -> str | None:
    """Why it is not that."""
    mesh = leaf.device_mesh
    if any(placement.is_partial() for placement in leaf.placements):
        return (
            f"with placements {leaf.placements}: its parts have not been summed. Sum them: "
            "dtensor.redistribute(placements=[Shard(0)]), or [Replicate()]"
        )
    if isinstance(sync, ReduceScatter):
        return (
            "of which each rank has a part already, and reduce_scatter would cut it; pass sync=gradacc.all_reduce(mesh)"
        )
    group = None if sync is None else groups.resolve(name, sync.group)
    counted = {dist.get_rank()} if group is None else set(dist.get_process_group_ranks(group))
    summed = mesh.mesh.flatten().tolist()
    said = f"over ranks {summed}, and sync counts the weights of ranks {sorted(counted)}: "
    if mesh.ndim == 1:
        if counted == set(summed):
            return None
        return said + "they must be the same. Pass sync=gradacc.all_reduce(mesh), of the mesh that it is over"
    if sync is None or sync.group is None:
        return said + f"of a mesh of {mesh.ndim} dimensions, say where data differ: sync=gradacc.all_reduce(mesh['dp'])"
    place = mesh.get_coordinate()
    for along in itertools.product((False, True), repeat=mesh.ndim):
        index = tuple(slice(None) if every else at for every, at in zip(along, place, strict=True))
        if set(mesh.mesh[index].flatten().tolist()) == counted:
            return None
    return said + "they must be those along one dimension of its mesh, or several: sync=gradacc.all_reduce(mesh['dp'])"


def nothing(leaf: Any, leaves: Sequence[Tensor]) -> Tensor:
    """What crosses of a DTensor: no number, in a shape that says its own, and in a dtype in which something crosses anyway."""
    plain = next((other.dtype for other in leaves if not _rows.is_dtensor(other)), torch.float32)
    dtype = _dtypes.real_dtype(_dtypes.sum_dtype(plain))
    return torch.empty((0, *leaf.shape), dtype=dtype, device=leaf.to_local().device)


def local(leaf: Any, union: Sums) -> Tensor:
    """This rank's part, a new tensor: in the unit of the union's sums, and in the dtype that gradients are divided in."""
    own: Tensor = leaf.to_local()
    wide = _dtypes.widened(own)
    if not union.differentiated:
        return torch.zeros_like(wide)
    if isinstance(union.weight, Tensor):
        wide = torch.where(union.weight.to(wide.device) == 0, 0, wide)
    own = wide * (1.0 / union.unit)
    return own


def whole(leaf: Any, own: Tensor) -> Any:
    """A DTensor as another one is, of these parts."""
    mesh, placements = leaf.device_mesh, leaf.placements
    return type(leaf).from_local(own, mesh, placements, run_check=False, shape=leaf.shape, stride=leaf.stride())
