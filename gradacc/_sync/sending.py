"""All-reduces on their way, with a record of every rank at the end of one of them."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc._sync import group as groups
from gradacc._sync import record as records
from gradacc._sync import wire


class Sending:
    """The all-reduces of one `wire.Shape`, launched in order."""

    def __init__(self, name: str, group: dist.ProcessGroup, shape: wire.Shape) -> None:
        self.name, self.shape = name, shape
        self._group = weakref.ref(group)  # NOTE [the end of a process] in `group.py`
        self.flats: list[Tensor | None] = [None] * len(shape.flats)
        self.works: list[dist.Work] = []

    def flat(self, at: int) -> Tensor:
        """The tensor that crosses in all-reduce number ``at``; not filled at first."""
        flat = self.flats[at]
        if flat is None:
            numel, dtype, device = self.shape.flats[at]
            flat = self.flats[at] = torch.empty(numel, dtype=dtype, device=device)
        return flat

    def launch(self, record: Tensor | None) -> None:
        """The next all-reduce; the one at whose end the records ride needs this rank's."""
        at = len(self.works)
        flat = self.flat(at)
        group = self._held()
        if at == self.shape.header:
            assert record is not None
            slots = self._slots(flat).zero_()
            slots[group.rank()].copy_(records.encode(record, flat.dtype))
        with groups.explaining_errors(self.name, group):
            self.works.append(dist.all_reduce(flat, group=group, async_op=True))

    def launch_rest(self, record: Tensor) -> None:
        """What has not been launched, without anything in it but the record."""
        while len(self.works) < len(self.flats):
            if self.flats[len(self.works)] is None:
                self.flat(len(self.works)).zero_()
            self.launch(record)

    def wait(self, at: int) -> Tensor:
        """The sum, of all-reduce number ``at``."""
        with groups.explaining_errors(self.name, self._held()):
            self.works[at].wait()
        return self.flat(at)

    def table(self, beside: Tensor | None) -> tuple[Tensor, float]:
        """All ranks' records, one a row; and the value of a 0-dim tensor (1, where there is none), in the same read."""
        slots = self._slots(self.flat(self.shape.header))
        if beside is None:
            return records.decode(slots.cpu(), self.shape.columns), 1.0
        numbers = torch.cat([slots.flatten(), beside.to(slots).view(1)]).cpu()
        return records.decode(numbers[:-1].view(slots.shape), self.shape.columns), float(numbers[-1])

    def _slots(self, flat: Tensor) -> Tensor:
        world = self._held().size()
        return flat[len(flat) - world * records.digits(self.shape.columns, flat.dtype) :].view(world, -1)

    def _held(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None
        return group
