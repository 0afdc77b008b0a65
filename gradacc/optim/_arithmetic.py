"""The arithmetic of an update, on lists of tensors: in place on memory that is ours, or pure.

An update rule is written once, over an `Arithmetic`. The first argument of every operation may be reused for its result
(`in_place`) or may not (`pure`), so a rule never reads a list again after handing it in first; `plus`, of gradients, reuses
where these are given away too (`donating`), and `sqrt` never does. Coefficients are Python numbers or, `pure` only, 0-dim
tensors. With Python numbers both give the same bits: they are the same kernels as in torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradacc._dtypes import widened

Tensors: TypeAlias = list[Tensor]
Coefficient: TypeAlias = float | Tensor
Operation: TypeAlias = Callable[..., Tensors]


class Arithmetic(NamedTuple):
    """What update rules are written in; each works leaf by leaf."""

    mul: Operation  # x * c
    div: Operation  # x / c
    shift: Operation  # x + number
    add: Operation  # x + c * y
    plus: Operation  # the same of gradients
    lerp: Operation  # x + number * (y - x)
    addcmul: Operation  # x + number * y * z
    addcdiv: Operation  # x + c * y / z
    maximum: Operation  # max(x, y)
    copy: Operation  # y
    sqrt: Operation  # √x in fresh memory; in `pure`, with derivative 0 at 0
    read: Callable[[Coefficient], Coefficient]  # a coefficient as the operations take it


def _reusing(foreach: Callable[..., Any]) -> Operation:
    def apply(xs: Tensors, *args: Any) -> Tensors:
        foreach(xs, *args)
        return xs

    return apply


def _scaling(foreach: Callable[..., Any], single: Callable[[Tensor, float], Tensor]) -> Operation:
    """On a CPU torch's foreach kernels round a scalar to half precision before they use it; the single ones do not."""

    def apply(xs: Tensors, coefficient: float) -> Tensors:
        if xs[0].dtype in (torch.bfloat16, torch.float16) and xs[0].is_cpu:
            return [single(x, coefficient) for x in xs]
        foreach(xs, coefficient)
        return xs

    return apply


def _add_(xs: Tensors, ys: Tensors, coefficient: float) -> Tensors:
    torch._foreach_add_(xs, ys, alpha=coefficient)
    return xs


in_place = Arithmetic(
    mul=_scaling(torch._foreach_mul_, Tensor.mul_),
    div=_scaling(torch._foreach_div_, Tensor.div_),
    shift=_reusing(torch._foreach_add_),
    add=_add_,
    plus=lambda xs, ys, coefficient: list(torch._foreach_add(xs, ys, alpha=coefficient)),
    lerp=_reusing(torch._foreach_lerp_),
    addcmul=_reusing(torch._foreach_addcmul_),
    addcdiv=_reusing(torch._foreach_addcdiv_),
    maximum=_reusing(torch._foreach_maximum_),
    copy=_reusing(torch._foreach_copy_),
    sqrt=lambda xs: list(torch._foreach_sqrt(xs)),
    read=float,
)

donating = in_place._replace(plus=_add_)


def _leafwise(op: Callable[..., Tensor]) -> Operation:
    """``op`` of every leaf; lists are taken apart, coefficients are the same for all."""

    def apply(*args: Any) -> Tensors:
        lists = [arg if isinstance(arg, list) else [arg] * len(args[0]) for arg in args]
        return [op(*leaf) for leaf in zip(*lists, strict=True)]

    return apply


def _fit(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """A coefficient that was computed in float64, in the dtype in which kernels hold their scalars."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    dtype = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    return coefficient.to(device=x.device, dtype=dtype)


def _mul(x: Tensor, coefficient: Coefficient) -> Tensor:
    return (widened(x) * _fit(coefficient, x)).to(x.dtype) if isinstance(coefficient, Tensor) else x * coefficient


def _div(x: Tensor, coefficient: Coefficient) -> Tensor:
    return (widened(x) / _fit(coefficient, x)).to(x.dtype) if isinstance(coefficient, Tensor) else x / coefficient


def _add(x: Tensor, y: Tensor, coefficient: Coefficient) -> Tensor:
    if isinstance(coefficient, Tensor):
        return (widened(x) + _fit(coefficient, x) * widened(y)).to(x.dtype)
    return x.add(y, alpha=coefficient)


def _addcdiv(x: Tensor, y: Tensor, z: Tensor, coefficient: Coefficient) -> Tensor:
    if isinstance(coefficient, Tensor):
        return (widened(x) + _fit(coefficient, x) * widened(y) / widened(z)).to(x.dtype)
    return x.addcdiv(y, z, value=coefficient)


def _sqrt(x: Tensor) -> Tensor:
    """What torch.sqrt gives, whose derivative at 0 is inf: a leaf without gradients would turn into NaN."""
    positive = x != 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), x)


pure = Arithmetic(
    mul=_leafwise(_mul),
    div=_leafwise(_div),
    shift=_leafwise(torch.add),
    add=_leafwise(_add),
    plus=_leafwise(_add),
    lerp=_leafwise(torch.lerp),
    addcmul=_leafwise(lambda x, y, z, value: torch.addcmul(x, y, z, value=value)),
    addcdiv=_leafwise(_addcdiv),
    maximum=_leafwise(torch.maximum),
    copy=_leafwise(lambda x, y: y.clone()),
    sqrt=_leafwise(_sqrt),
    read=lambda coefficient: coefficient,
)
