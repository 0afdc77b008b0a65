"""Hugging Face Accelerate, the real one, in two processes: its gradients are ours, with more collectives."""

import subprocess
import sys

import torch

from tests.helpers import assert_trees_close


def test_accelerate_gives_our_gradients(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.sync.with_accelerate", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in range(2))
    gathered = {"causal LM": ["c10d::allgather_"], "plain": []}  # the number of tokens, before the first micro-batch
    for name, before in gathered.items():
        for ours, theirs, names, other in (first[name], second[name]):
            assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-7)
            assert names == ["c10d::allreduce_"]
            assert other == [*before, "c10d::allreduce_"]
        assert_trees_close(first[name][0], second[name][0], rtol=0, atol=0)
