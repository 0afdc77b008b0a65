"""Time of a keyed dropout against `F.dropout`: what it costs that a mask is a function of a key.

    python -m benchmarks.random [--processes 5] [--rounds 9] [--device cuda] [--out benchmarks/results]

All contestants drop elements of one tensor of shape (64, 256, 512), in float32, and differentiate the sum; they take turns in
one process, once a round (`benchmarks._measure`), and several processes do so. *Tensor code* is `gradacc.random.dropout` as it
is under transforms, all at once; *by pieces or torch's kernels* is what an eager call takes: pieces that fit into the cache on
a CPU, torch's kernels where it has them. Before anything is timed, both are compared bit for bit.

Writes `random.json` (to `--out`) and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import fresh, interleaved, machine, pooled, ran_task, ratio, said, shown, spread
from benchmarks._report import describe
from gradacc import random

SHAPE = (64, 256, 512)
P = 0.1
BASE = "F.dropout"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the figures, and print them as a Markdown table."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    passed = ["--rounds", str(options.rounds), "--device", options.device]
    passed += ["--threads", str(options.threads)] if options.threads is not None else []
    processes = [fresh("benchmarks.random", ["--task", "time", *passed]) for _ in range(options.processes)]
    results = {
        "machine": machine(torch.device(options.device)),
        "processes": options.processes,
        "rounds": options.rounds,
        "runs": {
            name: {
                "seconds": spread(pooled(processes)[name])._asdict(),
                "vs_dropout": ratio(processes, name, BASE)._asdict(),
            }
            for name in processes[0]
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "random.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def time_task(options: argparse.Namespace) -> dict[str, list[float]]:
    """Compare the two paths, then time all in turns."""
    device = torch.device(options.device)
    x = torch.randn(SHAPE, device=device)
    keys = random.split(random.key(0, device=device), SHAPE[0])
    assert torch.equal(tensor_code(x, keys), random.dropout(x, keys, P))
    w = x.clone().requires_grad_()
    return interleaved(
        {
            BASE: lambda: F.dropout(x, P),
            "F.dropout again": lambda: F.dropout(x, P),
            "gradacc.random.dropout, by pieces or torch's kernels": lambda: random.dropout(x, keys, P),
            "gradacc.random.dropout, tensor code": lambda: tensor_code(x, keys),
            "F.dropout, forward and backward": differentiated(lambda w: F.dropout(w, P), w),
            "gradacc.random.dropout, forward and backward": differentiated(lambda w: random.dropout(w, keys, P), w),
        },
        rounds=options.rounds,
        warmup=2,
        device=device,
    )


TASKS = {"time": time_task}


def tensor_code(x: Tensor, keys: Tensor) -> Tensor:
    """What runs where a transform is active."""
    result: Tensor = torch.vmap(lambda x, key: random.dropout(x, key, P))(x, keys)
    return result


def differentiated(dropout: Callable[[Tensor], Tensor], w: Tensor) -> Callable[[], object]:
    """The gradient of the sum."""
    return lambda: torch.autograd.grad(dropout(w).sum(), w)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| dropout of {SHAPE}, float32 | ms | time / F.dropout |", "|---|--:|--:|"]
    for name, row in results["runs"].items():
        lines.append(f"| {name} | {row['seconds']['median'] * 1e3:.1f} | {shown(row['vs_dropout'])} |")
    return "\n".join([*lines, "", f"{said(results['rounds'], results['processes'])}. {describe(results['machine'])}."])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=5, help="that time everything, one after the other (5)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
