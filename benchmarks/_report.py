"""`eager.json` as a figure and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._measure import said, shown
from benchmarks._variants import AGAIN, FLOOR, LOOP, OURS

STYLES = {  # colour, marker, size: the memory lines lie on each other, so the markers are rings around a dot
    FLOOR: ("#9aa0a6", "_", 9.0),
    LOOP: ("#202124", "s", 16.0),
    AGAIN: ("#5f6368", "s", 16.0),
    "Accelerate": ("#b06000", "D", 11.5),
    "Lightning Fabric": ("#7b3fa0", "o", 8.5),
    "naive torch.func.grad loop": ("#c5221f", "x", 6.0),
    OURS: ("#1a73e8", "o", 4.5),
}
MB = 1e6


def describe(machine: dict[str, Any]) -> str:
    """One line: device or processor, cores, threads, versions."""
    versions = ", ".join(f"{name} {machine[name]}" for name in machine if name in _VERSIONED)
    where = f"{machine['device']}; " if "device" in machine else ""
    return f"{where}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {versions}"


_VERSIONED = ("python", "torch", "accelerate", "lightning-fabric")


def tables(results: dict[str, Any]) -> str:
    """A Markdown table for each workload, and a line on what was measured where."""
    lines: list[str] = []
    for work in results["workloads"].values():
        memory = work.get("memory", {})
        resident = "resident" in memory
        head = [work["title"], "time / hand-written loop", "time / forward + backward"]
        head += ["peak memory / parameters", *["resident"] * resident] if memory else ["µs a micro-batch over the loop"]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        for name, timed in work["time"].items():
            cells = [f"**{name}**" if name == OURS else name, shown(timed["vs_loop"]), shown(timed["vs_floor"])]
            if memory:
                steps = str(work["steps"]) if str(work["steps"]) in memory["allocated"][LOOP] else "4"
                source = LOOP if name == AGAIN else name
                peaks = [memory[kind][source][steps] for kind in ("allocated", *(["resident"] * resident))]
                sizes = [f"{peak / work['parameter_bytes']:.2f} x ({peak / MB:.0f} MB)" for peak in peaks]
                cells += [""] * len(sizes) if name == AGAIN else sizes
            else:
                pairs = zip(*(chain(*work["time"][of]["rounds"]) for of in (name, LOOP)), strict=True)
                cells.append(f"{median(mine - loop for mine, loop in pairs) / work['steps'] * 1e6:+.0f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    settings = results["settings"]
    lines.append(
        f"{said(settings['rounds'], settings['processes'])}; no optimizer. "
        f"Peak memory over module and batch. {describe(results['machine'])}."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """A row a workload: time ratios with quartiles; peak memory against steps, of a fixed batch and micro-batch.

    What has no memory figures (the GPT of almost nothing) is for the table only.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    works = [work for work in results["workloads"].values() if "memory" in work]
    if not works:
        return
    size = (15, 4.2 * len(works) + 0.6)
    figure, rows = pyplot.subplots(
        len(works), 3, figsize=size, squeeze=False, layout="constrained", width_ratios=(1.5, 1, 1)
    )
    colours = {name: colour for name, (colour, _, _) in STYLES.items()}
    for work, (time, fixed, grown) in zip(works, rows, strict=True):
        draw_ratios(time, work, colours, bold=OURS, margin=0.16, label="median, quartiles of rounds")
        _draw_memory(fixed, work, "allocated", "the batch is fixed")
        _draw_memory(grown, work, "allocated_fixed_microbatch", "the micro-batch is fixed")
    lines, names = rows[0][1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    save(figure, results["machine"], path)


def draw_ratios(
    axes: Any, work: dict[str, Any], colours: Mapping[str, str], *, bold: str, margin: float, label: str
) -> None:
    """A line a contestant: the median of its ratio to the hand-written loop's time, over quartiles and processes."""
    names = list(work["time"])
    for place, name in enumerate(names):
        ratio = work["time"][name]["vs_loop"]
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=colours[name], linewidth=6, alpha=0.3)
        axes.plot([ratio["least"], ratio["most"]], [place, place], color=colours[name], linewidth=1.5)
        axes.plot(ratio["median"], place, "o", color=colours[name], markersize=7)
        text = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": colours[name]}
        axes.annotate(f"{ratio['median']:.3f}", (ratio["high"], place), **text)
    axes.axvline(1.0, color="#202124", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[names.index(bold)].set_fontweight("bold")
    axes.invert_yaxis()
    axes.margins(x=margin)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(work["title"], fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(f"time / the hand-written loop's: {label}")


def save(figure: Any, machine: dict[str, Any], path: Path) -> None:
    """With a line on the machine below it."""
    from matplotlib import pyplot

    figure.supxlabel(describe(machine), fontsize=8, color="#5f6368", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_memory(axes: Any, work: dict[str, Any], kind: str, what: str) -> None:
    for name, peaks in work["memory"][kind].items():
        colour, marker, size = STYLES[name]
        over = [peak / work["parameter_bytes"] for peak in peaks.values()]
        places = range(len(over))
        width = 2.2 if name == OURS else 1.2
        axes.plot(places, over, color=colour, linewidth=width, label=name, **_marker(marker, size, filled=name == OURS))
    axes.set_xticks(range(len(peaks)), list(peaks))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.set_xlabel("steps")
    axes.set_ylabel("peak memory / parameters")
    axes.set_title(f"peak tensor memory, {what}", fontsize=10, loc="left")


def _marker(shape: str, size: float, *, filled: bool) -> dict[str, Any]:
    return {"marker": shape, "markersize": size, "markeredgewidth": 1.6, "fillstyle": "full" if filled else "none"}
