"""A call that brings what each rank has to all of them: parts of parameters, or numbers.

It is a call like that of a ``grad_fn``: ranks agree at first use, fail together, and find out where they make different ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _dtypes
from gradacc._cut import Cut
from gradacc._sync import agreement as agreements
from gradacc._sync import crossing, wire
from gradacc._sync import record as records
from gradacc._sync.agreement import Description, Known
from gradacc._sync.channel import COLUMNS, FINE
from gradacc._sync.crossing import Flat
from gradacc._sync.turn import NAMES, SUMS, Turn


class Message(NamedTuple):
    """What a rank brings: so many numbers, and how they are put where they leave from."""

    numel: int
    dtype: torch.dtype
    device: torch.device
    write: Callable[[Tensor], object]


Lasting = WeakKeyDictionary[dist.ProcessGroup, dict[Description, Known]]
"""What ranks have agreed on, by group and by what they said of themselves."""


class Gathering(Turn):
    """One call's walk."""

    def __init__(self, name: str, group: dist.ProcessGroup, lasting: Lasting, described: Description) -> None:
        super().__init__(name, name, group)
        self._lasting, self._described = lasting.setdefault(group, {}), described
        self.agreement = self._lasting.get(described)

    def cross(self, messages: Sequence[Message]) -> list[Tensor]:
        """Of each, which is as long on every rank: a row for each rank."""
        with self.leaving_for_next_call():
            return self._cross(messages)

    def raise_problem(self) -> None:
        """Calls that differ are told with what each gathers."""
        params = self._described.params
        if self.next.kind == NAMES and params:
            elements = sum(math.prod(shape) for _, shape, _ in params)
            self.call_name += f" ({len(params)} tensors, {elements} elements, {params[0][0]} first)"
        super().raise_problem()

    def note_success(self, table: Tensor, largest: float) -> None:
        """The agreement, where it is new."""
        assert self.agreement is not None
        self.channel.agreements = max(self.channel.agreements, self.agreement.identity + 1)
        self._lasting[self._described] = self.agreement

    def _cross(self, messages: Sequence[Message]) -> list[Tensor]:
        with self.failing_together():
            shape = _shape(messages)
        self.greet(None if self.agreement is None else shape)
        if self.agreement is None:
            with self.exchanging():
                agreements.compare(self.caller(), self._described)
                self.agreement = Known(self.channel.agreements, shape)
                self.set_next(SUMS, shape)
        with self.sending() as sending:
            for at, message in enumerate(messages):
                message.write(sending.flat(at).numbers)
                sending.launch(self.record(COLUMNS, FINE, self.agreement.identity))
        return [sending.wait(at).numbers for at in range(len(messages))]


def _shape(messages: Sequence[Message]) -> wire.Shape:
    last = len(messages) - 1
    flats = []
    for at, (numel, dtype, device, _) in enumerate(messages):
        digits = records.digits(COLUMNS, dtype) if at == last else 0
        flats.append(Flat(crossing.GATHERED, numel, 0, digits, dtype, dtype, device))
    return wire.Shape(tuple(flats), last, COLUMNS)


def gather_parts(turn: Gathering | None, parts: Sequence[Tensor], into: Sequence[Tensor], cuts: Sequence[Cut]) -> None:
    """All ranks' parts, flat, into whole tensors: a collective for each dtype and device, or one with nothing but records.

    Without a ``turn`` there is nobody else.
    """
    if turn is None:
        for leaf, part in zip(into, parts, strict=True):
            leaf.copy_(part.view(leaf.shape))
        return
    members: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, leaf in enumerate(into):
        members.setdefault((_dtypes.real_dtype(leaf.dtype), leaf.device), []).append(index)
    messages = []
    for (dtype, device), indices in members.items():
        widths = [cuts[i].width * (2 if into[i].is_complex() else 1) for i in indices]
        write = functools.partial(_write, [parts[i] for i in indices], widths)
        messages.append(Message(sum(widths), dtype, device, write))
    rows = turn.cross(messages or [Message(0, torch.float32, turn.device, lambda nothing: None)])
    for row, indices in zip(rows, members.values(), strict=bool(members)):
        column = 0
        for i in indices:
            column += _assemble(into[i], row[:, column:], cuts[i])
    turn.done()


def _write(parts: Sequence[Tensor], widths: Sequence[int], numbers: Tensor) -> None:
    """Parts one behind the other, each as wide as the widest rank's."""
    for room, part in zip(torch.split(numbers, list(widths)), parts, strict=True):
        own = _dtypes.as_real(part).reshape(-1)
        room[: len(own)].copy_(own)
        room[len(own) :].zero_()


def _assemble(leaf: Tensor, rows: Tensor, cut: Cut) -> int:
    """A tensor of the parts that are the first columns of ``rows``; how many columns these are."""
    whole = leaf if leaf.is_contiguous() else torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    numbers, width = _dtypes.as_real(whole).view(-1), 2 if leaf.is_complex() else 1
    for run, own in cut.rows(numbers, width):
        own.copy_(rows.narrow(0, run.first, run.ranks)[:, : own.shape[1]])
    if whole is not leaf:
        leaf.copy_(whole)
    return cut.width * width


def describe(params: Sequence[tuple[str, tuple[int, ...], torch.dtype]], *options: tuple[str, object]) -> Description:
    """What a rank says of itself."""
    return Description(tuple(params), options, (), None, 0.0, ())
