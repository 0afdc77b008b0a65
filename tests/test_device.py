"""Everything on a device: ``tests/on_device``, on a stand-in accelerator, in a process of its own (`tests.device` says why)."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def test_on_a_stand_in_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_device")]
    done = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, "GRADACC_STAND_IN": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


def test_other_tests_have_no_accelerator_but_the_machine_s():
    """`tests.device` gives one to its whole process, and is imported in processes of its own only."""
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    assert "tests.device" not in sys.modules
