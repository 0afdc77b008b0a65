"""Law 13 for models that know nothing of keys: with `keyed`, every split is the large batch, in training mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import random
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint

D = torch.float64
STEPS = [1, 2, 3, 8]
N = 8


class Plain(nn.Module):
    """Dropout of several kinds, noise, attention, and a depth that is decided once for the batch."""

    def __init__(self, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.inp, self.out = nn.Linear(3, 8), nn.Linear(8, 1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    def block(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return F.dropout(x + 0.1 * torch.randn_like(x), 0.2)

    def forward(self, x):
        x = F.dropout1d(self.inp(x), 0.3)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        x = x * (1 + torch.rand((), dtype=x.dtype))  # the same for the whole batch
        x = x * torch.bernoulli(torch.full((len(x), 1, 1), 0.7, dtype=x.dtype))
        return self.out(F.alpha_dropout(x, 0.1, training=self.training))


def module(recompute=False):
    torch.manual_seed(0)
    return Plain(recompute).double()


def batch_of(index):
    """Examples by their numbers."""
    x = (index[:, None, None] + torch.arange(12.0, dtype=D).view(4, 3) * 0.7).sin()
    return {"x": x, "keys": random.fold_in(random.key(5), index)}


BATCH = batch_of(torch.arange(N))


def loss_of(module):
    apply, params, _ = gradacc.functional(module)

    def loss_fn(params, batch):
        with random.keyed(batch["keys"], shared=random.key(9)):
            return (apply(params, batch["x"]) - 1).square().mean()

    return loss_fn, params


def plain_loss(module, batch):
    return (module(batch["x"]) - 1).square().mean()


def of_the_large_batch():
    """By plain autograd, without `accumulate`."""
    model = module()
    with random.keyed(BATCH["keys"], shared=random.key(9)):
        value = plain_loss(model, BATCH)
    value.backward()
    return {name: leaf.grad for name, leaf in model.named_parameters()}, value.detach()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", STEPS)
def test_every_split_is_the_large_batch(engine, steps):
    """Recomputed too, where the engine allows it."""
    expected = of_the_large_batch()
    for recompute in [False] + [True] * (engine == "eager"):
        loss_fn, params = loss_of(module(recompute))
        grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps)
        result = ENGINES[engine](lambda grad_fn=grad_fn, params=params: grad_fn(params, BATCH))
        assert_trees_close(result, expected)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_without_keys_it_is_another_gradient(steps):
    """Torch's own draws do not keep the law."""
    apply, params, _ = gradacc.functional(module())
    torch.manual_seed(0)
    grads = gradacc.accumulate(lambda p, x: (apply(p, x) - 1).square().mean(), steps=steps)(params, BATCH["x"])
    model = module()
    torch.manual_seed(0)
    plain_loss(model, BATCH).backward()
    expected = {name: leaf.grad for name, leaf in model.named_parameters()}
    with pytest.raises(AssertionError):
        assert_trees_close(grads, expected)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("recompute", [False, True])
def test_through_is_the_large_batch(steps, recompute):
    """The encoder's draws of its second run are those of its first, under a loss in which all examples meet."""
    apply, params, _ = gradacc.functional(module(recompute))

    def encode(params, batch):
        with random.keyed(batch["keys"], shared=random.key(9)):
            return apply(params, batch["x"]).flatten(1)

    def loss_fn(params, z, batch):
        return (z @ z.mT).logsumexp(1).mean()

    grads = gradacc.accumulate(loss_fn, through=encode, steps=steps)(params, BATCH)
    whole = torch.func.grad if not recompute else _gradient
    assert_trees_close(grads, whole(lambda p: loss_fn(p, encode(p, BATCH), BATCH))(params))


def _gradient(loss):
    """By plain autograd, which checkpoints need."""

    def grad(params):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    return grad


@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("steps", STEPS)
def test_pieces_are_the_whole(steps, backward):
    apply, params, _ = gradacc.functional(module())

    def func(params, batch):
        with random.keyed(batch["keys"], shared=random.key(9)):
            return (apply(params, batch["x"]) - 1).square().sum()

    pieces = gradacc.microbatch(func, steps=steps, in_dims=(None, 0), out="sum", backward=backward)
    assert_trees_close(_gradient(lambda p: pieces(p, BATCH))(params), _gradient(lambda p: func(p, BATCH))(params))


@pytest.mark.parametrize("steps", STEPS)
def test_the_streaming_form(steps):
    loss_fn, params = loss_of(module())
    acc = gradacc.accumulator(loss_fn)
    state = acc.init(params)
    for part in torch.arange(N).tensor_split(steps):
        state = acc.update(state, params, batch_of(part))
    assert_trees_close(acc.finalize(state), of_the_large_batch())


def test_the_order_of_examples_does_not_matter():
    loss_fn, params = loss_of(module())
    shuffled = batch_of(torch.tensor([5, 0, 7, 2, 1, 6, 3, 4]))
    grads = gradacc.accumulate(loss_fn, steps=3)(params, shuffled)
    assert_trees_close(grads, of_the_large_batch()[0])


def test_purity():
    loss_fn, params = loss_of(module(recompute=True))
    before, state = fingerprint((params, BATCH)), torch.get_rng_state()
    first, second = (gradacc.accumulate_and_value(loss_fn, steps=3)(params, BATCH) for _ in range(2))
    assert_trees_equal(first, second)
    assert fingerprint((params, BATCH)) == before
    assert torch.equal(torch.get_rng_state(), state)


def of_a_rank(group, index, steps):
    loss_fn, params = loss_of(module())
    return gradacc.accumulate_and_value(loss_fn, steps=steps, sync=gradacc.all_reduce(group))(params, batch_of(index))


@pytest.mark.parametrize("shares", [[8], [5, 3], [2, 0, 6]])
@pytest.mark.parametrize("steps", [1, 2])
def test_any_number_of_ranks_is_the_large_batch(pool, shares, steps):
    expected = of_the_large_batch()
    args = [(share, steps) for share in torch.arange(N).split(shares)]
    for result in pool.run_each(len(shares), of_a_rank, args):
        assert_trees_close(result, expected)
