"""What the calls of one process have in common in a process group: their numbers, and what the next one looks like.

NOTE [turns]
    Collectives of different sizes do not meet: gloo aborts a process, NCCL waits. So that ranks which make different calls
    find out, the first thing that crosses in a call has a shape that every rank knows before it knows anything of its own
    call: that which followed, the last time, on calls like the latest ones. Whoever makes a call of another shape (of another
    ``grad_fn``, or the first one) sends zeros in the expected one, with a record that says so, and goes on if all ranks do
    the same. Where one ``grad_fn`` is called again and again, or several in turns, every shape is as expected, and nothing
    more crosses than there has to. A rank that raises before it knows what it would have sent takes part likewise.

    What is expected is derived from records, which all ranks have alike, and from nothing else.

    Two threads of a rank have no order that others could share. While one of them sends, or waits, the other's call is an error
    there, and the other ranks are told so in their next call.

NOTE [what a record says of its call]
    Which ``grad_fn`` it is of (how many this group had agreed on before), and the number of the call in this group, which is
    counted when a call begins, before anything can raise. Where ranks differ, all of them tell each other what they were about
    to call, and raise an error that names it. Then they have the same number again (the largest), and go on together.

    A rank that leaves out a call of the same ``grad_fn`` has the others' numbers in all that follow. Where the batch is a
    window of a loop that all ranks run (`gradacc.data.windows` with a group), the record says which one, and ranks in different
    ones get an error; elsewhere such a rank is found out when it makes one call less than the others, who then wait for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc._sync import group as groups
from gradacc._sync.wire import Shape

FINE, RAISED, SWITCHING = 0, 1, 2
"""How a rank's call goes; SWITCHING: it is of another shape than was expected."""

DIFFERENTIATED, ARRIVED, WITHHELD, APART, FAR, DROPPED = 4, 8, 16, 32, 64, 128
"""Bits beside it: of `gradacc._sums.Sums`; whether a loss reached the parameters; whether gradients are still to come (NOTE
[scales]); whether the call before this one raised on this rank when the others had their results; whether gradients of weights
that are not read do not fit, so that zeros came in their place (NOTE [scales]); and NOTE [windows that are dropped] in
``begun.py``."""

FIRST = -1
"""In the place of the number of a ``grad_fn`` that has none yet."""

NUMBER, IDENTITY, BEGUN, WINDOW, WEIGHT, UNIT, COLUMNS = range(1, 8)
"""Columns of every record, behind the status and its bits; weight and unit are floats."""

_MAGIC = 0x67726164 << 16


class Row(NamedTuple):
    """What a rank's record says of its call."""

    bits: int
    number: int
    identity: int
    begun: int
    window: int
    """Its number, from 1 on, or 0: `gradacc._window.Window`."""

    @property
    def status(self) -> int:
        """One of the three."""
        return self.bits & 3


