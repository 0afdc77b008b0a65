"""How processes end after a last call: ``python -m tests.sync.ends COUNT [late] [HOW ...]``.

Starts COUNT pairs of ranks for each HOW (all of `CASES`, by default), one pair after the other, and prints how often they
ended with which exit codes, and how long the slowest pair took, in seconds by the clock and of the CPU. All of them destroy
their process group in a ``finally``, and check that nobody holds it then; but those of ``plain left`` (plain torch) and
``left``, for comparison.

``late``: the group's own threads get the processor only when nobody else wants it, so that they are late with what they do
after a collective is complete. It is what happens by chance on a busy machine.
"""

from __future__ import annotations

import collections
import os
import shutil
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradacc

HELD = 5
"""The exit code where somebody holds the group."""

CASES = {
    "returns": (0, 0),
    "raises": (1, 1),
    "raises with overlap": (1, 1),
    "raises at first use": (1, 1),
    "parameters differ": (1, 1),
    "interrupted": (-2, 1),
    "save raises": (1, 1),
    "windows": (1, 1),
    "finalize": (1, 1),
    "left": (1, 1),
    "plain left": (0, 0),
}
"""What ranks do, and the exit codes that they are to have."""


def be_late() -> None:
    """Everything on one processor, and of it nothing for other threads while this one wants it."""
    one = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, one)
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def work(how: str, rank: int, late: bool, folder: Path) -> None:
    """A rank's calls, of which the last one is the one that counts."""
    if how == "plain left":
        for call in range(3):
            if late and call == 2:
                be_late()
            dist.all_reduce(torch.ones(100_000), async_op=True).wait()
        return
    if how in ("windows", "finalize"):
        (loop if how == "windows" else stream)(rank, late)
        return
    last = 1 if how in ("raises at first use", "parameters differ") else 3
    calls: list[int] = []

    def counted(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2 * last - 1 and late:
            be_late()
        if rank == 0 and len(calls) == 2 * last and how not in ("returns", "parameters differ", "save raises"):
            raise KeyboardInterrupt if how == "interrupted" else ValueError("of this rank")
        return (x @ params["a"] @ params["b"]).square().mean()

    grad_fn = gradacc.accumulate(counted, steps=2, sync=gradacc.all_reduce(overlap=how == "raises with overlap"))
    params = {"a": torch.ones(16, 300), "b": torch.ones(300, 300 + (rank if how == "parameters differ" else 0))}
    for _ in range(last):
        grad_fn(params, torch.ones(4, 16))
    if how == "save raises":
        gradacc.checkpoint.save(folder / "c", {"rank": rank})


def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Any one."""
    return (x @ w).square().mean()


def loop(rank: int, late: bool) -> None:
    """Windows, whose loader raises on rank 0; a variable holds them, another the loop."""

    def loader() -> Iterator[torch.Tensor]:
        for number in range(8):
            if number == 4 and late:
                be_late()
            if number == 5 and rank == 0:
                raise ValueError("of this rank")
            yield torch.ones(4, 16)

    grad_fn = gradacc.accumulate(loss, sync=gradacc.all_reduce())
    windows = gradacc.data.windows(loader(), 2, group=dist.group.WORLD)
    left = iter(windows)
    for window in left:
        grad_fn(torch.ones(16, 300), window)


def stream(rank: int, late: bool) -> None:
    """The streaming form; what rank 0 gives to finalize at last is no state."""
    acc = gradacc.accumulator(loss, sync=gradacc.all_reduce())
    w, x = torch.ones(16, 300), torch.ones(4, 16)
    for call in range(3):
        state = acc.update(acc.init(w), w, x)
        if call == 2 and late:
            be_late()
        acc.finalize(x if call == 2 and rank == 0 else state)  # type: ignore[arg-type]


def be_a_rank(how: str, rank: int, late: bool, folder: Path) -> None:
    """One of two processes."""
    said = os.open(folder / f"said by {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    try:
        work(how, rank, late, folder)
    finally:
        if not how.endswith("left"):
            group: Any = weakref.ref(dist.group.WORLD)
            dist.destroy_process_group()
            if group() is not None:
                traceback.print_exc()
                os._exit(HELD)


def main(count: str, *arguments: str) -> tuple[str, int, bool, Path] | None:
    """What this process is to do as a rank; None in the one that has started them all, and printed its counts."""
    torch.set_num_threads(1)
    gradacc.accumulate(lambda w, x: (w * x).mean(), steps=2)(torch.ones(()), torch.ones(2))  # what a first time imports
    late = "late" in arguments
    base = Path(tempfile.mkdtemp())
    for how in [name for name in arguments if name != "late"] or CASES:
        rank = start(how, int(count), late, base)
        if rank is not None:
            return rank
    shutil.rmtree(base)
    return None


def start(how: str, count: int, late: bool, base: Path) -> tuple[str, int, bool, Path] | None:
    """The same, for one of the cases."""
    codes: collections.Counter[tuple[int, ...]] = collections.Counter()
    slowest = (0.0, 0.0)
    for run in range(count):
        folder = base / f"{how} {run}"
        folder.mkdir()
        began, used = time.monotonic(), os.times()
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                return how, rank, late, folder
            children.append(child)
        ended = tuple(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        took = os.times()
        cpu = took.children_user + took.children_system - used.children_user - used.children_system
        slowest = max(slowest, (time.monotonic() - began, cpu))
        codes[ended] += 1
        if ended != CASES[how] and not how.endswith("left"):
            for said in sorted(folder.glob("said by *")):
                print(said.read_text(errors="replace"), file=sys.stderr)
    told = ", ".join(f"{number} x {ended}" for ended, number in codes.most_common())
    print(f"{how}: {told}; the slowest took {slowest[0]:.1f} s, {slowest[1]:.1f} s of the CPU", flush=True)
    return None


if __name__ == "__main__":
    rank = main(*sys.argv[1:])
    if rank is not None:
        be_a_rank(*rank)  # and then this process ends as any script does
