"""What a wrapper says of its states, in terms of what is said of those inside."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradacc.optim import _check
from gradacc.optim._optimizer import OptimizerReport, ReportFunction


def of_inner(name: str, kind: type, inner: OptimizerReport) -> OptimizerReport:
    """Of a wrapper whose state has that of the optimizer that is wrapped as ``inner``."""

    def inside(question: ReportFunction, state: Any) -> Any:
        _check.state(name, state, kind)
        return question(state.inner)

    return OptimizerReport(*(question and functools.partial(inside, question) for question in inner))


def of_wrapper(name: str, kind: type, inner: OptimizerReport) -> OptimizerReport:
    """Of a wrapper that skips updates: its state has ``skipped`` too."""

    def skipped(state: Any) -> Any:
        _check.state(name, state, kind)
        return state.skipped if inner.skipped is None else _added(state.skipped, inner.skipped(state.inner))

    return of_inner(name, kind, inner)._replace(skipped=skipped)


def of_groups(name: str, kind: type, parts: Sequence[OptimizerReport]) -> OptimizerReport:
    """Of one optimizer a group; a group without parameters has the state ``()``.

    Answers are tuples, in the order of the groups; a learning rate that is not known is NaN, a count 0.
    """

    def each(questions: Sequence[ReportFunction | None], otherwise: Any, state: Any) -> tuple[Any, ...]:
        _check.state(name, state, kind)
        return tuple(
            otherwise if question is None or inner == () else question(inner)
            for question, inner in zip(questions, state.inner, strict=True)
        )

    rates, updates, skipped = ([getattr(part, field) for part in parts] for field in OptimizerReport._fields)
    return OptimizerReport(
        functools.partial(each, rates, math.nan) if any(rates) else None,
        functools.partial(each, updates, 0) if any(updates) else None,
        functools.partial(each, skipped, 0) if any(skipped) else None,
    )


def _added(outer: Tensor, inner: Any) -> Any:
    """Skipped here, and inside: where groups skip on their own, of each."""
    return tuple(_added(outer, each) for each in inner) if isinstance(inner, tuple) else outer + inner