class Channel:
    """Of a group. Its number, agreements and what is expected are the same on all ranks, between calls."""

    def __init__(self) -> None:
        self.number = 0
        """Of the latest call."""
        self.agreements = 0
        self.expected: Shape | None = None
        """None before the first call has gone through: then an exchange of descriptions is the first thing that crosses."""
        self.unfinished: list[Unfinished] = []
        """Calls that were left while others wait for them: by a KeyboardInterrupt, or without the memory to tell them."""
        self.gathers = False
        """Whether the latest call exchanged rows first: NOTE [three exchanges] in ``gather.py``."""
        self.broken = False
        """Whether it was left where nothing can be told any more."""
        self.apart = False
        """Whether the others may have a result of the latest call, and this rank has not."""
        self._sender: Unfinished | None = None
        """The call that sends, or waits for what it has sent."""
        self._lock = threading.Lock()
        self._latest: deque[tuple[int, Shape]] = deque(maxlen=32)
        """Of the latest calls that went through: which ``grad_fn``, and the shape."""
        self._same = 0
        """How many of them, at the end, are of one ``grad_fn``."""

    def begin(self) -> int:
        """The number of a new call."""
        self.number += 1
        return self.number

    def start_sending(self, name: str, group: dist.ProcessGroup, call: Unfinished) -> None:
        """This call sends; until it is `stop_sending`, no other one may.

        Raises:
            RuntimeError: another thread is in the middle of one.
        """
        with self._lock:
            if self._sender is None:
                self._sender = call
        if self._sender is not call:
            raise RuntimeError(
                f"{name}: another thread of rank {dist.get_rank()} is in the middle of a call in {groups.named(group)}, and "
                "what two calls send at once would be mixed up. In a group, every rank makes the same calls in the same "
                "order, one after the other: give each thread a group of its own (torch.distributed.new_group), or let one "
                "thread make the calls"
            )

    def stop_sending(self, call: Unfinished) -> None:
        """It has nothing to send any more."""
        if self._sender is call:
            self._sender = None

    def finish_earlier_calls(self, name: str, group: dist.ProcessGroup) -> None:
        """Bring to its end what earlier calls have left."""
        if self.broken:
            raise RuntimeError(
                f"{name}: an earlier call on this rank was interrupted while the ranks of {groups.named(group)} agreed; "
                "this group cannot be used any more. Make a new one"
            )
        while self.unfinished:
            self.unfinished[0].abandon()

    def note_crossed(self, identity: int, shape: Shape) -> None:
        """A call of this ``grad_fn`` has gone through."""
        self._same = self._same + 1 if self._latest and self._latest[-1][0] == identity else 1
        self._latest.append((identity, shape))
        self.expected = shape if self._same >= len(self._latest) else _following(list(self._latest))


class Unfinished:
    """A call, or a part of one, that has not told the others all that they wait for."""

    channel: Channel

    @property
    def is_over(self) -> bool:
        """Whether it has told them."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Tell them that it has raised."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """This rank's call raises: the others are told; where they cannot be waited for, in this rank's next call."""
        groups.release(error)
        note_told(error)
        if not isinstance(error, Exception):
            self.leave_for_next_call()
            return
        try:
            with torch.inference_mode(False):
                self.abandon()
        except Exception:  # this rank's own error is the one to see
            self.leave_for_next_call()

    def leave_for_next_call(self) -> None:
        """For the next call of this group."""
        if not self.is_over and self not in self.channel.unfinished:
            self.channel.unfinished.append(self)

    def note_over(self) -> None:
        """It has told them."""
        if self in self.channel.unfinished:
            self.channel.unfinished.remove(self)


def note_told(error: BaseException) -> None:
    """All ranks know of this error: those around what raised it tell nobody."""
    with contextlib.suppress(AttributeError):
        error._is_told = True  # type: ignore[attr-defined]


_channels: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()
"""By process group. It belongs to no ``grad_fn``: several of them, and different ones, speak in a group."""


def of(group: dist.ProcessGroup) -> Channel:
    """The channel of a group."""
    found = _channels.get(group)
    if found is None:
        found = _channels[group] = Channel()
    return found


def bits(status: int, *flags: int) -> int:
    """A record's first column."""
    return _MAGIC | status | sum(flags)


def rows(name: str, group: dist.ProcessGroup, table: Tensor) -> list[Row]:
    """What the records of all ranks say of their calls."""
    found = [Row(*row) for row in table[:, :WEIGHT].tolist()]
    if any(row.bits & ~0xFFFF != _MAGIC for row in found):
        raise RuntimeError(
            f"{name}: what came through {groups.named(group)} is no record of a call: another collective of this group was "
            "mixed up with this call's. Nothing was returned. Every rank must make the same calls in the same order"
        )
    return found


def _following(latest: Sequence[tuple[int, Shape]]) -> Shape:
    """What followed at that earlier place before which most of the latest calls came in the same order."""
    found, length = latest[-1][1], 0
    for end in range(len(latest) - 1, 0, -1):
        same = 0
        while same < end and latest[end - 1 - same][0] == latest[-1 - same][0]:
            same += 1
        if same > length:
            found, length = latest[end][1], same
    return found
