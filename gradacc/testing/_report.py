"""What `check_accumulation` returns, and how it reads."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Literal, NamedTuple

Cause = Literal[
    "nonfinite",
    "state",
    "randomness",
    "carry",
    "rounding",
    "aux",
    "reduction",
    "weights",
    "constant",
    "nonlinear",
    "interaction",
    "unknown",
]
"""Why a split is not exact.

- ``nonfinite``: the large batch itself gives NaN or infinity;
- ``state``: the same call, from the same random state, gives something else the second time;
- ``randomness``: the loss draws random numbers;
- ``carry``: the loss reads what an earlier micro-batch has put into its carry;
- ``rounding``: in float64 the difference vanishes;
- ``aux``: gradient and value are exact, the aux is not;
- ``reduction``: a sum that was taken for a mean, or the other way round;
- ``weights``: the mean is over something other than examples (tokens, pixels): return a `gradacc.Mean`;
- ``constant``: a sum with a term that does not depend on the batch (a penalty), added once a micro-batch;
- ``nonlinear``: a function (a root, a logarithm) of a mean;
- ``interaction``: examples see each other (BatchNorm in training mode, in-batch negatives);
- ``unknown``: none of the experiments explains it.
"""


_HIDING: tuple[Cause, ...] = ("nonfinite", "state", "randomness", "interaction")
"""Causes whose experiment does not account for the whole difference."""


class Diagnosis(NamedTuple):
    """A cause, the evidence for it, and what to do."""

    cause: Cause
    why: str
    fix: str


def unknown(why: str) -> Diagnosis:
    """No experiment explains it."""
    return Diagnosis(
        "unknown",
        f"no experiment explains the difference: {why}",
        "make the loss smaller until the difference goes away; it is deterministic, and float64 does not help.",
    )


class Split(NamedTuple):
    """How far one split is from the large batch. Errors are relative; `check_accumulation` has the equations."""

    steps: int
    sizes: tuple[int, ...]
    """Examples in each micro-batch."""
    grad_error: float
    """Of the worst leaf."""
    worst: str
    """The path of that leaf."""
    value_error: float
    aux_error: float | None
    """Of the worst leaf of the aux, or `Mean` or `Moments` of a carry; None where there is neither."""
    exact: bool
    """Whether all errors are within the tolerance."""


@dataclass(frozen=True)
class Report:
    """The verdict on each split and, where one is not exact, why and what to do. ``bool(report)`` is ``report.exact``."""

    splits: tuple[Split, ...]
    rtol: float
    """The tolerance that the errors were held against."""
    dtype: str
    """The coarsest dtype among the parameters and the loss, which the default tolerance comes from."""
    cause: Cause | None
    """None where every split is exact."""
    why: str
    fix: str

    @property
    def exact(self) -> bool:
        """Whether every split is exact."""
        return all(split.exact for split in self.splits)

    def raise_if_inexact(self) -> None:
        """Raise `AssertionError` with the whole report unless every split is exact."""
        if not self.exact:
            raise AssertionError(str(self))

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        verdict = "exact" if self.exact else f"NOT exact ({self.cause})"
        parts = [
            f"Accumulation is {verdict}.",
            _table(self.splits),
            f"Errors are relative to the large batch (gradient: the worst leaf, relative to that leaf); tolerance "
            f"{self.rtol:.1e} ({self.dtype}).",
        ]
        if self.exact and self.dtype != "float64":
            parts.append(f"What is smaller than that is not seen in {self.dtype}: double=True compares in float64.")
        for title, text in (("Why", self.why), ("Fix", self.fix)):
            if text:
                parts.append(textwrap.fill(f"{title}: {text}", width=100, subsequent_indent="     "))
        if self.cause in _HIDING:
            parts.append("Other causes may hide behind this one: fix it, and check again.")
        return "\n".join(parts)


def _table(splits: tuple[Split, ...]) -> str:
    with_aux = any(split.aux_error is not None for split in splits)
    rows = [["steps", "micro-batches of", "gradient", "value", *(["aux"] if with_aux else []), "verdict", "worst leaf"]]
    for split in splits:
        errors = [split.grad_error, split.value_error]
        if with_aux:
            errors.append(math.nan if split.aux_error is None else split.aux_error)
        rows.append(
            [
                str(split.steps),
                _sizes(split.sizes),
                *(f"{error:.1e}" for error in errors),
                "exact" if split.exact else "INEXACT",
                split.worst,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *cells, last = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*cells, last.strip()]))
    return "\n".join(lines)


def _sizes(sizes: tuple[int, ...]) -> str:
    if len(sizes) <= 4:
        return ", ".join(map(str, sizes))
    return f"{sizes[0]}, {sizes[1]}, ..., {sizes[-1]}"
