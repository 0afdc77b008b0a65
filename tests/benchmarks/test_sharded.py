"""The benchmark of divided states: its variants train as one process does, and the smallest form of it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _trained
from benchmarks._sharded_report import AGAIN, BASE, FSDP, FSDP_KEPT, OURS, SHARDED, SHARDED_HALF, SHARDED_OVERLAP, ZERO
from benchmarks._synced import rank_share
from benchmarks._workloads import WORKLOADS
from tests.workers import Failed

ROOT = Path(__file__).parents[2]


def on_ranks(group, names, scaled=1.0):
    """All of the pool: variants use the default group."""
    work = WORKLOADS["tiny"](torch.device("cpu")).resized(16)
    share = rank_share(work, group.rank(), group.size())
    share = share._replace(loss=lambda output, target: scaled * work.loss(output, target))
    return _trained.check(work, {name: _trained.WAYS[name].build(share, 2) for name in names})


@pytest.mark.parametrize("names", [[BASE, ZERO], [FSDP_KEPT, FSDP], [OURS, SHARDED, SHARDED_OVERLAP, SHARDED_HALF]])
def test_all_train_as_one_process_with_the_union(pool, names):
    for errors in pool.run(4, on_ranks, names):
        assert list(errors) == names
        assert all(errors[name] < 1e-4 for name in names if name != SHARDED_HALF)


def test_training_otherwise_is_found(pool):
    with pytest.raises(Failed, match=r"AssertionError: .*off the union's updates by"):
        pool.run(4, on_ranks, [BASE], 2.0)


@pytest.mark.slow
def test_sharded(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sharded", "--quick", "--links", "loopback", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    work = json.loads((tmp_path / "sharded.json").read_text())["workloads"]["tiny"]
    link = work["links"]["loopback"]
    assert list(link["seconds"][0]) == list(_trained.WAYS)
    assert link["collectives"][OURS] == {"allreduce": 1}
    assert link["collectives"][FSDP_KEPT]["allgather_base"] < link["collectives"][FSDP]["allgather_base"]
    whole, part = work["memory"][BASE], link["parameter_bytes"]
    assert whole["params"] == part == work["memory"][SHARDED]["params"]
    assert whole["state"] == pytest.approx(2 * part, rel=0.05)
    for name in (ZERO, FSDP, FSDP_KEPT, SHARDED, SHARDED_OVERLAP):
        assert work["memory"][name]["state"] == pytest.approx(part, rel=0.1), name
        gradients = part if name == ZERO else part / 2
        assert work["memory"][name]["grads"] == pytest.approx(gradients, rel=0.1), name
    assert f"| **{SHARDED}** |" in run.stdout
    assert AGAIN not in link["bytes"]
