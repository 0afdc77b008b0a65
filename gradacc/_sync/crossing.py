"""How one flat tensor of numbers crosses between ranks, with what rides behind it.

NOTE [ways]
    `SUMMED`: one all-reduce. In what order ranks are added is the backend's.

    `ORDERED`: an all-to-all brings each rank a part of every rank's numbers, which it adds in rank order in the accumulators'
    dtype; an all-gather brings the sums back, as wide as they came. It sends what a ring all-reduce does, and no bit depends on
    where a number is in a flat. Numbers that cross in half precision are rounded twice, however many ranks there are.

    `SCATTERED`: the first half of that: each rank keeps the sums that it has made. gloo has no reduce-scatter of its own
    (torch's all-reduces and keeps a part). `REDUCED`: the backend's own reduce-scatter, where it has one.

    `GATHERED`: an all-gather alone: nothing is added.

    Behind the numbers cross riders (sums of which every rank needs all) and records. What is summed has a slot for each rank,
    where the others add zeros (NOTE [one collective]); elsewhere a rank has one. An all-reduce or an all-gather carries what a
    rank has behind its numbers once. `SCATTERED` and `REDUCED` have a message for each rank, and all of it is in every one of
    them: a rank sends every rider W times, for W ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SUMMED, ORDERED, SCATTERED, REDUCED, GATHERED = range(5)
"""NOTE [ways]"""


class Flat(NamedTuple):
    """What is alike on all ranks."""

    way: int
    numel: int
    """Numbers: of `SCATTERED` and `REDUCED` those of one rank (as many on each); else all that a rank sends."""
    riders: int
    """Behind them."""
    digits: int
    """Of one rank's record; 0 where records ride elsewhere."""
    wire: torch.dtype
    """In which they cross,"""
    dtype: torch.dtype
    """and are added."""
    device: torch.device


class Arrived(NamedTuple):
    """What came."""

    numbers: Tensor
    """Of one dimension: sums; of `GATHERED` a row for each rank."""
    riders: Tensor
    """A row of sums; or one of each rank."""
    records: Tensor
    """A row for each rank, coded."""


def is_summed_by_backend(way: int) -> bool:
    """Whether what rides behind the numbers is added with them."""
    return way in (SUMMED, REDUCED)


class Crossing:
    """One flat on its way. The group is not held: NOTE [the end of a process] in ``group.py``."""

    def __init__(self, flat: Flat, group: dist.ProcessGroup) -> None:
        self.flat, self.world, self.rank = flat, group.size(), group.rank()
        self.numbers, self.behind = self._room()
        """Where to put numbers (of parts: a row for each rank), and what rides behind them."""
        self._work: dist.Work | None = None
        """What is to be waited for next."""
        self.started = self._moved = False
        self._came: Tensor | None = None
        self._summed: Arrived | None = None

    @property
    def riders(self) -> Tensor:
        """Where to put them."""
        return self.behind[: self.flat.riders]

    def clear(self) -> None:
        """A rank that has nothing to give sends zeros."""
        self.numbers.zero_()
        self.behind.zero_()

    def start(self, group: dist.ProcessGroup, record: Tensor | None) -> None:
        """Send it, with this rank's coded record."""
        flat = self.flat
        if record is not None:
            slots = self.behind[flat.riders :].view(-1, flat.digits).zero_()
            slots[self.rank if is_summed_by_backend(flat.way) else 0].copy_(record)
        if flat.way == SUMMED:
            self._came = self._whole
            self._work = dist.all_reduce(self._whole, group=group, async_op=True)
        elif flat.way == ORDERED:
            if flat.numel:
                self._came = torch.empty_like(self._whole)
                self._work = dist.all_to_all_single(self._came, self._whole, group=group, async_op=True)
        elif flat.way == GATHERED:
            self._gather(group, self._whole)
        else:
            whole = self._whole
            whole[:, flat.numel :] = self.behind
            came = self._came = torch.empty_like(whole) if flat.way == SCATTERED else whole.new_empty(whole.shape[1])
            if flat.way == SCATTERED:
                self._work = dist.all_to_all_single(came, whole, group=group, async_op=True)
            else:
                self._work = dist.reduce_scatter_single(came, whole.view(-1), group=group, async_op=True)
        self.started = True

    def go_on(self, group: dist.ProcessGroup) -> None:
        """Add up what came, and give back the memory of what was sent; send the sums, where all ranks need them."""
        flat = self.flat
        if flat.way not in (ORDERED, SCATTERED, REDUCED) or self._moved:
            return
        if self._work is not None:
            self._work.wait()
        if flat.way == SCATTERED:
            assert self._came is not None
            rows = self._came
            behind = rows[:, flat.numel :].clone()
            self._summed = parted(flat, self.world, sum_of(rows[:, : flat.numel], flat.dtype), behind)
            self._came = self._work = None
        elif flat.way == REDUCED:
            self._work = None
        else:
            rows = self.behind.new_empty(self.world, 0) if self._came is None else self._came.view(self.world, -1)
            self._gather(group, torch.cat([sum_of(rows, flat.dtype).to(flat.wire), self.behind]))
        self._moved = True
        # What was sent has arrived; nobody needs its memory any more (which torch's handle held, too).
        del self._whole, self.numbers

    def arrived(self) -> Arrived:
        """Wait for what comes."""
        flat = self.flat
        if self._summed is None:
            if self._work is not None:
                self._work.wait()
            came = self._came
            assert came is not None
            if is_summed_by_backend(flat.way):
                self._summed = parted(flat, self.world, came[: flat.numel], came[flat.numel :].view(1, -1))
            else:
                rows = came.view(self.world, -1)
                columns = rows.shape[1] - len(self.behind)
                numbers = rows[:, :columns]
                if flat.way == ORDERED:
                    numbers = numbers.reshape(-1)[: flat.numel]
                self._summed = parted(flat, self.world, numbers, rows[:, columns:])
        return self._summed

    def _room(self) -> tuple[Tensor, Tensor]:
        flat, world = self.flat, self.world
        summed = is_summed_by_backend(flat.way)
        behind = flat.riders + (world if summed else 1) * flat.digits
        if flat.way in (SUMMED, GATHERED):
            self._whole = torch.empty(flat.numel + behind, dtype=flat.wire, device=flat.device)
            return self._whole[: flat.numel], self._whole[flat.numel :]
        apart = torch.empty(behind, dtype=flat.wire, device=flat.device)
        if flat.way == ORDERED:
            self._whole = torch.empty(-(-flat.numel // world) * world, dtype=flat.wire, device=flat.device)
            self._whole[flat.numel :].zero_()
            return self._whole[: flat.numel], apart
        self._whole = torch.empty(world, flat.numel + behind, dtype=flat.wire, device=flat.device)
        return self._whole[:, : flat.numel], apart

    def _gather(self, group: dist.ProcessGroup, message: Tensor) -> None:
        came = message.new_empty(self.world * len(message))
        self._work = dist.all_gather_single(came, message, group=group, async_op=True)
        self._came = came


def parted(flat: Flat, world: int, numbers: Tensor, behind: Tensor) -> Arrived:
    """Numbers, and the rows of what came behind them, which are riders and records."""
    return Arrived(numbers, behind[:, : flat.riders], behind[:, flat.riders :].reshape(world, flat.digits))


def sum_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Of all rows, from the first to the last."""
    total = rows[0].to(dtype, copy=True)
    for row in rows[1:]:
        total.add_(row)
    return total
