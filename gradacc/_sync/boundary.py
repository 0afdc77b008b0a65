"""One call's boundary: send what there is, read what came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _engines, _fold, _tree
from gradacc._options import Options
from gradacc._sync import agreement as agreements
from gradacc._sync import channel as channels
from gradacc._sync import group as groups
from gradacc._sync import layout as layouts
from gradacc._sync import scale as scales
from gradacc._sync import wire
from gradacc._sync.agreement import Agreed, Agreement
from gradacc._sync.channel import APART, ARRIVED, COLUMNS, DIFFERENTIATED, FINE, RAISED, SWITCHING, WITHHELD, Channel
from gradacc._sync.layout import Layout
from gradacc._sync.sending import Sending
from gradacc._sync.traced import Traced

_EXCHANGE, _GREETING, _SUMS, _REST, _NAMES, _NOTHING = range(6)


class _Next(NamedTuple):
    """What crosses next in a call, on every rank alike."""

    kind: int
    """Descriptions; sums, or a record that says that it is a call of another shape; sums; what was withheld from them; what
    each rank has called; nothing."""
    shape: wire.Shape | None = None


class Link:
    """One call's connection to the other ranks.

    A call is a walk through what crosses in it (`_Next`), of which every rank takes the same steps, those too that have raised:
    they `abandon` it, which is the same walk with nothing to give.
    """

    def __init__(self, options: Options, group: dist.ProcessGroup, agreed: Agreed, channel: Channel) -> None:
        self.options, self.group, self.agreed, self.channel = options, group, agreed, channel
        self.number = channel.begin()
        self.agreement: Agreement | None = None
        self.factor: float = 1.0
        """What a gradient is multiplied by on its way: from this rank's unit to the common one."""
        self.withholds = False
        """Whether this rank's gradients do not fit that unit: NOTE [scales]."""
        self.delivered: set[int] = set()
        self.held: dict[int, Tensor] = {}
        """Gradients that were delivered and cannot be packed yet, or perhaps once more, in the order in which they came."""
        self._missing: list[int] = []
        self._begun: _Next | None = None
        self._sending: Sending | None = None
        self._lasting = False
        self._received: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._table: Any = None
        self._problem: Exception | None = None
        self._rest: Any = None

    def begin(self) -> None:
        """First of all, what earlier calls have left."""
        try:
            with torch.inference_mode(False):
                self.channel.settle(self.options.name, self.group)
        except BaseException:
            self._leave()
            raise

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype]) -> None:
        """Say what is differentiated, as soon as it is known."""
        self.params, self.treedef, self.dtypes = params, treedef, dtypes
        self.signature = (treedef, tuple((p.shape, p.dtype, p.device) for p in params), tuple(dtypes))
        self.agreement = self._known().get(self.signature)

    @property
    def overlaps(self) -> bool:
        """Whether gradients are to be delivered before `cross`."""
        return self.options.sync is not None and self.options.sync.overlap

    def set_unit(self, unit: float | Tensor | None, weight: float | Tensor) -> None:
        """Say in which unit this rank's gradients are, and how much they count for, before the first one is packed."""
        if self.agreement is not None and self.options.reduction == "mean":
            self.withholds = scales.is_far(float(weight), self.agreement.scale, self.agreement.plan)
            self.factor = 0.0 if self.withholds else float(unit or 0.0) / self.agreement.scale

    def deliver(self, index: int, grad: Tensor) -> None:
        """A gradient that is final: it is packed, and its bucket leaves when it is full and its turn has come."""
        if self.withholds or not self._is_expected():
            self.held[index] = grad
            return
        assert self.agreement is not None
        plan = self.agreement.plan
        if self._sending is None:
            self._missing = [len(bucket.indices) for bucket in plan.buckets]
        sending = self._open()
        at = plan.places[index].bucket
        _pack(plan.places[index], sending.flat(at), grad, self.factor)
        self.delivered.add(index)
        if plan.narrow:
            self.held[index] = grad
        self._missing[at] -= 1
        while len(sending.works) < plan.header and not self._missing[len(sending.works)]:
            sending.launch(None)

    def cross(
        self, grads: list[Tensor | None], sums: _fold.Sums, arrived: bool
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        """The union's gradients (in the unit of the returned sums), sums, and whether any rank's loss reached its parameters.

        Takes the gradients out of ``grads``, each as it is packed (or when it is sure that it need not be packed again).
        """
        try:
            return self._cross(grads, sums, arrived)
        except BaseException:
            self._leave()
            raise

    def fail(self, error: BaseException) -> None:
        """This rank's call raises: the others are told; where they cannot be waited for, in this rank's next call."""
        if not isinstance(error, Exception):
            self._leave()
            return
        try:
            with torch.inference_mode(False):
                self.abandon()
        except Exception:  # this rank's own error is the one to see
            self._leave()

    def abandon(self) -> None:
        """Take part in what is left of the call without anything to give, and say that it has raised."""
        while self._next.kind != _NOTHING:
            if self._next.kind == _EXCHANGE:
                with self._exchanging():
                    agreements.tell(self.options.name, self.group, self.number, self.agreed.title)
            elif self._next.kind == _NAMES:
                with contextlib.suppress(RuntimeError):
                    self._raise_names()
            else:
                sending = self._open()
                sending.launch_rest(self._record(sending.shape.columns, RAISED))
                self._conclude(keep=False)

    def done(self) -> None:
        """The call returns what it is to return."""
        self.channel.apart = False

    @property
    def _next(self) -> _Next:
        """At first what the channel expects: not before the call sends something, as its iterator may make other calls."""
        if self._begun is None:
            expected = self.channel.expected
            self._begun = _Next(_EXCHANGE) if expected is None else _Next(_GREETING, expected)
        return self._begun

    def _go(self, kind: int, shape: wire.Shape | None = None) -> None:
        self._begun, self._sending = _Next(kind, shape), None
        if kind == _NOTHING and self in self.channel.unfinished:
            self.channel.unfinished.remove(self)

    def _leave(self) -> None:
        """For the next call of this group."""
        if (self._begun is None or self._begun.kind != _NOTHING) and self not in self.channel.unfinished:
            self.channel.unfinished.append(self)

    def _known(self) -> dict[Any, Agreement]:
        return self.agreed.groups.setdefault(self.group, {})

    def _is_expected(self) -> bool:
        return self.agreement is not None and self.agreement.shape == self._next.shape

    def _open(self) -> Sending:
        if self._sending is None:
            assert self._next.shape is not None
            self._sending = Sending(self.options.name, self.group, self._next.shape)
        return self._sending

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Around what can raise on this rank alone."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Around exchanges, which cannot be taken up again where they were left."""
        try:
            yield
        except Exception:  # on every rank, or the group is broken
            self._go(_NOTHING)
            raise
        except BaseException:
            self._go(_NOTHING)
            self.channel.broken = True
            raise
        self._go(_NOTHING)

    def _cross(
        self, grads: list[Tensor | None], sums: _fold.Sums, arrived: bool
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        options = self.options
        with self._telling():
            order = tuple(self.held)
            for index, grad in self.held.items():
                grads[index] = grad
            self.held = {}
            here = None if sums.kind is None else layouts.of(options, sums)
            weight = float(sums.weight)
            described = None
            if self.agreement is None:
                described = agreements.describe(options, self.params, self.treedef, here, weight, order)
        if self._next.kind == _GREETING and not self._is_expected():
            with self._telling():
                sending = self._open()
                identity = channels.FIRST if self.agreement is None else self.agreement.identity
                sending.launch_rest(self._record(sending.shape.columns, SWITCHING, identity))
            self._conclude()
            self._check()
        if described is not None:
            call = (options, self.group, self.channel, self.number, self.agreed.title)
            with self._exchanging():
                found = agreements.agree(*call, self.params, self.dtypes, described, here)
            if found.shape is None:
                self.channel.apart = True
                return [None] * len(grads), sums._replace(kind=None), False
            self._go(_SUMS, found.shape)
            self.agreement, self._lasting = found.agreement, found.lasting
            with self._telling():
                if found.problem is not None:
                    raise found.problem
        agreement = self.agreement
        assert agreement is not None
        with self._telling():
            if here is not None:
                self._check_kind(agreement, here)
            if not self.delivered:
                self.set_unit(sums.unit, weight)
            self._send(agreement, grads, sums, here, weight, arrived)
        self._conclude()
        self._check()
        return self._receive(agreement, grads, sums)

    def _check_kind(self, agreement: Agreement, here: Layout) -> None:
        problem = layouts.difference(agreement.layout, here)
        if problem is not None:
            raise ValueError(
                f"{self.options.name}: {problem}: the first at this grad_fn's first call, the second now. With sync, ranks "
                "rely on what they agreed on then; return the same kinds always, or make another grad_fn"
            )

    def _record(self, columns: int, status: int, identity: int = 0) -> Tensor:
        """Of a rank that has nothing to give."""
        record = torch.zeros(columns, dtype=torch.int64)
        record[0] = channels.bits(status, APART * self.channel.apart)
        record[channels.NUMBER], record[channels.IDENTITY] = self.number, identity
        return record

    def _send(
        self,
        agreement: Agreement,
        grads: list[Tensor | None],
        sums: _fold.Sums,
        here: Layout | None,
        weight: float,
        arrived: bool,
    ) -> None:
        """Everything that has not been delivered."""
        plan, kept = agreement.plan, here is not None
        values = _fold.numbers(sums) if kept else None
        flags = (
            DIFFERENTIATED * (kept and sums.differentiated),
            ARRIVED * (kept and arrived),
            WITHHELD * (kept and self.withholds),
            APART * self.channel.apart,
        )
        fixed = [
            channels.bits(FINE, *flags),
            self.number,
            agreement.identity,
            weight if kept else 0.0,
            float(sums.unit or 0.0) if kept else 0.0,
        ]
        record = wire.record(plan, fixed, values, plan.buckets[plan.header].device)
        sending = self._open()
        for at in range(len(sending.works), len(plan.buckets)):
            flat = sending.flat(at)
            for index in plan.buckets[at].indices:
                if index not in self.delivered:
                    grad = grads[index] if kept else None
                    if not plan.narrow and not self.withholds:
                        grads[index] = None
                    _pack(plan.places[index], flat, None if self.withholds else grad, self.factor)
            wire.write_vectors(plan, at, flat, values)
            sending.launch(record)

    def _conclude(self, keep: bool = True) -> None:
        """Wait for what was sent; then this rank takes the step that all of them take, and knows what is wrong.

        ``keep``: make the gradients in the accumulators' dtype, while later buckets cross.
        """
        sending, (kind, shape), agreement = self._open(), self._next, self.agreement
        assert shape is not None
        plan = agreement.plan if agreement is not None and agreement.shape == shape and kind != _REST else None
        flats, wide = [], []
        for at in range(len(shape.flats)):
            flats.append(sending.wait(at))
            if keep and plan is not None and not plan.narrow:
                wide.append(wire.widen(plan.buckets[at], flats[at]))
        table, finite = sending.table(None if plan is None or not plan.narrow else _is_finite(plan, flats))
        self._received, self._table = (flats, wide), table
        self._go(_NOTHING)
        channel, rows = self.channel, channels.rows(self.options.name, self.group, table)
        channel.number = max(channel.number, *(row.number for row in rows))
        statuses = {row.status for row in rows}
        name, group = self.options.name, self.group
        if RAISED in statuses:
            self._problem = agreements.of_statuses(name, group, [row.status == RAISED for row in rows])
        elif len({(row.status, row.number, row.identity) for row in rows}) > 1:
            self._go(_NAMES)
        elif len({row.bits & APART for row in rows}) > 1:
            channel.apart = False
            self._problem = agreements.of_apart(name, group, [bool(row.bits & APART) for row in rows])
        elif SWITCHING in statuses:
            channel.apart = False
            self._go(_EXCHANGE) if agreement is None else self._go(_SUMS, agreement.shape)
        elif kind != _REST:
            assert agreement is not None
            channel.apart = True  # until `done`
            channel.crossed(agreement.identity, shape)
            weight = self._learn(agreement)
            again = any(row.bits & WITHHELD for row in rows)
            if agreement.plan.narrow:
                again = not finite or (self.options.reduction == "mean" and scales.is_wrong(weight, agreement.scale))
            if again:
                self._rest = self._plan_of_rest()
                self._go(_REST, wire.shape(self._rest, group.size(), COLUMNS))

    def _learn(self, agreement: Agreement) -> float:
        """What later calls rely on, after one that went through on all ranks; returns the total weight of this one."""
        weight = float(self._table.view(torch.float64)[:, channels.WEIGHT].sum())
        known = self._known()
        if self._lasting:
            self.channel.agreements = agreement.identity + 1
        if self._lasting or self.signature in known:
            known[self.signature] = agreement._replace(scale=scales.scale(weight)) if weight else agreement
        return weight

    def _check(self) -> None:
        """Raise what all ranks have found, if anything."""
        if self._next.kind == _NAMES:
            self._raise_names()
        if self._problem is not None:
            raise self._problem

    def _raise_names(self) -> None:
        with self._exchanging():
            agreements.raise_for_calls(self.options.name, self.group, self.number, self.agreed.title)

    def _receive(
        self, agreement: Agreement, grads: list[Tensor | None], sums: _fold.Sums
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        """The union's, from what came."""
        plan, table, (flats, wide) = agreement.plan, self._table, self._received
        floats = table.view(torch.float64)
        bits = table[:, 0]
        weight, unit = float(floats[:, channels.WEIGHT].sum()), agreement.scale
        vectors: dict[int, Tensor] = {}
        for at, flat in enumerate(flats):
            vectors |= wire.read_vectors(plan, at, flat)
        whole: list[Tensor | None]
        if self._next.kind == _REST:
            unit = scales.scale(weight) if self.options.reduction == "mean" else unit
            first = None if plan.narrow else wire.unpack(plan, wide, self.params)
            # Where all ranks have withheld theirs, there are zeros, and a ratio that may be out of their range.
            counted = bool(floats[(bits & WITHHELD) == 0, channels.WEIGHT].any())
            whole = self._cross_rest(grads, sums, first, agreement.scale / unit if counted else 0.0, unit)
        else:
            grads[:] = [None] * len(grads)
            if plan.narrow:
                wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
            whole = wire.unpack(plan, wide, self.params)
        summed = wire.summed(plan, COLUMNS, table, floats[:, channels.UNIT] / unit)
        for n, tensor in vectors.items():
            summed[n] = tensor
        restored = [_restored(x, spec, self.params[0].device) for x, spec in zip(summed, plan.specs, strict=True)]
        union = layouts.restore(agreement.layout, restored, sums, self.params[0])._replace(
            weight=weight, unit=unit, differentiated=bool((bits & DIFFERENTIATED).any())
        )
        return whole, union, bool((bits & ARRIVED).any())

    def _plan_of_rest(self) -> wire.Plan:
        """Gradients alone, in the accumulators' dtypes (of float16, in float32)."""
        return wire.plan(
            [p.shape for p in self.params],
            self.dtypes,
            [p.device for p in self.params],
            (),
            torch.float32 if torch.float16 in self.dtypes else None,
            None,
        )

    def _cross_rest(
        self,
        grads: list[Tensor | None],
        sums: _fold.Sums,
        first: list[Tensor | None] | None,
        ratio: float,
        unit: float,
    ) -> list[Tensor | None]:
        """What was withheld, and ``ratio`` times what was not (None: nothing that came before counts)."""
        plan, self._received = self._rest, ([], [])
        with self._telling():
            factor = float(sums.unit or 0.0) / unit if self.options.reduction == "mean" else 1.0
            sending = self._open()
            for at, bucket in enumerate(plan.buckets):
                flat = sending.flat(at)
                for index in bucket.indices:
                    grad, grads[index] = grads[index], None
                    _pack(plan.places[index], flat, grad if sums.kind is not None else None, factor)
                sending.launch(self._record(sending.shape.columns, FINE) if at == plan.header else None)
        self._conclude()
        self._check()
        flats = self._received[0]
        wide = [wire.widen(bucket, flat) for bucket, flat in zip(plan.buckets, flats, strict=True)]
        second = wire.unpack(plan, wide, self.params)
        if first is not None:
            for one, other in zip(second, first, strict=True):
                assert one is not None
                assert other is not None
                one.add_(other, alpha=ratio)
        return second


def connect(options: Options, agreed: Agreed | None) -> Link | Traced | None:
    """The connection that a call needs; None where nothing crosses."""
    if options.sync is None or agreed is None:
        return None
    group = groups.resolve(options.name, options.sync.group)
    if group is None:
        return None
    if _engines.loops():
        return Traced(options, group)
    if _engines.transforming():
        raise NotImplementedError(
            f"{options.name}: sync=all_reduce() inside a functorch transform or another grad_fn's loss is not available in "
            "this version; call it outside, or leave sync out"
        )
    link = Link(options, group, agreed, channels.of(group))
    link.begin()
    return link


def _is_finite(plan: wire.Plan, flats: Sequence[Tensor]) -> Tensor:
    """Whether all gradients are, as they came: a sum is finite only if every number in it is."""
    device = plan.buckets[plan.header].device
    each = [
        flat[: bucket.numel].sum(dtype=torch.float32).isfinite().to(device)
        for bucket, flat in zip(plan.buckets, flats, strict=True)
        if bucket.indices
    ]
    return torch.stack(each).all()


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
