"""One call's boundary: agree on what there is, send it, read it."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _engines, _fold, _tree
from gradacc._options import Options
from gradacc._sync import group as groups
from gradacc._sync import layout as layouts
from gradacc._sync import wire
from gradacc._sync.layout import Layout
from gradacc._sync.traced import Traced

_FINE, _RAISED, _CHANGED = 0, 1, 2
_STATUS, _DIFFERENTIATED, _ARRIVED, _WEIGHT, _UNIT = range(5)
_FIXED = 5
"""Columns of every record: the five above."""


class Agreement(NamedTuple):
    """What the ranks of a group found alike at first use."""

    layout: Layout
    scale: float
    """A power of two near the total weight of the last call: gradients cross in units of it, in the range of a mean."""
    plan: wire.Plan


Agreed = WeakKeyDictionary[Any, dict[Any, Agreement]]
"""Of one ``grad_fn``: by process group and by the parameters' structure. It saves an exchange, and changes no result."""


@dataclass(frozen=True)
class _Description:
    """What a rank says of itself at first use."""

    params: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    options: tuple[Any, ...]
    layout: Layout | None
    weight: float
    raised: bool


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
        self._flats: list[Tensor | None] = []
        self._missing: list[int] = []
        self._works: list[dist.Work] = []

    @property
    def overlaps(self) -> bool:
        """Whether gradients can be delivered before `cross`: not at first use."""
        return self.agreement is not None and self.options.sync is not None and self.options.sync.overlap

    def cross(
        self, grads: list[Tensor | None], sums: _fold.Sums, arrived: bool
    ) -> tuple[list[Tensor | None], _fold.Sums, bool]:
        """The union's gradients (in the unit of the returned sums), sums, and whether any rank's loss reached its parameters.

        Takes the gradients out of ``grads``, each as it is packed.
        """
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
        """Say in which unit this rank's gradients are, before the first one is delivered."""
        assert self.agreement is not None
        self.factor = 1.0 if self.options.reduction == "sum" else float(unit or 0.0) / self.agreement.scale

    def deliver(self, index: int, grad: Tensor) -> None:
        """A gradient that is final: it is packed, and its bucket leaves when it is full and its turn has come."""
        assert self.agreement is not None
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

    def receive(self) -> list[Tensor]:
        """The sums, one tensor a bucket."""
        with groups.speaking(self.options.name, self.group):
            for work in self._works:
                work.wait()
        flats, self._flats, self._works = self._flats, [], []
        return [flat for flat in flats if flat is not None]

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
            everyone: list[Any] = [None] * group.size()
            dist.all_gather_object(everyone, _Description((), (), None, 0.0, raised=True), group=group)


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
        agreement = _agree(link, here, float(sums.weight), raised)
        if agreement is None:
            return [None] * len(grads), sums._replace(kind=None), False
    elif here is not None:
        problem = layouts.difference(agreement.layout, here)
    status = _RAISED if raised else _CHANGED if problem else _FINE
    plan, kept = agreement.plan, status == _FINE and here is not None
    if kept and not link.delivered:
        link.agreement = agreement
        link.set_unit(sums.unit)
    values = _fold.numbers(sums) if kept else None
    mine = [sums.differentiated, arrived, float(sums.weight), float(sums.unit or 0.0)] if kept else [0, 0, 0.0, 0.0]
    record = wire.record(plan, [status, *mine], values, plan.buckets[plan.header].device)
    link.send(plan, grads if kept else [None] * len(grads), values, record)
    flats = link.receive()
    header = flats[plan.header]
    coded = header[len(header) - link.group.size() * wire.digits(wire.columns(plan, _FIXED), header.dtype) :]
    table = wire.decode(coded.view(link.group.size(), -1).cpu(), wire.columns(plan, _FIXED))
    if problem is not None:
        raise ValueError(
            f"{options.name}: {problem}: the first at this grad_fn's first call, the second now. With sync, ranks rely on "
            "what they agreed on then; return the same kinds always, or make another grad_fn"
        )
    _check_status(link, table[:, _STATUS].tolist(), raised)
    floats = table.view(torch.float64)
    summed = wire.summed(plan, _FIXED, table, floats[:, _UNIT] / agreement.scale)
    for at, flat in enumerate(flats):
        for n, tensor in wire.read_vectors(plan, at, flat).items():
            summed[n] = tensor
    weight = floats[:, _WEIGHT].sum().item()
    if link.signature in link.agreed and weight:
        link.agreed[link.signature] = agreement._replace(scale=_scale(weight))  # the same on every rank
    restored = [_restored(x, spec, link.params[0].device) for x, spec in zip(summed, plan.specs, strict=True)]
    whole = layouts.restore(agreement.layout, restored, sums, link.params[0])._replace(
        weight=weight,
        unit=agreement.scale,
        differentiated=bool(table[:, _DIFFERENTIATED].any()),
    )
    return wire.unpack(plan, flats, link.params), whole, bool(table[:, _ARRIVED].any())


