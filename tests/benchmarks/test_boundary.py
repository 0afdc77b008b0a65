"""The benchmark of the boundary runs, counts what it says, and leaves no network behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks._network import UnavailableError, two_hosts

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.boundary", "--quick"]


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("gradacc-")}


@pytest.fixture
def network():
    """Skips where no namespaces can be made."""
    try:
        with two_hosts(400) as hosts:
            assert len(hosts) == 2
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_boundary(tmp_path):
    run = subprocess.run([*COMMAND, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "boundary.json").read_text())
    assert results["links"].keys() | results["skipped"].keys() == {"loopback", "slow"}
    for link in results["links"].values():
        for measured in link["steps"].values():
            counts = {name: found["counts"] for name, found in measured["collectives"].items()}
            assert counts["gradacc"] == counts["gradacc, a loss that returns Mean"] == {"allreduce": 1}
            assert sum(counts["Accelerate's token-weighted recipe"].values()) > 1
    if "slow" in results["links"]:  # the namespaces' own counters: nobody else's bytes
        one, four = (results["links"]["slow"]["steps"][steps]["bytes"] for steps in ("1", "4"))
        assert four["gradacc"] == pytest.approx(one["gradacc"], rel=0.05)
        assert four["DDP, every micro-batch"] > 3 * four["gradacc"]
        assert four["gradacc, bfloat16"] < 0.6 * four["gradacc"]
    assert "**gradacc, overlap**" in run.stdout
    assert (tmp_path / "boundary.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_the_network_is_removed_when_interrupted(tmp_path, asked):
    before = namespaces()
    with subprocess.Popen(
        [*COMMAND, "--links", "slow", "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE
    ) as run:
        deadline = time.monotonic() + 60
        while len(namespaces() - before) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(namespaces() - before) == 2
        time.sleep(3)  # the ranks are starting
        run.send_signal(asked)
        run.communicate(timeout=120)
    assert run.returncode != 0
    assert not namespaces() - before
