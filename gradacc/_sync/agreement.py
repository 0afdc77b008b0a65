"""What the ranks of a group find alike at first use. NOTE [agreement]

NOTE [fingerprints]
    Descriptions of every rank on every rank would be bytes, and time to read them, in proportion to ranks times parameters. So
    ranks first find out whether they are alike: one all-reduce (MAX) of a few hashes and of their complements, which are equal
    exactly where all hashes are; and one of the weights. What only some know then comes from one of these: the layout, where a
    rank has not seen a micro-batch, and the order of the gradients, where they overlap. Only where ranks differ do they
    exchange the whole descriptions, to say in what.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gradacc import _tree
from gradacc._options import Options
from gradacc._reduce import AllReduce
from gradacc._shard import Shard
from gradacc._sync import channel as channels
from gradacc._sync import group as groups
from gradacc._sync import layout as layouts
from gradacc._sync import problems, wire
from gradacc._sync import scale as scales
from gradacc._sync.begun import Begun
from gradacc._sync.bound import Bound
from gradacc._sync.layout import Layout, Spec


@dataclass(frozen=True)
class Known:
    """What later calls rely on."""

    identity: int
    """How many were agreed on in this group before: the same on every rank."""
    shape: wire.Shape


@dataclass(frozen=True)
class Agreement(Known):
    """Those of a ``grad_fn``."""

    layout: Layout
    plan: wire.Plan
    scale: float
    """NOTE [scales]"""


class Agreed:
    """What one ``grad_fn`` has agreed on: by process group and by the parameters' structure."""

    def __init__(self, name: str, loss_fn: Callable[..., Any], group: Any) -> None:
        self.call_name = count_place(f"{name}({_code_of(loss_fn)})", group)
        """What ranks call it among themselves."""
        self.begun = Begun()
        self.groups: WeakKeyDictionary[Any, dict[Any, Agreement]] = WeakKeyDictionary()


_made: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()
_made_for_all: Counter[str] = Counter()
"""How many were made, for a group or for the default one: of a loss that is written in this place."""


def count_place(place: str, group: Any) -> str:
    """A place, and which one this is of those that were made there: closures differ in nothing else that can be compared."""
    if group is None:
        made = _made_for_all
    else:
        # Of a mesh of several dimensions, or a group that this rank is not in, there is no call.
        if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names") and group.ndim == 1:
            group = group.get_group()
        made = _made.setdefault(group, Counter()) if isinstance(group, dist.ProcessGroup) else Counter()
    made[place] += 1
    return place if made[place] == 1 else f"{place}, number {made[place]} that this rank made"


@dataclass(frozen=True)
class Description:
    """What a rank says of itself; of plain types, so that every rank can read it."""

    params: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    options: tuple[Any, ...]
    specs: tuple[Spec, ...]
    layout: bytes | None
    """A pickled `Layout`, in which a class may be that only one rank can import."""
    weight: float
    order: tuple[int, ...]
    """Of the parameters, as their gradients were final in the last micro-batch's backward pass."""


def describe(options: Options, bound: Bound, layout: Layout | None, weight: float, order: Sequence[int]) -> Description:
    """What this rank says of itself."""
    sync = options.sync
    assert sync is not None
    try:
        coded = None if layout is None else pickle.dumps(layout)
    except Exception as error:  # whatever a user's class raises
        raise TypeError(
            f"{options.name}: with sync, ranks tell each other the structure of aux, which cannot be pickled: {error}. "
            "Return it in containers of module-level classes"
        ) from error
    if any(issubclass(kind, Shard) for kind in _tree.kinds(bound.treedef)):
        raise TypeError(
            f"{options.name}: a gradacc.Shard is this rank's part of a tensor, and ranks add up whole ones: parts of different "
            "elements would be added. Pass whole tensors"
        )
    paths = _tree.paths(bound.treedef, "params")
    return Description(
        tuple((path, tuple(p.shape), p.dtype) for path, p in zip(paths, bound.params, strict=True)),
        (
            ("reduction", options.reduction),
            ("dtype", options.dtype),
            ("has_aux", options.has_aux),
            ("sync", "all_reduce" if isinstance(sync, AllReduce) else "reduce_scatter"),
            ("compress", sync.compress),
            ("overlap", sync.overlap),
            ("ordered", isinstance(sync, AllReduce) and sync.ordered),
            ("weights", options.weights is not None),
            ("nonfinite", options.nonfinite),
            ("has_carry", options.has_carry),
            ("through", options.through is not None),
            ("rows", options.rows),
        ),
        () if layout is None else tuple(layouts.specs(layout)),
        coded,
        weight,
        tuple(order),
    )


