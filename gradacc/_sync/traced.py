"""The boundary while Dynamo traces: the same packing and the same arithmetic, as one node of the graph.

Shapes and structures are constants of a graph, so there is nothing to agree on, and exceptions do not exist in it: ranks must
compile the same `grad_fn` for batches of the same structure, and a rank that differs is not found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _fold, _tree
from gradacc._options import Options
from gradacc._sync import layout as layouts
from gradacc._sync import wire


class Traced:
    """As `gradacc._sync.boundary.Link`, for one graph."""

    def __init__(self, options: Options, group: dist.ProcessGroup) -> None:
        self.options, self.group = options, group

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype]) -> None:
        """Say what is differentiated, as soon as it is known."""
        self.params, self.dtypes = params, dtypes

    def cross(
        self, grads: list[Tensor | None], sums: _fold.Sums, arrived: bool
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        """The union's gradients (in the unit 1) and sums."""
        sync, name = self.options.sync, self.options.name
        assert sync is not None
        if sums.kind is None:
            raise ValueError(
                f"{name}: compiled, with sync, a window without a micro-batch says nothing of what the loss returns; "
                "leave such windows to grad_fn as it is, not compiled (on every rank)"
            )
        if sync.compress == torch.float16:
            raise ValueError(
                f"{name}: compress=torch.float16 is not available in a compiled call, where gradients cross as sums, which "
                "overflow it; use torch.bfloat16"
            )
        plan = wire.plan(
            [param.shape for param in self.params],
            self.dtypes,
            [param.device for param in self.params],
            layouts.of(self.options, sums).specs(),
            sync.compress,
            order=None,
        )
        device = plan.buckets[plan.header].device
        unit: Any = 0.0 if sums.unit is None else sums.unit
        factor = 1.0 if self.options.reduction == "sum" else unit
        values = _fold.numbers(sums)
        like = torch.zeros((), dtype=torch.float64, device=device)
        record = wire.record(plan, [like + sums.weight, like + unit], values, device)
        flats = []
        for at, bucket in enumerate(plan.buckets):
            parts = [
                torch.zeros(place.numel, dtype=bucket.wire, device=bucket.device)
                if grad is None
                else (wire.real(grad) * factor).to(bucket.wire).reshape(-1)
                for grad, place in ((grads[i], plan.places[i]) for i in bucket.indices)
            ]
            parts += [wire.real(values[n]).reshape(-1) for n in plan.vectors[at]]
            if at == plan.header:
                coded = wire.encode(record, bucket.wire)
                before, after = self.group.rank(), self.group.size() - 1 - self.group.rank()
                parts += [coded.new_zeros(before * len(coded)), coded, coded.new_zeros(after * len(coded))]
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=self.group)
            flats.append(flat)
        wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
        header, digits = flats[plan.header], wire.digits(len(record), plan.buckets[plan.header].wire)
        table = wire.decode(header[len(header) - self.group.size() * digits :].view(self.group.size(), -1), len(record))
        floats = table.view(torch.float64)
        summed = wire.summed(plan, 2, table, floats[:, 1])
        for at, flat in enumerate(flats):
            for n, tensor in wire.read_vectors(plan, at, flat).items():
                summed[n] = tensor
        restored = [
            number if spec.dtype is None else number.to(device=self.params[0].device, dtype=spec.dtype)
            for number, spec in zip(summed, plan.specs, strict=True)
        ]
        whole = _fold.with_numbers(sums, restored)._replace(weight=floats[:, 0].sum(), unit=1.0, differentiated=True)
        return wire.unpack(plan, wide, self.params), whole, arrived or not sums.differentiated

    def fail(self, error: BaseException) -> None:
        """Nothing can be told from inside a graph."""

    def done(self) -> None:
        """Nor that all is well."""
