"""`Mean`: an element of a commutative monoid, and a pytree node."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradacc
from gradacc import Mean

numbers = st.integers(-100, 100)
means = st.builds(
    lambda total, weight: Mean(torch.tensor(total, dtype=torch.float64), weight), numbers, st.integers(0, 100)
)


def same(a, b):
    return a.total == b.total and a.weight == b.weight


@given(means, means, means)
def test_monoid(a, b, c):
    zero = Mean(torch.tensor(0.0, dtype=torch.float64), 0)
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))  # exact: integers
    assert same(a + zero, a)
    assert same(sum([a, b, c]), a + b + c)


def test_value():
    assert Mean(torch.tensor(6.0), 4).value == 1.5
    assert Mean(torch.tensor(0.0), 0).value.isnan()
    torch.testing.assert_close(Mean(torch.ones(2), torch.tensor([1.0, 4.0])).value, torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("other", [1, 0.5, "x", None, torch.ones(())])
def test_it_adds_to_means_only(other):
    with pytest.raises(TypeError):
        Mean(torch.ones(()), 1) + other


def test_it_is_a_pytree_node_to_optree_and_to_torch():
    mean = Mean(torch.ones(2), torch.tensor(3))
    doubled = optree.tree_map(lambda x: 2 * x, mean, namespace="gradacc")
    assert doubled.weight == 6
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, {"m": mean})["m"]
    assert isinstance(doubled, Mean)
    assert doubled.weight == 6
    batched = torch.func.vmap(lambda x: gradacc.Mean(x.sum(), x[0]))(torch.arange(6.0).view(3, 2))
    assert batched.total.shape == (3,)
    assert optree.tree_accessors(mean, namespace="gradacc")[0].codify("m") == "m.total"


def test_it_is_immutable():
    with pytest.raises(AttributeError):
        Mean(torch.ones(()), 1).weight = 2
