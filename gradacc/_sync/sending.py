"""Flats on their way, in order, with a record of every rank behind one of them."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc._sync import group as groups
from gradacc._sync import record as records
from gradacc._sync import wire
from gradacc._sync.crossing import Arrived, Crossing

BEHIND = 2
"""How many flats are sent before the sums of one are sent back (NOTE [ways]): the network is not idle while one is added up.

It is a number, and not what has arrived, as every rank sends in the same order."""


class Sending:
    """What crosses in one `wire.Shape`, launched in order."""

    def __init__(self, name: str, group: dist.ProcessGroup, shape: wire.Shape) -> None:
        self.name, self.shape = name, shape
        self._group = weakref.ref(group)  # NOTE [the end of a process] in `group.py`
        self.crossings: list[Crossing | None] = [None] * len(shape.flats)

    @property
    def launched(self) -> int:
        """How many."""
        return sum(crossing is not None and crossing.started for crossing in self.crossings)

    def flat(self, at: int) -> Crossing:
        """Where to put what crosses; not filled at first."""
        crossing = self.crossings[at]
        if crossing is None:
            crossing = self.crossings[at] = Crossing(self.shape.flats[at], self._held())
        return crossing

    def launch(self, record: Tensor | None) -> None:
        """The next one; that behind which the records ride needs this rank's."""
        at = self.launched
        crossing = self.flat(at)
        group = self._held()
        coded = None
        if at == self.shape.header:
            assert record is not None
            coded = records.encode(record, crossing.flat.wire)
        with groups.explaining_errors(self.name, group):
            if at >= BEHIND:
                self.flat(at - BEHIND).go_on(group)
            crossing.start(group, coded)

    def launch_rest(self, record: Tensor) -> None:
        """What has not been launched, without anything in it but the record."""
        while self.launched < len(self.crossings):
            if self.crossings[self.launched] is None:
                self.flat(self.launched).clear()
            self.launch(record)

    def wait(self, at: int) -> Arrived:
        """What came, of number ``at``; when all have been launched."""
        group = self._held()
        with groups.explaining_errors(self.name, group):
            for each in range(max(0, len(self.crossings) - BEHIND), len(self.crossings)):
                self.flat(each).go_on(group)
            return self.flat(at).arrived()

    def table(self, beside: Tensor | None) -> tuple[Tensor, float]:
        """All ranks' records, one a row; and the value of a 0-dim tensor (1, where there is none), in the same read."""
        slots = self.flat(self.shape.header).arrived().records
        if beside is None:
            return records.decode(slots.cpu(), self.shape.columns), 1.0
        numbers = torch.cat([slots.flatten(), beside.to(slots).view(1)]).cpu()
        return records.decode(numbers[:-1].view(slots.shape), self.shape.columns), float(numbers[-1])

    def _held(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None
        return group
