"""Pieces without examples, and numbers among what pieces return."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradacc import microbatch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward mode
BACKWARDS = ("auto", "recompute", "forward")


def _batch() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 7.0]], dtype=torch.float64)
    return x, torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)


def _mean(x: Tensor, w: Tensor) -> Tensor:
    """Of no examples it is NaN, and so is its derivative by ``w``."""
    return w.square().sum() * x.mean()


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 0, 2), (0, 0, 3)])
def test_a_piece_without_examples_adds_nothing_to_a_mean(sizes: tuple[int, ...], backward: str) -> None:
    x, w = _batch()
    by_pieces = microbatch(_mean, in_dims=(0, None), out="mean", backward=backward)  # type: ignore[arg-type]
    mean = by_pieces(list(x.split(sizes)), w)
    torch.testing.assert_close(mean, _mean(x, w))
    (first,) = torch.autograd.grad(mean, w, create_graph=True)
    (expected,) = torch.autograd.grad(_mean(x, w), w, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), w), torch.autograd.grad(expected.sum(), w))
    quiet = microbatch(lambda x: _mean(x, w.detach()), out="mean")(list(x.split(sizes)))
    torch.testing.assert_close(quiet, mean.detach())


def test_a_piece_without_examples_adds_nothing_to_a_mean_under_transforms() -> None:
    x, w = _batch()
    pieces, w = list(x.split([1, 0, 2])), w.detach()
    by_pieces = microbatch(_mean, in_dims=(0, None), out="mean")
    torch.testing.assert_close(
        torch.func.grad_and_value(lambda w: by_pieces(pieces, w))(w),
        torch.func.grad_and_value(lambda w: _mean(x, w))(w),
    )
    many = torch.stack([w, 2 * w])
    torch.testing.assert_close(
        torch.vmap(lambda w: by_pieces(pieces, w))(many), torch.stack([_mean(x, own) for own in many])
    )
    torch.testing.assert_close(
        torch.func.hessian(lambda w: by_pieces(pieces, w))(w), torch.func.hessian(lambda w: _mean(x, w))(w)
    )


@pytest.mark.parametrize("grad", [True, False])
def test_the_mean_of_nothing_at_all_is_nan_and_its_gradient_zero(grad: bool) -> None:
    x, w = _batch()
    nothing = [x[:0], x[:0]]
    for backward in BACKWARDS if grad else BACKWARDS[:1]:
        by_pieces = microbatch(_mean, in_dims=(0, None), out="mean", backward=backward)  # type: ignore[arg-type]
        mean = by_pieces(nothing, w if grad else w.detach())
        assert mean.isnan()
        if grad:
            assert torch.equal(torch.autograd.grad(mean, w)[0], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(
        torch.func.grad(lambda w: microbatch(_mean, in_dims=(0, None), out="mean")(nothing, w))(w.detach()),
        torch.zeros(2, dtype=torch.float64),
    )
    assert math.isnan(microbatch(lambda x: float(len(x)), out="mean")(nothing))


def _numbers(*values: Any) -> Callable[[Tensor], Any]:
    left = iter(values)
    return lambda _: next(left)


@pytest.mark.parametrize(
    ("out", "values", "expected"),
    [
        ("sum", [True], 1),
        ("sum", [True, True], 2),
        ("sum", [2, 0.5], 2.5),
        ("mean", [1, 4], 2.0),
        ("mean", [math.nan, 4], math.nan),
        ("max", [1.0, 3.0, 2.0], 3.0),
        ("max", [1.0, math.nan], math.nan),
        ("max", [math.nan, 1.0], math.nan),
        ("min", [1.0, math.nan, 0.0], math.nan),
        ("min", [math.nan, 1.0], math.nan),
        ("min", [True, False], False),
    ],
)
def test_numbers(out: str, values: list[Any], expected: Any) -> None:
    """As tensors of them would be; of one type, however many pieces there are."""
    sizes = [2, 1] if out == "mean" else [1] * len(values)
    actual = microbatch(_numbers(*values), out=out)(list(torch.zeros(sum(sizes), 3).split(sizes)))
    assert type(actual) is type(expected)
    assert actual == expected or (math.isnan(actual) and math.isnan(expected))
