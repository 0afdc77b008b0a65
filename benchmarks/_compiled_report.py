"""`compiled.json` as a figure and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._compiled_variants import AROUND, COMPILED, EAGER, LOOP_COMPILED, ONE_GRAPH, OPTAX
from benchmarks._measure import said, shown, spread
from benchmarks._report import MB, describe, draw_ratios, save
from benchmarks._variants import AGAIN, LOOP

COLOURS = {
    LOOP: "#202124",
    AGAIN: "#5f6368",
    LOOP_COMPILED: "#b06000",
    EAGER: "#669df6",
    ONE_GRAPH: "#1a73e8",
    AROUND: "#174ea6",
    OPTAX: "#c5221f",
}


def tables(results: dict[str, Any]) -> str:
    """A table for each workload, and lines on neighbours, first calls, the graph's size, and what was measured where."""
    lines: list[str] = []
    for work in results["workloads"].values():
        head = [work["title"], "time / hand-written loop", "time / optax on JAX", "first call"]
        lines += ["| " + " | ".join([*head, "peak memory: resident", "allocated"]) + " |", "|---|" + "--:|" * 5]
        for name, timed in work["time"].items():
            cold = work["cold"].get(name, {})
            cells = [f"**{name}**" if name == ONE_GRAPH else name, shown(timed["vs_loop"]), shown(timed["vs_optax"])]
            cells.append(f"{cold['first_call']:.1f} s" if name in COMPILED and cold else "")
            cells += [_size(cold[kind], work) if kind in cold else "" for kind in ("resident", "allocated")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for work in results["workloads"].values():
        near = work["neighbours"]
        lines.append(
            f"{_model(work)}: right after JAX the loop takes {_ratio(near[LOOP])} of its time right after itself; "
            f"right after the loop, JAX takes {_ratio(near[OPTAX])} of its own. One batch in "
            + " and in ".join(
                f"{steps} steps: first call {_median(found, 'first_call'):.1f} s, later {_median(found, 'later_call'):.2f} s"
                for steps, found in work["growth"].items()
            )
            + f" ({_growth(work)} x). Graph nodes at "
            + ", ".join(f"{steps} steps: {count}" for steps, count in work["nodes"].items())
            + "."
        )
    settings = results["settings"]
    versions = ", ".join(f"{name} {results['machine'][name]}" for name in ("jax", "jaxlib", "optax"))
    lines.append(
        f"{said(settings['rounds'], settings['processes'])}; no optimizer. "
        "First call and memory in fresh processes, without caches; what a framework starts once a process is not in "
        f"it. {describe(results['machine'])}, {versions}."
    )
    return "\n".join(lines)


def _growth(work: dict[str, Any]) -> str:
    """The first call with the most steps over that with the fewest: the median of pairs of fresh processes."""
    few, many = (work["growth"][steps] for steps in sorted(work["growth"], key=int))
    ratios = [of_many["first_call"] / of_few["first_call"] for of_few, of_many in zip(few, many, strict=True)]
    return f"{spread(ratios).median:.2f}"


def _median(found: list[dict[str, float]], what: str) -> float:
    return spread([one[what] for one in found]).median


def _model(work: dict[str, Any]) -> str:
    model: str = work["title"].partition(",")[0]
    return model


def _ratio(measured: dict[str, float]) -> str:
    return f"{measured['median']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def _size(peak: int, work: dict[str, Any]) -> str:
    return f"{peak / work['parameter_bytes']:.2f} x ({peak / MB:.0f} MB)"


def draw(results: dict[str, Any], path: Path) -> None:
    """A row a workload: time ratios with quartiles; seconds of the first call; peak memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    works = list(results["workloads"].values())
    size = (15, 3.6 * len(works) + 0.6)
    figure, rows = pyplot.subplots(
        len(works), 3, figsize=size, squeeze=False, layout="constrained", width_ratios=(1.6, 1, 1)
    )
    for work, (time, first, memory) in zip(works, rows, strict=True):
        draw_ratios(time, work, COLOURS, bold=ONE_GRAPH, margin=0.22, label="median, quartiles of rounds")
        names = [name for name in COMPILED if name in work["cold"]]
        _bars(first, names, [work["cold"][name]["first_call"] for name in names], "{:.1f} s")
        first.set_title("first call", fontsize=10, loc="left")
        first.set_xlabel("seconds, without caches")
        names = list(work["cold"])
        peaks = [work["cold"][name]["resident"] / work["parameter_bytes"] for name in names]
        _bars(memory, names, peaks, "{:.2f}")
        memory.set_title("peak resident memory", fontsize=10, loc="left")
        memory.set_xlabel("over the parameters")
    save(figure, results["machine"], path)


def _bars(axes: Any, names: list[str], values: list[float], label: str) -> None:
    bars = axes.barh(range(len(names)), values, color=[COLOURS[name] for name in names], height=0.6)
    axes.bar_label(bars, [label.format(value) for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.grid(axis="x", alpha=0.25)
