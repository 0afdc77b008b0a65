"""The evidence of scale: each part runs in its smallest form, and finds what the pages say."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import _scale_bytes, _scale_cost, _scale_model, scale
from benchmarks._links import Link, hosts
from benchmarks._network import UnavailableError
from benchmarks._scale_model import Fit, Row, break_even, errors, fitted, predicted
from benchmarks._scale_ways import OURS

ROOT = Path(__file__).parents[2]
KNOWN = Fit(software=0.001, delays=2.0, overhead=1.05)


def test_cost_and_what_was_measured_before_is_kept(tmp_path, capsys):
    kept = {
        "machine": {"processor": "another one", "cores": 64, "threads": 1, "python": "3.11", "torch": "2.13"},
        "load": 0.0,
        "ranks": {"64": {"error": 1e-15, "alike": True, "empty": 1, "examples": 9, "told": 64, "seconds": 1}},
    }
    (tmp_path / "scale.json").write_text(json.dumps({"parts": {"exactness": kept}}))
    assert scale.main(["--part", "cost", "--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "scale.json").read_text())["parts"]
    assert results["exactness"] == kept
    for world, found in results["cost"]["ranks"].items():
        assert found["collectives"] == 1
        # 7 columns and a value, of 8 bytes, in floats that hold 3 bytes each.
        assert found["wire_bytes"] == results["cost"]["gradient_bytes"] + int(world) * 22 * 4
    assert _scale_cost.lines_of(results["cost"])["held"].per_rank < 4000
    assert (tmp_path / "scale.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "88 bytes a rank" in printed
    assert "another one, 64 cores" in printed


def test_gradients_of_very_many_ranks_cross_once():
    """Of which each has 1 / 16384 of the weight."""
    assert _scale_cost._at(16384, 1)["collectives"] == 1


def test_a_fit_is_found_again_and_what_is_no_ring_is_not():
    def rows(seconds):
        return [
            Row(world, rate, delay, size, [seconds(world, size, Link(rate, delay))])
            for world in (2, 3, 4, 8)
            for rate, delay, size in _scale_model.SETTINGS
        ]

    ring = rows(lambda world, size, link: predicted(KNOWN, world, size, link))
    found = fitted([row for row in ring if row.world in (2, 4)])
    assert found == pytest.approx(KNOWN)
    assert max(map(abs, errors(found, ring))) < 1e-9
    # Everyone sends everything to everyone: what fits 2 and 4 ranks is far off at 8.
    every = rows(lambda world, size, link: (world - 1) * (2 * link.delay + size * 8e-6 / link.rate))
    found = fitted([row for row in every if row.world in (2, 4)])
    assert min(errors(found, [row for row in every if row.world == 8])) < -0.4


@pytest.mark.parametrize("compute", [0.0, 0.1, 0.5, 0.9, 1.0, 3.0])
def test_break_even_is_the_first_number_that_is_faster(compute):
    once, every = 1.2, 1.0
    faster = [k for k in range(1, 100) if k * compute + once < k * max(compute, every) - 1e-9]
    assert break_even(once, every, compute) == (faster[0] if faster else None)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_collectives_and_bytes():
    found = _scale_bytes.measure(quick=True)
    ways, size = found["ways"], found["parameter_bytes"]
    assert ways[OURS]["counts"] == {"allreduce": 1}
    assert ways[OURS]["transport"] == {"gloo:all_reduce": 1}
    assert ways["gradacc, `all_reduce(ordered=True)`"]["counts"] == {"alltoall_base": 1, "allgather_base": 1}
    assert ways["gradacc, `reduce_scatter()`, `optim.sharded`"]["counts"] == {"alltoall_base": 1, "allgather_base": 1}
    assert ways["DDP, `no_sync`"]["counts"] == {"allreduce": 1}
    assert ways["DDP, every micro-batch"]["counts"] == {"allreduce": 8}
    modules = 7  # six blocks, and the rest
    for name, reduced, gathered in [
        ("FSDP2, every micro-batch", 8, 16),
        ("FSDP2, every micro-batch, not resharded after forward", 8, 8),
        ("FSDP2, deferred", 1, 16),
        ("FSDP2, deferred, not resharded after forward", 1, 8),
        ("FSDP2, deferred, parameters kept", 1, 1),
    ]:
        counts = {"allgather_base": modules * gathered, "reduce_scatter_base": modules * reduced}
        assert ways[name]["counts"] == counts, name
        # gloo's reduce-scatter is an all-reduce, twice the bytes.
        assert ways[name]["transport"] == {"gloo:all_gather": modules * gathered, "gloo:all_reduce": modules * reduced}
        if found["where"] == "two namespaces":
            assert ways[name]["bytes"] >= (reduced + gathered / 2) * size
    if found["where"] == "two namespaces":
        assert size < ways[OURS]["bytes"] < 1.1 * size


@pytest.mark.slow
@pytest.mark.parametrize("link", [Link(100, 0.0), Link(400, 0.005)])
def test_links_do_what_they_are_told(link):
    """A message takes the link's delay twice, and no bytes pass faster than its rate; nothing is left behind."""
    try:
        with hosts(2):
            pass
    except UnavailableError as reason:
        pytest.skip(str(reason))
    size = 1_000_000
    (row,) = _scale_model._measured(2, [[link.rate, link.delay, size]], 3)
    least = predicted(Fit(0.0, 1.0, 1.0), 2, size, link)
    assert least <= min(row.seconds) < 2 * least + 0.1


@pytest.mark.slow
def test_nothing_is_left_when_it_is_interrupted(tmp_path):
    """No namespace, no relay, no rank."""
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--part", "model", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        own, deadline = f"gradacc-{run.pid}-", time.monotonic() + 60
        while len(processes(own)) < 4 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if run.poll() == 0:
            pytest.skip("no links can be made here")
        assert len(processes(own)) >= 4, "the relay, who starts the ranks, and two of them"
        run.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert not processes(own)
    assert own not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def processes(own):
    """Those in whose command this stands."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if own in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it(tmp_path, capsys):
    assert scale.main(["--quick", "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "scale.json").read_text())["parts"]
    assert {"exactness", "cost", "bytes"} <= set(parts) <= set(scale.PARTS)
    if "model" in parts:
        assert "(held out)" in capsys.readouterr().out
