"""What the boundary costs: one accumulated gradient over two ranks, gradacc against DDP and Accelerate.

    python -m benchmarks.boundary [--processes 3] [--rounds 9] [--quick] [--links loopback slow]

**Where.** Two processes with gloo, started by torchrun, one thread each, on *loopback*: both on this machine; and on a
*slow* link: two hosts made of network namespaces, joined by a veth pair whose ends send 400 Mbit/s (`tc … tbf`). The
latter needs Linux, root and iproute2, and is left out with a message elsewhere; it is removed afterwards, come what
may.

**Time.** The variants of `benchmarks._synced` take turns in one pair of processes, once a round, in a balanced order.
All ranks wait for each other before every timing, and the slower one's time counts. At the tables' number of steps
several pairs do so, at different times. A ratio is to another variant's time *in the same round*; reported are the
median of the pairs' medians, the quartiles of all rounds, and the lowest and the highest median of a pair. Accelerate
runs twice a round, under two names: the second row's distance from 1 is the noise. No variant takes an optimizer step;
every variant frees its gradients inside the clock. Before anything is timed, every variant's gradient is checked
against the one that one process computes from both ranks' examples.

**Bytes and collectives.** Bytes by the interface's own counter, headers included; collectives by torch's CommDebugMode.
Both at every number of steps, for the same global batch.

**Model.** Latency and bandwidth, measured with a small and a large all-reduce, and what they say on paper for 8, 64 and
1024 ranks, and for which ratio of compute to communication overlap pays (`benchmarks._model`).

Writes `boundary.json` and `boundary.png` (to `--out`) and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._boundary_report import draw, tables
from benchmarks._measure import machine, rounded
from benchmarks._network import LINKS, Host, UnavailableError, found
from benchmarks._workloads import WORKLOADS

STEPS = (1, 2, 4, 8)
MAIN = 4
"""Micro-batches a rank of the tables."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on every link, every number of steps in a fresh pair of ranks, and write and print the results."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # an exception, so that all is cleaned up
    torch.set_num_threads(1)  # as the ranks do; nothing is computed here
    results: dict[str, Any] = {
        "machine": machine(torch.device("cpu"), ("accelerate",)),
        "settings": {
            "processes": options.processes,
            "rounds": options.rounds,
            "other_rounds": options.other_rounds,
            "warmup": options.warmup,
            "main_steps": MAIN,
            "workload": options.workload,
        },
        "links": {},
        "skipped": {},
    }
    for name in options.links:
        try:
            with LINKS[name].open() as hosts:
                measured = {str(steps): _measured(hosts, options, name, steps) for steps in options.steps}
            results["links"][name] = {"title": LINKS[name].title, "steps": measured}
        except UnavailableError as reason:
            print(f"{LINKS[name].title}: left out, {reason}", file=sys.stderr)
            results["skipped"][name] = str(reason)
    if not results["links"]:
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "boundary.json").write_text(json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n")
    draw(results, options.out / "boundary.png")
    print(tables(results))
    return 0


def _measured(hosts: Sequence[Host], options: argparse.Namespace, name: str, steps: int) -> Any:
    """What fresh pairs of ranks find (Accelerate keeps its number of steps for as long as a process lives)."""
    pairs = [_pair(hosts, options, name, steps) for _ in range(options.processes if steps == MAIN else 1)]
    return {**pairs[0], "seconds": [pair["seconds"] for pair in pairs]}


def _pair(hosts: Sequence[Host], options: argparse.Namespace, name: str, steps: int) -> Any:
    print(f"{LINKS[name].title}: {steps} micro-batches", file=sys.stderr)
    rounds = options.rounds if steps == MAIN else options.other_rounds
    passed = {"workload": options.workload, "steps": steps, "rounds": rounds, "warmup": options.warmup}
    return found(hosts, "benchmarks._ranks", passed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boundary", description=summary)
    parser.add_argument("--processes", type=int, default=3, help="pairs of ranks at 4 micro-batches, one elsewhere (3)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed rounds of each at 4 micro-batches, fewer elsewhere (9)"
    )
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are dropped (2)")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS), help="which (both)")
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt", help="of benchmarks._workloads (gpt)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, three rounds, two numbers of steps: does it work?"
    )
    options = parser.parse_args(arguments)
    options.steps = STEPS
    if options.quick:
        options.rounds, options.warmup, options.workload, options.steps = 3, 1, "tiny", (1, MAIN)
        options.processes = 1
    options.other_rounds = max(options.rounds // 2, 3)
    return options


if __name__ == "__main__":
    sys.exit(main())
