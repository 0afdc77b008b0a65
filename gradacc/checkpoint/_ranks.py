"""What ranks do together: agree, or fail together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from gradacc._sync import group as groups

if dist.is_available() and not dist.is_initialized():
    # Its default arguments hold the group that exists when it is imported, which torch.distributed.checkpoint does later.
    # See NOTE [the end of a process] in `_sync/group.py`.
    import torch.distributed.nn.functional  # noqa: F401

Mine = TypeVar("Mine")
Shared = TypeVar("Shared")


class ElsewhereError(RuntimeError):
    """Another rank has raised; what this one did went well."""


def world(name: str) -> dist.ProcessGroup | None:
    """All ranks; None where there is one."""
    return groups.resolve(
        name, None, "ranks would overwrite each other's checkpoint. Call torch.distributed.init_process_group() first"
    )


def on_all_ranks(
    name: str, group: dist.ProcessGroup | None, call: Callable[[], tuple[Mine, Shared]]
) -> tuple[Mine, list[Shared]]:
    """``call()`` on every rank: what it keeps, and what each has to share. Where it raises on one rank, all raise.

    Raises:
        ElsewhereError: it raised on another rank.
        RuntimeError: another rank has ended. Where ``call()`` raised on this rank, its own exception is raised instead.
    """
    if group is None:
        mine, shared = call()
        return mine, [shared]
    error: Exception | None = None
    answer: tuple[Shared | None, str] = None, ""
    try:
        mine, shared = call()
        answer = shared, ""
    except Exception as raised:
        error = raised
        answer = None, f"{type(raised).__name__}: {raised}"
    answers: list[Any] = []
    with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
        answers = groups.exchange(name, group, answer)
    if error is not None:
        raise error
    for rank, (_, problem) in enumerate(answers):
        if problem:
            raise ElsewhereError(f"{name}: failed because of rank {rank}: {problem}")
    return mine, [shared for shared, _ in answers]


def check_one_tree(name: str, kinds: Sequence[dict[str, str]]) -> None:
    """A ValueError where the union of all ranks' trees is none; ``kinds``: what their nodes are, by path."""
    first: dict[str, int] = {}
    for rank, own in enumerate(kinds):
        for path, kind in own.items():
            other = first.setdefault(path, rank)
            if kind != kinds[other][path]:
                raise ValueError(
                    f"{name}: tree{path} is not the same on ranks {other} and {rank}: a {kinds[other][path]} and a {kind}, "
                    "so no tree has both. Put what belongs to a rank under a key of its own, as in {'ranks': {rank: ...}}"
                )


def check_alike(name: str, fingerprints: Sequence[dict[str, tuple[str, str]]]) -> None:
    """A ValueError where two ranks have different leaves under one key; ``fingerprints`` are those of all ranks."""
    first: dict[str, int] = {}
    for rank, own in enumerate(fingerprints):
        for key, (title, content) in own.items():
            other = first.setdefault(key, rank)
            title_there, content_there = fingerprints[other][key]
            if title != title_there or content != content_there:
                how = f"{title_there} and {title}" if title != title_there else f"both {title}, but of other values"
                raise ValueError(
                    f"{name}: tree{key} is not the same on ranks {other} and {rank}: {how}. "
                    "Parameters stay alike if they are seeded alike before they are made, and every gradient has sync=. "
                    "Put what belongs to a rank under a key of its own, as in {'ranks': {rank: ...}}"
                )
