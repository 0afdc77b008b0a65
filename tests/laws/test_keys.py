"""Law 13: with keyed randomness, results depend neither on the split nor on the number of ranks."""

from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc import random
from gradacc.testing import splits
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint, some_slow, value_of
from tests.laws.test_ranks import layouts

# torch's own forward mode scripts its decompositions
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

D = torch.float64
few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPLITS = [{"steps": 1}, {"steps": 2}, {"steps": 3}, {"steps": 8}, {"microbatch_size": 1}, {"microbatch_size": 3}]


def parameters():
    g = torch.Generator().manual_seed(0)
    return {"in": torch.randn(3, 6, generator=g, dtype=D), "out": torch.randn(6, generator=g, dtype=D)}


def batch_of(index):
    """Examples by their numbers, in whatever batch and on whatever rank they are, with a key for each."""
    x = (index[:, None] * torch.tensor([0.7, 1.3, 2.1], dtype=D)).sin()
    return {"x": x, "keys": random.fold_in(random.key(5), index), "weight": index % 3}


def batch(n):
    return batch_of(torch.arange(n))


def per_example(params, batch, dropout):
    """Two dropouts, and noise: a value an example."""
    keys = batch["keys"]
    x = dropout(batch["x"], random.fold_in(keys, 0), 0.3)
    hidden = torch.tanh(x @ params["in"] + 0.1 * random.normal(random.fold_in(keys, 1), (6,), dtype=D))
    return (dropout(hidden, random.fold_in(keys, 2), 0.5) @ params["out"] - 1).square()


def mean(params, batch):
    return per_example(params, batch, random.dropout).mean()


def weighted(params, batch):
    return gradacc.Mean((per_example(params, batch, random.dropout) * batch["weight"]).sum(), batch["weight"].sum())


def shared(params, batch, key):
    """And a weight of which the same elements are dropped in every micro-batch."""
    return mean({**params, "in": random.dropout(params["in"], key, 0.2)}, batch)


def naive(params, batch):
    return per_example(params, batch, lambda x, keys, p: F.dropout(x, p)).mean()


LOSSES = {"mean": mean, "weighted": weighted}


def of_the_large_batch(loss, batch):
    """By plain autograd, without gradacc."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in parameters().items()}
    value = value_of(loss(leaves, batch))
    value.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}, value.detach()


def check(result, loss, batch):
    grads, value = of_the_large_batch(loss, batch)
    assert_trees_close(result[0], grads, rtol=1e-10)
    assert_trees_close(value_of(result[1]), value, rtol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_split_is_the_large_batch(loss, split, engine):
    grad_fn = gradacc.accumulate_and_value(LOSSES[loss], **split)
    check(ENGINES[engine](lambda: grad_fn(parameters(), batch(8))), LOSSES[loss], batch(8))


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=st.integers(2, 7))
def test_any_split_is_the_large_batch(engine, data, size):
    grad_fn = gradacc.accumulate_and_value(mean, **data.draw(splits(size)))
    check(ENGINES[engine](lambda: grad_fn(parameters(), batch(size))), mean, batch(size))


@pytest.mark.parametrize("split", some_slow(SPLITS, {"steps": 2}), ids=str)
def test_compiled(split):
    grad_fn = torch.compile(gradacc.accumulate_and_value(mean, **split), fullgraph=True, backend="eager")
    check(grad_fn(parameters(), batch(8)), mean, batch(8))


# Torch's own, where Inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_by_inductor():
    grad_fn = torch.compile(gradacc.accumulate_and_value(mean, steps=3), fullgraph=True)
    check(grad_fn(parameters(), batch(8)), mean, batch(8))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_shared_key_is_the_same_in_every_microbatch(split, engine):
    key = random.key(9)
    grad_fn = gradacc.accumulate_and_value(shared, **split)
    result = ENGINES[engine](lambda: grad_fn(parameters(), batch(8), key))
    check(result, lambda params, batch: shared(params, batch, key), batch(8))


@pytest.mark.parametrize("split", [each for each in SPLITS if each != {"steps": 1}], ids=str)
def test_without_keys_it_is_another_gradient(split):
    """The law is one of keys: torch's own dropout does not keep it."""
    torch.manual_seed(0)
    result = gradacc.accumulate_and_value(naive, **split)(parameters(), batch(8))
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check(result, naive, batch(8))


def of_a_rank(group, loss: str, index: Any, split: dict[str, Any]) -> Any:
    """Keys are made where the example is, of its number."""
    grad_fn = gradacc.accumulate_and_value(LOSSES[loss], sync=gradacc.all_reduce(group), **split)
    return grad_fn(parameters(), batch_of(index))


@few
@given(layout=layouts(), loss=st.sampled_from(sorted(LOSSES)), steps=st.integers(1, 3))
def test_any_number_of_ranks_is_the_large_batch(pool, layout, loss, steps):
    shares = [sum(sizes) for sizes in layout]
    index = torch.arange(sum(shares)) + 1  # the first one has a weight
    if not len(index):
        return  # nothing anywhere: tests.sync
    args = [(loss, share, {"steps": steps}) for share in index.split(shares)]
    for result in pool.run_each(len(layout), of_a_rank, args):
        check(result, LOSSES[loss], batch_of(index))


@pytest.mark.parametrize("engine", ENGINES)
def test_purity(engine):
    """Nothing is changed, torch's random state neither, and a second call is the same bits."""
    params, data = parameters(), batch(8)
    before, state = fingerprint((params, data)), torch.get_rng_state()
    grad_fn = gradacc.accumulate_and_value(mean, steps=3)
    first, second = (ENGINES[engine](lambda: grad_fn(params, data)) for _ in range(2))
    assert_trees_equal(first, second)
    assert fingerprint((params, data)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(first))


def test_the_order_of_examples_does_not_matter():
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    grads = gradacc.accumulate(mean, steps=3)(parameters(), batch_of(order))
    assert_trees_close(grads, of_the_large_batch(mean, batch(8))[0])


@FORWARD_MODE
def test_an_ensemble_and_a_hessian_vector_product():
    params, data = parameters(), batch(8)
    grad_fn = gradacc.accumulate(mean, steps=3)
    stacked = {name: torch.stack([leaf, leaf.cos()]) for name, leaf in params.items()}
    grads = torch.vmap(grad_fn, in_dims=(0, None))(stacked, data)
    assert_trees_close(optree.tree_map(lambda leaf: leaf[0], grads), of_the_large_batch(mean, data)[0])
    hvp = [torch.func.jvp(lambda p, f=f: f(p, data), (params,), (params,))[1] for f in (grad_fn, torch.func.grad(mean))]
    assert_trees_close(*hvp)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_streaming_form(steps):
    data = batch(8)
    acc = gradacc.accumulator(mean)
    state = acc.init(parameters())
    for part in zip(*(leaf.tensor_split(steps) for leaf in data.values()), strict=True):
        state = acc.update(state, parameters(), dict(zip(data, part, strict=True)))
    check(acc.finalize(state), mean, data)
