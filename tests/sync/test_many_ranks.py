"""Ranks by the hundred, which are threads: the large batch's gradient, whatever their shares, and one error on all of them."""

import pytest
import torch

from benchmarks import _scale_exact as many
from tests.helpers import some_slow


@pytest.mark.parametrize("world", some_slow(many.WORLDS, 64))
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # each thread, where torch warns
def test_uneven_shares_empty_ranks_and_one_that_fails(world):
    found = many.at(world)
    assert found["error"] <= 1e-10
    assert found["alike"]
    assert found["told"] == world
    assert 0 < found["empty"] < world / 4


def test_the_comparison_sees_another_result(monkeypatch):
    """And the oracle is the mean over all examples."""
    share = many.share
    monkeypatch.setattr(many, "_expected", lambda world, turn: [3 * x for x in expected(share, world, turn)])
    assert many.at(4)["error"] == pytest.approx(2 / 3)


def expected(share, world, turn):
    """By autograd alone, of a mean over all examples that is written out here."""
    params = {name: leaf.requires_grad_() for name, leaf in many.parameters().items()}
    batch = torch.cat([share(rank + turn) for rank in range(world)])
    value = (batch @ params["w"] + params["b"]).tanh().square().sum(1).mean()
    return [*torch.autograd.grad(value, [params["w"], params["b"]]), value.detach()]