class Alike(NamedTuple):
    """What ranks find where nothing differs: NOTE [fingerprints]."""

    known: tuple[int, tuple[Spec, ...], bytes] | None
    """The first rank that has seen a micro-batch, its specs and its layout; None where there is none."""
    weight: float
    """Of all ranks."""
    order: tuple[int, ...]
    """Of a rank whose gradients had the longest one."""


Answers: TypeAlias = list[tuple[int, str, Description | None]]
"""Every rank's number, name of the call, and description; None of one whose call has raised."""


class Found(NamedTuple):
    """What all ranks' descriptions say together."""

    shape: wire.Shape | None
    """Of what crosses next; None: there is nothing to sum yet. The same on every rank."""
    agreement: Agreement | None = None
    """None where this rank has a problem."""
    lasting: bool = False
    """Whether later calls may rely on it: not where no rank had anything that counts."""
    problem: Exception | None = None
    """What this rank has to say against it: it takes part in what follows with a record that it has raised."""


class Caller(NamedTuple):
    """One call of this rank."""

    name: str
    group: dist.ProcessGroup
    number: int
    """In this group, from 1 on."""
    call_name: str
    """Of its ``grad_fn``, as ranks call it among themselves."""

    def exchange(self, mine: Description | None) -> Alike | Answers:
        """What all ranks have, where that is alike; else what each of them has, the same list on every rank."""
        with groups.explaining_errors(self.name, self.group):
            alike = self._compare(mine)
        return groups.exchange(self.name, self.group, (self.number, self.call_name, mine)) if alike is None else alike

    def raise_for_calls(self) -> NoReturn:
        """Ranks make different calls: an error, the same on every rank, that names them all."""
        answers = self.exchange(None)
        assert not isinstance(answers, Alike), "a call that has raised is not alike"
        raise problems.calls_differ(self.name, self.group, answers)

    def _compare(self, mine: Description | None) -> Alike | None:
        """None where ranks differ, or one has raised. NOTE [fingerprints]"""
        group, rank, world = self.group, dist.get_rank(self.group), self.group.size()
        facts = () if mine is None else (mine.params, mine.options)
        known = mine is not None and mine.layout is not None
        # A rank without a layout says nothing of it: the least that a MAX can be.
        layout = fingerprint(mine.layout, mine.specs) if mine is not None and known else [-(2**63)] * WORDS
        hashes = [*fingerprint(self.number, self.call_name), *fingerprint(facts)]
        counts = [
            mine is None,
            not known,
            (world - rank) if known else 0,
            0 if mine is None else len(mine.order) * world + world - 1 - rank,
        ]
        complements = [~word for word in hashes] + [~word if known else -(2**63) for word in layout]
        device = groups.device(group)
        words = torch.tensor([*hashes, *layout, *complements, *map(int, counts)], device=device)
        dist.all_reduce(words, op=dist.ReduceOp.MAX, group=group)
        weight = torch.tensor([0.0 if mine is None else mine.weight], dtype=torch.float64, device=device)
        dist.all_reduce(weight, group=group)
        found = words.tolist()
        most, least = found[: 3 * WORDS], [~word for word in found[3 * WORDS : 6 * WORDS]]
        raised, unknown, first, longest = found[6 * WORDS :]
        differ = most[: 2 * WORDS] != least[: 2 * WORDS] or (first and most[2 * WORDS :] != least[2 * WORDS :])
        if raised or differ:
            return None
        assert mine is not None
        told: tuple[tuple[Spec, ...], bytes] | None = (mine.specs, mine.layout) if mine.layout is not None else None
        if first and unknown:
            told = groups.tell(group, world - first, told)
        order = mine.order if longest < world else groups.tell(group, world - 1 - longest % world, mine.order)
        ranks = dist.get_process_group_ranks(group)
        return Alike(None if told is None else (ranks[world - first], *told), weight.item(), order)


WORDS = 4
"""Of a fingerprint."""


