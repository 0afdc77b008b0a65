"""What one rank of `benchmarks.boundary` does; started by torchrun, `WORLD` times.

    torchrun … -m benchmarks._ranks --workload gpt --steps 4 --rounds 21 --warmup 2 --result FILE

Rank 0 writes what was measured to FILE. All ranks do the same, in lockstep: a barrier before every timing, whose result is
the maximum over the ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._measure import Run, order, spread
from benchmarks._network import sent
from benchmarks._synced import check, counted, rank_share, ways
from benchmarks._workloads import WORKLOADS

SETTLE = 0.05
"""Seconds after which a socket has sent what it was given."""
LARGE = 20_000_000
"""Bytes of the all-reduce that shows the bandwidth; about the GPT's gradients."""


def main() -> None:
    """Check all variants, count what they send, time them in turns, and measure the network."""
    parser = argparse.ArgumentParser()
    for name in ("rounds", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    as_rank(parser, measure)


def as_rank(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], object]) -> None:
    """Be one of the ranks, with one thread; rank 0 writes what ``measure(options)`` returns to ``--result``."""
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    result = measure(options)
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured at one number of steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    work = WORKLOADS[options.workload](torch.device("cpu")).resized(16)
    share = rank_share(work, rank, world)
    every = {**ways(), **counted()}
    built = {name: way.build(share, options.steps) for name, way in every.items()}
    torch.set_num_threads(1)  # whatever a library has made of it
    errors = check(work, built, {name: way.tolerance for name, way in every.items()})
    for variant in built.values():
        variant()  # DDP regroups its buckets after the first backward pass
    timed = {name: built[name] for name in ways()}
    return {
        "steps": options.steps,
        "parameter_bytes": work.parameter_bytes,
        "gradient_error": errors,
        "collectives": {name: collectives(run) for name, run in built.items()},
        "bytes": {name: wire_bytes(run, os.environ["GLOO_SOCKET_IFNAME"]) for name, run in timed.items()},
        "seconds": interleaved(timed, rounds=options.rounds, warmup=options.warmup),
        "network": network(),
    }


def interleaved(runs: Mapping[str, Run], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """`benchmarks._measure.interleaved` for ranks that run together: seconds until the last one is done."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for turn in range(warmup + rounds):
        for index in order(len(names), turn):
            elapsed = timed(runs[names[index]])
            if turn >= warmup:
                seconds[names[index]].append(elapsed)
    gc.unfreeze()
    return seconds


def timed(run: Run) -> float:
    """Seconds of one call on the slowest rank; garbage is collected before it and the collector is off during it."""
    gc.collect()
    gc.disable()
    try:
        return _slowest(run)
    finally:
        gc.enable()


def _slowest(run: Run) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def wire_bytes(run: Run, interface: str) -> int:
    """Bytes that a rank sends in one call, by the interface's own counter.

    On loopback everybody's bytes pass the same counter, so it is divided by the number of ranks, and the smallest of
    three is the one with the least of what others sent.
    """
    found = []
    for _ in range(3 if interface == "lo" else 1):
        dist.barrier()
        time.sleep(SETTLE)
        before = sent(interface)
        run()
        time.sleep(SETTLE)
        found.append(sent(interface) - before)
    return min(found) // (dist.get_world_size() if interface == "lo" else 1)


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all that is summed, in order: of each all-reduce, or all-to-all before a sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.c10d.allreduce_:
            self.found += [tensor.nbytes for tensor in args[0]]
        if func.overloadpacket is torch.ops.c10d.alltoall_base_:
            self.found.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


def collectives(run: Run) -> dict[str, Any]:
    """How many collectives one call makes, by torch's CommDebugMode, and the bytes of its all-reduces."""
    sizes = _Sizes()
    with CommDebugMode() as mode, sizes:  # type: ignore[no-untyped-call]
        mode.advanced_module_tracker.__exit__()  # its hooks on modules fail at a module's second call
        run()
    return {
        "counts": {
            operation.__name__.strip("_"): count for operation, count in mode.get_comm_counts().items() if count
        },
        "all_reduced_bytes": sizes.found,
    }


def network() -> dict[str, float]:
    """Median seconds of an all-reduce of one float, and of `LARGE` bytes as float32 and as bfloat16."""
    return {
        "small_seconds": _all_reduce(torch.zeros(1), 101),
        "large_bytes": LARGE,
        "large_seconds": _all_reduce(torch.zeros(LARGE // 4), 7),
        "large_seconds_bfloat16": _all_reduce(torch.zeros(LARGE // 2, dtype=torch.bfloat16), 7),
    }


def _all_reduce(tensor: torch.Tensor, times: int) -> float:
    def run() -> None:
        dist.all_reduce(tensor)

    run()
    return spread([_slowest(run) for _ in range(times)]).median


if __name__ == "__main__":
    main()
