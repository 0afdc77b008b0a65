"""The benchmarks run and write what they say; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_eager(tmp_path):
    command = [sys.executable, "-m", "benchmarks.eager", "--quick", "--workloads", "mlp", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "eager.json").read_text())
    times = results["workloads"]["mlp"]["time"]
    assert times["hand-written loop"]["vs_loop"]["median"] == 1.0
    assert times["gradacc.accumulate"]["vs_loop"]["median"] > 0
    assert "gradacc.accumulate" in run.stdout
    assert (tmp_path / "eager.png").stat().st_size > 1000
