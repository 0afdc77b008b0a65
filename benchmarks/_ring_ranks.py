"""Times of gloo's all-reduce over links that are known, by ranks that this process forks.

    python -m benchmarks._ring_ranks --world 4 --control SOCKET --names NAMESPACE... --plan JSON

Prints a JSON list of rows ``[rate, delay, bytes, seconds…]``. Ranks begin at one moment of the machine's clock, which
namespaces share; a time is from there to the end of the last rank.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._links import Hosts, Link, address, end_with_parent

AHEAD = 0.02
"""Seconds between rank 0's word of the beginning and the beginning, beside the links' own delay."""


def main() -> int:
    """Fork the ranks; rank 0 prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = Hosts(tuple(options.names), options.control)
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank, args=(made, options.world, rank, options.plan)) for rank in range(options.world)
    ]
    for rank in ranks:
        rank.start()
    while all(rank.is_alive() or rank.exitcode == 0 for rank in ranks) and any(rank.is_alive() for rank in ranks):
        time.sleep(0.05)
    failed = any(rank.exitcode for rank in ranks)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
    return int(failed)


def _rank(made: Hosts, world: int, rank: int, plan: dict[str, Any]) -> None:
    try:
        end_with_parent()
        made.enter(rank)
        start = f"tcp://{address(0)}:29500"
        dist.init_process_group("gloo", init_method=start, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        rows = [_timed(made, Link(rate, delay), size, plan["repeats"]) for rate, delay, size in plan["settings"]]
        if rank == 0:
            print(json.dumps(rows), flush=True)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _timed(made: Hosts, link: Link, size: int, repeats: int) -> list[float]:
    """Of one setting, after one all-reduce that is not counted: TCP has to open its windows for the link."""
    dist.barrier()
    if dist.get_rank() == 0:
        made.set_link(link)
    tensor, seconds = torch.zeros(size // 4), []
    for turn in range(repeats + 1):
        begin = torch.tensor(time.perf_counter() + AHEAD + 16 * link.delay, dtype=torch.float64)
        dist.broadcast(begin, 0)
        late = begin.item() - time.perf_counter()
        time.sleep(max(late - 0.0005, 0.0))
        while time.perf_counter() < begin.item():
            os.sched_yield()
        dist.all_reduce(tensor)
        # How long this rank took, and whether it heard of the beginning in time.
        told = torch.tensor([time.perf_counter() - begin.item(), float(late <= 0)], dtype=torch.float64)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        if turn and not told[1]:
            seconds.append(round(float(told[0]), 6))
    return [link.rate, link.delay, size, *seconds]


if __name__ == "__main__":
    sys.exit(main())
