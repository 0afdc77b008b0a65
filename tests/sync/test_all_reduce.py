"""What crosses: the union's gradient, value and aux, in one collective, with the same bits on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal


def token_loss(params, batch):
    """A Mean over tokens, with one leaf of each kind of aux."""
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    real = batch["mask"]
    total = (y.square().sum(-1) * real).sum()
    aux = {
        "each": y.sum((-1, -2)),
        "hits": gradacc.Mean((y > 0).sum((0, 1)), real.sum()),
        "average": total / real.sum(),
        "norm": gradacc.Mean(y.square().sum(), y.numel()),
    }
    return gradacc.Mean(total, real.sum()), aux


def make(sizes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(3, 4, generator=g, dtype=dtype), "b": torch.randn(4, generator=g, dtype=dtype)}
    n = sum(sizes)
    batch = {"x": torch.randn(n, 5, 3, generator=g, dtype=dtype), "mask": torch.rand(n, 5, generator=g) < 0.7}
    parts = [{key: value.split(sizes)[rank] for key, value in batch.items()} for rank in range(len(sizes))]
    return params, batch, parts


def call(group, params, batch, sync_options, **options):
    grad_fn = gradacc.accumulate_and_value(
        token_loss, has_aux=True, sync=gradacc.all_reduce(group, **sync_options), **options
    )
    return [grad_fn(params, batch) for _ in range(2)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (7, 2), (5, 0), (0, 3, 1), (1, 0, 6, 2)])
def test_ranks_equal_one_process_with_the_union(pool, sizes, overlap):
    params, batch, parts = make(sizes)
    expected = gradacc.accumulate_and_value(token_loss, has_aux=True, steps=1)(params, batch)
    answers = pool.run_each(
        len(sizes), call_steps, [(params, part, {"overlap": overlap}, {"steps": 3}) for part in parts]
    )
    for rank, calls in enumerate(answers):
        for grads, (value, aux) in calls:
            each = aux.pop("each")
            reference = dict(expected[1][1])
            assert_trees_close(each, reference.pop("each").split(sizes)[rank])
            assert_trees_close((grads, (value, aux)), (expected[0], (expected[1][0], reference)))
    for calls in answers[1:]:
        assert_trees_equal([(g, v) for g, (v, _) in calls], [(g, v) for g, (v, _) in answers[0]])


def call_steps(group, params, batch, sync_options, options):
    return call(group, params, batch, sync_options, **options)
