"""Tensors that are divided over ranks: every element is one rank's, and all have as many."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradacc import _cut

NUMELS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(NUMELS, st.integers(1, 12))
def test_parts_follow_each_other(numels, world):
    for cut, numel in zip(_cut.cuts(numels, ["float"] * len(numels), world), numels, strict=True):
        end = 0
        for rank in range(world):
            offset, length = cut.part(rank)
            assert offset == end
            assert numel // world <= length <= -(-numel // world)
            end = offset + length
        assert end == numel
        assert cut.width == -(-numel // world)
        assert len(cut.runs) <= 3


@given(NUMELS, st.integers(1, 12))
def test_no_rank_has_more_than_its_share_of_all(numels, world):
    cuts = _cut.cuts(numels, ["float"] * len(numels), world)
    held = [sum(cut.part(rank)[1] for cut in cuts) for rank in range(world)]
    assert max(held) == -(-sum(numels) // world)
    assert min(held) == sum(numels) // world


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("ab")), min_size=1, max_size=8), st.integers(1, 12))
def test_each_dtype_by_itself(tensors, world):
    numels, kinds = zip(*tensors, strict=True)
    cuts = _cut.cuts(numels, kinds, world)
    for kind in "ab":
        chosen = [cut for cut, own in zip(cuts, kinds, strict=True) if own == kind]
        held = [sum(cut.part(rank)[1] for cut in chosen) for rank in range(world)]
        assert max(held) - min(held) <= 1


@given(st.integers(0, 40), st.lists(st.integers(0, 3), max_size=2), st.integers(1, 12))
def test_rows_are_those_of_chunk(rows, row, world):
    """As DTensors divide them: where there are fewer chunks, the last ranks have none."""
    whole = torch.arange(rows * torch.Size(row).numel()).view(rows, *row)
    cut, chunks = _cut.of_rows(whole.shape, world), [*whole.chunk(world), *[whole[:0]] * world]
    for rank in range(world):
        offset, length = cut.part(rank)
        assert torch.equal(whole.reshape(-1)[offset : offset + length], chunks[rank].reshape(-1))
