"""A training process of which rank 1 dies: ``python -m tests.sync.faulty killed 10``."""

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import gradacc


def main(how: str, seconds: str) -> int:
    """Steps until something breaks; prints how long the breaking call took, and its message; returns 3."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=int(seconds)))
    calls = []
    last = 1 if how == "killed at first use" else 3

    def loss(params, x):
        calls.append(1)
        y = x @ params["a"] @ params["b"]
        if dist.get_rank() == 1 and len(calls) == 2 * last:
            y.register_hook(lambda _: os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL))
        return y.square().mean()

    sync = gradacc.all_reduce(overlap=how == "killed with overlap")
    grad_fn = gradacc.accumulate(loss, steps=2, sync=sync)
    if how.startswith("killed while others"):
        grad_fn = _of_the_whole_batch(how)
    params = {"a": torch.ones(64, 600), "b": torch.ones(600, 600)}
    for _ in range(5):
        began = time.monotonic()
        try:
            grad_fn(params, torch.ones(4, 64))
        except RuntimeError as error:
            print(f"|{time.monotonic() - began}|{error}", flush=True)
            os._exit(3)  # the group is broken: nothing is torn down in good order
    return 0


def _of_the_whole_batch(how: str) -> Any:
    calls = []

    def encode(params, x):
        calls.append(1)
        # Two micro-batches a call, each encoded twice.
        dies = 9 if how == "killed while others gather" else 11
        if dist.get_rank() == 1 and len(calls) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return x @ params["a"] @ params["b"]

    def loss(params, outputs, x, rows):
        return gradacc.Mean((outputs[rows] @ outputs.T).tanh().sum(), len(x))

    return gradacc.accumulate(loss, through=encode, steps=2, sync=gradacc.all_reduce())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
