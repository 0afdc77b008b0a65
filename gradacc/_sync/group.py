"""Process groups: which one is meant, what to say when it breaks, and who holds it.

NOTE [the end of a process]
    A thread of gloo's lets go of a collective's tensors some time after the collective is complete, for which it needs the
    interpreter. Where that is being taken apart already (a script that ends, or raises, right after a call), Python ends the
    thread, and with it the process: "terminate called without an active exception", SIGABRT. Plain torch does it too. The way
    out is ``torch.distributed.destroy_process_group()`` in a ``finally``: it waits for these threads, but only if it was the
    last one who held the group. So nothing here holds one longer than a call: turns and windows refer to theirs weakly, and
    frames that an error has in its traceback are cleared (`release`), those of gradacc that take part in collectives, and
    torch's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from gradacc._describe import describe

_HOLDERS = ("gradacc._sync.", "gradacc.checkpoint.", "torch.distributed.")
"""Modules whose frames have groups among their locals."""


_UNSYNCHRONISED = (
    "nothing would be synchronised. Call torch.distributed.init_process_group() first, or leave sync (of windows: group) "
    "out"
)


def of_name(name: str) -> dist.ProcessGroup | None:
    """The process group that torch knows by this name; None where there is none (any more)."""
    try:
        # mypy knows neither a private function nor that a name will do.
        group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except (RuntimeError, ValueError, KeyError):  # what torch raises where it knows no such name
        return None
    return group


def resolve(name: str, group: Any, otherwise: str = _UNSYNCHRONISED) -> dist.ProcessGroup | None:
    """The process group to talk to; None where there is nobody.

    ``otherwise``: what would happen where ``WORLD_SIZE`` says that there is, but no group, and the fix.
    """
    if not dist.is_available() or not dist.is_initialized():
        world = os.environ.get("WORLD_SIZE", "1")
        if world.isdigit() and int(world) > 1:
            raise RuntimeError(f"{name}: WORLD_SIZE is {world}, but no process group was initialised, so {otherwise}")
        if group is None:
            return None
        raise RuntimeError(
            f"{name}: there is a group, but torch.distributed is not initialised (or was destroyed); "
            "call torch.distributed.init_process_group() first"
        )
    if group is None:
        group = dist.group.WORLD
    elif not isinstance(group, dist.ProcessGroup) and hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            raise ValueError(
                f"{name}: the group is a DeviceMesh of {group.ndim} dimensions {tuple(names)}; name the one to reduce over, "
                f"as in mesh[{(names or ('dp',))[0]!r}]"
            )
        group = group.get_group()
    if torch.compiler.is_compiling():
        return group if group.size() > 1 else None
    if group is dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0
    ):
        raise ValueError(f"{name}: rank {dist.get_rank()} is not in the group; make the call on the group's ranks only")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: the group must be a ProcessGroup or a DeviceMesh, got {describe(group)}")
    return group if group.size() > 1 else None


def named(group: dist.ProcessGroup) -> str:
    """How messages name a group."""
    ranks = dist.get_process_group_ranks(group)
    shown = f"{ranks[:8]}"[:-1] + (f", ... {len(ranks)} of them]" if len(ranks) > 8 else "]")
    return f"process group {group.group_name!r} ({group.group_desc}; {dist.get_backend(group)}; ranks {shown})"


@contextmanager
def explaining_errors(name: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Around collectives: torch's errors say which connection broke, not what that means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: the collective of {named(group)} failed on rank {dist.get_rank()}: another rank has ended, did not "
            f"come within the group's timeout, or made another call. Nothing was returned. torch says: {error}"
        ) from error


def exchange(name: str, group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """What every rank has, which can be pickled."""
    everyone: list[Any] = [None] * group.size()
    with explaining_errors(name, group):
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def device(group: dist.ProcessGroup) -> torch.device:
    """On which its collectives can have small tensors, as those that pickle have theirs."""
    found: torch.device = distributed_c10d._get_object_coll_device(group)  # type: ignore[assignment]
    return torch.device(found)


def tell(group: dist.ProcessGroup, rank: int, value: Any) -> Any:
    """What one rank has (by its place in the group), which can be pickled, on all."""
    told = [value]
    dist.broadcast_object_list(told, group=group, group_src=rank)
    return told[0]


@contextmanager
def releasing() -> Iterator[None]:
    """Around everything that holds a group: an error lets go of it. NOTE [the end of a process]"""
    try:
        yield
    except BaseException as error:
        release(error)
        raise


def release(error: BaseException) -> None:
    """Let go of groups in the frames that an error, and what it came from, have left. NOTE [the end of a process]"""
    left, seen = [error], set()
    while left:
        each = left.pop()
        seen.add(id(each))
        left += [other for other in (each.__cause__, each.__context__) if other is not None and id(other) not in seen]
        trace = each.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__name__", "").startswith(_HOLDERS):
                with suppress(RuntimeError):  # it still runs
                    trace.tb_frame.clear()
            trace = trace.tb_next
