"""`microbatch.json` as Markdown: a section of `docs/speed.md`, and figures of `docs/microbatch.md`."""

from __future__ import annotations

import re
from typing import Any

from benchmarks import _memories
from benchmarks._measure import said, shown
from benchmarks._report import MB, describe

PLAIN, AGAIN = "plain", "plain again"
FORWARD, RECOMPUTE = 'microbatch, backward="forward"', 'microbatch, backward="recompute"'
HALF, DROPPED = "half ignored: " + FORWARD, "half ignored: dropped before the head"
TORCHS, AT_OURS = "F.linear_cross_entropy, its pieces", "F.linear_cross_entropy, our pieces"


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    size = results["size"]
    lines = []
    for dtype, found in results["heads"].items():
        title = f"{size['tokens']} tokens x {size['vocabulary']} x {size['width']}, {dtype}, pieces of {size['piece']}"
        lines += [f"| {title} | s | time / plain | peak over the floor | of plain's | total |", "|---|" + "--:|" * 5]
        memory = found["memory"]
        over = {name: peak - memory["floor"] for name, peak in memory.items() if name != "floor"}
        for name, timed in found["time"].items():
            cells = [f"**{name}**" if name in (FORWARD, RECOMPUTE) else name]
            cells += [f"{timed['seconds']['median']:.3g}", shown(timed["vs_plain"])]
            if name == AGAIN:
                cells += ["", "", ""]
            else:
                cells += [f"{over[name] / MB:.0f} MB", f"{over[name] / over[PLAIN]:.3f}", f"{memory[name] / MB:.0f} MB"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        ours = ", ".join(f"{name} {shown(found['time'][name]['vs_torchs'])}" for name in (FORWARD, RECOMPUTE))
        dropped = shown(found["time"][DROPPED]["vs_half"])
        lines += [
            f"Over torch's own at equal pieces: {ours}. Dropping ignored tokens over not dropping: {dropped}.",
            "",
        ]
    lines += [growths(results["growth"]), ""]
    lines.append(f"{said(results['rounds'], results['processes'])}. {describe(results['machine'])}.")
    return "\n".join(lines)


def growths(found: dict[str, Any]) -> str:
    """What pieces keep flat, as tables."""
    lines = []
    for name, growth in _memories.GROWTHS.items():
        own = found[name]
        head = " | ".join(f"{size} {name}" for size in own["plain"])
        lines += [f"| {growth.title}: MB | {head} |", "|---|" + "--:|" * len(own["plain"])]
        lines += [
            f"| {way} | {' | '.join(f'{peak / MB:.1f}' for peak in peaks.values())} |" for way, peaks in own.items()
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with these figures between its marks."""
    text = growths(results["growth"])
    return re.sub("(<!-- growth -->\n).*?(<!-- /growth -->)", rf"\g<1>{text}\n\g<2>", page, flags=re.DOTALL)
