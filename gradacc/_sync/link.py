"""The boundary of a call with other ranks: send what there is, read what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _sums, _tree
from gradacc._options import Options
from gradacc._rows import Homes
from gradacc._sums import Sums
from gradacc._sync import agreement as agreements
from gradacc._sync import bound as bounds
from gradacc._sync import channel as channels
from gradacc._sync import crossing, problems, wire
from gradacc._sync import layout as layouts
from gradacc._sync import scale as scales
from gradacc._sync.agreement import Agreed, Agreement
from gradacc._sync.boundary import Boundary
from gradacc._sync.channel import APART, ARRIVED, COLUMNS, DIFFERENTIATED, DROPPED, FAR, FINE, WITHHELD
from gradacc._sync.crossing import Arrived
from gradacc._sync.gather import Gather
from gradacc._sync.layout import Layout
from gradacc._sync.sending import Sending
from gradacc._sync.turn import REST, SUMS, Turn
from gradacc._window import Window


class Link(Turn, Boundary):
    """One call's connection to the other ranks: what it gives, and what it gets.

    A turn first: by itself a boundary tells nobody of an error.
    """

    crosses = True
    agreement: Agreement | None

    def __init__(self, options: Options, group: dist.ProcessGroup, agreed: Agreed, homes: Homes = ()) -> None:
        super().__init__(options.name, agreed.call_name, group)
        self.options, self.agreed, self._homes = options, agreed, homes
        self.begun = agreed.begun
        self.states, self.dropped = agreed.begun.take()
        self.gather = None if options.through is None else Gather(self, options.rows)
        self.overlaps = options.sync is not None and options.sync.overlap
        self.channel.gathers = self.gather is not None
        self.factor: float | Tensor = 1.0
        """What a gradient is multiplied by on its way: from this rank's unit to the common one."""
        self.withholds = False
        """Whether this rank's gradients do not fit that unit: NOTE [scales]."""
        self.far: Tensor | None = None
        """The same where the weight is not read: 0-dim, bool; zeros are sent in their place."""
        self.delivered: set[int] = set()
        self.held: dict[int, Tensor] = {}
        """Gradients that were delivered and cannot be packed yet, or perhaps once more, in the order in which they came."""
        self._missing: list[int] = []
        self._lasting = False
        self._received: tuple[list[Arrived], list[Tensor]] = ([], [])
        self._table: Tensor | None = None
        self._rest: wire.Plan | None = None

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype], batch: Any) -> None:
        self.window = batch.number if isinstance(batch, Window) else 0
        self.params = params
        self.device = params[0].device
        self.bound = bounds.bound(self.options, self.group, params, treedef, dtypes, self._homes)
        self.signature = (
            treedef,
            tuple((p.shape, p.dtype, p.device) for p in params),
            tuple(dtypes),
            tuple(home is not None for home in self._homes),
        )
        self.agreement = self._known().get(self.signature)

    def set_unit(self, unit: float | Tensor | None, weight: float | Tensor) -> None:
        if self.agreement is not None and self.options.reduction == "mean":
            # Of gradients that others weigh (those of rows in the loss of the whole batch) the unit says how large they are.
            counted = weight if isinstance(weight, Tensor) or weight or unit is None else unit
            far = scales.is_far(counted, self.agreement.scale, self.agreement.plan, self.group.size())
            factor = 0.0 if unit is None else unit / self.agreement.scale
            if isinstance(far, Tensor):
                self.far, self.factor = far, (~far).to(torch.float64) * factor
            else:
                self.withholds, self.factor = far, 0.0 if far else factor

    def deliver(self, index: int, grad: Tensor) -> None:
        """It is packed, and its bucket leaves when it is full and its turn has come."""
        if self._sending is None:
            if self.withholds or self.agreement is None or self.agreement.shape != self.next.shape:
                self.held[index] = grad
                return
            self._missing = [len(bucket.indices) for bucket in self.agreement.plan.buckets]
        assert self.agreement is not None
        plan, sending = self.agreement.plan, self.open()
        at = plan.places[index].bucket
        wire.pack(plan.places[index], sending.flat(at).numbers, grad, self.factor)
        self.delivered.add(index)
        if plan.narrow:
            self.held[index] = grad
        self._missing[at] -= 1
        while sending.launched < plan.header and not self._missing[sending.launched]:
            sending.launch(None)

    def cross(
        self, grads: list[Tensor | None], sums: Sums, arrived: bool, types: Callable[[Sums], Sums]
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """A gradient is taken out when it is packed, or need surely not be packed again."""
        with self.leaving_for_next_call():
            grads, sums, arrived = self._cross(grads, sums, arrived)
        return grads, types(sums), arrived

    def returned(self, results: list[Tensor]) -> list[Any]:
        return self.bound.returned(results, self.group)

    def fail(self, error: BaseException) -> None:
        """This rank's call raises, before or behind its exchanges of rows."""
        if self.gather is not None:
            self.gather.fail(error)
        super().fail(error)

    def _known(self) -> dict[Any, Agreement]:
        return self.agreed.groups.setdefault(self.group, {})

    def _cross(self, grads: list[Tensor | None], sums: Sums, arrived: bool) -> tuple[list[Tensor | None], Sums, bool]:
        options = self.options
        with self.failing_together():
            order = tuple(self.held)
            for index, grad in self.held.items():
                grads[index] = grad
            self.held = {}
            here = None if sums.value is None else layouts.of(sums)
            weight, described = sums.weight, None
            if self.agreement is None:
                described = agreements.describe(options, self.bound, here, float(weight), order)
        self.greet(None if self.agreement is None else self.agreement.shape)
        if described is not None:
            with self.exchanging():
                found = agreements.agree(options, self.caller(), self.bound, described, here)
                if found.shape is not None:
                    self.set_next(SUMS, found.shape)
            if found.shape is None:
                self.channel.apart = True
                return self.bound.zeros(self.group.rank()), _sums.NOTHING, False
            self.agreement, self._lasting = found.agreement, found.lasting
            with self.failing_together():
                if found.problem is not None:
                    raise found.problem
        agreement = self.agreement
        assert agreement is not None
        with self.failing_together():
            if here is not None:
                self._check_kind(agreement, here)
            self._make_room(agreement, grads)
            if not self.delivered:
                self.set_unit(sums.unit, weight)
        with self.sending() as sending:
            self._send(sending, grads, sums, here, weight, arrived)
        del sending
        return self._receive(agreement, grads, sums)

    def _make_room(self, agreement: Agreement, grads: list[Tensor | None]) -> None:
        """For the gradients of several targets, of which this rank may have seen none."""
        targets = layouts.targets(self.options, agreement.plan.specs)
        self.params = [*self.params] * targets
        grads += [None] * (len(self.params) - len(grads))
        self._strides = [wire.strides_of(param, grad) for param, grad in zip(self.params, grads, strict=True)]

    def _unpacked(self, plan: wire.Plan, wide: list[Tensor]) -> list[Tensor | None]:
        return wire.unpack(plan, wide, self.params, self._strides, self.group.rank())

    def _check_kind(self, agreement: Agreement, here: Layout) -> None:
        problem = layouts.difference(agreement.layout, here)
        if problem is not None:
            raise ValueError(
                f"{self.options.name}: {problem}: the first at this grad_fn's first call, the second now. With sync, ranks "
                "rely on what they agreed on then; return the same kinds always, or make another grad_fn"
            )

    def _send(
        self,
        sending: Sending,
        grads: list[Tensor | None],
        sums: Sums,
        here: Layout | None,
        weight: float | Tensor,
        arrived: bool,
    ) -> None:
        """Everything that has not been delivered."""
        agreement, kept = self.agreement, here is not None
        assert agreement is not None
        plan = agreement.plan
        values = _sums.numbers(sums)[0] if kept else None
        flags = (
            DIFFERENTIATED * (kept and sums.differentiated),
            ARRIVED * (kept and arrived),
            WITHHELD * (kept and self.withholds),
            APART * self.channel.apart,
            DROPPED * self.dropped,
        )
        bits: int | Tensor = channels.bits(FINE, *flags)
        if self.far is not None:
            bits = bits + FAR * self.far.to(torch.int64)
        fixed = [
            bits,
            self.number,
            agreement.identity,
            self.states,
            self.window,
            _floating(weight if kept else 0.0),
            _floating(0.0 if sums.unit is None or not kept else sums.unit),
        ]
        record = wire.record(plan, fixed, values, plan.buckets[plan.header].device)
        is_summed = crossing.is_summed_by_backend(self.bound.way)
        slots = (self.group.rank(), self.group.size()) if is_summed else (0, 1)
        for at in range(sending.launched, len(plan.buckets)):
            flat = sending.flat(at)
            for index in plan.buckets[at].indices:
                if index not in self.delivered:
                    grad = grads[index] if kept else None
                    if not plan.narrow and not self.withholds:
                        grads[index] = None
                    wire.pack(plan.places[index], flat.numbers, None if self.withholds else grad, self.factor)
            wire.write_vectors(plan, at, flat.riders, values, slots)
            sending.launch(record)

    def wait_for_sums(self, sending: Sending, keep: bool) -> Tensor | None:
        """And gradients in the accumulators' dtype, made while later buckets cross."""
        shape, agreement = sending.shape, self.agreement
        sums = agreement is not None and agreement.shape == shape and self.next.kind != REST
        plan = agreement.plan if agreement is not None and sums else None
        flats, wide = [], []
        for at in range(len(shape.flats)):
            flats.append(sending.wait(at))
            if keep and plan is not None and not plan.narrow:
                wide.append(wire.widen(plan.buckets[at], flats[at]))
        self._received = flats, wide
        return None if plan is None or not plan.narrow else wire.largest(plan, flats)

    def note_success(self, table: Tensor, largest: float) -> None:
        """The agreement, where it is new; its scale. What was withheld, or does not fit into float16, crosses once more."""
        agreement = self.agreement
        assert agreement is not None
        floats, bits = table.view(torch.float64), table[:, 0]
        weight = float(floats[:, channels.WEIGHT].sum())
        known = self._known()
        if self._lasting:
            self.channel.agreements = agreement.identity + 1
        if self._lasting or self.signature in known:
            is_known = weight and math.isfinite(weight)
            known[self.signature] = replace(agreement, scale=scales.scale(weight)) if is_known else agreement
        wrong, far = floats[:, channels.WEIGHT].isnan().tolist(), (bits & FAR).tolist()
        if any(wrong):
            self._problem = problems.weights_are_wrong(self.options.name, self.group, wrong)
            return
        if any(far):
            self._problem = problems.weights_are_far(self.options.name, self.group, far)
            return
        again = bool((bits & WITHHELD).any())
        if agreement.plan.narrow:
            counts = bool((bits & DIFFERENTIATED).any()) and (self.options.reduction == "sum" or weight != 0.0)
            wrong_scale = self.options.reduction == "mean" and scales.is_wrong(weight, agreement.scale)
            again = counts and (wrong_scale or not scales.NARROWEST <= largest < math.inf)
        if again:
            # Gradients alone, in the accumulators' dtypes (of float16, in float32).
            gradients = self.bound.gradients() * (len(self.params) // len(self.bound.params))
            wide = torch.float32 if torch.float16 in self.bound.dtypes else None
            self._rest = wire.plan(gradients, (), wide, None)
            self.set_next(REST, wire.shape(self._rest, self.group.size(), COLUMNS, self.bound.way))
        self._table = table

    def _receive(
        self, agreement: Agreement, grads: list[Tensor | None], sums: Sums
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """The union's, from what came."""
        plan, table, (flats, wide) = agreement.plan, self._table, self._received
        assert table is not None
        floats = table.view(torch.float64)
        bits = table[:, 0]
        weight, unit = float(floats[:, channels.WEIGHT].sum()), agreement.scale
        whole: list[Tensor | None]
        if self.next.kind == REST:
            unit = scales.scale(weight) if self.options.reduction == "mean" else unit
            first = None if plan.narrow else self._unpacked(plan, wide)
            # Where all ranks have withheld theirs, there are zeros, and a ratio that may be out of their range. (A rank of
            # weight 0 may have gradients: those of its rows in the loss of the whole batch.)
            counted = bool((((bits & WITHHELD) == 0) & ((bits & ARRIVED) != 0)).any())
            whole = self._cross_rest(grads, sums, first, agreement.scale / unit if counted else 0.0, unit)
        else:
            grads[:] = [None] * len(grads)
            if plan.narrow:
                wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
            whole = self._unpacked(plan, wide)
        summed = wire.read(plan, flats, COLUMNS, table, floats[:, channels.UNIT] / unit)
        differentiated = bool((bits & DIFFERENTIATED).any())
        union = layouts.restore(agreement.layout, summed, sums, self.params[0], (weight, unit, differentiated))
        return whole, union, bool((bits & ARRIVED).any())

    def _cross_rest(
        self,
        grads: list[Tensor | None],
        sums: Sums,
        first: list[Tensor | None] | None,
        ratio: float,
        unit: float,
    ) -> list[Tensor | None]:
        """What was withheld, and ``ratio`` times what was not (None: nothing that came before counts)."""
        plan, self._received = self._rest, ([], [])
        assert plan is not None
        with self.sending() as sending:
            factor: float | Tensor = 1.0
            if self.options.reduction == "mean":
                factor = 0.0 if sums.unit is None else sums.unit / unit
            for at, bucket in enumerate(plan.buckets):
                flat = sending.flat(at)
                for index in bucket.indices:
                    grad, grads[index] = grads[index], None
                    wire.pack(plan.places[index], flat.numbers, grad if sums.value is not None else None, factor)
                sending.launch(self.record(sending.shape.columns, FINE) if at == plan.header else None)
        del sending
        flats = self._received[0]
        wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
        second = self._unpacked(plan, wide)
        if first is not None:
            for one, other in zip(second, first, strict=True):
                assert one is not None
                assert other is not None
                one.add_(other, alpha=ratio)
        return second


def _floating(number: float | Tensor) -> float | Tensor:
    return number if isinstance(number, Tensor) else float(number)
