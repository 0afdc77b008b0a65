"""Any finite weights, in any order: NOTE [units]."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import gradacc
from gradacc import _units
from tests.helpers import ENGINES, some_slow, transformed

DTYPES = {torch.float32: 37, torch.float64: 300}
"""And the powers of ten up to which a weight, and the total that it multiplies, are normal numbers."""


def loss(params, microbatch):
    """A mean of gradient ``slope`` with a given weight; aux: an average and a sum."""
    slope, weight = microbatch
    mean = (params * slope).sum()
    return gradacc.Mean(weight * mean, weight), [(slope * 1.0).sum(), gradacc.Mean(slope.sum(), 1)]


def sequences(dtype):
    power = DTYPES[dtype]
    weights = st.one_of(
        st.just(0.0),
        st.builds(lambda mantissa, exponent: mantissa * 10.0**exponent, st.floats(1, 2), st.integers(-power, power)),
    )
    return st.lists(st.tuples(st.floats(-3, 3, width=32), weights), min_size=1, max_size=5)


def batch_of(pairs, dtype, kind=float):
    return [(torch.tensor([slope, 1.0], dtype=dtype), kind(torch.tensor(w, dtype=dtype).item())) for slope, w in pairs]


def check(result, microbatches, dtype):
    grads, (_, (average, total)) = result
    whole = sum(Fraction(float(weight)) for _, weight in microbatches)
    parts = [(Fraction(slope[0].item()), Fraction(float(weight))) for slope, weight in microbatches]
    if not whole:
        assert grads.tolist() == [0, 0]
        return
    exact = sum(slope * weight for slope, weight in parts) / whole
    size = float(sum(abs(slope) * weight for slope, weight in parts) / whole) + 1e-30
    rounding = 16 * torch.finfo(dtype).eps
    assert abs(grads[0].item() - float(exact)) <= rounding * size
    assert abs(grads[1].item() - 1) <= rounding
    assert abs(average.item() - float(exact) - 1) <= rounding * (size + 1)
    assert total.weight == len(microbatches)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_finite_weights(dtype, engine):
    @given(pairs=sequences(dtype))
    @example(pairs=[(1.0, 1e-37), (1.0, 1e3)])
    @example(pairs=[(1.0, 1e3), (2.0, 1e-37), (3.0, 1e37)])
    @example(pairs=[(1.0, 0.0), (2.0, 1e-37), (3.0, 0.0), (1.0, 1e37)])
    def run(pairs):
        microbatches = batch_of(pairs, dtype)
        grad_fn = gradacc.accumulate_and_value(loss, has_aux=True)
        check(ENGINES[engine](lambda: grad_fn(torch.ones(2, dtype=dtype), microbatches)), microbatches, dtype)

    run()


@pytest.mark.parametrize("engine", ["eager", "functional"])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_finite_weights_in_any_tree_of_states(dtype, donate, engine):
    @given(data=st.data(), pairs=sequences(dtype))
    def run(data, pairs):
        microbatches = batch_of(pairs, dtype)
        params = torch.ones(2, dtype=dtype)
        init, update, merge, finalize = gradacc.accumulator(loss, has_aux=True, donate=donate)
        cut = data.draw(st.integers(0, len(microbatches)))

        def whole():
            states = [
                functools.reduce(lambda state, m: update(state, params, m), some, init(params))
                for some in (microbatches[:cut], microbatches[cut:])
            ]
            return finalize(merge(*states))

        check(ENGINES[engine](whole), microbatches, dtype)

    run()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", [[1e-38, 1e3], [1e3, 1e-38], [1e-45, 3e38], [3e38], [3e38, 1e-45, 3e38]])
def test_weights_to_the_ends_of_float32(weights, engine):
    """Subnormal ones too, whose inverse float32 does not hold."""

    def loss(w, microbatch):
        slope, weight = microbatch
        return gradacc.Mean(weight * (w * slope), weight)

    microbatches = [(torch.tensor(2.0), torch.tensor(w).item()) for w in weights]
    grads = ENGINES[engine](lambda: gradacc.accumulate(loss)(torch.ones(()), microbatches))
    torch.testing.assert_close(grads, torch.tensor(2.0))


@pytest.mark.parametrize("weight", [1e-30, 0.3, 7.0, 1e6, 1e30])
def test_one_micro_batch_is_the_undivided_one_bit_for_bit(weight):
    x = torch.randn(5, 3)
    w = torch.randn(3)

    def mean(w, x):
        return gradacc.Mean((x @ w).tanh().sum() * weight, weight)

    def divided(w):
        total = mean(w, x)
        return total.total / total.weight

    expected = torch.func.grad(divided)(w)
    assert torch.equal(gradacc.accumulate(mean, steps=1)(w, x), expected)
    assert torch.equal(ENGINES["functional"](lambda: gradacc.accumulate(mean, steps=1)(w, x)), expected)


def test_the_buffer_is_multiplied_only_where_weights_grow_a_million_times():
    units = []
    one = _units.first(3.0, torch.float32)
    for weight in (1.0, 2.0e6, 6.0e6, 7.0e6, 1e-30, 8.0e6, 1e13):
        one = _units.grown(one, weight, torch.float32)
        units.append(one)
    assert units[:2] == [3.0, 3.0]
    assert units[2:6] == [3.0 * 2**21] * 4
    assert math.log2(units[6] / 3) % 1 == 0
    assert units[6] / 2 <= 1e13 <= units[6] * 2


@pytest.mark.parametrize("engine", ["eager", "functional"])
@pytest.mark.parametrize("numbers", ["Python's", "tensors"])
def test_float16_stays_near_one_in_every_backward_pass(numbers, engine):
    """A sum over 1 token, then over a million: in units of the first weight, float16 would overflow."""

    def loss(w, microbatch):
        x, weight = microbatch
        return gradacc.Mean((w * x).float() * weight, weight)

    kind = float if numbers == "Python's" else torch.tensor
    microbatches = [(torch.tensor(3.0, dtype=torch.float16), kind(w)) for w in (1.0, 1e6, 1e-6, 0.0)]
    grads = ENGINES[engine](lambda: gradacc.accumulate(loss)(torch.ones((), dtype=torch.float16), microbatches))
    assert grads == torch.tensor(3.0, dtype=torch.float16)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_cancel_do_so_in_float16_with_any_weights(engine):
    def loss(w, microbatch):
        x, weight = microbatch
        return gradacc.Mean((w * x).float() * weight, weight)

    half = torch.float16
    microbatches = [(torch.tensor(x, dtype=half), w) for x, w in ((0.3, 7.0), (-0.3, 7.0), (0.1, 3e5), (-0.1, 3e5))]
    grads = ENGINES[engine](
        lambda: gradacc.accumulate(loss, dtype=torch.float32)(torch.ones((), dtype=half), microbatches)
    )
    assert grads.item() == 0


def weighted(w, weight):
    return gradacc.Mean(weight * (w * 2.0), weight)


@pytest.mark.parametrize(
    "weights", [[1e-37, 1e3], [0.0, 1e-37, 1e37], [1e37, 1e-37, 1e37], [3e38, 3e38], [1e-30, 1e37]]
)
def test_any_weights_that_are_not_read_under_a_transform(weights):
    grads = transformed(lambda: gradacc.accumulate(weighted)(torch.ones(()), [torch.tensor(w) for w in weights]))
    torch.testing.assert_close(grads, torch.tensor(2.0))


RANGE = [
    ([1e-37, 1e3], True),
    ([0.0, 1e-37, 1e15], True),
    ([1e37, 1e-37, 1e37], True),
    ([1.0, 1e30], True),
    ([3e38, 3e38], True),
    ([1e-30, 1e37], False),
]


@pytest.mark.parametrize(("weights", "fits"), some_slow(RANGE, RANGE[1], RANGE[-1]))
def test_the_range_of_weights_that_are_not_read_compiled(weights, fits):
    """Beyond it, inf or NaN: no other number."""
    torch._dynamo.reset()
    compiled = torch.compile(gradacc.accumulate(weighted), fullgraph=True, backend="eager")
    grads = compiled(torch.ones(()), [torch.tensor(w) for w in weights])
    if fits:
        torch.testing.assert_close(grads, torch.tensor(2.0))
    else:
        assert not grads.isfinite()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_weight_that_is_not_read_makes_everything_nan(weight, place):
    def loss(w, weight):
        return gradacc.Mean(w * 2.0, weight)

    weights = [torch.tensor(3.0), torch.tensor(3.0)]
    weights[place] = torch.tensor(weight)

    def both():
        grads, value = gradacc.accumulate_and_value(loss)(torch.ones(()), weights)
        return torch.stack([grads, value.value])

    assert transformed(both).isnan().all()
