"""Sequences of calls in which ranks fail, skip and mix up calls: right, or an error on every rank."""

import os

import pytest

from tests.sync import fuzz

SEQUENCES = int(os.environ.get("GRADACC_FUZZ", "500"))
SIZE = 25


@pytest.mark.slow
@pytest.mark.parametrize("world", fuzz.WORLDS)
def test_any_sequence_is_right_or_an_error_everywhere(pool, world):
    share, fine = SEQUENCES // len(fuzz.WORLDS), 0
    for start in range(0, share, SIZE):
        wrong, good = fuzz.run(pool, world, list(range(start, min(start + SIZE, share))))
        assert wrong == []
        fine += good
    assert fine > 2 * share  # it is not errors alone
