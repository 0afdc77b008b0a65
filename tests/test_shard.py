"""`Shard`: a rank's part of a tensor, as a node of trees."""

import pickle

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree

import gradacc
from gradacc import _shard
from tests.helpers import NAMESPACE

FACTS = gradacc.ShardFacts((2, 3), 1, 2, 1, 3, "dp")
SHARD = gradacc.Shard(torch.tensor([1.0, 2.0]), FACTS)


def test_what_it_says():
    assert (SHARD.shape, SHARD.offset, SHARD.length) == ((2, 3), 1, 2)
    assert repr(SHARD) == "Shard(shape=(2, 3), offset=1, values=tensor([1., 2.]))"


def test_it_is_a_node_to_optree_and_to_torch():
    twice = optree.tree_map(lambda x: 2 * x, {"w": SHARD}, namespace=NAMESPACE)["w"]
    assert torch.equal(twice.values, torch.tensor([2.0, 4.0]))
    assert twice.facts == FACTS
    thrice = torch_pytree.tree_map(lambda x: 3 * x, [SHARD])[0]
    assert torch.equal(thrice.values, torch.tensor([3.0, 6.0]))
    assert thrice.facts == FACTS


def test_parts_of_other_tensors_are_another_structure():
    other = gradacc.Shard(SHARD.values, FACTS._replace(offset=2))
    structures = [optree.tree_structure(shard, namespace=NAMESPACE) for shard in (SHARD, SHARD, other)]
    assert structures[0] == structures[1] != structures[2]


def test_it_can_be_pickled():
    back = pickle.loads(pickle.dumps(SHARD))
    assert torch.equal(back.values, SHARD.values)
    assert back.facts == FACTS


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_what_stands_for_the_whole_has_its_shape_and_no_memory(shape):
    whole = _shard.whole_like(gradacc.Shard(torch.ones(0, dtype=torch.bfloat16), FACTS._replace(shape=shape)))
    assert whole.shape == shape
    assert whole.dtype == torch.bfloat16
    assert whole.untyped_storage().nbytes() == 2


def test_a_part_of_a_tensor_in_any_memory_is_in_row_major_order():
    whole = torch.arange(6.0).view(3, 2).t()
    assert _shard.part_of(whole, FACTS).tolist() == [2.0, 4.0]
