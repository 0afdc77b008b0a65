"""Numbers of gradients that are divided over ranks: the same on all of them."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gradacc import _rows, _shard, _where
from gradacc._sync import gathering
from gradacc._sync import group as groups
from gradacc._sync import turn as turns
from gradacc._tree import TensorTree
from gradacc.optim._optimizer import StepFunction

_NORM = "the norm of gradients that are divided over ranks"
_VERDICT = "whether gradients that are divided over ranks are finite"


def telling(name: str, tree: Any) -> AbstractContextManager[None]:
    """Around a step of parts of gradients: an error of one rank is one of all, and nobody waits for it."""
    if _where.transforming():
        return contextlib.nullcontext()
    try:
        group = group_of(tree)
    except (TypeError, ValueError):  # which the step says
        group = ""
    if not group:
        return contextlib.nullcontext()
    return turns.telling(name, _resolved(group))


def together(name: str, step: StepFunction) -> StepFunction:
    """`telling` around the step of a wrapper."""

    @functools.wraps(step)
    def told(params: TensorTree, grads: TensorTree, state: TensorTree, *args: Any, **kwargs: Any) -> Any:
        with telling(name, grads):
            return step(params, grads, state, *args, **kwargs)

    return told


def group_of(tree: Any) -> str:
    """The name of the process group that the parts in a tree are divided over; empty where there is none."""
    names = {shard.facts.group for shard in _shard.shards(_rows.as_shards(_NORM, tree, "grads"))} - {""}
    if len(names) > 1:
        raise ValueError(f"gradients are divided over several process groups: {sorted(names)}; use one for all of them")
    return names.pop() if names else ""


class Asker:
    """One that asks for norms or verdicts, as ranks call it among themselves: by its name, and which one it is.

    That is counted in each group at first use: a rank may have made others before that never ask.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()

    def called(self, group: ProcessGroup) -> str:
        """In this group."""
        if group not in self._numbers:
            counts = _asked.setdefault(group, Counter())
            counts[self._name] += 1
            self._numbers[group] = counts[self._name]
        number = self._numbers[group]
        return self._name if number == 1 else f"{self._name}, number {number}"


_asked: WeakKeyDictionary[ProcessGroup, Counter[str]] = WeakKeyDictionary()


def total_norm(who: Asker, tree: Any, norm: Tensor) -> Tensor:
    """Of the norm of this rank's gradients: that of all ranks', where ``tree`` has parts of them."""
    name = group_of(tree)
    if not name:
        return norm
    (rows,) = _gathered((who, _NORM), name, norm.detach().double().reshape(1))
    total: Tensor = torch.linalg.vector_norm(rows)
    return total.to(norm)


def everywhere(who: Asker, tree: Any, fine: Tensor) -> Tensor:
    """Whether something holds on all ranks, where ``tree`` has parts of gradients: 0-dim, bool."""
    name = group_of(tree)
    if not name:
        return fine
    (rows,) = _gathered((who, _VERDICT), name, fine.double().reshape(1))
    return (rows != 0).all().to(fine.device)


_agreed: gathering.Lasting = gathering.Lasting()


def _gathered(asked: tuple[Asker, str], name: str, number: Tensor) -> Sequence[Tensor]:
    who, what = asked
    if _where.transforming():
        raise NotImplementedError(
            f"{what} cannot be said inside a functorch transform or a compiled function; call the step outside"
        )
    group = _resolved(name)
    what = f"{who.called(group)}, {what}"
    turn = gathering.Gathering(what, group, _agreed, gathering.describe([], ("gathers", what)))
    turn.begin()
    device = groups.device(group)
    rows = turn.cross([gathering.Message(1, torch.float64, device, lambda room: room.copy_(number))])
    turn.done()
    return rows


def _resolved(name: str) -> ProcessGroup:
    group = groups.of_name(name)
    if group is None:
        raise RuntimeError(
            f"grads are divided over the process group {name!r}, which is not there any more: torch.distributed was "
            "destroyed, or begun anew. Compute them, and the optimizer's state, with a group that lives"
        )
    return group
