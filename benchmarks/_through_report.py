"""`through.json` as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._measure import paired, said, shown
from benchmarks._report import MB, describe

THEIRS, AGAIN = "sentence-transformers, cached", "sentence-transformers again"
OURS, WHOLE = "accumulate(through=)", "one graph of the whole batch"
REPLICATED, ROWS = "loss_fn(params, outputs, batch)", "loss_fn(params, outputs, batch, rows)"
WIDTH = 384
"""Of an output."""


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    batches = results["batches"]
    lines = [f"| MiniLM, micro-batches of {results['microbatch']} | pairs | s | time / {THEIRS} |", "|---|--:|--:|--:|"]
    for batch, found in batches.items():
        for name, timed in found["time"].items():
            seconds = f"{timed['seconds']['median']:.3g}"
            lines.append(f"| {_bold(name)} | {batch} | {seconds} | {shown(timed['vs_theirs'])} |")
    lines += ["", *memory(batches), "", *ranks(results["ranks"]), ""]
    tokens = " and ".join(f"{count} of a {side}" for side, count in results["tokens"].items())
    most = max(found["rounds"] for found in batches.values())
    fewer = [f"{found['rounds']} of {batch} pairs" for batch, found in batches.items() if found["rounds"] < most]
    versions = ", ".join(f"{name} {results['machine'][name]}" for name in ("sentence-transformers", "transformers"))
    lines += [
        f"At most {tokens} (tokens). {said(most, results['processes'])}.",
        *[f"Rounds: {', '.join(fewer)}."] * bool(fewer),
        f"{describe(results['machine'])}, {versions}.",
    ]
    return "\n".join(lines)


def memory(batches: dict[str, Any]) -> list[str]:
    """Peaks against the batch, and what a pair more takes."""
    sizes = list(batches)
    lines = [f"| peak over the gradients: MB | {' | '.join(f'{size} pairs' for size in sizes)} | bytes a pair more |"]
    lines.append("|---|" + "--:|" * (len(sizes) + 1))
    for name in (WHOLE, THEIRS, OURS):
        peaks = {size: batches[size]["memory"][name] for size in sizes if name in batches[size]["memory"]}
        lines.append(_row(_bold(name), peaks, sizes))
    return [*lines, _row("(outputs of both sides)", {size: outputs(int(size)) for size in sizes}, sizes)]


def outputs(batch: int) -> int:
    """Bytes."""
    return 2 * batch * WIDTH * 4


def _row(name: str, peaks: dict[str, int], sizes: list[str]) -> str:
    cells = [f"{peaks[size] / MB:.1f}" if size in peaks else "" for size in sizes]
    return f"| {name} | {' | '.join(cells)} | {slope(peaks)} |"


def slope(peaks: dict[str, int]) -> str:
    """Between the two largest batches."""
    if len(peaks) < 2:
        return ""
    (small, less), (large, more) = list(peaks.items())[-2:]
    return f"{(more - less) / (int(large) - int(small)):.0f}"


def ranks(found: dict[str, Any]) -> list[str]:
    """Both forms of a loss, on one of two ranks."""
    title = "| a rank's cost of the loss, of two | pairs of both | GFLOP | peak: MB | s | flops, peak, time of the first form |"
    lines = [title, "|---|--:|--:|--:|--:|---|"]
    for union, forms in found.items():
        base = forms[REPLICATED]
        for name, own in forms.items():
            cells = [union, f"{own['flops'] / 1e9:.2f}", f"{own['peak'] / MB:.1f}", f"{median(own['seconds']):.3f}"]
            time = paired({"own": own["seconds"], "base": base["seconds"]}, "own", "base").median
            shares = f"{own['flops'] / base['flops']:.2f}, {own['peak'] / base['peak']:.2f}, {time:.2f}"
            lines.append(f"| `{name}` | {' | '.join(cells)} | {'' if name == REPLICATED else shares} |")
    return lines


def _bold(name: str) -> str:
    return f"**{name}**" if name == OURS else name
