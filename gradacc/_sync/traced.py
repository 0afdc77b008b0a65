"""The boundary while Dynamo traces: the same packing and the same arithmetic, as one node of the graph.

Shapes and structures are constants of a graph, so there is nothing to agree on, and exceptions do not exist in it: ranks must
compile the same `grad_fn` for batches of the same structure, and a rank that differs is not found out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _sums, _tree
from gradacc._dtypes import as_real
from gradacc._options import Options
from gradacc._sums import Sums
from gradacc._sync import channel as channels
from gradacc._sync import crossing, wire
from gradacc._sync import layout as layouts
from gradacc._sync import record as records
from gradacc._sync.bound import bound
from gradacc._sync.boundary import Boundary
from gradacc._sync.crossing import Arrived, Flat


class Traced(Boundary):
    """The boundary of one graph."""

    def __init__(self, options: Options, group: dist.ProcessGroup) -> None:
        self.options, self.group = options, group

    crosses = True

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype], batch: Any) -> None:
        self.params = params
        self.bound = bound(self.options, self.group, params, treedef, dtypes)

    def cross(
        self, grads: list[Tensor | None], sums: Sums, arrived: bool, types: Callable[[Sums], Sums]
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """The union's gradients are in the unit 1."""
        sums, group = types(sums), self.group
        plan, params = self._plan(sums), [*self.params] * (len(grads) // len(self.params))
        shape = wire.shape(plan, group.size(), channels.COLUMNS, self.bound.way)
        device = plan.buckets[plan.header].device
        unit: Any = 0.0 if sums.unit is None else sums.unit
        factor = 1.0 if self.options.reduction == "sum" else unit
        values, rest, pieces = _sums.numbers(sums)
        like = torch.zeros((), dtype=torch.float64, device=device)
        fixed = [channels.bits(channels.FINE), 0, channels.FIRST, 0, 0, like + sums.weight, like + unit]
        record = wire.record(plan, fixed, values, device)
        strides = [wire.strides_of(param, grad) for param, grad in zip(params, grads, strict=True)]
        came = []
        for at, bucket in enumerate(plan.buckets):
            numbers = [
                torch.zeros(shape.numel() * place.width, dtype=bucket.wire, device=bucket.device)
                if grad is None
                else _flat(as_real(grad) * factor, own is not None).to(bucket.wire)
                for grad, place, own, shape in (
                    (grads[i], plan.places[i], strides[i], params[i].shape) for i in bucket.indices
                )
            ]
            behind = [piece for n in plan.vectors[at] for piece in self._rider(plan.specs[n], values[n])]
            coded = records.encode(record, bucket.wire) if at == plan.header else None
            flat = shape.flats[at]
            came.append(self._cross_flat(flat, numbers, [plan.places[i] for i in bucket.indices], behind, coded))
        wide = [wire.widen(bucket, each) for bucket, each in zip(plan.buckets, came, strict=True)]
        table = records.decode(came[plan.header].records, len(record))
        floats = table.view(torch.float64)
        summed = wire.read(plan, came, channels.COLUMNS, table, floats[:, channels.UNIT])
        restored = [
            number if spec.dtype is None else number.to(device=params[0].device, dtype=spec.dtype)
            for number, spec in zip(summed, plan.specs, strict=True)
        ]
        differentiated = dataclasses.replace(rest, differentiated=True)
        whole = _sums.with_numbers(differentiated, restored, pieces, floats[:, channels.WEIGHT].sum(), 1.0)
        found = wire.unpack(plan, wide, params, strides, group.rank())
        return found, _sums.of_all_ranks(whole), arrived or not sums.differentiated

    def returned(self, results: list[Tensor]) -> list[Any]:
        return self.bound.returned(results, self.group)

    def _cross_flat(
        self, flat: Flat, numbers: list[Tensor], places: list[wire.Place], behind: list[Tensor], coded: Tensor | None
    ) -> Arrived:
        """As `gradacc._sync.crossing.Crossing`, of tensors that a graph makes."""
        group, world = self.group, self.group.size()
        if coded is not None:
            behind = [*behind, *(self._slots(coded) if crossing.is_summed_by_backend(flat.way) else [coded])]
        empty = torch.empty(0, dtype=flat.wire, device=flat.device)
        if flat.way == crossing.SUMMED:
            whole = torch.cat([*numbers, *behind, empty])
            dist.all_reduce(whole, group=group)
            return crossing.parted(flat, world, whole[: flat.numel], whole[flat.numel :].view(1, -1))
        tail = torch.cat([*behind, empty])
        if flat.way == crossing.ORDERED:
            message = tail
            if flat.numel:
                pad = empty.new_zeros(-flat.numel % world)
                rows = self._exchanged(torch.cat([*numbers, pad])).view(world, -1)
                message = torch.cat([crossing.sum_of(rows, flat.dtype).to(flat.wire), tail])
            gathered = message.new_empty(world * len(message))
            dist.all_gather_single(gathered, message, group=group)
            rows = gathered.view(world, -1)
            columns = len(message) - len(tail)
            return crossing.parted(flat, world, rows[:, :columns].reshape(-1)[: flat.numel], rows[:, columns:])
        blocks = [_padded_rows(each, place) for each, place in zip(numbers, places, strict=True)]
        whole = torch.cat([*blocks, tail.expand(world, -1)], 1)
        if flat.way == crossing.SCATTERED:
            rows = self._exchanged(whole.view(-1)).view(world, -1)
            return crossing.parted(
                flat, world, crossing.sum_of(rows[:, : flat.numel], flat.dtype), rows[:, flat.numel :]
            )
        own = whole.new_empty(whole.shape[1])
        dist.reduce_scatter_single(own, whole.view(-1), group=group)
        return crossing.parted(flat, world, own[: flat.numel], own[flat.numel :].view(1, -1))

    def _exchanged(self, flat: Tensor) -> Tensor:
        came = torch.empty_like(flat)
        dist.all_to_all_single(came, flat, group=self.group)
        return came

    def _slots(self, own: Tensor) -> list[Tensor]:
        before, after = self.group.rank(), self.group.size() - 1 - self.group.rank()
        return [own.new_zeros(before * len(own)), own, own.new_zeros(after * len(own))]

    def _rider(self, spec: layouts.Spec, value: Tensor) -> list[Tensor]:
        flat = as_real(value).reshape(-1)
        return self._slots(flat) if spec.gathered and crossing.is_summed_by_backend(self.bound.way) else [flat]

    def _plan(self, sums: Sums) -> wire.Plan:
        sync, name = self.options.sync, self.options.name
        assert sync is not None
        if sums.value is None:
            raise ValueError(
                f"{name}: compiled, with sync, a window without a micro-batch says nothing of what the loss returns; "
                "leave such windows to grad_fn as it is, not compiled (on every rank)"
            )
        if sync.compress == torch.float16:
            raise ValueError(
                f"{name}: compress=torch.float16 is not available in a compiled call, where gradients cross as sums, which "
                "overflow it; use torch.bfloat16"
            )
        return self.bound.plan(self.options, layouts.specs(layouts.of(sums)), None)


def _padded_rows(numbers: Tensor, place: wire.Place) -> Tensor:
    """A gradient's parts, a row for each rank."""
    assert place.cut is not None
    rows = place.cut.rows(numbers, place.width)
    return torch.cat([torch.nn.functional.pad(own, (0, place.numel - own.shape[1])) for _, own in rows])


def _flat(grad: Tensor, copies: bool) -> Tensor:
    """In one dimension.

    A kernel may return other strides than it was traced with (a convolution's in float64), so that what was a view then is
    none: where a parameter has strides of its own, that costs a copy.
    """
    return (grad.clone(memory_format=torch.contiguous_format) if copies else grad).reshape(-1)
