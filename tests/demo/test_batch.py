"""Batches: padded at the end, and a function of seed and iteration alone."""

from __future__ import annotations

import torch

from gradacc.demo.batch import batch_at, pad
from gradacc.demo.model import PAD

PIECES = [bytes([65 + index]) * (2 + index) for index in range(20)]


def test_padding_comes_after_the_text(cpu: torch.device) -> None:
    assert pad([b"ab\xff", b"c"], cpu).tolist() == [[97, 98, 255], [99, PAD, PAD]]


def test_a_batch_depends_on_seed_and_iteration_only(cpu: torch.device) -> None:
    def batches(seed: int, iterations: range) -> dict[int, list[list[int]]]:
        return {iteration: batch_at(PIECES, 6, seed, iteration, cpu).tolist() for iteration in iterations}

    all_of_them = batches(0, range(8))
    torch.manual_seed(123)
    assert batches(0, range(4, 8)) == {iteration: all_of_them[iteration] for iteration in range(4, 8)}
    assert len({str(batch) for batch in all_of_them.values()}) == 8
    assert not set(map(str, batches(1, range(8)).values())) & set(map(str, all_of_them.values()))
