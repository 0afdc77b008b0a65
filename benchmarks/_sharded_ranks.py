"""What one rank of `benchmarks.sharded` does; started by torchrun.

    torchrun … -m benchmarks._sharded_ranks --workload gpt --steps 4 --rounds 9 --warmup 1 --count 1 --result FILE
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks._measure import allocated
from benchmarks._ranks import as_rank, collectives, interleaved, wire_bytes
from benchmarks._sharded_report import AGAIN
from benchmarks._synced import rank_share
from benchmarks._trained import UPDATES, WAYS, Training, check
from benchmarks._workloads import WORKLOADS, Workload

EXAMPLES = {"gpt": 16, "mlp": 32, "tiny": 16}
"""Of both ranks' batches."""
CPU = torch.device("cpu")


def main() -> None:
    """Check all variants, time them in turns, and, with ``--count 1``, count what they send and hold."""
    parser = argparse.ArgumentParser()
    for name in ("rounds", "warmup", "steps", "count"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--workload", choices=EXAMPLES, required=True)
    as_rank(parser, measure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one workload over one link."""
    work = WORKLOADS[options.workload](CPU).resized(EXAMPLES[options.workload])
    share = rank_share(work, dist.get_rank(), dist.get_world_size())
    built = {name: way.build(share, options.steps) for name, way in WAYS.items()}
    torch.set_num_threads(1)  # whatever a library has made of it
    found: dict[str, Any] = {"title": work.title.partition(",")[0], "parameter_bytes": work.parameter_bytes}
    found["update_error"] = check(work, built)
    runs = {name: training.step for name, training in built.items()}
    found["seconds"] = interleaved(runs, rounds=options.rounds, warmup=options.warmup)
    if options.count:
        interface = os.environ["GLOO_SOCKET_IFNAME"]
        found["bytes"] = {name: wire_bytes(run, interface) for name, run in runs.items() if name != AGAIN}
        found["collectives"] = {name: collectives(run)["counts"] for name, run in runs.items() if name != AGAIN}
        del built, runs
        found["memory"] = {name: memory(name, share, options.steps) for name in WAYS if name != AGAIN}
    return found


def memory(name: str, share: Workload, steps: int) -> dict[str, int]:
    """Bytes of tensors on a rank, exact: the largest of all ranks.

    What is left when one has been built and has taken some steps is what it holds between two; of that, what is neither
    parameter nor state is gradients and buffers.
    """
    held: list[Training] = []

    def begin() -> None:
        held.append(WAYS[name].build(share, steps))
        for _ in range(UPDATES):
            held[0].step()
        gc.collect()

    rest = allocated(begin, CPU).left
    params, state = (_bytes(tensors) for tensors in held[0].held())
    peak = rest + allocated(held[0].step, CPU).peak
    return {
        key: _most(value)
        for key, value in {"params": params, "state": state, "other": rest - params - state, "peak": peak}.items()
    }


def _bytes(tensors: Iterable[Any]) -> int:
    """Of their memory, each counted once."""
    own = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in tensors if isinstance(leaf, Tensor)]
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in own}
    return sum(storages.values())


def _most(value: int) -> int:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


if __name__ == "__main__":
    main()
