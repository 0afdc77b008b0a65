"""`Moments`: the moments of both samples together, whatever they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal

D = torch.float64


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]), st.integers(0, 1000))
def test_any_parts_have_the_moments_of_the_whole(sizes, far, seed):
    x = torch.randn(sum(sizes), 3, dtype=D, generator=torch.Generator().manual_seed(seed)) + far
    parts = [gradacc.Moments.of(part, 0) for part in x.split(sizes)]
    zeros = torch.zeros(3, dtype=D)
    for found in (sum(parts), sum(parts[::-1]), sum(parts, gradacc.Moments(0, zeros, zeros))):
        assert found.count == len(x)
        if len(x):
            assert_trees_close(found.mean, x.mean(0))
            assert_trees_close(found.m2, x.var(0, correction=0) * len(x), rtol=1e-6)
        else:
            assert_trees_equal((found.mean, found.m2), (zeros, zeros))


def test_far_from_zero_no_digits_are_lost():
    """Where sums of x and of x^2 have none left."""
    x = torch.arange(64, dtype=torch.float32).view(32, 2).sin() + 4096
    found = sum(gradacc.Moments.of(part, 0) for part in x.split(5))
    exact = x.double().var(0)
    # Numbers near 4096 are 5e-4 apart in float32, of a variance of 0.5.
    assert_trees_close(found.variance(1).double(), exact, rtol=1e-3)
    squares = ((x.square().sum(0) - x.sum(0).square() / 32) / 31).double()
    assert not torch.allclose(squares, exact, rtol=0.1)


def test_a_count_of_its_own_for_each_channel():
    """A mask says what counts."""
    x = torch.arange(8, dtype=D).view(4, 2)
    mask = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 1]], dtype=D)

    def masked(x, mask):
        count = mask.sum(0)
        mean = (x * mask).sum(0) / count.clamp(min=1)
        return gradacc.Moments(count, mean, ((x - mean).square() * mask).sum(0))

    both = masked(x[:1], mask[:1]) + masked(x[1:], mask[1:])
    for channel in range(2):
        own = x[mask[:, channel] == 1, channel]
        assert_trees_close((both.mean[channel], both.variance(1)[channel]), (own.mean(), own.var()))


def test_of_half_precision_is_float32_and_of_two_dimensions_is_one_sample():
    x = torch.arange(24.0).view(2, 3, 4).bfloat16()
    found = gradacc.Moments.of(x, [0, 2])
    assert found.count == 8
    assert (found.mean.dtype, found.m2.dtype) == (torch.float32, torch.float32)
    assert_trees_close(found.mean, x.float().mean((0, 2)), rtol=1e-6)


def test_what_is_no_sample_is_an_error():
    with pytest.raises(TypeError, match=r"of a floating tensor, got a tensor of dtype torch.int64; convert it"):
        gradacc.Moments.of(torch.arange(3), 0)
    with pytest.raises(TypeError, match="of a floating tensor, got"):
        gradacc.Moments.of([1.0], 0)
    with pytest.raises(TypeError, match="Moments plus"):
        gradacc.Moments.of(torch.ones(3), 0) + 1.0
