"""What it costs and saves to divide an optimizer's state over ranks: whole training steps of gradacc, DDP, ZeRO and FSDP2.

    python -m benchmarks.sharded [--processes 3] [--rounds 9] [--quick] [--links loopback slow]

A step is an accumulated gradient of 4 micro-batches a rank and an AdamW update, without clipping, on two ranks with gloo, one
thread each (`benchmarks._trained`). Links are those of `benchmarks.boundary`: loopback, and 400 Mbit/s between two network
namespaces. A GPT on both, and an MLP of many parameters on loopback.

**Check.** Before anything is timed, every variant's parameters after two steps are compared with those of one process that
trains on the union: the error is of the change, by 2-norm, of the leaf that is furthest off.

**Time.** As in `benchmarks.boundary`: all variants in turns, once a round, in pairs of processes at different times; ratios to
DDP with torch's AdamW *in the same round*, which runs twice, under two names. The slow link and the MLP have fewer
pairs and rounds, as the tables say. Gradients are freed inside the clock.

**Bytes, collectives.** By the interface's own counter, headers included, and by torch's CommDebugMode.

**Memory.** Of the rank that has more, each variant alone: parameters, gradients and state from their tensors; all that is held
between steps (buckets and buffers too), and the highest point of a step, from the resident set of a process in which every
tensor has pages of its own (`benchmarks._measure.EXACT_HEAP`). Linux.

Writes `sharded.json` (to `--out`) and prints Markdown tables.
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

from benchmarks._measure import EXACT_HEAP, machine, rounded
from benchmarks._network import LINKS, Host, UnavailableError, found
from benchmarks._sharded_report import tables

STEPS = 4
"""Micro-batches a rank."""
RANKS = "benchmarks._sharded_ranks"
FULL = {"loopback": ("gpt", "mlp"), "slow": ("gpt",)}
FEWER = {("loopback", "mlp"): (1, 3), ("slow", "gpt"): (2, 3)}
"""What takes long: in how many pairs at most, and the part of the rounds that is left to it."""
QUICK = {"loopback": ("tiny",), "slow": ("tiny",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on every link, and write and print the results."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # an exception, so that all is cleaned up
    torch.set_num_threads(1)  # as the ranks do; nothing is computed here
    results: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "settings": {"processes": options.processes, "rounds": options.rounds, "steps": STEPS},
        "workloads": {},
        "skipped": {},
    }
    for link in options.links:
        try:
            with LINKS[link].open() as hosts:
                for workload in options.plan[link]:
                    measured = _measured(hosts, options, link, workload)
                    kept = results["workloads"].setdefault(workload, {"title": measured.pop("title"), "links": {}})
                    kept["links"][link] = {"title": LINKS[link].title, **measured}
                    if "memory" not in kept:
                        kept["memory"] = found(hosts, RANKS, _passed(workload, 0, "memory"), EXACT_HEAP)
        except UnavailableError as reason:
            print(f"{LINKS[link].title}: left out, {reason}", file=sys.stderr)
            results["skipped"][link] = str(reason)
    if not results["workloads"]:
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sharded.json").write_text(json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n")
    print(tables(results))
    return 0


def _measured(hosts: Sequence[Host], options: argparse.Namespace, link: str, workload: str) -> dict[str, Any]:
    """What fresh pairs of ranks find; the first one counts, too."""
    most, part = FEWER.get((link, workload), (options.processes, 1))
    rounds = min(options.rounds, max(options.rounds // part, 3))
    pairs = []
    for pair in range(min(options.processes, most)):
        print(f"{LINKS[link].title}: {workload}, pair {pair + 1}", file=sys.stderr)
        pairs.append(found(hosts, RANKS, _passed(workload, rounds, "time" if pair else "count")))
    return {**pairs[0], "seconds": [pair["seconds"] for pair in pairs]}


def _passed(workload: str, rounds: int, task: str) -> dict[str, object]:
    return {"task": task, "workload": workload, "steps": STEPS, "rounds": rounds, "warmup": 1}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=summary)
    parser.add_argument("--processes", type=int, default=3, help="pairs of ranks, one after the other (3)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds in each on loopback, fewer elsewhere (9)")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS), help="which (both)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it work?")
    options = parser.parse_args(arguments)
    options.plan = FULL
    if options.quick:
        options.plan, options.processes, options.rounds = QUICK, 1, 2
    return options


if __name__ == "__main__":
    sys.exit(main())