def _agree(link: Link, here: Layout | None, weight: float, raised: bool) -> Agreement | None:
    """Exchange descriptions; None where there is nothing to sum yet, or this rank is about to raise."""
    options, group, unknown = link.options, link.group, None
    assert options.sync is not None
    try:
        pickle.dumps(here)
    except Exception as error:  # whatever a user's class raises
        here, raised, unknown = None, True, error
    paths = _tree.paths(link.treedef, "params")
    mine = _Description(
        tuple((path, tuple(p.shape), p.dtype) for path, p in zip(paths, link.params, strict=True)),
        (
            ("reduction", options.reduction),
            ("dtype", options.dtype),
            ("has_aux", options.has_aux),
            ("compress", options.sync.compress),
            ("overlap", options.sync.overlap),
        ),
        here,
        weight,
        raised,
    )
    everyone: list[Any] = [None] * group.size()
    with groups.speaking(options.name, group):
        dist.all_gather_object(everyone, mine, group=group)
    if unknown is not None:
        raise TypeError(
            f"{options.name}: with sync, ranks tell each other the structure of aux, which cannot be pickled: {unknown}. "
            "Return it in containers of module-level classes"
        ) from unknown
    ranks = dist.get_process_group_ranks(group)
    _check_status(link, [_RAISED if each.raised else _FINE for each in everyone], raised)
    if raised:
        return None
    _check_alike(link, ranks, everyone)
    known = [(rank, each.layout) for rank, each in zip(ranks, everyone, strict=True) if each.layout is not None]
    for rank, layout in known[1:]:
        problem = layouts.difference(known[0][1], layout)
        if problem is not None:
            raise ValueError(f"{options.name}: ranks {known[0][0]} and {rank} differ: {problem}; {groups.title(group)}")
    total = sum(each.weight for each in everyone)
    if not known:
        return None
    scale = _scale(total)
    agreement = Agreement(
        known[0][1],
        scale,
        wire.plan(
            [p.shape for p in link.params],
            link.dtypes,
            [p.device for p in link.params],
            known[0][1].specs(),
            options.sync.compress,
            options.sync.overlap,
        ),
    )
    if total or options.reduction == "sum":
        link.agreed[link.signature] = agreement
    return agreement


def _scale(weight: float) -> float:
    return 2.0 ** round(math.log2(weight)) if weight else 1.0


def _check_alike(link: Link, ranks: Sequence[int], everyone: Sequence[_Description]) -> None:
    """The same error on every rank, naming the first difference from the group's first rank."""
    first = everyone[0]
    for rank, each in zip(ranks[1:], everyone[1:], strict=True):
        problem = None
        if each.options != first.options:
            (option, one), (_, other) = next((a, b) for a, b in zip(first.options, each.options, strict=True) if a != b)
            problem = f"{option}={one!r} on rank {ranks[0]}, {option}={other!r} on rank {rank}"
        elif each.params != first.params:
            problem = _difference(ranks[0], first.params, rank, each.params)
        if problem is not None:
            raise ValueError(
                f"{link.options.name}: ranks {ranks[0]} and {rank} differ: {problem}. Every rank of {groups.title(link.group)} "
                "must call the same grad_fn with parameters of the same structure, shapes and dtypes"
            )


def _difference(rank: int, params: tuple[Any, ...], other: int, others: tuple[Any, ...]) -> str:
    for a, b in zip(params, others, strict=False):
        if a[0] != b[0]:
            return f"the first parameter that differs is {a[0]} on rank {rank}, {b[0]} on rank {other}"
        if a != b:
            return f"{a[0]} is {a[2]} of shape {a[1]} on rank {rank}, {b[2]} of shape {b[1]} on rank {other}"
    longer, number, extra = (
        (rank, len(params), params[len(others) :])
        if len(params) > len(others)
        else (
            other,
            len(others),
            others[len(params) :],
        )
    )
    return f"rank {longer} has {number} parameters, {extra[0][0]} among them, the other {min(len(params), len(others))}"


def _check_status(link: Link, statuses: Sequence[int], raised: bool) -> None:
    ranks = dist.get_process_group_ranks(link.group)
    failed = [rank for rank, status in zip(ranks, statuses, strict=True) if status != _FINE]
    if failed and not raised:
        raise RuntimeError(
            f"{link.options.name}: no gradient on rank {dist.get_rank()}, because the call raised on rank"
            f"{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} of {groups.title(link.group)}; see the error there"
        )


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
