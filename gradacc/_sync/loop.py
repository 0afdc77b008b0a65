"""One rank's loop over windows, beside the others' loops: `gradacc.data.windows` with a group."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from gradacc._sync import channel as channels
from gradacc._sync import group as groups
from gradacc._sync.gather import Gather
from gradacc._sync.turn import Turn


class Loop:
    """What ranks tell each other between windows. The group is held by torch alone: NOTE [the end of a process]."""

    def __init__(self, name: str, group: weakref.ref[dist.ProcessGroup]) -> None:
        self.name, self._group = name, group
        self._calls = channels.of(self.group)
        self._before: int | None = None
        """The number of the latest call with ``sync`` in this group, when the latest window began."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks."""
        group = self._group()
        if group is None:
            raise RuntimeError(f"{self.name}: the process group was destroyed; make the windows again with a new one")
        return group

    def begin_window(self) -> None:
        """The caller gets a window."""
        self._before = self._calls.number

    def exchange(self, unknown: bool, left: int, raised: bool) -> tuple[bool, int]:
        """Whether any rank cannot count its windows, and the most that any rank has left.

        Raises:
            RuntimeError: a loader, or a schedule, has raised on another rank.
        """
        group, rank = self.group, dist.get_rank()
        flags = torch.tensor([unknown, left, rank + 1 if raised else 0], device=groups.device(group))
        with groups.explaining_errors(self.name, group):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
        anyone, most, failed = flags.tolist()
        if failed:
            raise RuntimeError(
                f"{self.name}: no window on rank {rank}, because the loader (or steps) raised on rank {failed - 1} of "
                f"{groups.named(group)}; see the error there"
            )
        return bool(anyone), most

    def fail(self, error: Exception) -> None:
        """This rank's loop ends by an error: it takes part in the call that the others make, if the last window made one."""
        if self._before is not None and self._calls.number > self._before:
            # In the place of a call that this rank would make now, if it had not raised.
            turn = Turn(self.name, self.name, self.group)
            turn.begin()
            if turn.channel.gathers:
                Gather(turn, returns=False).fail(error)
            turn.fail(error)
