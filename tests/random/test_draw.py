"""Which way a draw goes: all at once, in pieces, or with torch's kernels; the same numbers in each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc import random
from gradacc.random import _draw
from tests.random import strategies
from tests.random.test_distributions import assert_equal, every_draw


@settings(max_examples=50)
@given(keys=strategies.keys(), piece=st.integers(1, 9))
def test_pieces_are_the_whole(keys, piece):
    expected = every_draw(keys)
    whole = _draw._PIECE
    _draw._PIECE = piece
    try:
        assert_equal(every_draw(keys), expected)
    finally:
        _draw._PIECE = whole


@pytest.mark.parametrize("rows", [1, 3])
def test_more_than_a_piece(rows):
    """A row longer than a piece, and several rows; under vmap there are no pieces."""
    keys = random.split(random.key(0), rows)
    count = 4 * _draw._PIECE + 5
    numbers = random.uniform(keys, (count,))
    assert torch.equal(numbers, torch.vmap(lambda key: random.uniform(key, (count,)))(keys))
    assert torch.equal(numbers[:, -5:].isfinite(), torch.ones(rows, 5, dtype=torch.bool))
