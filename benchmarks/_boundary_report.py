"""`boundary.json` as a figure and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._measure import paired, pooled, ratio, said, shown, spread
from benchmarks._model import Network, early, fitted, ring, saved, tree
from benchmarks._report import describe, save
from benchmarks._synced import (
    ACCELERATE,
    AGAIN,
    BOTH,
    COMPRESS,
    EVERY,
    FLOOR,
    NO_SYNC,
    OURS,
    OVERLAP,
    RECIPE,
    WEIGHTED,
)

STYLES = {  # colour, marker, dashes
    FLOOR: ("#9aa0a6", "_", ":"),
    EVERY: ("#c5221f", "x", "-"),
    NO_SYNC: ("#202124", "s", "-"),
    ACCELERATE: ("#b06000", "D", "-"),
    OURS: ("#1a73e8", "o", "-"),
    OVERLAP: ("#1a73e8", "^", "--"),
    COMPRESS: ("#188038", "o", "-"),
    BOTH: ("#188038", "^", "--"),
}
WORLDS = (8, 64, 1024)
MB = 1e6
Table = list[str]


def tables(results: dict[str, Any]) -> str:
    """Everything as Markdown: times, bytes, collectives, the model."""
    steps, links = str(results["settings"]["main_steps"]), results["links"]
    lines: Table = []
    for link in links.values():
        lines += [*_times(link["title"], link["steps"][steps]), ""]
    for link in links.values():
        lines += [*_bytes(link), ""]
    first = next(iter(links.values()))["steps"][steps]
    lines += [*_collectives(first), ""]
    for link in links.values():
        lines += [*_model(link["title"], link["steps"][steps], int(steps)), ""]
    settings = results["settings"]
    lines.append(
        f"Two ranks with gloo, each with one thread and {steps} micro-batches where nothing else is said. "
        f"{said(settings['rounds'], settings['processes'])}, the slower rank's time; no optimizer. "
        f"{describe(results['machine'])}."
    )
    lines += [f"Left out: {name}: {why}." for name, why in results["skipped"].items()]
    return "\n".join(lines)


def _times(title: str, measured: dict[str, Any]) -> Table:
    processes = measured["seconds"]
    seconds = pooled(processes)
    lines = [f"| {title} | time / Accelerate | time / no communication | seconds | gradient's error |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for name in seconds:
        over, floor = (shown(ratio(processes, name, base)._asdict()) for base in (ACCELERATE, FLOOR))
        error = measured["gradient_error"][name]
        lines.append(f"| {_bold(name)} | {over} | {floor} | {spread(seconds[name]).median:.3f} | {error:.0e} |")
    return lines


def _bold(name: str) -> str:
    return f"**{name}**" if name in (OURS, OVERLAP, COMPRESS, BOTH) else name


def _bytes(link: dict[str, Any]) -> Table:
    steps = list(link["steps"])
    size = link["steps"][steps[0]]["parameter_bytes"]
    lines = [
        f"| {link['title']}: MB sent by a rank in a step | " + " | ".join(f"{k} micro-batches" for k in steps) + " |"
    ]
    lines.append("|---|" + "--:|" * len(steps))
    for name in link["steps"][steps[0]]["bytes"]:
        if name != AGAIN:
            counted = " | ".join(f"{link['steps'][k]['bytes'][name] / MB:.3f}" for k in steps)
            lines.append(f"| {_bold(name)} | {counted} |")
    return [*lines, f"| (the parameters' gradients in float32) |{f' {size / MB:.3f} |' * len(steps)}"]


def _collectives(measured: dict[str, Any]) -> Table:
    lines = ["| | collectives a step | of them | MB to reduce |", "|---|--:|---|--:|"]
    for name, counted in measured["collectives"].items():
        if name not in (FLOOR, AGAIN):
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counted["counts"].items()))
            total = sum(counted["counts"].values())
            bold = f"**{name}**" if name == WEIGHTED else _bold(name)
            lines.append(f"| {bold} | {total} | {kinds} | {sum(counted['all_reduced_bytes']) / MB:.3f} |")
    recipe, ours = (sum(measured["collectives"][name]["counts"].values()) for name in (RECIPE, WEIGHTED))
    return [
        *lines,
        "",
        f"A token-weighted gradient and its loss: {recipe} collectives in Accelerate's recipe, {ours} here.",
    ]


def _model(title: str, measured: dict[str, Any], steps: int) -> Table:
    network = measured["network"]
    fit = fitted(network["small_seconds"], network["large_seconds"], network["large_bytes"])
    size, seconds = measured["parameter_bytes"], pooled(measured["seconds"])
    compute = spread(seconds[FLOOR]).median
    extra = spread([mine - floor for mine, floor in zip(seconds[OURS], seconds[FLOOR], strict=True)]).median
    lines = [
        f"On paper, {title}: latency {fit.latency * 1e6:.0f} µs a message, bandwidth {fit.bandwidth * 8 / MB:.0f} Mbit/s, so "
        f"{ring(2, size, fit):.3f} s for 2 ranks (gradacc took {extra:.3f} s longer than without communication); "
        f"an all-reduce of as many bytes of bfloat16 takes {network['large_seconds_bfloat16'] / network['large_seconds']:.2f} "
        "x float32's time.",
        "",
        "| seconds of communication a step | " + " | ".join(f"{world} ranks" for world in WORLDS) + " |",
        "|---|" + "--:|" * len(WORLDS),
    ]
    for name, algorithm in (("ring", ring), ("tree", tree)):
        for what, crossing in (("once a step, float32", size), ("once a step, bfloat16", size / 2)):
            lines.append(_predicted(f"{name}, {what}", algorithm, crossing, fit, 1))
        lines.append(_predicted(f"{name}, every micro-batch, float32", algorithm, size, fit, steps))
    return [*lines, "", *_overlap(measured, compute, fit, steps)]


def _predicted(
    name: str, algorithm: Callable[[int, float, Network], float], size: float, fit: Network, times: int
) -> str:
    return f"| {name} | " + " | ".join(f"{times * algorithm(world, size, fit):.3f}" for world in WORLDS) + " |"


def _overlap(measured: dict[str, Any], compute: float, fit: Network, steps: int) -> Table:
    """Where overlap pays: what it can save by the ratio of compute to communication, and what it costs."""
    first = early(measured["collectives"][OVERLAP]["all_reduced_bytes"])
    best = 3 * steps / 2
    ratios = sorted({0.25, 1.0, best * first or 0.25, best, 4 * best})
    size = measured["parameter_bytes"]
    here = ", ".join(
        f"{compute / ring(world, size, fit):.2g} ({saved(compute, ring(world, size, fit), steps, first):.1%}) "
        f"for {world} ranks"
        for world in (2, *WORLDS)
    )
    cost = paired(pooled(measured["seconds"]), OVERLAP, OURS)
    return [
        f"| the most that overlap saves of a step, {steps} micro-batches; compute / communication = | "
        + " | ".join(f"{ratio:.2g}" for ratio in ratios)
        + " |",
        "|---|" + "--:|" * len(ratios),
        f"| this GPT's buckets ({first:.0%} of the bytes leave early) | "
        + " | ".join(f"{saved(ratio, 1.0, steps, first):.1%}" for ratio in ratios)
        + " |",
        "| many buckets (all but the last leaves early) | "
        + " | ".join(f"{saved(ratio, 1.0, steps, 1.0):.1%}" for ratio in ratios)
        + " |",
        "",
        f"It saves most where compute takes {best:.2g} x (3/2 steps) as long as communication, times the part that leaves "
        f"early. This GPT computes {compute:.3f} s; compute / communication (and what overlap saves at most), ring: {here}. "
        f"Measured with 2 ranks: {cost.median:.3f} [{cost.low:.3f}, {cost.high:.3f}] x gradacc without overlap.",
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """Step time against the number of steps at a fixed global batch: a panel a link, a line a variant."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    links = results["links"]
    figure, panels = pyplot.subplots(1, len(links), figsize=(7 * len(links), 5.2), squeeze=False, layout="constrained")
    for link, axes in zip(links.values(), panels[0], strict=True):
        _draw_link(axes, link)
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    save(figure, results["machine"], path)


def _draw_link(axes: Any, link: dict[str, Any]) -> None:
    steps = list(link["steps"])
    places = range(len(steps))
    for name, (colour, marker, dashes) in STYLES.items():
        times = [spread(pooled(link["steps"][k]["seconds"])[name]) for k in steps]
        look = {"color": colour, "marker": marker, "linestyle": dashes, "fillstyle": "none", "markersize": 7}
        axes.plot(places, [time.median for time in times], label=name, linewidth=1.8, **look)
        lows, highs = [time.low for time in times], [time.high for time in times]
        axes.fill_between(places, lows, highs, color=colour, alpha=0.1, linewidth=0)
    axes.set_xticks(places, steps)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.set_xlabel("micro-batches a rank (the global batch is fixed)")
    axes.set_ylabel("seconds a step: median and quartiles")
    axes.set_title(link["title"], fontsize=10, loc="left", fontweight="bold")
