"""Keys of seeds and of keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradacc import random
from tests.random import oracle, strategies


@given(seed=strategies.integers)
def test_a_key_is_seed_and_offset(seed):
    key = random.key(seed)
    assert key.tolist() == [seed, 0]
    assert key.dtype == torch.uint64


@given(keys=strategies.keys(), n=st.integers(0, 5))
def test_split_makes_the_keys_that_fold_in_makes(keys, n):
    new = random.split(keys, n)
    assert new.shape == (*keys.shape[:-1], n, 2)
    assert new.dtype == torch.uint64
    for i in range(n):
        assert torch.equal(new[..., i, :], random.fold_in(keys, i))
    expected = [[oracle.child(key, i) for i in range(n)] for key in oracle.as_pairs(keys.reshape(-1, 2))]
    assert [oracle.as_pairs(row) for row in new.reshape(len(expected), n, 2)] == expected


@given(pairs=st.lists(st.tuples(strategies.keys([]), strategies.integers), max_size=4))
def test_fold_in_takes_an_integer_for_each_key(pairs):
    keys = torch.stack([key for key, _ in pairs]) if pairs else torch.zeros(0, 2, dtype=torch.uint64)
    data = torch.tensor([i for _, i in pairs], dtype=torch.uint64)
    folded = random.fold_in(keys, data)
    assert oracle.as_pairs(folded) == [oracle.child(key, i) for key, (_, i) in zip(keys.tolist(), pairs, strict=True)]
    assert oracle.as_pairs(random.fold_in(keys, data.view(torch.int64))) == oracle.as_pairs(folded)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_integers_of_any_dtype(dtype):
    key, data = random.key(1), torch.tensor([3, 0, 100], dtype=dtype)
    assert torch.equal(random.fold_in(key, data), torch.stack([random.fold_in(key, i) for i in (3, 0, 100)]))


def test_fold_in_broadcasts():
    keys, data = random.split(random.key(1), 3), torch.arange(2)[:, None]
    folded = random.fold_in(keys, data)
    assert folded.shape == (2, 3, 2)
    assert torch.equal(folded[1, 2], random.fold_in(keys[2], 1))


def test_keys_are_made_anew_and_nothing_is_changed():
    key = random.key(1)
    before = key.tolist()
    made = [random.split(key, 2), random.fold_in(key, 0), random.fold_in(key, torch.tensor(0))]
    assert len({each.data_ptr() for each in (*made, key)}) == 4
    assert key.tolist() == before


def test_keys_share_no_draw():
    """Of a tree of keys, three levels deep, all blocks are different."""
    keys = random.split(random.split(random.split(random.key(0), 16), 16), 16).reshape(-1, 2)
    children = random.split(keys, 4).reshape(-1, 2)
    assert len(children.view(torch.int64).unique(dim=0)) == len(children) == 4 * 16**3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    def make(key, index):
        keys = random.fold_in(random.fold_in(key, 7), index)
        return keys, random.split(keys, 3), random.key(2**64 - 1)

    key, index = random.key(5), torch.arange(4)
    for mine, other in zip(
        torch.compile(make, fullgraph=True, backend=backend)(key, index), make(key, index), strict=True
    ):
        assert torch.equal(mine, other)


def test_vmap_is_the_loop():
    keys, data = random.split(random.key(0), 4), torch.arange(4) * 3
    for made, expected in (
        (torch.vmap(random.fold_in)(keys, data), random.fold_in(keys, data)),
        (torch.vmap(random.fold_in, in_dims=(None, 0))(keys[0], data), random.fold_in(keys[0], data)),
        (torch.vmap(lambda k: random.split(k, 3))(keys), random.split(keys, 3)),
    ):
        assert torch.equal(made, expected)
