"""The compiled benchmark runs and writes what it says; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(tmp_path):
    pytest.importorskip("jax", reason="of `make bench` alone: 600 MB")
    command = [sys.executable, "-m", "benchmarks.compiled", "--quick", "--workloads", "mlp", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert run.returncode == 0, run.stderr
    measured = json.loads((tmp_path / "compiled.json").read_text())["workloads"]["mlp"]
    assert measured["time"]["hand-written loop"]["vs_loop"]["median"] == 1.0
    assert measured["time"]["optax on JAX, jit"]["gradient_error"] < 1e-4
    assert set(measured["growth"]) == {"2", "32"}
    assert measured["nodes"]["8"] == measured["nodes"]["64"]
    assert measured["cold"]["torch.compile(accumulate(loss))"]["resident"] > 0
    assert "torch.compile(accumulate(loss))" in run.stdout
    assert (tmp_path / "compiled.png").stat().st_size > 1000
