"""One piece, run and run backward: functions that do more than real arithmetic (complex numbers, transforms, checkpoints)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradacc import microbatch

D = torch.float64


def _tensors(dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (0.3 * torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((7, 3), (3, 3)))
    return x.requires_grad_(), w.requires_grad_()


def _same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _number(y: Tensor) -> Tensor:
    """Not holomorphic: its gradient is no multiple of one complex number's."""
    return y.abs().square() + y.real * y.imag + 3 * y.real


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("out", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [D, torch.complex128])
def test_a_complex_number_of_all(dtype: torch.dtype, out: str, backward: str) -> None:
    x, w = _tensors(dtype)

    def func(x: Tensor, w: Tensor) -> Tensor:
        y = ((x @ w) * (1 + 2j)).exp() * x.conj()
        return y.sum() if out == "sum" else y.mean()

    total = microbatch(func, steps=3, in_dims=(0, None), out=out, backward=backward)(x, w)
    _same(total, func(x, w))
    _same(torch.autograd.grad(_number(total), (x, w)), torch.autograd.grad(_number(func(x, w)), (x, w)))


def test_gradients_of_a_complex_number_are_not_taken_with_the_forward_pass() -> None:
    x, w = _tensors()
    by_pieces = microbatch(lambda x: (x @ w * 1j).sum(), steps=3, out="sum", backward="forward")
    with pytest.raises(ValueError, match=r"output is complex. Use backward='auto'"):
        by_pieces(x)


INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda x, w: torch.func.grad(lambda y: (y @ w).sin().sum())(x),
    "grad of grad": lambda x, w: torch.func.grad(
        lambda y: torch.func.grad(lambda z: (z @ w).sin().sum())(y).square().sum()
    )(x),
    "vmap": lambda x, w: torch.vmap(lambda row: (row @ w).sin())(x),
    "vmap of grad": lambda x, w: torch.vmap(torch.func.grad(lambda row: (row @ w).sin().sum()))(x),
}


@pytest.mark.parametrize("closed", ["leaf", "made before", "argument"])
@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside_of_the_function(name: str, closed: str) -> None:
    x, leaf = _tensors()
    w = leaf.sin() if closed == "made before" else leaf
    if closed == "argument":
        by_pieces = microbatch(INSIDE[name], steps=3, in_dims=(0, None))(x, w)
    else:
        by_pieces = microbatch(lambda x: INSIDE[name](x, w), steps=3)(x)
    expected = INSIDE[name](x, w)
    _same(by_pieces, expected)
    first, wanted = (torch.autograd.grad(y.square().sum(), (x, leaf), create_graph=True) for y in (by_pieces, expected))
    _same(first, wanted)
    _same(
        *(
            torch.autograd.grad(g[0].square().sum() + g[1].sin().sum(), (x, leaf), retain_graph=True)
            for g in (first, wanted)
        )
    )


@pytest.mark.parametrize("hidden", [True, False])
def test_a_reentrant_checkpoint_is_an_error(hidden: bool) -> None:
    """What it uses would get no gradient, without a word, where it is reached only through a tensor made in the function."""
    x, w = _tensors()

    def func(x: Tensor) -> Tensor:
        own = torch.ones((), dtype=D, requires_grad=True)
        if hidden:
            return checkpoint(lambda x, own: (x @ w).sin() * own, x, own, use_reentrant=True) + x @ w
        return checkpoint(lambda x: (x @ w).sin(), x, use_reentrant=True)

    with pytest.raises(ValueError, match="Pass use_reentrant=False"):
        microbatch(func, steps=3)(x.detach() if hidden else x)


def test_a_checkpoint_inside_of_the_function() -> None:
    x, w = _tensors()
    by_pieces = microbatch(lambda x: checkpoint(lambda x: (x @ w).sin(), x, use_reentrant=False), steps=3)
    _same(torch.autograd.grad(by_pieces(x).sum(), (x, w)), torch.autograd.grad((x @ w).sin().sum(), (x, w)))
