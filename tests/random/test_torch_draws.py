"""Each operator that draws, against the public functions of keys."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gradacc import random

KEYS = random.split(random.key(3), 5)
SHARED = random.key(11)
X = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
OWN = random.fold_in(KEYS, 0)
"""Of the first draw."""


def keyed(draw, *, shared=None):
    with random.keyed(KEYS, shared):
        return draw()


def kept(p, shape=(4, 3)):
    return random.bernoulli(OWN, 1 - p, shape)


HALF = torch.float16
D = torch.float64
P = torch.tensor([0.1, 0.5, 0.9])
BERNOULLI = {
    "bernoulli_": (lambda: torch.empty(5, 4, 3).bernoulli_(0.3), lambda: kept(0.7).float()),
    "bernoulli_ of bool": (lambda: torch.empty(5, 4, 3, dtype=torch.bool).bernoulli_(0.3), lambda: kept(0.7)),
    "bernoulli_ without p": (lambda: torch.empty(5, 4, 3).bernoulli_(), lambda: kept(0.5).float()),
    "bernoulli_ of tensors": (
        lambda: torch.empty(5, 4, 3).bernoulli_(P),
        lambda: (random.uniform(OWN, (4, 3)) < P).float(),
    ),
    "bernoulli": (
        lambda: torch.bernoulli(P.expand(5, 4, 3)),
        lambda: (random.uniform(OWN, (4, 3)) < P).float(),
    ),
    "bernoulli with p": (lambda: torch.bernoulli(X, 0.3), lambda: kept(0.7).float()),
}
NUMBERS = {
    "rand": (lambda: torch.rand(5, 4), lambda: random.uniform(OWN, (4,))),
    "rand of doubles": (lambda: torch.rand(5, dtype=D), lambda: random.uniform(OWN, dtype=D)),
    "rand of halves": (lambda: torch.rand(5, 9, dtype=HALF), lambda: random.uniform(OWN, (9,), dtype=HALF)),
    "rand_like": (lambda: torch.rand_like(X), lambda: random.uniform(OWN, (4, 3))),
    "rand_like of another dtype": (lambda: torch.rand_like(X, dtype=D), lambda: random.uniform(OWN, (4, 3), dtype=D)),
    "uniform_": (lambda: torch.empty(5, 4).uniform_(-2, 3), lambda: 5 * random.uniform(OWN, (4,)) - 2),
    "randn": (lambda: torch.randn(5, 4), lambda: random.normal(OWN, (4,))),
    "randn_like": (lambda: torch.randn_like(X), lambda: random.normal(OWN, (4, 3))),
    "normal_": (lambda: torch.empty(5, 4).normal_(1, 2), lambda: 2 * random.normal(OWN, (4,)) + 1),
    "normal of a size": (lambda: torch.normal(1.0, 2.0, (5, 4)), lambda: 2 * random.normal(OWN, (4,)) + 1),
    "normal of means": (lambda: torch.normal(X, 2.0), lambda: 2 * random.normal(OWN, (4, 3)) + X),
    "normal of deviations": (lambda: torch.normal(1.0, X.abs()), lambda: X.abs() * random.normal(OWN, (4, 3)) + 1),
    "normal of both": (lambda: torch.normal(X, X.abs()[0]), lambda: X.abs()[0] * random.normal(OWN, (4, 3)) + X),
    "a distribution": (
        lambda: torch.distributions.Normal(X, 2.0).rsample(),
        lambda: 2 * random.normal(OWN, (4, 3)) + X,
    ),
}
DROPOUT = {
    "dropout": (lambda: F.dropout(X, 0.3), lambda: X * kept(0.3) / 0.7),
    "dropout in place": (lambda: F.dropout(X.clone(), 0.3, inplace=True), lambda: X * kept(0.3) / 0.7),
    "of channels": (lambda: F.dropout1d(X, 0.3), lambda: X * kept(0.3, (4, 1)) / 0.7),
    "a kernel's": (lambda: torch.native_dropout(X, 0.3, True)[0], lambda: X * kept(0.3) / 0.7),
    "a kernel's that drops all": (lambda: torch.native_dropout(X, 1.0, True)[0], lambda: torch.zeros_like(X)),
    "a kernel's in evaluation": (lambda: torch.native_dropout(X, 0.3, False)[0], lambda: X),
    "in evaluation": (lambda: F.dropout(X, 0.3, training=False), lambda: X),
}
CASES = {**BERNOULLI, **NUMBERS, **DROPOUT}


@pytest.mark.parametrize("name", CASES)
def test_a_draw_is_that_of_keys(name):
    draw, expected = CASES[name]
    torch.testing.assert_close(keyed(draw), expected(), rtol=1e-6, atol=1e-6)


def test_alpha_dropout_is_its_formula():
    a = (0.7 * (1 + 0.3 * 1.7580993408473766**2)) ** -0.5
    dropped = -1.7580993408473766
    expected = a * torch.where(kept(0.3), X, dropped) - a * dropped * 0.3
    torch.testing.assert_close(keyed(lambda: F.alpha_dropout(X, 0.3, training=True)), expected)


def test_attention_has_dropout_of_its_weights():
    q = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    weights = (q @ q.mT * 3**-0.5).softmax(-1) * kept(0.3, (2, 4, 4)) / 0.7
    torch.testing.assert_close(keyed(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)), weights @ q)


def test_attention_without_dropout_keeps_its_kernel():
    q = torch.randn(5, 2, 4, 3)
    ops = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        keyed(lambda: F.scaled_dot_product_attention(q, q, q))
    assert any("flash" in name for name in ops)


def test_gradients_are_those_of_the_mask():
    x = X.double().requires_grad_()
    keyed(lambda: F.dropout(x, 0.3).sum()).backward()
    torch.testing.assert_close(x.grad, kept(0.3).double() / 0.7)
    y = X.double().requires_grad_()
    keyed(lambda: torch.native_dropout(y, 0.3, True)[0].sum()).backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_a_kernel_s_dropout_counts_as_the_composed_one_does():
    """The numbers of later draws are the same on every device."""
    for p in (0.0, 0.3, 1.0):
        for size in (3, 0):
            a, b = (
                keyed(lambda drop=drop, p=p, size=size: (drop(X[..., :size], p), torch.rand(5))[1])
                for drop in (F.dropout, lambda x, p: torch.native_dropout(x, p, True))
            )
            assert torch.equal(a, b)


def test_without_data():
    drawn = keyed(lambda: F.dropout(torch.ones(5, 4, device="meta"), 0.5) + torch.randn(5, 4, device="meta"))
    assert drawn.shape == (5, 4)
    assert keyed(lambda: torch.bernoulli(torch.full((5,), 0.5, device="meta"))).shape == (5,)


def test_memory_format_stays():
    x = torch.ones(5, 4, 3, 3).to(memory_format=torch.channels_last)
    assert keyed(lambda: torch.rand_like(x)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda: torch.empty(5).bernoulli_(1.5), "keyed: bernoulli: p is a number in"),
        (lambda: torch.bernoulli(torch.full((5,), 1.5)), "keyed: bernoulli: p is in"),
        (lambda: torch.bernoulli(torch.full((5,), torch.nan)), "keyed: bernoulli: p is in"),
        (lambda: torch.empty(5).uniform_(2, 1), "between 2"),
        (lambda: torch.normal(0.0, -1.0, (5,)), "not negative; got -1"),
        (lambda: torch.normal(torch.zeros(5), -torch.ones(5)), "not negative"),
    ],
)
def test_bad_arguments(draw, match):
    with pytest.raises(ValueError, match=match):
        keyed(draw)


@pytest.mark.parametrize(
    "draw", [lambda: torch.randn(5, dtype=torch.complex64), lambda: torch.rand(5, dtype=torch.complex64)]
)
def test_a_dtype_that_keys_do_not_have(draw):
    with pytest.raises(NotImplementedError, match="of dtype torch.complex64"):
        keyed(draw)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.ones(i + 1, 3) for i in range(5)], layout=layout)
    with pytest.raises(NotImplementedError, match="of a nested tensor; pad it"):
        keyed(lambda: F.dropout(nested, 0.5))
