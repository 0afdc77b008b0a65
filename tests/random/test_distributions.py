"""Uniform and normal numbers, and yes or no: exact bits, statistics of fixed keys, and every way to get them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc import random
from tests.helpers import some_slow
from tests.random import oracle, strategies

# torch's own forward mode scripts its decompositions
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def rows(keys):
    return oracle.as_pairs(keys.reshape(-1, 2))


@given(keys=strategies.keys(), shape=strategies.shapes, dtype=st.sampled_from(DTYPES))
def test_uniform_is_that_of_python_s_integers_to_the_bit(keys, shape, dtype):
    numbers = random.uniform(keys, shape, dtype=dtype)
    assert numbers.shape == (*keys.shape[:-1], *shape)
    assert numbers.dtype == dtype
    expected = [oracle.uniform(key, math.prod(shape), dtype) for key in rows(keys)]
    assert numbers.double().reshape(len(expected), math.prod(shape)).tolist() == expected


@settings(max_examples=50)
@given(keys=strategies.keys(), shape=strategies.shapes, dtype=st.sampled_from(DTYPES))
def test_normal_is_box_muller(keys, shape, dtype):
    numbers = random.normal(keys, shape, dtype=dtype)
    assert numbers.shape == (*keys.shape[:-1], *shape)
    assert numbers.dtype == dtype
    expected = torch.tensor([oracle.normal(key, math.prod(shape), dtype) for key in rows(keys)], dtype=torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(numbers.double(), expected.reshape(numbers.shape), rtol=tolerance, atol=tolerance)


@settings(max_examples=50)
@given(keys=strategies.keys(), shape=strategies.shapes, p=st.floats(0, 1))
def test_bernoulli_is_uniform_below_p(keys, shape, p):
    drawn = random.bernoulli(keys, p, shape)
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn, random.uniform(keys, shape).double() < p)


@given(key=strategies.keys([]), p=st.integers(0, 2**24).map(lambda n: n / 2**24))
def test_bernoulli_at_the_numbers_themselves(key, p):
    """``p`` is one of the 2**24 numbers that are drawn, or a little more."""
    numbers = random.uniform(key, (9,))
    for each in (*numbers.tolist(), *(math.nextafter(number, 1) for number in numbers.tolist()), p):
        assert torch.equal(random.bernoulli(key, each, (9,)), numbers.double() < each)


def test_bernoulli_0_and_1():
    keys = random.split(random.key(0), 100)
    assert not random.bernoulli(keys, 0, (100,)).any()
    assert random.bernoulli(keys, 1, (100,)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_a_row_is_a_function_of_its_key(draw, dtype):
    """Bit for bit, whatever the other rows are, by itself, and in the middle of a piece."""
    keys = random.split(random.key(3), 7)
    for count in (1, 2, 3, 4, 5, 1001, 70_001):
        numbers = draw(keys, (count,), dtype=dtype)
        for i in range(7):
            assert torch.equal(numbers[i], draw(keys[i], (count,), dtype=dtype))
        assert torch.equal(numbers.flip(0), draw(keys.flip(0), (count,), dtype=dtype))
        assert torch.equal(numbers[:, : count // 2], draw(keys, (count // 2,), dtype=dtype))


def moments(numbers, expected):
    """Each power's mean, within four standard errors."""
    for power, (mean, variance) in expected.items():
        found = numbers.double().pow(power).mean().item()
        assert abs(found - mean) < 4 * math.sqrt(variance / numbers.numel()), power


UNIFORM_MOMENTS = {n: (1 / (n + 1), 1 / (2 * n + 1) - 1 / (n + 1) ** 2) for n in (1, 2, 3, 4)}
NORMAL_MOMENTS = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments(dtype):
    keys = random.split(random.key(11), 256)
    moments(random.uniform(keys, (1024,), dtype=dtype), UNIFORM_MOMENTS)
    moments(random.normal(keys, (1024,), dtype=dtype), NORMAL_MOMENTS)


