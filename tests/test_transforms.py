"""Under functorch transforms: batches, ensembles and derivatives of accumulated gradients."""

import pytest
import torch

import gradacc
from tests.helpers import assert_trees_close

D = torch.float64
X = torch.arange(12, dtype=D).view(6, 2).sin()


def mean(w, x):
    return torch.tanh(x @ w).square().mean()


def tokens(w, x):
    return gradacc.Mean((torch.tanh(x @ w) * (x[:, 0] > 0)).sum(), (x[:, 0] > 0).sum())


LOSSES = {"mean": (mean, mean), "Mean": (tokens, lambda w, x: tokens(w, x).value)}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_over_parameters_and_over_batches(name):
    loss, scalar = LOSSES[name]
    grad_fn = gradacc.accumulate(loss, steps=4)
    ws, xs = torch.randn(3, 2, dtype=D, generator=torch.Generator().manual_seed(0)), torch.stack([X, X.cos(), -X])
    expected = torch.stack([torch.func.grad(scalar)(w, X) for w in ws])
    assert_trees_close(torch.func.vmap(grad_fn, (0, None))(ws, X), expected)
    expected = torch.stack([torch.func.grad(scalar)(ws[0], x) for x in xs])
    assert_trees_close(torch.func.vmap(grad_fn, (None, 0))(ws[0], xs), expected)


def test_a_batched_micro_batch_of_weight_0():
    """In one member of the vmap every micro-batch counts, in another some do not, in the last none does."""
    masks = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(4, dtype=D)

    def loss(w, batch):
        x, mask = batch
        return gradacc.Mean((w * x * mask).sum() / mask.any(), mask.sum())  # NaN or infinite where nothing is real

    grads = torch.func.vmap(gradacc.accumulate(loss, steps=2), (None, (None, 0)))(torch.ones((), dtype=D), (x, masks))
    torch.testing.assert_close(grads, torch.tensor([1.5, 2.0, 0.0], dtype=D))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp uses it
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_through_the_accumulated_gradient(name):
    loss, scalar = LOSSES[name]
    w = torch.tensor([0.3, -0.7], dtype=D)
    ours, theirs = gradacc.accumulate(loss, steps=4), torch.func.grad(scalar)
    assert_trees_close(torch.func.jacrev(ours)(w, X), torch.func.jacrev(theirs)(w, X))
    assert_trees_close(torch.func.jacfwd(ours)(w, X), torch.func.jacfwd(theirs)(w, X))
    tangent = torch.func.jvp(lambda w: ours(w, X), (w,), (torch.ones_like(w),))[1]
    assert_trees_close(tangent, torch.func.hessian(scalar)(w, X).sum(1))

    def after_a_step(rate, grad_fn):  # a hyper-gradient
        return mean(w - rate * grad_fn(w, X), X)

    rate = torch.tensor(0.1, dtype=D)
    assert_trees_close(torch.func.grad(after_a_step)(rate, ours), torch.func.grad(after_a_step)(rate, theirs))
