"""One call's boundary: send what there is, read what came."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _engines, _fold, _tree
from gradacc._options import Options
from gradacc._sync import group as groups
from gradacc._sync import layout as layouts
from gradacc._sync import wire
from gradacc._sync.agreement import CHANGED, FINE, RAISED, Agreed, Agreement, agree, check_statuses, scale, tell
from gradacc._sync.layout import Layout
from gradacc._sync.traced import Traced

_STATUS, _DIFFERENTIATED, _ARRIVED, _WEIGHT, _UNIT = range(5)
_FIXED = 5
"""Columns of every record: the five above."""


class Link:
    """One call's connection to the other ranks, and what it has sent so far."""

    def __init__(
        self,
        options: Options,
        group: dist.ProcessGroup,
        agreed: dict[Any, Agreement],
        params: Sequence[Tensor],
        treedef: _tree.TreeDef,
        dtypes: Sequence[torch.dtype],
    ) -> None:
        self.options, self.group, self.agreed = options, group, agreed
        self.params, self.treedef, self.dtypes = params, treedef, dtypes
        self.signature = (treedef, tuple((p.shape, p.dtype, p.device) for p in params), tuple(dtypes))
        self.agreement = agreed.get(self.signature)
        self.factor: float = 1.0
        """What a gradient is multiplied by on its way: from this rank's unit to the common one."""
        self.delivered: set[int] = set()
        self.held: dict[int, Tensor] = {}
        """At first use: gradients that were delivered before there was a plan, in the order in which they came."""
        self._flats: list[Tensor | None] = []
        self._missing: list[int] = []
        self._works: list[dist.Work] = []

    @property
    def overlaps(self) -> bool:
        """Whether gradients are to be delivered before `cross`."""
        return self.options.sync is not None and self.options.sync.overlap

    def cross(
        self, grads: list[Tensor | None], sums: _fold.Sums, arrived: bool
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        """The union's gradients (in the unit of the returned sums), sums, and whether any rank's loss reached its parameters.

        Takes the gradients out of ``grads``, each as it is packed.
        """
        for index, grad in self.held.items():
            grads[index] = grad
        try:
            here = None if sums.kind is None else layouts.of(self.options, sums)
        except Exception:  # a class of the user's in aux
            with contextlib.suppress(Exception):
                self.fail(sums)
            raise
        return _cross(self, grads, sums, here, arrived)

    def fail(self, sums: _fold.Sums) -> None:
        """Tell the others that this rank's call has raised; NOTE [failing together]."""
        _cross(self, [None] * len(self.params), sums, None, arrived=False, raised=True)

    def set_unit(self, unit: float | Tensor | None) -> None:
        """Say in which unit this rank's gradients are, before the first one is packed."""
        if self.agreement is not None and self.options.reduction == "mean":
            self.factor = float(unit or 0.0) / self.agreement.scale

    def deliver(self, index: int, grad: Tensor) -> None:
        """A gradient that is final: it is packed, and its bucket leaves when it is full and its turn has come."""
        if self.agreement is None:
            self.held[index] = grad
            return
        plan = self.agreement.plan
        if not self._flats:
            self._open(plan)
        at = plan.places[index].bucket
        _pack(plan.places[index], self._flat(plan, at), grad, self.factor)
        self.delivered.add(index)
        self._missing[at] -= 1
        while len(self._works) < plan.header and not self._missing[len(self._works)]:
            self._launch(self._flats[len(self._works)])

    def send(self, plan: wire.Plan, grads: list[Tensor | None], values: list[Any] | None, record: Tensor) -> None:
        """Everything that has not been delivered; takes the gradients out of ``grads``."""
        if not self._flats:
            self._open(plan)
        for at in range(len(self._works), len(plan.buckets)):
            bucket, flat = plan.buckets[at], self._flat(plan, at)
            for index in bucket.indices:
                if index not in self.delivered:
                    grad, grads[index] = grads[index], None
                    _pack(plan.places[index], flat, grad, self.factor)
            wire.write_vectors(plan, at, flat, values)
            if at == plan.header:
                slots = flat[len(flat) - self.group.size() * wire.digits(len(record), bucket.wire) :].zero_()
                mine = wire.encode(record, bucket.wire)
                slots.view(self.group.size(), -1)[self.group.rank()].copy_(mine)
            self._launch(flat)

    def receive(self, plan: wire.Plan) -> tuple[list[Tensor], list[Tensor]]:
        """The sums, one tensor a bucket; and their gradients in the accumulators' dtype, made while later buckets cross."""
        sent, self._flats, self._works = list(zip(plan.buckets, self._flats, self._works, strict=True)), [], []
        flats, wide = [], []
        for bucket, flat, work in sent:
            with groups.speaking(self.options.name, self.group):
                work.wait()
            assert flat is not None
            flats.append(flat)
            wide.append(wire.widen(bucket, flat))
        return flats, wide

    def _open(self, plan: wire.Plan) -> None:
        self._flats, self._missing = [None] * len(plan.buckets), [len(bucket.indices) for bucket in plan.buckets]

    def _flat(self, plan: wire.Plan, at: int) -> Tensor:
        flat = self._flats[at]
        if flat is None:
            bucket = plan.buckets[at]
            numel = wire.size(plan, at, self.group.size(), wire.columns(plan, _FIXED))
            flat = self._flats[at] = torch.empty(numel, dtype=bucket.wire, device=bucket.device)
        return flat

    def _launch(self, flat: Tensor | None) -> None:
        assert flat is not None
        with groups.speaking(self.options.name, self.group):
            self._works.append(dist.all_reduce(flat, group=self.group, async_op=True))


def connect(
    options: Options,
    agreed: Agreed | None,
    params: Sequence[Tensor],
    treedef: _tree.TreeDef,
    dtypes: Sequence[torch.dtype],
) -> Link | Traced | None:
    """The connection that a call needs; None where nothing crosses."""
    if options.sync is None or agreed is None:
        return None
    group = groups.resolve(options.name, options.sync.group)
    if group is None:
        return None
    if _engines.loops():
        return Traced(options, group, params, dtypes)
    if _engines.transforming():
        raise NotImplementedError(
            f"{options.name}: sync=all_reduce() inside a functorch transform or another grad_fn's loss is not available in "
            "this version; call it outside, or leave sync out"
        )
    return Link(options, group, agreed.setdefault(group, {}), params, treedef, dtypes)


def give_up(options: Options, agreed: Agreed | None) -> None:
    """This rank raises before it has a link: at first use, the others can still be told."""
    if options.sync is None or agreed is None or _engines.transforming():
        return
    with contextlib.suppress(Exception):  # this rank's own error is the one to see
        group = groups.resolve(options.name, options.sync.group)
        if group is not None and not agreed.get(group):
            tell(group)


def _cross(
    link: Link,
    grads: list[Tensor | None],
    sums: _fold.Sums,
    here: Layout | None,
    arrived: bool,
    raised: bool = False,
) -> tuple[list[Tensor | None], _fold.Sums, bool]:
    options, agreement, problem = link.options, link.agreement, None
    if agreement is None:
        described = (options, link.group, link.params, link.treedef, link.dtypes, here, float(sums.weight))
        agreement, lasting = agree(*described, tuple(link.held), raised)
        if agreement is None:
            return [None] * len(grads), sums._replace(kind=None), False
        link.held.clear()
        if lasting:
            link.agreed[link.signature] = agreement
    elif here is not None:
        problem = layouts.difference(agreement.layout, here)
    status = RAISED if raised else CHANGED if problem else FINE
    plan, kept = agreement.plan, status == FINE and here is not None
    if kept and not link.delivered:
        link.agreement = agreement
        link.set_unit(sums.unit)
    values = _fold.numbers(sums) if kept else None
    mine = [sums.differentiated, arrived, float(sums.weight), float(sums.unit or 0.0)] if kept else [0, 0, 0.0, 0.0]
    record = wire.record(plan, [status, *mine], values, plan.buckets[plan.header].device)
    link.send(plan, grads if kept else [None] * len(grads), values, record)
    flats, wide = link.receive(plan)
    header = flats[plan.header]
    coded = header[len(header) - link.group.size() * wire.digits(wire.columns(plan, _FIXED), header.dtype) :]
    table = wire.decode(coded.view(link.group.size(), -1).cpu(), wire.columns(plan, _FIXED))
    if problem is not None:
        raise ValueError(
            f"{options.name}: {problem}: the first at this grad_fn's first call, the second now. With sync, ranks rely on "
            "what they agreed on then; return the same kinds always, or make another grad_fn"
        )
    check_statuses(options.name, link.group, table[:, _STATUS].tolist(), raised)
    floats = table.view(torch.float64)
    summed = wire.summed(plan, _FIXED, table, floats[:, _UNIT] / agreement.scale)
    for at, flat in enumerate(flats):
        for n, tensor in wire.read_vectors(plan, at, flat).items():
            summed[n] = tensor
    weight = floats[:, _WEIGHT].sum().item()
    if link.signature in link.agreed and weight:
        link.agreed[link.signature] = agreement._replace(scale=scale(weight))  # the same on every rank
    restored = [_restored(x, spec, link.params[0].device) for x, spec in zip(summed, plan.specs, strict=True)]
    whole = layouts.restore(agreement.layout, restored, sums, link.params[0])._replace(
        weight=weight,
        unit=agreement.scale,
        differentiated=bool(table[:, _DIFFERENTIATED].any()),
    )
    return wire.unpack(plan, wide, link.params), whole, bool(table[:, _ARRIVED].any())


def _restored(value: Tensor, spec: layouts.Spec, device: torch.device) -> Any:
    if spec.dtype is None:
        number = float(value.item())
        return int(number) if spec.whole and number.is_integer() else number
    return value.to(device=device, dtype=spec.dtype)


def _pack(place: wire.Place, flat: Tensor, grad: Tensor | None, factor: float) -> None:
    part = flat.narrow(0, place.offset, place.numel)
    if grad is None:
        part.zero_()
    else:
        numbers = wire.real(grad.detach())
        torch.mul(numbers, factor, out=part.view(numbers.shape))
