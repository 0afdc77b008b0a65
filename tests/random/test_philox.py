"""The generator: known answers, and the same in Python's integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradacc.random import _philox
from tests.random import oracle, strategies

# Random123 1.14.0, tests/kat_vectors, the lines of "philox4x32 10": counter, key, answer.
KNOWN = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_known_answers(line):
    """Of both."""
    words = [int(word, 16) for word in line.split()]
    assert oracle.philox(words[:4], words[4:6]) == words[6:]
    counter, key = [torch.tensor([word]) for word in words[:4]], [torch.tensor([word]) for word in words[4:6]]
    assert [int(word) for word in _philox.philox(tuple(counter), tuple(key))] == words[6:]


@given(keys=strategies.keys(), start=st.integers(0, 2**40), count=st.integers(0, 5))
def test_blocks_are_those_of_python_s_integers(keys, start, count):
    words = torch.stack(_philox.blocks(keys, start, count), -1)
    assert words.shape == (*keys.shape[:-1], count, 4)
    expected = [[oracle.block(key, start + n) for n in range(count)] for key in oracle.as_pairs(keys.reshape(-1, 2))]
    assert words.reshape(len(expected), count, 4).tolist() == expected


@given(keys=strategies.keys(), by=strategies.integers)
def test_words_and_keys_are_the_same_bits(keys, by):
    words = _philox.blocks(keys, 0, 2)
    assert torch.equal(torch.stack(_philox.unpacked(_philox.packed(words))), torch.stack(words))
    moved = _philox.shifted(keys, _philox.signed(by)).reshape(-1, 2)
    assert oracle.as_pairs(moved) == [(s, (o + by) % 2**64) for s, o in oracle.as_pairs(keys.reshape(-1, 2))]
