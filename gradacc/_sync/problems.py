"""Errors that all ranks find alike, in the same records: each names the ranks that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from gradacc._sync import group as groups


def calls_raised(name: str, group: dist.ProcessGroup, raised: Sequence[bool]) -> Exception:
    """An error that names the ranks whose calls raised."""
    return RuntimeError(
        f"{name}: no gradient on rank {dist.get_rank()}, because the call raised on {_named(group, raised)} of "
        f"{groups.named(group)}; see the error there"
    )


def result_was_missed(name: str, group: dist.ProcessGroup, apart: Sequence[bool]) -> Exception:
    """An error that names the ranks that have missed a result."""
    return RuntimeError(
        f"{name}: on {_named(group, apart)} of {groups.named(group)} the call before this one raised when the others already "
        "had its result, so parameters may differ between ranks now. Nothing was returned. Load a checkpoint, or send the "
        "parameters and the optimizer's state of one rank to all; the next call goes on"
    )


def weights_are_wrong(name: str, group: dist.ProcessGroup, wrong: Sequence[bool]) -> Exception:
    """An error that names the ranks with a weight that nobody has read before."""
    return ValueError(
        f"{name}: there is a Mean whose weight is negative, infinite or NaN on {_named(group, wrong)} of "
        f"{groups.named(group)}; it must be finite and not negative. Nothing was returned"
    )


def values_differ(name: str, group: dist.ProcessGroup, values: Sequence[float]) -> Exception:
    """An error that says what each rank has as the value of one loss."""
    ranks = dist.get_process_group_ranks(group)
    each = ", ".join(f"{value:g} on rank {rank}" for rank, value in zip(ranks, values, strict=True))
    return ValueError(
        f"{name}: every rank of {groups.named(group)} evaluates the loss of the whole batch, and it is {each}. Nothing was "
        "returned. Parameters and other arguments must be the same on every rank; what differs belongs to the examples "
        "(tensors with a row for each), or loss_fn takes rows, and returns a gradacc.Mean over this rank's own"
    )


def windows_were_dropped(name: str, group: dist.ProcessGroup, dropped: Sequence[bool]) -> Exception:
    """An error that names the ranks that have begun another window."""
    return RuntimeError(
        f"{name}: on {_named(group, dropped)} of {groups.named(group)} an update raised and another state was begun without a "
        "finalize, so finalize is called for different windows, and nothing was returned. A rank that catches the error of an "
        "update must call finalize all the same, with the state before it. Make another accumulator on every rank, and go on "
        "from the same place"
    )


def windows_differ(name: str, group: dist.ProcessGroup, windows: Sequence[int]) -> Exception:
    """An error that says which window each rank is in; 0: none that has a number."""
    ranks = dist.get_process_group_ranks(group)
    numbered = [(rank, n) for rank, n in zip(ranks, windows, strict=True) if n]
    each = _by_answer([(rank, f" in window {n}") for rank, n in numbered], ", ")
    return RuntimeError(
        f"{name}: ranks of {groups.named(group)} are in different windows of their loops: {each}. A rank has left out a call "
        "(by catching an error and going on, for instance), so nothing was returned. Let all ranks begin the loop again from "
        "the same place (a step, a checkpoint); pass iter(window) where ranks are to pair other windows on purpose"
    )


def weights_are_far(name: str, group: dist.ProcessGroup, far: Sequence[bool]) -> Exception:
    """An error that names the ranks whose gradients did not fit."""
    return RuntimeError(
        f"{name}: on {_named(group, far)} of {groups.named(group)} the weights differ from the last call's by a factor of over "
        "a billion, and they are on an accelerator, where that is known too late. Nothing was returned; the same call once "
        "more goes through"
    )


def _named(group: dist.ProcessGroup, flags: Sequence[bool]) -> str:
    return _listed([rank for rank, flag in zip(dist.get_process_group_ranks(group), flags, strict=True) if flag])


_SHOWN = 8
"""How many ranks, or different answers, an error names: there may be thousands."""


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN]))}{more}"


def _by_answer(answers: Sequence[tuple[int, str]], between: str) -> str:
    """Ranks and what each of them says; those that say the same are told together."""
    saying: dict[str, list[int]] = {}
    for rank, answer in answers:
        saying.setdefault(answer, []).append(rank)
    # Who is alone with an answer is whom one looks for.
    rarest = sorted(saying, key=lambda answer: len(saying[answer]))[:_SHOWN]
    told = [f"{_listed(ranks)}{answer}" for answer, ranks in saying.items() if answer in rarest]
    more = [f"{len(saying) - _SHOWN} other answers"] if len(saying) > _SHOWN else []
    return between.join(told + more)


def calls_differ(name: str, group: dist.ProcessGroup, answers: Sequence[tuple[int, str, Any]]) -> Exception:
    """An error that says what calls there were, and of which ranks."""
    ranks = dist.get_process_group_ranks(group)
    calls = [f": {call_name}, call {number}" for number, call_name, _ in answers]
    each = _by_answer([*zip(ranks, calls, strict=True)], "; ")
    # What each was given is not exchanged once a rank relies on what it has agreed on before.
    same = len({answer[:2] for answer in answers}) == 1
    more = ", alike in name and number: they differ in the structure, shapes or dtypes that were given" if same else ""
    if any("that this rank made" in call for call in calls):
        more += ". Transforms, and optimizers of all ranks, are known by how many a rank has made there before: make as many "
        more += "of them, in the same order, on every rank"
    return RuntimeError(
        f"{name}: ranks of {groups.named(group)} made different calls, and nothing was returned. {each} in this group{more}. "
        "Every rank must make the same calls in the same order, and one that catches an error must not go on by itself. Catch "
        "this one on every rank, and let all of them go on from the same place (a step, a checkpoint): their next calls have "
        "the same number again"
    )
