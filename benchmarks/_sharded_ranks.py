"""What one rank of `benchmarks.sharded` does; started by torchrun.

torchrun … -m benchmarks._sharded_ranks --task time --workload gpt --steps 4 --rounds 9 --warmup 1 --result FILE
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks._measure import resident, resident_peak
from benchmarks._ranks import as_rank, collectives, interleaved, wire_bytes
from benchmarks._sharded_report import AGAIN
from benchmarks._synced import rank_share
from benchmarks._trained import UPDATES, WAYS, Trained, Training, check
from benchmarks._workloads import WORKLOADS, Workload

EXAMPLES = {"gpt": 16, "mlp": 32, "tiny": 16}
"""Of both ranks' batches."""


def main() -> None:
    """One of `TASKS`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--workload", choices=EXAMPLES, required=True)
    for name in ("rounds", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    as_rank(parser, lambda options: TASKS[options.task](options))


def shared(name: str) -> tuple[Workload, Workload]:
    """The workload, and this rank's share of it."""
    work = WORKLOADS[name](torch.device("cpu")).resized(EXAMPLES[name])
    return work, rank_share(work, dist.get_rank(), dist.get_world_size())


def time_task(options: argparse.Namespace, *, count: bool = False) -> dict[str, Any]:
    """Check all variants, and time them in turns; ``count``: also what they send."""
    work, share = shared(options.workload)
    built = {name: way.build(share, options.steps) for name, way in WAYS.items()}
    torch.set_num_threads(1)  # whatever a library has made of it
    found: dict[str, Any] = {"title": work.title.partition(",")[0], "parameter_bytes": work.parameter_bytes}
    found["update_error"] = check(work, built)
    runs = {name: training.step for name, training in built.items()}
    found["seconds"] = interleaved(runs, rounds=options.rounds, warmup=options.warmup)
    if count:
        interface = os.environ["GLOO_SOCKET_IFNAME"]
        found["bytes"] = {name: wire_bytes(run, interface) for name, run in runs.items() if name != AGAIN}
        found["collectives"] = {name: collectives(run)["counts"] for name, run in runs.items() if name != AGAIN}
    return found


def memory_task(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Of every variant, each alone."""
    share, small = shared(options.workload)[1], shared("tiny")[1]
    found = {}
    for name, way in WAYS.items():
        if name != AGAIN:
            _begun(way, small, options.steps)  # what libraries take at first use is not a variant's
            found[name] = memory(way, share, options.steps)
    return found


def memory(way: Trained, share: Workload, steps: int) -> dict[str, int]:
    """Bytes on the rank that has more: parameters, gradients, state, all that is held between steps, the highest point of one.

    The first three from the tensors, the others from the resident set.
    """
    dist.barrier()
    before = resident()
    training = _begun(way, share, steps)
    dist.barrier()
    held = resident() - before
    params, state = (_bytes(tensors) for tensors in training.held())
    peak = held + resident_peak(training.step)
    sizes = torch.tensor([params, _bytes(training.gradients()), state, held, peak])
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    return dict(zip(("params", "grads", "state", "held", "peak"), sizes.tolist(), strict=True))


def _begun(way: Trained, share: Workload, steps: int) -> Training:
    training = way.build(share, steps)
    for _ in range(UPDATES):
        training.step()
    return training


TASKS = {
    "time": time_task,
    "count": lambda options: time_task(options, count=True),
    "memory": memory_task,
}


def _bytes(tensors: Iterable[Any]) -> int:
    """Of their memory, each counted once."""
    own = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in tensors if isinstance(leaf, Tensor)]
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in own}
    return sum(storages.values())


if __name__ == "__main__":
    main()
