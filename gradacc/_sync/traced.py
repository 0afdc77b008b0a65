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
from gradacc._sync import layout as layouts
from gradacc._sync import record as records
from gradacc._sync import wire


class Traced:
    """The boundary of one graph."""

    def __init__(self, options: Options, group: dist.ProcessGroup) -> None:
        self.options, self.group = options, group

    crosses, overlaps, gather = True, False, None

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype], batch: Any) -> None:
        """Say what is differentiated, as soon as it is known."""
        self.params, self.dtypes = params, dtypes

    def set_unit(self, unit: float | Tensor | None, weight: float | Tensor) -> None:
        """Known in the graph."""

    def deliver(self, index: int, grad: Tensor) -> None:
        """Nothing overlaps in a graph."""

    def cross(
        self, grads: list[Tensor | None], sums: Sums, arrived: bool, types: Callable[[Sums], Sums]
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """As `gradacc._sync.Boundary`; the union's gradients are in the unit 1."""
        sums, group = types(sums), self.group
        plan, params = self._plan(sums), [*self.params] * (len(grads) // len(self.params))
        device = plan.buckets[plan.header].device
        unit: Any = 0.0 if sums.unit is None else sums.unit
        factor = 1.0 if self.options.reduction == "sum" else unit
        values, rest, pieces = _sums.numbers(sums)
        like = torch.zeros((), dtype=torch.float64, device=device)
        fixed = [channels.bits(channels.FINE), 0, channels.FIRST, 0, 0, like + sums.weight, like + unit]
        record = wire.record(plan, fixed, values, device)
        strides = [wire.strides_of(param, grad) for param, grad in zip(params, grads, strict=True)]
        flats = []
        for at, bucket in enumerate(plan.buckets):
            parts = [
                torch.zeros(place.numel, dtype=bucket.wire, device=bucket.device)
                if grad is None
                else _flat(as_real(grad) * factor, own is not None).to(bucket.wire)
                for grad, place, own in ((grads[i], plan.places[i], strides[i]) for i in bucket.indices)
            ]
            parts += [piece for n in plan.vectors[at] for piece in self._rider(plan.specs[n], values[n])]
            if at == plan.header:
                coded = records.encode(record, bucket.wire)
                before, after = group.rank(), group.size() - 1 - group.rank()
                parts += [coded.new_zeros(before * len(coded)), coded, coded.new_zeros(after * len(coded))]
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=group)
            flats.append(flat)
        wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
        header, digits = flats[plan.header], records.digits(len(record), plan.buckets[plan.header].wire)
        table = records.decode(header[len(header) - group.size() * digits :].view(group.size(), -1), len(record))
        floats = table.view(torch.float64)
        summed = wire.read(plan, flats, channels.COLUMNS, table, floats[:, channels.UNIT])
        restored = [
            number if spec.dtype is None else number.to(device=params[0].device, dtype=spec.dtype)
            for number, spec in zip(summed, plan.specs, strict=True)
        ]
        differentiated = dataclasses.replace(rest, differentiated=True)
        whole = _sums.with_numbers(differentiated, restored, pieces, floats[:, channels.WEIGHT].sum(), 1.0)
        return wire.unpack(plan, wide, params, strides), _sums.of_all_ranks(whole), arrived or not sums.differentiated

    def _rider(self, spec: layouts.Spec, value: Tensor) -> list[Tensor]:
        flat = as_real(value).reshape(-1)
        if not spec.gathered:
            return [flat]
        before, after = self.group.rank(), self.group.size() - 1 - self.group.rank()
        return [flat.new_zeros(before * len(flat)), flat, flat.new_zeros(after * len(flat))]

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
        specs = layouts.specs(layouts.of(sums))
        targets = layouts.targets(self.options, specs)
        return wire.plan(
            [param.shape for param in self.params] * targets,
            [*self.dtypes] * targets,
            [param.device for param in self.params] * targets,
            specs,
            sync.compress,
            order=None,
        )

    def fail(self, error: BaseException) -> None:
        """Nothing can be told from inside a graph."""

    def done(self) -> None:
        """Nor that all is well."""


def _flat(grad: Tensor, copies: bool) -> Tensor:
    """In one dimension.

    A kernel may return other strides than it was traced with (a convolution's in float64), so that what was a view then is
    none: where a parameter has strides of its own, that costs a copy.
    """
    return (grad.clone(memory_format=torch.contiguous_format) if copies else grad).reshape(-1)
