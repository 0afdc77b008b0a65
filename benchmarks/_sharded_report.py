"""`sharded.json` as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks._measure import pooled, ratio, said, shown, spread
from benchmarks._report import describe

BASE, AGAIN = "DDP (no_sync) + AdamW", "the same again"
ZERO = "DDP (no_sync) + ZeroRedundancyOptimizer(AdamW)"
FSDP_KEPT, FSDP = "FSDP2 + AdamW, parameters kept for the step", "FSDP2 + AdamW, reshard_after_forward=True"
OURS, SHARDED = "gradacc: all_reduce, adamw", "gradacc: reduce_scatter, sharded(adamw)"
SHARDED_OVERLAP, SHARDED_HALF = f"{SHARDED}, overlap", f"{SHARDED}, bfloat16"
MB = 1e6


def tables(results: dict[str, Any]) -> str:
    """Time and bytes of every workload on every link, and what a rank holds."""
    lines: list[str] = []
    for work in results["workloads"].values():
        for link in work["links"].values():
            lines += [*times(f"{work['title']}; {link['title']}", link), ""]
        size = next(iter(work["links"].values()))["parameter_bytes"]
        lines += [*memory(work["title"], work["memory"], size), ""]
    settings = results["settings"]
    lines.append(
        f"Two ranks with gloo, each with one thread and {settings['steps']} micro-batches. "
        f"{said(settings['rounds'], settings['processes'])}, the slower rank's time. "
        f"{describe(results['machine'])}."
    )
    lines += [f"Left out: {name}: {why}." for name, why in results["skipped"].items()]
    return "\n".join(lines)


def times(title: str, link: dict[str, Any]) -> list[str]:
    """Of one workload over one link."""
    processes = link["seconds"]
    rounds = f"{len(processes)} x {len(processes[0][BASE])} rounds"
    lines = [
        f"| {title} ({rounds}) | time / {BASE} | seconds | MB sent by a rank | collectives | updates' error |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name in processes[0]:
        cells = [shown(ratio(processes, name, BASE)._asdict()), f"{spread(pooled(processes)[name]).median:.3f}"]
        if name == AGAIN:
            cells += ["", ""]
        else:
            counts = sorted(link["collectives"][name].items())
            cells += [f"{link['bytes'][name] / MB:.2f}", ", ".join(f"{count} {kind}" for kind, count in counts)]
        lines.append(f"| {_bold(name)} | {' | '.join(cells)} | {link['update_error'][name]:.0e} |")
    return lines


def memory(title: str, measured: dict[str, dict[str, int]], size: int) -> list[str]:
    """What a rank holds between steps, and at the highest point of one."""
    columns = {
        "params": "parameters",
        "grads": "gradients",
        "state": "state",
        "held": "held between steps",
        "peak": "peak of a step",
    }
    lines = [
        f"| {title}: MB on a rank | {' | '.join(columns.values())} | peak / parameters |",
        "|---|" + "--:|" * (len(columns) + 1),
    ]
    for name, found in measured.items():
        cells = [f"{found[key] / MB:.2f}" for key in columns]
        lines.append(f"| {_bold(name)} | {' | '.join(cells)} | {found['peak'] / size:.2f} |")
    return lines


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS.partition(":")[0]) else name