def fingerprint(*facts: Any) -> list[int]:
    """256 bits, as integers that collectives take; of what reads alike on every rank where it is alike."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return [int.from_bytes(digest[8 * n : 8 * n + 8], "little", signed=True) for n in range(WORDS)]


def compare(caller: Caller, mine: Description) -> Alike | list[Description]:
    """Exchange descriptions; an error, on every rank, where calls, parameters or options differ."""
    name, group, channel = caller.name, caller.group, channels.of(caller.group)
    answers = caller.exchange(mine)
    if isinstance(answers, Alike):
        channel.number = max(channel.number, caller.number)
        return answers
    channel.number = max(channel.number, *(number for number, _, _ in answers))
    everyone = [each for _, _, each in answers if each is not None]
    if len(everyone) < len(answers):
        raise problems.calls_raised(name, group, [each is None for _, _, each in answers])
    if len({answer[:2] for answer in answers}) > 1:
        raise problems.calls_differ(name, group, answers)
    _check_alike(name, group, everyone)
    return everyone


def agree(options: Options, caller: Caller, bound: Bound, mine: Description, layout: Layout | None) -> Found:
    """What all ranks will send. An error that is raised here is raised on every rank."""
    name, group, channel = options.name, caller.group, channels.of(caller.group)
    everyone = compare(caller, mine)
    if isinstance(everyone, Alike):
        known, total, order = [] if everyone.known is None else [everyone.known], everyone.weight, everyone.order
    else:
        ranks = dist.get_process_group_ranks(group)
        pairs = zip(ranks, everyone, strict=True)
        known = [(rank, each.specs, each.layout) for rank, each in pairs if each.layout is not None]
        total, order = sum(each.weight for each in everyone), max((each.order for each in everyone), key=len)
    if not known:
        return Found(None)
    assert options.sync is not None
    specs = known[0][1]
    gradients = len(bound.params) * layouts.targets(options, specs)
    plan = bound.plan(options, specs, _whole(order, gradients) if options.sync.overlap else None)
    shape = wire.shape(plan, group.size(), channels.COLUMNS, bound.way)
    try:
        layout = _common(name, group, known, layout)
    except Exception as error:  # ranks that differ; a class that cannot be imported here
        return Found(shape, problem=error)
    agreement = Agreement(channel.agreements, shape, layout, plan, scales.scale(total))
    return Found(shape, agreement, bool(total) or options.reduction == "sum")


def _common(
    name: str, group: dist.ProcessGroup, known: Sequence[tuple[int, tuple[Spec, ...], bytes]], own: Layout | None
) -> Layout:
    """The layout that all ranks have that have seen a micro-batch."""
    found: list[Layout] = []
    for rank, _, layout in known:
        try:
            found.append(own if rank == dist.get_rank() and own is not None else pickle.loads(layout))
        except Exception as error:  # whatever a class does that is not the same here
            raise TypeError(
                f"{name}: with sync, ranks tell each other the structure of aux, and that of rank {rank} cannot be read on "
                f"rank {dist.get_rank()}: {error}. Return it in containers of classes that every rank can import"
            ) from error
    for (rank, _, _), other in zip(known[1:], found[1:], strict=True):
        problem = layouts.difference(found[0], other)
        if problem is not None:
            raise ValueError(f"{name}: ranks {known[0][0]} and {rank} differ: {problem}; {groups.named(group)}")
    return found[0]


def _code_of(loss_fn: Any) -> str:
    """Where the code of a loss stands: module, name and line, without what differs between machines."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    with contextlib.suppress(ValueError):
        loss_fn = inspect.unwrap(loss_fn)
    if not hasattr(loss_fn, "__qualname__"):
        loss_fn = type(loss_fn)
    code = getattr(loss_fn, "__code__", None)
    line = "" if code is None else f":{code.co_firstlineno}"
    return f"{loss_fn.__module__}.{loss_fn.__qualname__}{line}"


def _whole(order: Sequence[int], number: int) -> list[int]:
    """All parameters: those that the last backward pass did not reach come last, as they wait for its end."""
    reached = set(order)
    return [*order, *(i for i in reversed(range(number)) if i not in reached)]


def _check_alike(name: str, group: dist.ProcessGroup, everyone: Sequence[Description]) -> None:
    """The same error on every rank, naming the first difference from the group's first rank."""
    ranks, first = dist.get_process_group_ranks(group), everyone[0]
    for rank, each in zip(ranks[1:], everyone[1:], strict=True):
        problem = None
        if each.options != first.options:
            (option, one), (_, other) = next((a, b) for a, b in zip(first.options, each.options, strict=True) if a != b)
            problem = f"{option}={one!r} on rank {ranks[0]}, {option}={other!r} on rank {rank}"
        elif each.params != first.params:
            problem = _difference(ranks[0], first.params, rank, each.params)
        if problem is not None:
            raise ValueError(
                f"{name}: ranks {ranks[0]} and {rank} differ: {problem}. Every rank of {groups.named(group)} "
                "must call the same grad_fn with parameters of the same structure, shapes and dtypes"
            )


def _difference(rank: int, params: tuple[Any, ...], other: int, others: tuple[Any, ...]) -> str:
    for a, b in zip(params, others, strict=False):
        if a[0] != b[0]:
            return f"the first parameter that differs is {a[0]} on rank {rank}, {b[0]} on rank {other}"
        if a != b:
            return f"{a[0]} is {a[2]} of shape {a[1]} on rank {rank}, {b[2]} of shape {b[1]} on rank {other}"
    (fewer, _), (more, longer) = sorted([(params, rank), (others, other)], key=lambda each: len(each[0]))
    return f"rank {longer} has {len(more)} parameters, {more[len(fewer)][0]} among them, the other {len(fewer)}"
