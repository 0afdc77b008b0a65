"""The command as a user starts it: real processes, a real terminal's signals, no extras installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import some_slow

from .test_run import check_is_complete_by_itself

ROOT = Path(__file__).parents[2]


def start(*arguments: str, path: Path = ROOT) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "gradacc", "demo", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_run_from_the_command_line(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("--data", str(data), "--out", str(out), "--iterations", "3", "--batch-size", "8", "--steps", "3")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.splitlines()[-2:] == [f"report:  {out / 'report.html'}", f"metrics: {out / 'metrics.jsonl'}"]
    assert "3/3" in errors
    assert "tokens/s" in errors
    assert "Traceback" not in errors
    assert "USDT" not in errors  # the profiler's own words
    assert len([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]) == 3
    assert "before and after 3 iterations" in check_is_complete_by_itself((out / "report.html").read_text("utf-8")).text


@pytest.mark.slow
def test_ctrl_c_while_training(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("--data", str(data), "--out", str(out), "--iterations", "100000", "--batch-size", "4")
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in errors
    reached = len([json.loads(line) for line in metrics.read_text().splitlines()])
    note = f"Ended by Ctrl-C after {reached} of 100000 iterations."
    assert f" after {reached} iterations." in output  # held-out text was measured once more
    assert note in output
    assert output.splitlines()[-1] == f"metrics: {metrics}"
    assert note in check_is_complete_by_itself((out / "report.html").read_text("utf-8")).text


@pytest.mark.slow
def test_ctrl_c_in_the_table(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("--data", str(data), "--out", str(out), "--batch-size", "4")
    assert process.stdout
    for line in process.stdout:
        if line.startswith("steps"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Ended by Ctrl-C after 0 of" in output
    assert (out / "metrics.jsonl").read_bytes() == b""
    check_is_complete_by_itself((out / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("missing", some_slow(["tqdm", "matplotlib"], "matplotlib"))
def test_without_the_extra(missing: str, data: Path, tmp_path: Path) -> None:
    fake = tmp_path / "path"
    fake.mkdir()
    (fake / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module named {missing}', name={missing!r})")
    process = start("--data", str(data), "--out", str(tmp_path / "out"), path=fake)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == ""
    assert errors == f"gradacc demo: error: the demo needs {missing}, which is missing: pip install 'gradacc[demo]'\n"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    process = start("--data", str(tmp_path / "missing"))
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == ""
    assert errors == f"gradacc demo: error: --data {tmp_path / 'missing'}: no such file or folder\n"


def test_output_that_nobody_reads(data: Path, tmp_path: Path) -> None:
    process = start("--data", str(data), "--out", str(tmp_path / "out"), "--iterations", "1", "--batch-size", "2")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=100) == 1
    assert "Traceback" not in errors
    assert "Exception" not in errors
    process.stderr.close()