def chi_square(counts):
    """Within four standard deviations of its mean, both sides."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    found = ((counts - expected).square() / expected).sum().item()
    assert abs(found - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_fills_all_cells_alike(dtype):
    numbers = random.uniform(random.split(random.key(12), 64), (4096,), dtype=dtype)
    chi_square(torch.bincount((numbers.double() * 128).long().flatten(), minlength=128).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_fills_all_cells_alike(dtype):
    numbers = random.normal(random.split(random.key(13), 64), (4096,), dtype=dtype).double()
    uniform = torch.special.ndtr(numbers)
    chi_square(torch.bincount((uniform * 128).long().clamp(max=127).flatten(), minlength=128).double())


def neighbours():
    """Draws that lie near each other: of rows, of words, of seeds, of parents and children."""
    keys = random.split(random.key(14), 256)
    numbers = random.uniform(keys, (1024,))
    yield "rows", numbers[:-1], numbers[1:]
    for step in (1, 2, 3, 4):
        yield f"words {step} apart", numbers[:, :-step], numbers[:, step:]
    seeds = torch.stack([random.uniform(random.key(seed), (4096,)) for seed in range(65)])
    yield "seeds", seeds[:-1], seeds[1:]
    yield "a parent and its child", numbers, random.uniform(random.fold_in(keys, 0), (1024,))
    yield "siblings", *(random.uniform(random.fold_in(keys, i), (1024,)) for i in (0, 1))
    normal = random.normal(keys, (1024,))
    yield "the two of a pair", normal[:, 0::2], normal[:, 1::2]


@pytest.mark.parametrize(("a", "b"), [(a, b) for _, a, b in neighbours()], ids=[name for name, *_ in neighbours()])
def test_neighbours_are_independent(a, b):
    """No correlation, and the cells of a square filled alike."""
    a, b = a.double().flatten(), b.double().flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 4 / math.sqrt(len(a))
    ranks = [((each.argsort().argsort() * 16) // len(a)) for each in (a, b)]
    counts = torch.bincount(ranks[0] * 16 + ranks[1], minlength=256).double()
    found = ((counts - len(a) / 256).square() / (len(a) / 256)).sum().item()
    assert abs(found - 225) < 4 * math.sqrt(450)  # margins are fixed: 15 x 15 degrees of freedom


def test_bernoulli_s_rate():
    keys = random.split(random.key(15), 256)
    for p in (1e-3, 0.1, 0.5, 0.9):
        rate = random.bernoulli(keys, p, (1024,)).double().mean().item()
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / 2**18)


def every_draw(keys):
    """In every dtype, of an odd number."""
    drawn = [
        draw(keys, (3, 3), dtype=dtype) for draw, dtype in itertools.product((random.uniform, random.normal), DTYPES)
    ]
    return [*drawn, random.bernoulli(keys, 0.3, (3, 3)), random.uniform(keys), random.normal(keys, ())]


def assert_equal(mine, others):
    for one, other in zip(mine, others, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_vmap_is_the_loop():
    keys = random.split(random.key(16), 6).view(2, 3, 2)
    expected = every_draw(keys)
    assert_equal(torch.vmap(every_draw)(keys), expected)
    assert_equal(torch.vmap(torch.vmap(every_draw))(keys), expected)
    assert_equal(torch.vmap(every_draw, in_dims=1, out_dims=1)(keys), expected)
    loop = [torch.stack(rows) for rows in zip(*map(every_draw, keys), strict=True)]
    assert_equal(loop, expected)


@FORWARD_MODE
def test_under_grad_and_jvp():
    key = random.key(17)
    assert_equal(torch.func.grad(lambda x: (x, every_draw(key)), has_aux=True)(torch.ones(()))[1], every_draw(key))
    noisy = lambda x: x * random.normal(key, (4,), dtype=torch.float64)  # noqa: E731
    x = torch.ones(4, dtype=torch.float64)
    assert torch.equal(torch.func.jvp(noisy, (x,), (x,))[1], noisy(x))


@pytest.mark.parametrize("backend", some_slow(["eager", "aot_eager"], "eager"))
def test_compiled(backend):
    keys = random.split(random.key(18), 6)
    compiled = torch.compile(every_draw, fullgraph=True, backend=backend)
    assert_equal(compiled(keys), every_draw(keys))


# Torch's own, where Inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_by_inductor():
    """All integers and uniform numbers are the same bits; its logarithm and cosine are others."""
    keys = random.split(random.key(19), 6)
    for mine, other in zip(torch.compile(every_draw, fullgraph=True)(keys), every_draw(keys), strict=True):
        assert mine.dtype == other.dtype
        if other.dtype.is_floating_point and (other < 0).any():
            tolerance = TOLERANCE[other.dtype]
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3), (2, 0)])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (5,)])
def test_shapes(batch, shape):
    keys = torch.zeros(*batch, 2, dtype=torch.uint64)
    for draw in (random.uniform, random.normal, lambda keys, shape: random.bernoulli(keys, 0.5, shape)):
        assert draw(keys, shape).shape == (*batch, *shape)
        assert draw(keys, list(shape)).shape == (*batch, *shape)


def test_keys_that_are_a_view():
    keys = random.split(random.key(20), 12)
    some = keys.view(4, 3, 2).transpose(0, 1)[:, ::2]
    assert not some.is_contiguous()
    assert_equal(every_draw(some), every_draw(some.contiguous()))


def test_the_default_dtype_and_device_change_nothing():
    keys = random.split(random.key(21), 3)
    expected = every_draw(keys)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert_equal(every_draw(keys), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_torch_s_own_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    every_draw(random.key(22))
    assert torch.equal(torch.get_rng_state(), before)
