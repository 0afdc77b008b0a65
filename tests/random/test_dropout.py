"""Dropout whose mask is a function of keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc import random
from tests.helpers import some_slow
from tests.random import strategies

# torch's own forward mode scripts its decompositions
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

KEYS = random.split(random.key(1), 5)
X = torch.arange(1.0, 61.0).view(5, 3, 4)


@settings(max_examples=50)
@given(keys=strategies.keys(), shape=strategies.shapes, p=st.one_of(st.sampled_from([0, 0.5, 1]), st.floats(0, 0.99)))
def test_it_is_where_of_bernoulli(keys, shape, p):
    size = torch.Size([*keys.shape[:-1], *shape])
    x = torch.arange(1.0, 1 + size.numel()).view(size)
    dropped = random.bernoulli(keys, p, shape)
    out = random.dropout(x, keys, p)
    assert (out[dropped] == 0).all()
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - p) if p < 1 else x[~dropped])


def test_a_row_is_a_function_of_its_own_key_and_values():
    out = random.dropout(X, KEYS, 0.4)
    for i in range(5):
        assert torch.equal(out[i], random.dropout(X[i], KEYS[i], 0.4))
        assert torch.equal(out[: i + 1], random.dropout(X[: i + 1], KEYS[: i + 1], 0.4))
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(out[order], random.dropout(X[order], KEYS[order], 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_mask_is_the_same_for_every_dtype(dtype):
    out = random.dropout(X.to(dtype), KEYS, 0.4)
    assert out.dtype == dtype
    assert torch.equal(out == 0, random.dropout(X, KEYS, 0.4) == 0)
    doubled = random.dropout(torch.ones(5, 12, dtype=dtype), KEYS, 0.5)
    assert torch.equal(doubled, 2 * (doubled != 0).to(dtype))


def test_p_0_and_p_1():
    same = random.dropout(X, KEYS, 0)
    assert torch.equal(same, X)
    assert same.data_ptr() != X.data_ptr()
    x = X.clone().requires_grad_()
    none = random.dropout(x, KEYS, 1)
    none.sum().backward()
    assert not none.any()
    assert not x.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_what_is_dropped_is_0_and_so_is_its_gradient(bad, p):
    x = torch.full_like(X, bad).requires_grad_()
    dropped = random.bernoulli(KEYS, p, X.shape[1:])
    out = random.dropout(x, KEYS, p)
    out.backward(torch.full_like(X, 2.0))
    assert (out[dropped] == 0).all()
    assert (x.grad[dropped] == 0).all()
    assert torch.equal(x.grad[~dropped], torch.full_like(x.grad[~dropped], 2 / (1 - 0.4)))


@FORWARD_MODE
def test_derivatives():
    x = X.double().requires_grad_()
    keys = KEYS
    torch.autograd.gradcheck(lambda x: random.dropout(x, keys, 0.3), x)
    torch.autograd.gradgradcheck(lambda x: random.dropout(x, keys, 0.3).square(), x)
    assert torch.equal(
        torch.func.jvp(lambda x: random.dropout(x, keys, 0.3), (X,), (X,))[1], random.dropout(X, keys, 0.3)
    )


def test_expectation_and_rate():
    keys = random.split(random.key(2), 256)
    x = torch.ones(256, 1024, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        out = random.dropout(x, keys, p)
        assert abs(out.mean().item() - 1) < 4 * (p / (1 - p) / 2**18) ** 0.5
        assert torch.equal(out.unique(), torch.tensor([0, 1 / (1 - p)], dtype=torch.float64))


def test_vmap_is_the_loop():
    keys = random.split(KEYS, 2)  # two dimensions of a batch
    x = torch.stack([X, X.cos()], 1)
    expected = random.dropout(x, keys, 0.4)
    drop = lambda x, keys: random.dropout(x, keys, 0.4)  # noqa: E731
    assert torch.equal(torch.vmap(drop)(x, keys), expected)
    assert torch.equal(torch.vmap(torch.vmap(drop))(x, keys), expected)
    assert torch.equal(torch.vmap(drop, in_dims=(0, None))(X, KEYS[0]), torch.stack([drop(x, KEYS[0]) for x in X]))
    grads = torch.vmap(torch.func.grad(lambda x, key: drop(x, key).square().sum()))(X, KEYS)
    torch.testing.assert_close(grads, torch.func.grad(lambda x: drop(x, KEYS).square().sum())(X))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    some_slow([(b, d) for b in ("eager", "aot_eager") for d in (None, True)], ("eager", None)),
)
def test_compiled(backend, dynamic):
    def loss(x, keys):
        return random.dropout(random.dropout(x, random.fold_in(keys, 0), 0.3), random.fold_in(keys, 1), 0.5).sum()

    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend=backend, dynamic=dynamic)
    for count in (5, 3, 2):
        expected = torch.func.grad(loss)(X[:count], KEYS[:count])
        assert torch.equal(compiled(X[:count], KEYS[:count]), expected)


# Torch's own, where Inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_by_inductor():
    compiled = torch.compile(lambda x, keys: random.dropout(x, keys, 0.3), fullgraph=True)
    torch.testing.assert_close(compiled(X, KEYS), random.dropout(X, KEYS, 0.3))


def test_activation_checkpointing_needs_no_state():
    x = X.clone().requires_grad_()
    run = lambda x: random.dropout(x.sin(), KEYS, 0.4).square()  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.func.grad(lambda x: run(x).sum())(X))
