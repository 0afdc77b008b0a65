"""Processes end in good order after their last call: what they return says what happened, and nobody waits."""

import os
import subprocess
import sys

import pytest

from tests.sync.ends import CASES


def run(*arguments: str) -> dict[str, str]:
    """Exit codes of each case, with how often they came."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.sync.ends", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert found.returncode == 0, found.stderr
    assert not found.stderr, found.stderr
    lines = (line.split(": ") for line in found.stdout.splitlines())
    return {how: codes.partition(";")[0] for how, codes in lines}


@pytest.mark.slow
def test_nobody_holds_a_group_that_is_destroyed():
    """While an error is on its way, too: so that destroying it waits for its threads, which would end the process."""
    cases = ["raises with overlap", "save raises", "windows"]
    assert run("1", "late", *cases) == {how: f"1 x {CASES[how]}" for how in cases}


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_processes_end_in_good_order():
    """More often: ``python -m tests.sync.ends 200 late``."""
    cases = [how for how in CASES if not how.endswith("left")]
    assert run("10", "late", *cases) == {how: f"10 x {CASES[how]}" for how in cases}
