"""Keys and their numbers on a device: the CPU's, and nothing waits."""

import torch

import gradacc
from gradacc import random
from tests.device import OnDevice, to_cpu, to_device
from tests.helpers import assert_trees_close
from tests.laws import test_keys as keyed
from tests.random.test_distributions import every_draw

KEYS = random.split(random.key(1), 6)


def everything(keys, index):
    made = [
        random.split(keys, 3),
        random.fold_in(keys, 2),
        random.fold_in(keys[0], index),
        random.key(2**64 - 1, device=keys.device),
    ]
    return [*made, *every_draw(keys), random.dropout(index.double(), keys, 0.3)]


def test_the_same_bits_and_nothing_waits(waits):
    index = torch.arange(6)
    keys_there, index_there = to_device(KEYS), to_device(index)
    waits.clear()
    there = everything(keys_there, index_there)
    assert not waits
    assert all(isinstance(each, OnDevice) for each in there)
    for mine, other in zip(there, everything(KEYS, index), strict=True):
        assert torch.equal(to_cpu(mine), other)


def test_every_split_is_the_large_batch_and_nothing_waits(waits):
    expected = keyed.of_the_large_batch(keyed.mean, keyed.batch(8))[0]
    params, batch = to_device(keyed.parameters()), to_device(keyed.batch(8))
    for split in keyed.SPLITS:
        waits.clear()
        grads = gradacc.accumulate(keyed.mean, **split)(params, batch)
        assert not waits
        assert_trees_close({name: to_cpu(grad) for name, grad in grads.items()}, expected)
