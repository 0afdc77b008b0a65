"""The calling conventions, and everything that must simply work."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, fingerprint, squares

D = torch.float64


def test_decorator_and_keyword_arguments(params, batch):
    @gradacc.accumulate_and_value(steps=2)
    def step(params, batch, *, scale):
        """Documented."""
        return scale * squares(params, batch)

    assert step.__name__ == "step"
    assert step.__doc__ == "Documented."
    expected = torch.func.grad_and_value(lambda p: 3 * squares(p, batch))(params)
    assert_trees_close(step(params, batch, scale=3), expected)


def test_meta_device():
    params, x = torch.ones(3, device="meta"), torch.ones(5, 3, device="meta")
    grads, value = gradacc.accumulate_and_value(lambda p, x: (x @ p).square().mean(), steps=2)(params, x)
    assert grads.device.type == value.device.type == "meta"
    grads, value = gradacc.accumulate_and_value(lambda p, x: gradacc.Mean((x @ p).sum(), (x[:, 0] > 0).sum()), steps=2)(
        params, x
    )
    assert grads.shape == (3,)
    assert value.total.device.type == "meta"


# --- losses of every kind


def test_losses_that_use_transforms_themselves(params, batch):
    def per_example(params, x, y):
        return (x @ params["w"] - y).square()

    def with_vmap(params, batch):
        return torch.func.vmap(per_example, (None, 0, 0))(params, batch["x"], batch["y"]).mean()

    def with_grad(params, batch):
        force = torch.func.grad(lambda x: per_example(params, x, 0.0).sum())
        return torch.stack([force(x).square().sum() for x in batch["x"]]).mean()

    for loss in (with_vmap, with_grad):
        expected = torch.func.grad_and_value(loss)(params, batch)
        assert_trees_close(gradacc.accumulate_and_value(loss, steps=3)(params, batch), expected)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside):
    weight, x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48.0).view(6, 8).sin()

    def loss(w, x):
        with nullcontext() if outside else torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = x @ w
            assert hidden.dtype == torch.bfloat16
        return hidden.float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        grads = gradacc.accumulate(loss, steps=3)(weight, x)
        expected = torch.func.grad(loss)(weight, x)
    assert grads.dtype == torch.float32
    torch.testing.assert_close(grads, expected, rtol=2e-2, atol=1e-3)  # bfloat16 products, rounded per micro-batch


def test_a_compiled_loss_in_the_eager_engine(params, batch):
    compiled = torch.compile(squares, backend="eager")
    grads = gradacc.accumulate(compiled, steps=7)(params, batch)
    assert_trees_close(grads, torch.func.grad(squares)(params, batch))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode, params, batch):
    expected = torch.func.grad_and_value(squares)(params, batch)
    with mode():
        made_inside = {name: leaf.clone() for name, leaf in params.items()}, {k: v.clone() for k, v in batch.items()}
        for inputs in ((params, batch), made_inside):
            actual = gradacc.accumulate_and_value(squares, steps=3)(*inputs)
            assert not any(leaf.is_inference() for leaf in (*actual[0].values(), actual[1]))
            assert_trees_close(actual, expected)
    # Inference tensors also outside of the mode that made them.
    assert_trees_close(gradacc.accumulate_and_value(squares, steps=3)(*made_inside), expected)


def test_threads_share_a_grad_fn():
    module = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=4)
    x = torch.arange(24, dtype=D).view(8, 3).sin()
    scaled = [{name: (i + 1) * p for name, p in params.items()} for i in range(8)]
    expected = [torch.func.grad(lambda p: apply(p, x).square().mean())(p) for p in scaled]
    results: list = [None] * len(scaled)

    def work(i):
        for _ in range(20):
            results[i] = grad_fn(scaled[i], x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(scaled))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        assert_trees_close(actual, wanted)


def test_random_numbers_are_reproducible_and_differ_between_micro_batches():
    drawn = []

    def loss(w, x):
        noise = torch.rand(len(x))
        drawn.append(noise)
        return (w * x * noise).mean()

    grad_fn = gradacc.accumulate(loss, steps=2)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(grad_fn(torch.ones(()), torch.ones(4)))
    assert results[0] == results[1]
    assert not torch.equal(drawn[0], drawn[1])


def test_an_exception_halfway_propagates_unchanged_and_leaves_nothing(params, batch):
    class Halfway(Exception):
        pass

    module = nn.Linear(3, 1).double()
    apply, weights, _ = gradacc.functional(module)
    seen, error = [], Halfway("second micro-batch")

    def loss(weights, batch):
        hidden = apply(weights, batch["x"])
        seen.append(weakref.ref(hidden))
        if len(seen) == 2:
            raise error
        return hidden.square().mean()

    before = fingerprint((weights, batch, dict(module.named_parameters())))
    with pytest.raises(Halfway) as raised:
        gradacc.accumulate(loss, steps=3)(weights, batch)
    assert raised.value is error
    assert fingerprint((weights, batch, dict(module.named_parameters()))) == before
    error.__traceback__ = None
    del raised
    gc.collect()
    assert all(ref() is None for ref in seen)
    grads = gradacc.accumulate(lambda w, b: apply(w, b["x"]).square().mean(), steps=3)(weights, batch)
    assert_trees_close(grads, torch.func.grad(lambda w: apply(w, batch["x"]).square().mean())(weights))


# --- losses that do more than compute


def test_a_grad_fn_inside_a_loss_is_differentiated_through():
    """MAML: the outer gradient goes through the inner one, on the eager engine too."""
    w, x = torch.tensor([0.3, -0.7], dtype=D), torch.arange(12, dtype=D).view(6, 2).sin()

    def inner(w, x):
        return torch.tanh(x @ w).square().mean()

    def outer(grad_fn):
        return lambda w, x: inner(w - 0.5 * grad_fn(w, x[:1].expand(4, 2) * 2), x)

    expected = torch.func.grad_and_value(outer(torch.func.grad(inner)))(w, x)
    ours = outer(gradacc.accumulate(inner, steps=2))
    assert_trees_close(gradacc.accumulate_and_value(ours, steps=1)(w, x), expected)
    penalty = gradacc.accumulate(lambda w, x: gradacc.accumulate(inner, steps=2)(w, x).square().sum(), steps=1)
    assert_trees_close(penalty(w, x), torch.func.grad(lambda w: torch.func.grad(inner)(w, x).square().sum())(w))


def test_an_autograd_gradient_inside_the_loss():
    def loss(w, x):
        (slope,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        return (slope * x[:, None]).mean()

    x, w = torch.arange(3, dtype=D), torch.tensor([1.0, 2.0], dtype=D)
    torch.testing.assert_close(gradacc.accumulate(loss, steps=3)(w, x), 6 * w / 2)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's forward mode uses it
def test_forward_mode_differentiation_reaches_the_gradient():
    from torch.autograd import forward_ad

    def loss(w, x):
        return (w**3 * x).mean()

    x = torch.ones(4, dtype=D)
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.tensor(2.0, dtype=D), torch.tensor(1.0, dtype=D))
        grad, tangent = forward_ad.unpack_dual(gradacc.accumulate(loss, steps=2)(w, x))
    assert grad == 12
    assert tangent == 12
