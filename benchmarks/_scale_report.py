"""`scale.json` as a figure and as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._links import Link
from benchmarks._report import describe
from benchmarks._scale_cost import Line, lines_of
from benchmarks._scale_model import Fit, Row, break_even, errors, errors_outside, fitted, predicted

MB = 1e6
WORLDS = (2, 8, 64, 256, 1024)
LINKS = (Link(400, 0.0), Link(400, 0.001), Link(100, 0.005))
"""Of those that were measured."""
SIZE, STEPS = 20_000_000, 8
"""Bytes of the gradients, and micro-batches, of the tables of what is predicted."""
COMPUTES = (0.0, 0.1, 0.5, 2.0)
"""Seconds of arithmetic of a micro-batch."""


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Of each part that was measured."""
    parts = results["parts"]
    made = {"exactness": _exactness, "cost": _cost, "bytes": _bytes}
    found = {part: table(parts[part]) for part, table in made.items() if part in parts}
    if "model" in parts:
        found["model"] = _model(parts)
    return {part: f"{text}\n\n{_where(parts[part])}" for part, text in found.items()}


def _where(part: dict[str, Any]) -> str:
    return f"{describe(part['machine'])}. Load when it began: {part['load']:.1f}."


def _exactness(found: dict[str, Any]) -> str:
    lines = [
        "| ranks | without examples | examples | largest relative error | same bits on all ranks | told of the failure | s |"
    ]
    lines += ["|--:|--:|--:|--:|---|--:|--:|"]
    for world, each in found["ranks"].items():
        alike = "yes" if each["alike"] else "no"
        lines.append(
            f"| {world} | {each['empty']} | {each['examples']} | {each['error']:.1e} | {alike} | {each['told']} | "
            f"{each['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _cost(found: dict[str, Any]) -> str:
    lines = ["| ranks | ms: median (least to most) | MB held: tensors | Python's objects | all-reduces | MB of them |"]
    lines += ["|--:|--:|--:|--:|--:|--:|"]
    for world, each in found["ranks"].items():
        low, middle, high = (f(each["seconds"]) * 1e3 for f in (min, median, max))
        sizes = (each["tensor_bytes"] / MB, each["python_bytes"] / MB)
        lines.append(
            f"| {world} | {middle:.1f} ({low:.1f} to {high:.1f}) | {sizes[0]:.2f} | {sizes[1]:.2f} | {each['collectives']} | "
            f"{each['wire_bytes'] / MB:.2f} |"
        )
    straight = lines_of(found)
    time, held, wire = straight["seconds"], straight["held"], straight["wire"]
    return "\n".join(
        [
            *lines,
            "",
            f"As lines: {time.fixed * 1e3:.1f} ms and **{time.per_rank * 1e6:.1f} µs a rank** (points are off by up to "
            f"{time.off:.0%}); {held.fixed / MB:.1f} MB and **{held.per_rank:.0f} bytes a rank** held; "
            f"{wire.fixed / MB:.1f} MB and **{wire.per_rank:.0f} bytes a rank** in the all-reduce. "
            f"{found['leaves']} parameters, gradients of {found['gradient_bytes'] / MB:.0f} MB in float32, "
            f"{found['rounds']} calls.",
        ]
    )


def _bytes(found: dict[str, Any]) -> str:
    lines = ["| | the gradient | collectives a step | of them | of gloo's | MB a rank sends | over the parameters |"]
    lines += ["|---|---|--:|---|---|--:|--:|"]
    for name, each in found["ways"].items():
        asked, done = (_kinds(each[kind]) for kind in ("counts", "transport"))
        bold = f"**{name}**" if name.startswith("gradacc") else name
        lines.append(
            f"| {bold} | {each['gathered']} | {sum(each['counts'].values())} | {asked} | {done} | {each['bytes'] / MB:.1f} | "
            f"{each['bytes'] / found['parameter_bytes']:.2f} x |"
        )
    worst = max(each["error"] for each in found["ways"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"Two ranks with gloo ({found['where']}), {found['steps']} micro-batches, parameters of "
            f"{found['parameter_bytes'] / MB:.2f} MB. Every gradient is the large batch's, to {worst:.0e}.",
        ]
    )


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{count} {kind.removeprefix('gloo:').removesuffix('_base')}" for kind, count in sorted(counts.items())
    )


def _model(parts: dict[str, Any]) -> str:
    rows, worlds = [Row(*row) for row in parts["model"]["rows"]], parts["model"]["fitted"]
    fit = fitted([row for row in rows if row.world in worlds])
    off = errors_outside(fit, rows, worlds)
    lines = [
        f"Fitted to {' and '.join(map(str, worlds))} ranks: software {fit.software * 1e3:.2f} ms a message, "
        f"{fit.delays:.2f} x a link's delay, {fit.overhead:.3f} bytes on a link for one of the tensor's.",
        "",
        "| ranks | settings | error: median | from | to |",
        "|--:|--:|--:|--:|--:|",
    ]
    for world in sorted({row.world for row in rows}):
        found = errors(fit, [row for row in rows if row.world == world])
        mark = "" if world in worlds else " (held out)"
        middle = median(abs(error) for error in found)
        lines.append(f"| {world}{mark} | {len(found)} | {middle:.1%} | {min(found):+.0%} | {max(found):+.0%} |")
    return "\n".join([*lines, "", *_extrapolated(parts, fit, off)])


def _local(parts: dict[str, Any]) -> tuple[Line, Line]:
    """Seconds, and bytes in the all-reduce beside gradients; nothing where that part was not measured."""
    if "cost" not in parts:
        return Line(0.0, 0.0, 0.0), Line(0.0, 0.0, 0.0)
    straight = lines_of(parts["cost"])
    return straight["seconds"], straight["wire"]


def _extrapolated(parts: dict[str, Any], fit: Fit, off: tuple[float, float]) -> list[str]:
    """What a step takes between ranks, and from how many micro-batches on once is faster."""
    local, wire = _local(parts)
    lines = [
        f"| link | ranks | an all-reduce, s | {STEPS} micro-batches: once | in each | "
        + " | ".join(f"from k on: {'no compute' if not c else f'{c:g} s each'}" for c in COMPUTES)
        + " |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(COMPUTES),
    ]
    for link in LINKS:
        for world in WORLDS:
            every = predicted(fit, world, SIZE, link)
            once = predicted(fit, world, SIZE + wire.per_rank * world, link) + local.fixed + local.per_rank * world
            wins = (break_even(once, every, compute) for compute in COMPUTES)
            lines.append(
                f"| {link.rate:g} Mbit/s, {link.delay * 1e3:g} ms | {world} | {every:.2f} ({every / (1 + off[1]):.2f} to "
                f"{every / (1 + off[0]):.2f}) | {once:.2f} | {STEPS * every:.2f} | "
                + " | ".join("never" if k is None else str(k) for k in wins)
                + " |"
            )
    return lines
