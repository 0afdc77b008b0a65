"""Time and memory of one accumulated gradient, eager: gradacc against the loops that it replaces.

    python -m benchmarks.eager [--processes 5] [--rounds 9] [--device cuda] [--quick]

**Time.** All variants of `benchmarks._variants` take turns in one process, once a round, in a balanced order, and
several processes do so at different times (all workloads, then all of them again). A ratio is to another variant's time
*in the same round*, so that what slows the whole machine down cancels; reported are the median of the processes'
medians, the quartiles of all rounds, and the lowest and the highest median of a process, which is what another run may
find. The hand-written loop runs twice a round, under two names: the second row's distance from 1 is the noise. No
variant takes an optimizer step; every variant frees its gradients inside the clock. Before anything is timed, every
variant's gradient is checked against the large batch's.

**Memory.** The peak over what was there before the call (module, batch), in sizes of the parameters and in 10⁶ bytes.
*allocated*: every tensor, exact (torch.profiler's allocation records; on CUDA the caching allocator's maximum).
*resident*: what the kernel saw, each variant and number of steps in a fresh process of its own (CPU only). Both against
`steps` for the same batch, and *allocated* also with one micro-batch's size kept while the batch grows with `steps`.

Writes `eager.json` and `eager.png` (to `--out`) and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._measure import allocated_peak, fresh, interleaved, machine, ran_task, resident_peak, times
from benchmarks._report import draw, tables
from benchmarks._variants import AGAIN, FLOOR, LOOP, VARIANTS, check
from benchmarks._workloads import WORKLOADS

STEPS = (1, 2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every workload, each task in a fresh process, and write and print the results."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    results: dict[str, Any] = {
        "machine": machine(torch.device(options.device), ("accelerate", "lightning-fabric")),
        "settings": {
            "processes": options.processes,
            "rounds": options.rounds,
            "warmup": options.warmup,
            "steps": STEPS,
        },
        "workloads": {},
    }
    timed: dict[str, list[Any]] = {workload: [] for workload in options.workloads}
    for _ in range(options.processes):
        for workload in options.workloads:
            timed[workload].append(_run("time", options, workload))
    for workload in options.workloads:
        work = WORKLOADS[workload](torch.device("cpu"))
        results["workloads"][workload] = {
            "title": work.title,
            "steps": work.steps,
            "parameter_bytes": work.parameter_bytes,
            "time": times(timed[workload], list(VARIANTS), {"vs_loop": LOOP, "vs_floor": FLOOR}),
        }
        if work.memory:
            results["workloads"][workload]["memory"] = _memory(options, workload)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "eager.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw(results, options.out / "eager.png")
    print(tables(results))
    return 0


def _memory(options: argparse.Namespace, workload: str) -> dict[str, Any]:
    memory: dict[str, Any] = _run("allocated", options, workload)
    if options.device == "cpu":
        memory["resident"] = {
            name: {str(steps): _run("resident", options, workload, name, steps) for steps in _steps(options)}
            for name in _distinct()
        }
    return memory


def time_task(options: argparse.Namespace) -> dict[str, Any]:
    """Check all variants, then time them in turns."""
    device = torch.device(options.device)
    work = WORKLOADS[options.workload](device)
    errors = check(work)
    runs = {name: build(work, work.steps) for name, build in VARIANTS.items()}
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    seconds = interleaved(runs, rounds=options.rounds, warmup=options.warmup, device=device, repeats=work.repeats)
    return {"seconds": seconds, "errors": errors}


def allocated_task(options: argparse.Namespace) -> dict[str, Any]:
    """Exact peaks in bytes, by variant and steps: of the workload's batch, and of `steps` times its micro-batch."""
    device = torch.device(options.device)
    work = WORKLOADS[options.workload](device)
    microbatch = len(work.inputs) // work.steps
    peaks: dict[str, Any] = {"allocated": {}, "allocated_fixed_microbatch": {}}
    for name in _distinct():
        for key, grown in (("allocated", False), ("allocated_fixed_microbatch", True)):
            peaks[key][name] = {}
            for steps in _steps(options):
                run = VARIANTS[name](work.resized(steps * microbatch) if grown else work, steps)
                run()
                peaks[key][name][str(steps)] = allocated_peak(run, device)
    return peaks


def resident_task(options: argparse.Namespace) -> int:
    """The kernel's peak in bytes of one variant at one number of steps, after a call that loads what is loaded late."""
    work = WORKLOADS[options.workload](torch.device("cpu"))
    run = VARIANTS[options.variant](work, options.steps)
    run()
    return resident_peak(run)


TASKS = {"time": time_task, "allocated": allocated_task, "resident": resident_task}


def _run(task: str, options: argparse.Namespace, workload: str, variant: str = LOOP, steps: int = 1) -> Any:
    print(f"{task}: {workload}" + (f", {variant}, {steps} steps" if task == "resident" else ""), file=sys.stderr)
    passed = ["--task", task, "--workload", workload, "--variant", variant, "--steps", str(steps)]
    passed += ["--device", options.device, "--rounds", str(options.rounds), "--warmup", str(options.warmup)]
    passed += ["--quick"] if options.quick else []
    passed += ["--threads", str(options.threads)] if options.threads is not None else []
    return fresh("benchmarks.eager", passed)


def _distinct() -> list[str]:
    return [name for name in VARIANTS if name != AGAIN]


def _steps(options: argparse.Namespace) -> tuple[int, ...]:
    return (1, 4) if options.quick else STEPS


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eager", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=5, help="that time everything, at different times (5)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each (9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are dropped (2)")
    parser.add_argument("--threads", type=int, help="of torch's CPU kernels (its default; 1 is less noisy when shared)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which (all)")
    parser.add_argument("--quick", action="store_true", help="three rounds and two numbers of steps: does it work?")
    for internal in ("task", "workload", "variant"):
        parser.add_argument(f"--{internal}", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.rounds, options.warmup = 2, 3, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
