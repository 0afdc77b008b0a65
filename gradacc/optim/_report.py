"""What an optimizer says of its states: the learning rate, and how many updates were made and skipped.

A step here comes with functions of its state (`reporting`, `report_of`), which `gradacc.train_step` makes metrics of; a step of
the caller's own says nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradacc import _tree
from gradacc.optim import _check
from gradacc.optim._optimizer import Optimizer

Question: TypeAlias = Callable[[Any], Any]
"""A function of a state: a number, a 0-dim tensor, or a tuple of them."""


class Report(NamedTuple):
    """Functions of a state; None where there is nothing to say."""

    rate: Question | None = None
    """The learning rate of the update that follows this state."""
    updates: Question | None = None
    """Updates so far, without those that were skipped."""
    skipped: Question | None = None
    """Updates skipped so far; None where none can be."""


def reporting(optimizer: Optimizer, report: Report) -> Optimizer:
    """The same optimizer, which `report_of` finds ``report`` of."""
    optimizer.step.report = optimizer.step, report  # type: ignore[attr-defined]  # a function's own attribute
    return optimizer


def report_of(optimizer: Optimizer) -> Report:
    """What an optimizer says of its states."""
    step, report = getattr(optimizer.step, "report", (None, Report()))
    return report if step is optimizer.step else Report()  # not where functools.wraps has copied it to another step


def of_wrapper(name: str, kind: type, inner: Report) -> Report:
    """Of a wrapper that skips updates: its state has ``skipped`` and ``inner``."""

    def inside(question: Question, state: Any) -> Any:
        _check.state(name, state, kind)
        return question(state.inner)

    def skipped(state: Any) -> Any:
        _check.state(name, state, kind)
        return state.skipped if inner.skipped is None else _added(state.skipped, inner.skipped(state.inner))

    rate, updates = (
        None if question is None else functools.partial(inside, question) for question in (inner.rate, inner.updates)
    )
    return Report(rate, updates, skipped)


def of_groups(name: str, kind: type, parts: Sequence[Report]) -> Report:
    """Of one optimizer a group; a group without parameters has the state ``()``.

    Answers are tuples, in the order of the groups; a learning rate that is not known is NaN, a count 0.
    """

    def each(questions: Sequence[Question | None], otherwise: Any, state: Any) -> tuple[Any, ...]:
        _check.state(name, state, kind)
        return tuple(
            otherwise if question is None or inner == () else question(inner)
            for question, inner in zip(questions, state.inner, strict=True)
        )

    rates, updates, skipped = ([getattr(part, field) for part in parts] for field in Report._fields)
    return Report(
        functools.partial(each, rates, math.nan) if any(rates) else None,
        functools.partial(each, updates, 0) if any(updates) else None,
        functools.partial(each, skipped, 0) if any(skipped) else None,
    )


def numbers(answer: Any, dtype: torch.dtype) -> Any:
    """An answer as detached tensors in memory of their own: ``dtype`` is that of Python numbers."""
    leaves, treedef = _tree.flatten(answer)
    return _tree.unflatten(
        treedef,
        [
            leaf.detach().clone() if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=dtype, device="cpu")
            for leaf in leaves
        ],
    )


def _added(outer: Tensor, inner: Any) -> Any:
    """Skipped here, and inside: where groups skip on their own, of each."""
    return tuple(_added(outer, each) for each in inner) if isinstance(inner, tuple) else outer + inner
