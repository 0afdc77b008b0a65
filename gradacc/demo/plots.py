"""The report's plots, as SVG to be put into a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradacc.demo.proof import Proof
from gradacc.demo.train import Metrics

EXACT = "#0b6e99"
NAIVE = "#c2571a"
MUTED = "#8a8f98"
NOTHING = 1e-9
"""Where a difference of exactly zero is drawn on a logarithmic axis."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9.5,
    "svg.hashsalt": "gradacc",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "grid.color": "#e8e9ec",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def error_plot(proof: Proof) -> str:
    """Relative difference of the gradient from the large batch's, against the number of steps."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.2, "steps (micro-batches per batch)", "relative difference of the gradient")
        steps = [row.steps for row in proof.rows]
        naive = [max(row.naive.gradient_error, NOTHING) for row in proof.rows]
        exact = [max(row.exact.gradient_error, NOTHING) for row in proof.rows]
        axes.plot(steps, naive, "s-", color=NAIVE, label="mean of means (the usual loop)")
        axes.plot(steps, exact, "o-", color=EXACT, label="gradacc")
        axes.set_yscale("log")
        axes.set_ylim(NOTHING / 2, 2)
        powers = range(-9, 1)
        axes.set_yticks([10.0**power for power in powers], ["0", *(f"$10^{{{power}}}$" for power in powers[1:])])
        axes.minorticks_off()
        axes.set_xticks(steps)
        axes.axhline(2**-23, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            "float32 rounding",
            (steps[-1], 2**-23),
            (0, -11),
            textcoords="offset points",
            color=MUTED,
            ha="right",
            fontsize=8,
        )
        axes.legend(loc="center right")
        return _svg(figure)


def memory_plot(proof: Proof) -> str:
    """Peak memory against the number of steps."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.2, "steps (micro-batches per batch)", "peak memory (MiB)")
        steps = [row.steps for row in proof.rows]
        naive = [row.naive.peak / 2**20 for row in proof.rows]
        exact = [row.exact.peak / 2**20 for row in proof.rows]
        axes.axhline(proof.peak / 2**20, color=MUTED, linewidth=1, linestyle="--", label="the large batch")
        axes.plot(steps, naive, "s-", color=NAIVE, markersize=9, markerfacecolor="none", label="mean of means")
        axes.plot(steps, exact, "o-", color=EXACT, label="gradacc")
        axes.set_ylim(bottom=0)
        axes.set_xticks(steps)
        axes.legend()
        return _svg(figure)


def loss_plot(history: Sequence[Metrics], held_out: Sequence[tuple[int, float]]) -> str:
    """Bits per byte against iterations: of every training batch, their running mean, and held out."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(10.6, 3.4, "iteration", "bits per byte")
        at = [metrics.iteration for metrics in history]
        losses = [metrics.bits_per_byte for metrics in history]
        axes.plot(at, losses, color=EXACT, alpha=0.3, linewidth=1, label="training, every batch")
        axes.plot(at, _running_mean(losses), color=EXACT, label="training, running mean")
        axes.plot(*zip(*held_out, strict=True), "D", color=NAIVE, markersize=5, label="held-out text")
        axes.set_ylim(bottom=0)
        axes.legend()
        return _svg(figure)


def _running_mean(values: Sequence[float], weight: float = 0.2) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else (1 - weight) * means[-1] + weight * value)
    return means


def _axes(width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure's ``<svg>`` element, without the XML header, whose document type names an address."""
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    return text[text.index("<svg") :]
