"""Time, compile time and memory of one accumulated gradient, compiled: both orders, the hand-written loop, optax on JAX.

    python -m benchmarks.compiled [--rounds 31] [--quick] [--workloads gpt mlp] [--out benchmarks/results]

**Time.** As in `benchmarks.eager`: all take turns in one process, and what is reported is the median over the rounds of
the ratio to the hand-written eager loop's time *in the same round*, with the quartiles; the loop runs twice a round, and
the second row's distance from 1 is the noise. Before anything is timed, every gradient, JAX's too, is checked against
the large batch's in PyTorch (rtol 1e-4). PyTorch and JAX get the same number of threads.

**Neighbours.** A thread pool that has just finished spins for a while before it sleeps, at the expense of the other
framework's. So the loop is also timed right after itself and right after JAX, and JAX likewise: the ratios say how much
of a time is the other's doing.

**Compile time.** Each in a fresh process, without any of Inductor's caches: *start-up* is the first compilation of
next to nothing (imports, the compiler's precompiled headers), *first call* what the gradient's first call takes after
that, compilation and one run. The one-graph variant also at 2 and at 32 steps of one batch (of 32 micro-batches of the
workload's size), in turns, with a *later call* beside it: the difference is compilation; what is reported is the median of the
ratios of a pair. And its graph's nodes at 8 and at 64 steps.

**Memory.** The peak of a call after the first over what was there before it. *resident*: what the kernel saw, in a fresh
process; *allocated*: PyTorch's tensors, exact.

Writes `compiled.json` and `compiled.png` (to `--out`) and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._compiled_report import draw, tables
from benchmarks._compiled_variants import CONTESTANTS, EAGER, ONE_GRAPH, OPTAX, check, graph_nodes
from benchmarks._measure import allocated_peak, fresh, interleaved, machine, ran_task, resident_peak, spread, times
from benchmarks._variants import AGAIN, LOOP
from benchmarks._workloads import WORKLOADS, Workload

CPU = torch.device("cpu")
COMPILE_STEPS = (2, 32)
NODE_STEPS = (8, 64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every workload, each task in a fresh process, and write and print the results."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    results: dict[str, Any] = {
        "machine": machine(CPU, ("jax", "jaxlib", "optax")),
        "settings": {"processes": options.processes, "rounds": options.rounds, "warmup": options.warmup},
        "workloads": {},
    }
    timed: dict[str, list[Any]] = {workload: [] for workload in options.workloads}
    for _ in range(options.processes):
        for workload in options.workloads:
            timed[workload].append(_run("time", options, workload))
    for workload in options.workloads:
        work = WORKLOADS[workload](CPU)
        names = (LOOP, EAGER, ONE_GRAPH, OPTAX) if options.quick else [name for name in CONTESTANTS if name != AGAIN]
        results["workloads"][workload] = {
            "title": work.title,
            "steps": work.steps,
            "parameter_bytes": work.parameter_bytes,
            "time": times(timed[workload], list(CONTESTANTS), {"vs_loop": LOOP, "vs_optax": OPTAX}),
            "neighbours": {
                name: _middle([each["neighbours"][name] for each in timed[workload]]) for name in (LOOP, OPTAX)
            },
            "cold": {name: _run("cold", options, workload, name, work.steps) for name in names},
            "growth": _growth(options, workload),
            "nodes": {str(steps): _run("nodes", options, workload, ONE_GRAPH, steps) for steps in NODE_STEPS},
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compiled.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw(results, options.out / "compiled.png")
    print(tables(results))
    return 0


def _middle(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The process with the median median."""
    return sorted(found, key=lambda each: each["median"])[len(found) // 2]


def time_task(options: argparse.Namespace) -> dict[str, Any]:
    """Check all contestants, then time them in turns; then the loop and JAX after each other and after themselves."""
    work = WORKLOADS[options.workload](CPU)
    contestants = {name: build(work, work.steps) for name, build in CONTESTANTS.items()}
    errors = check(work, contestants)
    runs = {name: contestant.run for name, contestant in contestants.items()}
    seconds = interleaved(runs, rounds=options.rounds, warmup=options.warmup, device=CPU)
    return {
        "seconds": seconds,
        "errors": errors,
        "neighbours": _neighbours({name: runs[name] for name in (LOOP, OPTAX)}, options),
    }


def _neighbours(runs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time of each right after the other, over its time right after itself."""
    elapsed: dict[tuple[str, bool], list[float]] = {}
    for turn in range(options.warmup + options.rounds):
        for name, run in runs.items():
            for own in (False, True):
                start = time.perf_counter()
                run()
                if turn >= options.warmup:
                    elapsed.setdefault((name, own), []).append(time.perf_counter() - start)
    return {
        name: spread(
            [after / own for after, own in zip(elapsed[name, False], elapsed[name, True], strict=True)]
        )._asdict()
        for name in runs
    }


def cold_task(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant in a process of its own, without caches: start-up, first and later call, and peaks of one more."""
    return _cold(options, _resized(options, options.steps))


def growth_task(options: argparse.Namespace) -> dict[str, Any]:
    """The same of one batch, whatever the number of steps."""
    return _cold(options, _resized(options, max(COMPILE_STEPS)))


def _growth(options: argparse.Namespace, workload: str) -> dict[str, list[Any]]:
    """At each number of steps, what as many fresh processes found, which took turns."""
    found: dict[str, list[Any]] = {str(steps): [] for steps in COMPILE_STEPS}
    for _ in range(options.pairs):
        for steps in COMPILE_STEPS:
            found[str(steps)].append(_run("growth", options, workload, ONE_GRAPH, steps))
    return found


def _cold(options: argparse.Namespace, work: Workload) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=folder, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
        contestant = CONTESTANTS[options.variant](work, options.steps)
        seconds: dict[str, float] = {}
        calls = {"startup": _trivial(options.variant), "first_call": contestant.run, "later_call": contestant.run}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        peaks = {"resident": resident_peak(contestant.run)}
        if options.variant != OPTAX:
            peaks["allocated"] = allocated_peak(contestant.run, CPU)
    return {**seconds, **peaks}


def _trivial(variant: str) -> Any:
    """What a framework does once in a process: an eager operation, or the compilation of one."""
    if variant == OPTAX:
        from benchmarks import _jax

        return _jax.trivial
    if variant in (LOOP, EAGER):
        return lambda: torch.zeros(1).sin()
    return lambda: torch.compile(torch.sin)(torch.zeros(10_000))


def nodes_task(options: argparse.Namespace) -> int:
    """Nodes of the graph at one number of steps."""
    return graph_nodes(_resized(options, options.steps), options.steps)


def _resized(options: argparse.Namespace, microbatches: int) -> Workload:
    """The workload with as many examples as `microbatches` of its own micro-batches have."""
    work = WORKLOADS[options.workload](CPU)
    return work.resized(microbatches * (len(work.inputs) // work.steps))


TASKS = {"time": time_task, "cold": cold_task, "growth": growth_task, "nodes": nodes_task}


def _run(task: str, options: argparse.Namespace, workload: str, variant: str = LOOP, steps: int = 1) -> Any:
    print(f"{task}: {workload}" + (f", {variant}, {steps} steps" if task != "time" else ""), file=sys.stderr)
    passed = ["--task", task, "--workload", workload, "--variant", variant, "--steps", str(steps)]
    passed += ["--rounds", str(options.rounds), "--warmup", str(options.warmup)]
    passed += ["--threads", str(options.threads)] if options.threads is not None else []
    return fresh("benchmarks.compiled", passed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--processes", type=int, default=5, help="that time everything, at different times (5)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each (9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are dropped (2)")
    parser.add_argument("--pairs", type=int, default=5, help="first calls at few and at many steps (5)")
    parser.add_argument("--threads", type=int, help="of PyTorch's CPU kernels and of JAX's (PyTorch's default)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    works = ["gpt", "mlp"]
    parser.add_argument("--workloads", nargs="+", choices=works, default=works, help="which (all)")
    parser.add_argument("--quick", action="store_true", help="three rounds, fewer first calls: does it work?")
    for internal in ("task", "workload", "variant"):
        parser.add_argument(f"--{internal}", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.rounds, options.warmup, options.pairs = 1, 3, 1, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
