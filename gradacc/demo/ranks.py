"""Several processes, one run: who this one is, and what rank 0 decides for all.

Rank 0 alone talks, writes and decides; the others compute. After each iteration it says whether the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from gradacc.demo.settings import DemoError

TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for one that is busy (rank 0 with its table) or lost (one that has ended is noticed at once)."""

T = TypeVar("T")


class EndedError(Exception):
    """Rank 0 has ended the run, and says why: there is nothing left to do for this one."""


class Ranks(NamedTuple):
    """This process among all of the run, and among those on its machine (``local``)."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's of ``count`` things: contiguous, sizes differ by at most one.

        >>> [Ranks(rank, 3).share(4) for rank in range(3)]
        [slice(0, 1, None), slice(1, 2, None), slice(2, 4, None)]
        """
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)


ALONE = Ranks()


def here() -> Ranks:
    """This process, by torchrun's environment variables.

    Raises:
        DemoError: they contradict each other, or name more processes than this machine has GPUs.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(value.isdecimal() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        told = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise DemoError(f"the environment says {told}, which is no rank: start it with torchrun or --nproc")
    check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return Ranks(*map(int, values.values()))


def check_gpus(processes: int) -> None:
    """A `DemoError` where there are GPUs, but fewer than processes."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise DemoError(f"{processes} processes need a GPU each, but this machine has {gpus}")


def find_device(ranks: Ranks) -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The default process group, where there are other ranks."""
    if ranks.world == 1:
        yield
        return
    store = _store_of_this_life(ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=TIMEOUT,
        store=store,
        rank=-1 if store is None else ranks.rank,
        world_size=-1 if store is None else ranks.world,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store_of_this_life(ranks: Ranks) -> PrefixStore | None:
    """Where the ranks that torchrun has started on one machine find each other; None for torch's own way.

    torchrun's agent keeps one store through all restarts (``--max-restarts``). With the same keys in each life a rank may find
    the address of one that was killed, and fail or wait (https://github.com/pytorch/pytorch/issues/135712). On several
    machines the number of restarts is not the same on all, so there ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` is the way out.
    """
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not on_one_machine:
        return None
    kept, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    return PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", kept)


def together(ranks: Ranks, call: Callable[[], T]) -> T:
    """``call()``; if it is a `DemoError` or Ctrl-C on any rank, it is that on rank 0, and all end."""
    if ranks.world == 1:
        return call()
    problem: BaseException | None = None
    try:
        result = call()
    except (DemoError, KeyboardInterrupt) as error:
        problem = error
    problems = exchange(ranks, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            if not ranks.first:
                raise EndedError
            raise DemoError(f"rank {rank}: {found}") if rank and isinstance(found, DemoError) else found
    return result


def exchange(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's ``value``."""
    values = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(values, value)
    return values


def decide(ranks: Ranks, call: Callable[[], T], keeps: Callable[[T], bool] = lambda _: False) -> T:
    """On rank 0, ``call()``: if it returns None the run goes on, else, or if it raises, the others end.

    Where ``keeps`` of what it returned, all write a checkpoint next.
    """
    ends, saves = True, False
    try:
        result = call()
        ends, saves = result is not None, keeps(result)
        return result
    finally:
        _broadcast(ranks, ends, saves)


def hear(ranks: Ranks) -> None:
    """On the other ranks, what rank 0 decides.

    Raises:
        EndedError: the run ends.
    """
    ends, _ = listen(ranks)
    if ends:
        raise EndedError


def listen(ranks: Ranks) -> tuple[bool, bool]:
    """On the other ranks: whether the run ends, and whether a checkpoint is written first."""
    return _broadcast(ranks, True, False)


def _broadcast(ranks: Ranks, ends: bool, saves: bool) -> tuple[bool, bool]:
    if ranks.world == 1:
        return ends, saves
    flags = torch.tensor([ends, saves], dtype=torch.uint8, device=find_device(ranks))
    dist.broadcast(flags, 0)
    ends, saves = (bool(flag) for flag in flags.tolist())
    return ends, saves
