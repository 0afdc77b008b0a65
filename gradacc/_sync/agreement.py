"""What the ranks of a group find alike at first use. NOTE [agreement]"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _tree
from gradacc._options import Options
from gradacc._sync import group as groups
from gradacc._sync import layout as layouts
from gradacc._sync import wire
from gradacc._sync.layout import Layout

FINE, RAISED, CHANGED = 0, 1, 2
"""How a rank's call went: RAISED, and CHANGED where it returned another kind than was agreed on."""


class Agreement(NamedTuple):
    """What later calls rely on."""

    layout: Layout
    scale: float
    """A power of two near the total weight of the last call: gradients cross in units of it, in the range of a mean."""
    plan: wire.Plan


Agreed = WeakKeyDictionary[Any, dict[Any, Agreement]]
"""Of one ``grad_fn``: by process group and by the parameters' structure. It saves an exchange, and changes no result."""


@dataclass(frozen=True)
class _Description:
    """What a rank says of itself."""

    params: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    options: tuple[Any, ...] = ()
    layout: Layout | None = None
    weight: float = 0.0
    order: tuple[int, ...] = ()
    """Of the parameters, as their gradients were final in the last micro-batch's backward pass."""
    raised: bool = False


def agree(
    options: Options,
    group: dist.ProcessGroup,
    params: Sequence[Tensor],
    treedef: _tree.TreeDef,
    dtypes: Sequence[torch.dtype],
    layout: Layout | None,
    weight: float,
    order: Sequence[int],
    raised: bool,
) -> tuple[Agreement | None, bool]:
    """Exchange descriptions; None where there is nothing to sum yet, or this rank is about to raise.

    And whether later calls may rely on it: not where no rank had anything that counts.
    """
    assert options.sync is not None
    unknown = None
    try:
        pickle.dumps(layout)
    except Exception as error:  # whatever a user's class raises
        layout, raised, unknown = None, True, error
    paths = _tree.paths(treedef, "params")
    mine = _Description(
        tuple((path, tuple(p.shape), p.dtype) for path, p in zip(paths, params, strict=True)),
        (
            ("reduction", options.reduction),
            ("dtype", options.dtype),
            ("has_aux", options.has_aux),
            ("compress", options.sync.compress),
            ("overlap", options.sync.overlap),
        ),
        layout,
        weight,
        tuple(order),
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
    check_statuses(options.name, group, [RAISED if each.raised else FINE for each in everyone], raised)
    if raised:
        return None, False
    ranks = dist.get_process_group_ranks(group)
    _check_alike(options.name, group, everyone)
    known = [(rank, each.layout) for rank, each in zip(ranks, everyone, strict=True) if each.layout is not None]
    for rank, other in known[1:]:
        problem = layouts.difference(known[0][1], other)
        if problem is not None:
            raise ValueError(f"{options.name}: ranks {known[0][0]} and {rank} differ: {problem}; {groups.title(group)}")
    if not known:
        return None, False
    total = sum(each.weight for each in everyone)
    plan = wire.plan(
        [p.shape for p in params],
        dtypes,
        [p.device for p in params],
        known[0][1].specs(),
        options.sync.compress,
        _whole(max((each.order for each in everyone), key=len), len(params)) if options.sync.overlap else None,
    )
    return Agreement(known[0][1], scale(total), plan), bool(total) or options.reduction == "sum"


def tell(group: dist.ProcessGroup) -> None:
    """Take part in the exchange of a rank that raises before it knows anything."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, _Description(raised=True), group=group)


def scale(weight: float) -> float:
    """The power of two that is nearest."""
    return 2.0 ** round(math.log2(weight)) if weight else 1.0


def check_statuses(name: str, group: dist.ProcessGroup, statuses: Sequence[int], raised: bool) -> None:
    """An error that names the ranks whose calls raised, where this one's did not."""
    ranks = dist.get_process_group_ranks(group)
    failed = [rank for rank, status in zip(ranks, statuses, strict=True) if status != FINE]
    if failed and not raised:
        raise RuntimeError(
            f"{name}: no gradient on rank {dist.get_rank()}, because the call raised on rank"
            f"{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} of {groups.title(group)}; see the error there"
        )


def _whole(order: Sequence[int], number: int) -> list[int]:
    """All parameters: those that the last backward pass did not reach come last, as they wait for its end."""
    reached = set(order)
    return [*order, *(i for i in reversed(range(number)) if i not in reached)]


def _check_alike(name: str, group: dist.ProcessGroup, everyone: Sequence[_Description]) -> None:
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
                f"{name}: ranks {ranks[0]} and {rank} differ: {problem}. Every rank of {groups.title(group)} "
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
