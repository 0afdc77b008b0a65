"""What the experiments start from, and how they are run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from gradacc.testing._probe import Errors, Probe, Result

T = TypeVar("T")


class Evidence(NamedTuple):
    """What the comparison has shown."""

    probe: Probe
    large: Result
    counts: list[int]
    found: list[Errors]
    rtol: float
    eps: float

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max(each.largest for each in self.found)


def result_or_none(experiment: Callable[[], T]) -> T | None:
    """What an experiment gives; None if the loss refuses it (a batch of one example, another dtype)."""
    try:
        return experiment()
    except Exception:
        return None


def finite(error: float) -> float:
    """Infinity for NaN, which would compare as small."""
    return math.inf if math.isnan(error) else error
