"""A run in little time, for tests of something else than its table and its pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable

from gradacc.demo import plots, run, sample
from gradacc.demo.proof import prove
from gradacc.demo.record import Record


def hasten(put: Callable[[object, str, object], None]) -> None:
    """A table of one row, empty pictures (one takes 0.2 s to draw), and short samples; ``put`` is `setattr`, or pytest's."""
    put(run, "prove", functools.partial(prove, steps=(2,)))
    put(sample, "SAMPLE_BYTES", 40)
    for picture in ("error_plot", "memory_plot", "loss_plot"):
        put(plots, picture, lambda *_: "<svg></svg>")


def facts(record: Record) -> str:
    """In the place of the report: what two runs must have in common to the last bit."""
    return f">{record.proof} → \n>{[metrics.loss for metrics in record.history]} → {record.held_out}<"
