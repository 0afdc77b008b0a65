"""Law 8: half-precision gradients are summed in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradacc
from tests.helpers import ENGINES


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_gradients_256_1_minus_256_sum_to_1(engine, dtype):
    big = 256.0 if dtype is torch.bfloat16 else 2048.0  # where 1 more is lost in this dtype
    x = torch.tensor([big, 1.0, -big], dtype=dtype)
    assert (x[0] + x[1]) + x[2] == 0
    grad_fn = gradacc.accumulate(lambda w, x: (w * x).sum(), microbatch_size=1, reduction="sum")
    grads = ENGINES[engine](lambda: grad_fn(torch.ones((), dtype=dtype), x))
    assert grads == 1
    assert grads.dtype == dtype


@pytest.mark.parametrize("engine", ENGINES)
@given(st.lists(st.integers(-128, 128), min_size=1, max_size=30))
def test_sums_of_bfloat16_gradients_are_rounded_once(engine, numbers):
    """Integers of 8 bits are exact in bfloat16 and their sums in float32, so only the last cast may round."""
    x = torch.tensor(numbers, dtype=torch.bfloat16)
    grad_fn = gradacc.accumulate_and_value(lambda w, x: (w * x).sum(), microbatch_size=1, reduction="sum")
    grads, value = ENGINES[engine](lambda: grad_fn(torch.ones((), dtype=torch.bfloat16), x))
    assert grads == torch.tensor(sum(numbers), dtype=torch.bfloat16)
    assert value == torch.tensor(sum(numbers), dtype=torch.bfloat16)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_long_sum_does_not_overflow_float16(engine):
    """4 x 100 000 tokens of gradient 1 each: a sum of 400 000 is infinite in float16, their mean is 1."""
    x = torch.ones(4, 100_000, dtype=torch.float16)

    def loss(w, x):
        return gradacc.Mean((w.float() * x.float()).sum(), x.numel())

    grads = ENGINES[engine](lambda: gradacc.accumulate(loss, steps=4)(torch.ones((), dtype=torch.float16), x))
    assert grads == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_dtype_names_the_accumulator_and_the_gradients_keep_it(engine):
    x = torch.tensor([2.0**24, 1.0, -(2.0**24)])
    loss = lambda w, x: (w * x).sum()  # noqa: E731
    in_float32 = gradacc.accumulate(loss, microbatch_size=1, reduction="sum")
    in_float64 = gradacc.accumulate(loss, microbatch_size=1, reduction="sum", dtype=torch.float64)
    w = torch.ones(())
    assert ENGINES[engine](lambda: in_float32(w, x)) == 0
    assert ENGINES[engine](lambda: in_float64(w, x)) == 1
    assert ENGINES[engine](lambda: in_float64(w, x)).dtype == torch.float64
