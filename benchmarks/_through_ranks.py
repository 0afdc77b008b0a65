"""What one rank of `benchmarks.through` does; started by torchrun.

    torchrun --nproc-per-node 2 -m benchmarks._through_ranks --union 1024 --rounds 8 --result FILE

Rank 0 writes to FILE what it has measured of both forms of a loss over ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gradacc
from benchmarks import _minilm
from benchmarks._measure import allocated_peak
from benchmarks._ranks import as_rank, interleaved
from benchmarks._through_report import REPLICATED, ROWS

WIDTH, INPUTS = 384, 8


def of_own_rows(params: Any, outputs: dict[str, Tensor], batch: Any, rows: slice) -> gradacc.Mean:
    """`_minilm.loss_fn`, of this rank's rows."""
    return _minilm.of_rows(outputs["summary"][rows], torch.arange(rows.start, rows.stop), outputs["body"])


LOSSES: dict[str, Callable[..., Any]] = {REPLICATED: _minilm.loss_fn, ROWS: of_own_rows}


def encode(side: str) -> Callable[..., Tensor]:
    """A layer."""
    return lambda params, batch: batch[side] @ params[side]


def main() -> None:
    """Check that both forms have the same gradient, and measure them."""
    parser = argparse.ArgumentParser()
    for name in ("union", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    as_rank(parser, lambda options: measure(options.union, options.rounds))


def measure(union: int, rounds: int) -> dict[str, Any]:
    """Of a rank with its share of so many pairs."""
    generator = torch.Generator().manual_seed(0)
    params = {side: torch.randn(INPUTS, WIDTH, generator=generator) for side in _minilm.LENGTHS}
    whole = {side: torch.randn(union, INPUTS, generator=generator) for side in _minilm.LENGTHS}
    batch = {side: leaf.chunk(dist.get_world_size())[dist.get_rank()] for side, leaf in whole.items()}
    through = {side: encode(side) for side in _minilm.LENGTHS}

    def run_of(loss: Callable[..., Any]) -> Callable[[], Any]:
        grad_fn = gradacc.accumulate(loss, through=through, steps=4, sync=gradacc.all_reduce())
        return lambda: grad_fn(params, batch)

    runs = {name: run_of(loss) for name, loss in LOSSES.items()}
    plain, own = (run() for run in runs.values())
    alone = gradacc.accumulate(_minilm.loss_fn, through=through, steps=1)(params, whole)
    for side, expected in alone.items():
        torch.testing.assert_close(plain[side], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(own[side], expected, rtol=1e-3, atol=1e-5)
    del plain, own, alone
    flops = {name: flops_of(run) for name, run in runs.items()}
    peaks = {name: allocated_peak(run, torch.device("cpu")) for name, run in runs.items()}
    seconds = interleaved(runs, rounds=rounds, warmup=1)
    return {name: {"flops": flops[name], "peak": peaks[name], "seconds": seconds[name]} for name in LOSSES}


def flops_of(run: Callable[[], Any]) -> int:
    """Of matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main()
