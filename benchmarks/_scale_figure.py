"""`scale.json` as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._links import Link
from benchmarks._scale_cost import lines_of
from benchmarks._scale_model import Fit, Row, errors_outside, fitted, predicted
from benchmarks._scale_report import LINKS, MB, STEPS

COLOURS = ("#1a73e8", "#188038", "#c5221f")


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for what a rank does itself, one for the model against what was measured, one for more ranks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (cost, model, more) = pyplot.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    parts = results["parts"]
    if "cost" in parts:
        _draw_cost(cost, parts["cost"])
    if "model" in parts:
        rows, worlds = [Row(*row) for row in parts["model"]["rows"]], parts["model"]["fitted"]
        fit = fitted([row for row in rows if row.world in worlds])
        _draw_model(model, fit, rows, worlds)
        _draw_more(more, fit, rows, errors_outside(fit, rows, worlds))
    for axes in (cost, model, more):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_cost(axes: Any, found: dict[str, Any]) -> None:
    worlds = [int(world) for world in found["ranks"]]
    seconds = [each["seconds"] for each in found["ranks"].values()]
    middles = [median(each) for each in seconds]
    bars = [
        [middle - min(each) for middle, each in zip(middles, seconds, strict=True)],
        [max(each) - middle for middle, each in zip(middles, seconds, strict=True)],
    ]
    time = lines_of(found)["seconds"]
    axes.errorbar(worlds, middles, bars, fmt="o", color=COLOURS[0], label="median, range")
    axes.plot(worlds, [time.fixed + time.per_rank * world for world in worlds], color="#202124", label="line")
    axes.set_xlabel("ranks")
    axes.set_ylabel("s of one rank at the boundary, without the all-reduce")
    axes.legend(frameon=False, fontsize=9)


def _draw_model(axes: Any, fit: Fit, rows: Sequence[Row], worlds: Sequence[int]) -> None:
    for label, inside, colour in (("fitted", True, "#9aa0a6"), ("held out", False, COLOURS[0])):
        chosen = [row for row in rows if (row.world in worlds) == inside]
        values = [predicted(fit, row.world, row.size, Link(row.rate, row.delay)) for row in chosen]
        names = ", ".join(map(str, sorted({row.world for row in chosen})))
        axes.plot(
            [median(row.seconds) for row in chosen],
            values,
            "o",
            fillstyle="none",
            color=colour,
            label=f"{label}: {names} ranks",
        )
    ends = [min(median(row.seconds) for row in rows), max(median(row.seconds) for row in rows)]
    axes.plot(ends, ends, color="#202124", linewidth=0.8)
    axes.set_xlabel("measured, s")
    axes.set_ylabel("predicted, s")
    axes.legend(frameon=False, fontsize=9)


def _draw_more(axes: Any, fit: Fit, rows: Sequence[Row], off: tuple[float, float]) -> None:
    """Of the largest size that was measured: lines over bands of the held-out errors, and what was measured as points."""
    size = max(row.size for row in rows)
    worlds = [2**n for n in range(1, 11)]
    for link, colour in zip(LINKS, COLOURS, strict=True):
        every = [predicted(fit, world, size, link) for world in worlds]
        label = f"{link.rate:g} Mbit/s, {link.delay * 1e3:g} ms"
        axes.plot(worlds, every, color=colour, label=f"{label}: once a step")
        axes.plot(worlds, [STEPS * x for x in every], "--", color=colour, label=f"in each of {STEPS} micro-batches")
        axes.fill_between(
            worlds,
            [x / (1 + off[1]) for x in every],
            [x / (1 + off[0]) for x in every],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        seen = [row for row in rows if (row.rate, row.delay, row.size) == (*link, size)]
        axes.plot(
            [row.world for row in seen], [median(row.seconds) for row in seen], "o", fillstyle="none", color=colour
        )
    axes.set_xlabel(f"ranks; points: measured, of {size / MB:g} MB")
    axes.set_ylabel("s of communication a step")
    axes.legend(frameon=False, fontsize=8)
