"""Two ranks on a device each: the union, in one read a call; what is found only there is an error on both."""

import subprocess
import sys


def test_two_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.on_device.ranks", str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert [each.count("\n") for each in said] == [9, 9]
