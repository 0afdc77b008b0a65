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


LOSSES = {
    "mean": lambda w, x: (w * x).mean(),
    "Mean": lambda w, x: gradacc.Mean((w * x).sum(), len(x)),
    "Mean in float32": lambda w, x: gradacc.Mean((w.float() * x.float()).sum(), len(x)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", LOSSES)
@given(data=st.data())
def test_means_that_cancel_are_not_rounded_before_they_do(engine, loss, data):
    """Shares such as 1/3 are no numbers of bfloat16: rounded on their way, gradients that cancel would leave a rest."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    numbers = data.draw(st.lists(st.integers(-128, 128), min_size=1, max_size=9))
    x = torch.tensor(numbers, dtype=dtype)
    w = torch.ones((), dtype=dtype)
    whole = sum(numbers) / len(numbers)
    for batch, options in ((x, {"microbatch_size": 1}), (list(x.split(1)), {"split": iter}), (x, {"steps": len(x)})):
        grads = ENGINES[engine](lambda b=batch, o=options: gradacc.accumulate(LOSSES[loss], **o)(w, b))
        torch.testing.assert_close(grads, torch.tensor(whole, dtype=dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_shares_below_float16s_range(engine):
    """3000 examples one by one: 1/3000 of a small gradient would be subnormal in float16."""
    x = torch.full((3000,), 2.0**-10, dtype=torch.float16)
    grad_fn = gradacc.accumulate(lambda w, x: (w * x).mean(), microbatch_size=1)
    grads = ENGINES[engine](lambda: grad_fn(torch.ones((), dtype=torch.float16), x))
    torch.testing.assert_close(grads, torch.tensor(2.0**-10, dtype=torch.float16), rtol=1e-3, atol=0)  # eps is 9.8e-4


def test_a_half_precision_loss_of_float32_parameters():
    """The loss's dtype rounds no share either: 256/3 + 1/3 - 255/3."""
    x = torch.tensor([256.0, 1.0, -255.0])
    grads = gradacc.accumulate(lambda w, x: (w * x).mean().bfloat16(), microbatch_size=1)(torch.ones(()), x)
    torch.testing.assert_close(grads, torch.tensor(2 / 3), rtol=1e-5, atol=0)
