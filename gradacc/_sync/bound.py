"""What a call differentiates, and which way its gradients cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _rows, _tree
from gradacc._cut import Cut
from gradacc._options import Options, Sync
from gradacc._reduce import AllReduce, ReduceScatter
from gradacc._rows import Homes
from gradacc._shard import Shard, ShardFacts
from gradacc._sync import crossing, wire
from gradacc._sync import layout as layouts
from gradacc._sync.layout import Spec

_REDUCE_AND_SCATTER = {"nccl", "xccl"}
"""Backends with a reduce-scatter that sends no more than it must."""


class Bound(NamedTuple):
    """What a call differentiates."""

    params: list[Tensor]
    treedef: _tree.TreeDef
    dtypes: list[torch.dtype]
    """What each gradient is summed in."""
    cuts: list[Cut] | None
    """In which parts each gradient comes back; None where every rank gets the whole."""
    homes: Homes
    """Of each parameter that was divided before the call, how: what comes back is a DTensor again."""
    way: int
    """In which gradients cross: NOTE [ways] in ``crossing.py``."""

    def plan(self, options: Options, specs: Sequence[Spec], order: Sequence[int] | None) -> wire.Plan:
        """Of all that crosses."""
        assert options.sync is not None
        gradients = self.gradients() * layouts.targets(options, specs)
        return wire.plan(gradients, specs, options.sync.compress, order)

    def gradients(self) -> list[wire.Gradient]:
        """Of each parameter."""
        cuts = [None] * len(self.params) if self.cuts is None else self.cuts
        return [
            wire.Gradient(param.shape, dtype, param.device, cut)
            for param, dtype, cut in zip(self.params, self.dtypes, cuts, strict=True)
        ]

    def returned(self, results: list[Tensor], group: dist.ProcessGroup) -> list[Any]:
        """What a call returns in the place of gradients."""
        if self.cuts is None:
            return results
        rank, world, name = group.rank(), group.size(), group.group_name
        return [
            Shard(result, ShardFacts(tuple(param.shape), *cut.part(rank), rank, world, name))
            if home is None
            else home.dtensor(result)
            for result, param, cut, home in zip(results, self.params, self.cuts, self.homes, strict=True)
        ]

    def zeros(self, rank: int) -> list[Tensor | None]:
        """Gradients of nothing; None where every rank gets the whole."""
        if self.cuts is None:
            return [None] * len(self.params)
        parts = zip(self.params, self.dtypes, self.cuts, strict=True)
        return [param.new_zeros(cut.part(rank)[1], dtype=dtype) for param, dtype, cut in parts]


def bound(
    options: Options,
    group: dist.ProcessGroup,
    params: Sequence[Tensor],
    treedef: _tree.TreeDef,
    dtypes: Sequence[torch.dtype],
    homes: Homes = (),
) -> Bound:
    """What a call differentiates; ``homes``: how parameters were divided before it."""
    sync = options.sync
    assert sync is not None
    cuts, homes = None, homes or [None] * len(params)
    if isinstance(sync, ReduceScatter):
        shapes = [(param.shape, param.dtype) for param in params]
        cuts = _rows.cuts(shapes, [home is not None for home in homes], group.size())
    return Bound([*params], treedef, [*dtypes], cuts, homes, _way(sync, group, {param.device for param in params}))


def _way(sync: Sync, group: dist.ProcessGroup, devices: set[torch.device]) -> int:
    """For gradients on these devices."""
    if isinstance(sync, AllReduce):
        return crossing.ORDERED if sync.ordered or sync.compress is not None else crossing.SUMMED
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    native = sync.compress is None and all(backends.get(device.type) in _REDUCE_AND_SCATTER for device in devices)
    return crossing.REDUCED if native else crossing.SCATTERED
