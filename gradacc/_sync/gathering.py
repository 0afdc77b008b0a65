"""A call that brings what each rank has to all of them: parts of parameters, or numbers.

It is a call like that of a ``grad_fn``: ranks agree at first use, fail together, and find out where they make different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc._sync import agreement as agreements
from gradacc._sync import channel as channels
from gradacc._sync import crossing, wire
from gradacc._sync import group as groups
from gradacc._sync import record as records
from gradacc._sync.agreement import Description
from gradacc._sync.channel import COLUMNS, FINE, SWITCHING
from gradacc._sync.crossing import Flat
from gradacc._sync.sending import Sending
from gradacc._sync.turn import DESCRIPTIONS, GREETING, SUMS, Next, Turn


class Known(NamedTuple):
    """What later calls rely on."""

    identity: int
    shape: wire.Shape


Lasting = WeakKeyDictionary[dist.ProcessGroup, dict[Description, Known]]
"""What ranks have agreed on, by group and by what they said of themselves."""


class Gathering(Turn):
    """One call's walk."""

    def __init__(self, name: str, group: dist.ProcessGroup, lasting: Lasting, described: Description) -> None:
        super().__init__(name, name, group, channels.of(group))
        self._lasting, self._described = lasting.setdefault(group, {}), described
        self._known: Known | None = self._lasting.get(described)

    def cross(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of each, which has one dimension and is as long on every rank: a row for each rank."""
        try:
            return self._cross(tensors)
        except BaseException as error:
            self.leave_for_next_call()
            groups.release(error)
            raise

    def done(self) -> None:
        """The call returns what it is to return."""
        self.channel.apart = False

    def next_of_another_shape(self) -> Next:
        """An exchange of descriptions, or what was agreed on."""
        return Next(DESCRIPTIONS) if self._known is None else Next(SUMS, self._known.shape)

    def note_success(self, table: Tensor, largest: float) -> None:
        """The agreement, where it is new."""
        assert self._known is not None
        self.channel.agreements = max(self.channel.agreements, self._known.identity + 1)
        self._lasting[self._described] = self._known

    def _cross(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with self.failing_together():
            shape = _shape(tensors)
        if self.next.kind == GREETING and (self._known is None or self.next.shape != shape):
            with self.failing_together():
                sending = self.open()
                identity = channels.FIRST if self._known is None else self._known.identity
                sending.launch_rest(self.record(sending.shape.columns, SWITCHING, identity))
            self.conclude()
            self.raise_problem()
        if self._known is None:
            with self.exchanging():
                agreements.compare(self.caller(), self._described)
                self._known = Known(self.channel.agreements, shape)
                self.set_next(SUMS, shape)
        with self.failing_together():
            sending = self._send(tensors)
        self.conclude()
        self.raise_problem()
        return [sending.wait(at).numbers for at in range(len(tensors))]

    def _send(self, tensors: Sequence[Tensor]) -> Sending:
        assert self._known is not None
        sending = self.open()
        for at, tensor in enumerate(tensors):
            sending.flat(at).numbers.copy_(tensor)
            sending.launch(self.record(COLUMNS, FINE, self._known.identity))
        return sending


def _shape(tensors: Sequence[Tensor]) -> wire.Shape:
    last = len(tensors) - 1
    flats = [
        Flat(
            crossing.GATHERED,
            len(tensor),
            0,
            records.digits(COLUMNS, tensor.dtype) if at == last else 0,
            tensor.dtype,
            tensor.dtype,
            tensor.device,
        )
        for at, tensor in enumerate(tensors)
    ]
    return wire.Shape(tuple(flats), last, COLUMNS)


def describe(params: Sequence[tuple[str, tuple[int, ...], torch.dtype]], *options: tuple[str, object]) -> Description:
    """What a rank says of itself."""
    return Description(tuple(params), options, (), None, 0.0, ())
