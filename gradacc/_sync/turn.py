"""One call's walk through what crosses in it, which all ranks take together: NOTE [turns] in ``channel.py``."""

from __future__ import annotations

import contextlib
import math
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc._sync import channel as channels
from gradacc._sync import group as groups
from gradacc._sync import problems, wire
from gradacc._sync.agreement import Caller, Known
from gradacc._sync.begun import Begun
from gradacc._sync.channel import APART, DROPPED, RAISED, SWITCHING, Unfinished, note_told
from gradacc._sync.sending import Sending

DESCRIPTIONS, GREETING, SUMS, REST, NAMES, NOTHING = range(6)
"""What crosses: descriptions (NOTE [agreement]); sums, or records that say that they are of another shape; sums; what was
withheld from them (NOTE [scales]); what each rank has called, where that differs; nothing any more."""


class Next(NamedTuple):
    """What crosses next, on every rank alike."""

    kind: int
    shape: wire.Shape | None = None


class Turn(Unfinished):
    """One call of this rank in a group.

    Every rank takes the same steps, those too that have raised: they `abandon` the call, which is the same walk with nothing
    to give.
    """

    def __init__(self, name: str, call_name: str, group: dist.ProcessGroup) -> None:
        self.name, self.call_name, self.channel = name, call_name, channels.of(group)
        self._group = weakref.ref(group)
        self.number = self.channel.begin()
        self._begun: Next | None = None
        self._sending: Sending | None = None
        self._problem: Exception | None = None
        self.agreement: Known | None = None
        """None before first use."""
        self.begun: Begun | None = None
        self.window = 0
        """The number of the window that is the batch, or 0."""
        self.states, self.dropped = 0, False
        """What there was in it when the call began: NOTE [windows that are dropped]."""
        self.device = torch.device("cpu")
        """Of the parameters, where they are known."""
        self.compares = False
        """Whether `states` is a value that is the same on every rank, a float's bits."""

    @property
    def group(self) -> dist.ProcessGroup:
        """Held by torch alone: NOTE [the end of a process] in ``group.py``."""
        group = self._group()
        if group is None:
            raise RuntimeError(f"{self.name}: the process group was destroyed while the call ran")
        return group

    def caller(self) -> Caller:
        """This call, with the group: not to be kept."""
        return Caller(self.name, self.group, self.number, self.call_name)

    def begin(self) -> None:
        """First of all, what earlier calls have left."""
        with self.leaving_for_next_call(), torch.inference_mode(False):
            self.channel.finish_earlier_calls(self.name, self.group)

    def compare(self, value: float) -> None:
        """Have a value compared with the others' when the call ends."""
        self.compares, self.states = True, struct.unpack("<q", struct.pack("<d", value))[0]

    def abandon(self) -> None:
        """Take part in what is left of the call without anything to give, and say that it has raised."""
        while self.next.kind != NOTHING:
            if self.next.kind == DESCRIPTIONS:
                with self.exchanging():
                    self.caller().exchange(None)
            elif self.next.kind == NAMES:
                with contextlib.suppress(RuntimeError):
                    self.raise_problem()
            else:
                sending = self.open()
                sending.launch_rest(self.record(sending.shape.columns, RAISED))
                self.conclude(keep=False)

    @property
    def is_over(self) -> bool:
        return self._begun is not None and self._begun.kind == NOTHING

    @contextlib.contextmanager
    def leaving_for_next_call(self) -> Iterator[None]:
        """Around all that is sent: what is left of it where that is interrupted is for the next call of this group."""
        try:
            yield
        except BaseException as error:
            self.leave_for_next_call()
            groups.release(error)
            raise

    @property
    def next(self) -> Next:
        """At first what the channel expects: not before the call sends something, as its iterator may make other calls."""
        if self._begun is None:
            expected = self.channel.expected
            self._begun = Next(DESCRIPTIONS) if expected is None else Next(GREETING, expected)
        return self._begun

    def set_next(self, kind: int, shape: wire.Shape | None = None) -> None:
        """The next step."""
        self._begun, self._sending = Next(kind, shape), None
        if kind == NOTHING:
            self.channel.stop_sending(self)
            self.note_over()

    def open(self) -> Sending:
        """What is sent in this step."""
        if self._sending is None:
            self._start_sending()
            assert self.next.shape is not None
            self._sending = Sending(self.name, self.group, self.next.shape)
        return self._sending

    def _start_sending(self) -> None:
        try:
            self.channel.start_sending(self.name, self.group, self)
        except RuntimeError:
            # What the channel expects, when this call is told, is not known yet.
            self._begun = None
            raise

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around what can raise on this rank alone."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    @contextlib.contextmanager
    def sending(self) -> Iterator[Sending]:
        """Around what is sent in this step; then comes what all ranks have found, and is raised where it is a problem."""
        with self.failing_together():
            yield self.open()
        self.conclude()
        self.raise_problem()

    def greet(self, shape: wire.Shape | None) -> None:
        """Where calls of another shape than this one's are expected (None: it is not known), say so.

        Then all ranks take the step that follows.
        """
        if self.next.kind == GREETING and self.next.shape != shape:
            with self.sending() as sending:
                identity = channels.FIRST if self.agreement is None else self.agreement.identity
                sending.launch_rest(self.record(sending.shape.columns, SWITCHING, identity))

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around exchanges, which end a call where they raise, and cannot be taken up again where they are interrupted.

        They are the last step, unless another one is named inside.
        """
        self._start_sending()
        step = self.next
        try:
            yield
        except Exception as error:
            self.set_next(NOTHING)
            note_told(error)
            raise
        except BaseException:
            self.set_next(NOTHING)
            self.channel.broken = True
            raise
        if self.next is step:
            self.set_next(NOTHING)

    def record(self, columns: int, status: int, identity: int = 0) -> Tensor:
        """Of a rank that has nothing to give."""
        record = torch.zeros(columns, dtype=torch.int64)
        record[0] = channels.bits(status, APART * self.channel.apart, DROPPED * self.dropped)
        record[channels.NUMBER], record[channels.IDENTITY] = self.number, identity
        record[channels.BEGUN], record[channels.WINDOW] = self.states, self.window
        return record

    def conclude(self, keep: bool = True) -> None:
        """Wait for what was sent; then this rank takes the step that all of them take, and knows what is wrong.

        ``keep``: whether this rank needs the sums.
        """
        sending, (kind, shape) = self.open(), self.next
        assert shape is not None
        table, largest = sending.table(self.wait_for_sums(sending, keep))
        self._begun, self._sending = Next(NOTHING), None
        try:
            self._read_records(kind, shape, table, largest)
        finally:
            if self.next.kind == NOTHING:
                self.set_next(NOTHING)

    def _read_records(self, kind: int, shape: wire.Shape, table: Tensor, largest: float) -> None:
        """What the records say together: the next step, or what is wrong."""
        name, group, channel = self.name, self.group, self.channel
        rows = channels.rows(name, group, table)
        channel.number = max(channel.number, *(row.number for row in rows))
        statuses = {row.status for row in rows}
        dropped = [bool(row.bits & DROPPED) for row in rows]
        if any(dropped) and len({row.begun for row in rows}) > 1:
            self._problem = problems.windows_were_dropped(name, group, dropped)
            if self.begun is not None:
                self.begun.apart = True
        elif RAISED in statuses:
            self._problem = problems.calls_raised(name, group, [row.status == RAISED for row in rows])
        elif len({(row.status, row.number, row.identity) for row in rows}) > 1:
            self.set_next(NAMES)
        elif self.compares and not _are_near([row.begun for row in rows]):
            self._problem = problems.values_differ(name, group, [_number(row.begun) for row in rows])
        elif len({row.window for row in rows if row.window}) > 1:
            self._problem = problems.windows_differ(name, group, [row.window for row in rows])
        elif len({row.bits & APART for row in rows}) > 1:
            channel.apart = False
            self._problem = problems.result_was_missed(name, group, [bool(row.bits & APART) for row in rows])
        elif SWITCHING in statuses:
            channel.apart = False
            known = self.agreement
            self.set_next(*(Next(DESCRIPTIONS) if known is None else Next(SUMS, known.shape)))
        elif kind != REST:
            channel.apart = True  # until `done`
            channel.note_crossed(rows[0].identity, shape)
            self.note_success(table, largest)

    def raise_problem(self) -> None:
        """Raise what all ranks have found, if anything."""
        if self.next.kind == NAMES:
            with self.exchanging():
                self.caller().raise_for_calls()
        if self._problem is not None:
            note_told(self._problem)
            raise self._problem

    def wait_for_sums(self, sending: Sending, keep: bool) -> Tensor | None:
        """Wait for everything; a 0-dim tensor that is to be read with the records: `note_success`'s ``largest``."""
        for at in range(len(sending.crossings)):
            sending.wait(at)
        return None

    def done(self) -> None:
        """The call returns what it is to return."""
        self.channel.apart = False

    def note_success(self, table: Tensor, largest: float) -> None:
        """What later calls rely on, after one that went through on all ranks; and whether something crosses once more."""


@contextlib.contextmanager
def telling(name: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around what makes calls in a group: an error of this rank alone takes the place of the next one. Nobody waits."""
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and not getattr(cause, "_is_told", False):
            cause = cause.__cause__
        if cause is None and group is not None:
            with contextlib.suppress(Exception):  # this rank's own error is the one to see
                turn = Turn(name, name, group)
                turn.begin()
                turn.fail(error)
        raise


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _are_near(values: Sequence[int]) -> bool:
    """Floats, by their bits, that differ by rounding at most."""
    first, *others = (_number(bits) for bits in values)
    if math.isnan(first):
        return all(map(math.isnan, others))
    return all(first == other or math.isclose(first, other, rel_tol=1e-3, abs_tol=1e-9) for other in others)
