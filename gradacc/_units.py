"""In what unit weights are counted.

NOTE [units]
    The large batch's gradient is ``sum_i w_i g_i / W``: ``g_i`` the gradient of micro-batch i's mean, ``w_i`` its weight,
    ``W = sum_i w_i``. The buffer holds ``sum_i (w_i / unit) g_i`` and is multiplied once, at the end, by ``unit / W``.
    Where W is known beforehand (we split the batch, and the mean is over examples) the unit is W, and the last pass over
    the gradients falls away. Otherwise it is the first weight that is not zero: everything stays in the range of a mean
    (a sum over a hundred thousand tokens would overflow float16), and where there is one micro-batch the result is the
    undivided one, bit for bit.

    One weight says nothing of the next. With the weights 1e-38 and 1e3, the second micro-batch's part in units of the first
    is 1e41 times its mean, which float32 does not hold. So the unit follows the weights: a weight of a `Mean` that is more
    than ``2 ** GROWTH`` units makes the unit larger, by a power of two, and what has been summed is multiplied by its inverse,
    which rounds nothing. That is a pass over the gradients, and rare: a factor of a million. The unit then is at most twice
    the largest weight and at least ``2 ** -GROWTH`` of it, so the buffer overflows only where the result is within a factor
    ``2 ** GROWTH`` of overflowing (1e38 / 1e6), and loses digits only where the result does. Any finite weights are right.

    The inverse of the unit is what a backward pass begins with, so the unit is in the range in which a normal number has a
    normal inverse: of a weight outside of it, the nearest ``weight * 2 ** k``.

    A weight that cannot be read cannot decide whether to make that pass. Under torch.func's transforms, where it may be
    batched, the pass is always made. On an accelerator, where reading waits for the device, and where Dynamo traces, it never
    is: there the unit stays what the first micro-batch made it, the first weight moved by a power of two into the middle half
    of the dtype's exponents (``2 ** -63`` to ``2 ** 63`` in float32; 1 where the first weight is 0). The sum then fits float32
    where ``W |g| / unit`` does: with weights of any size below the first, and above it up to 1e38 times the first (or
    ``2 ** -63``, the larger) over the size of the gradients. Beyond that the result is inf or NaN, and never another number.

    In half precision what is in the backward pass must be near 1, too, for each micro-batch. There a weight has a unit of its
    own (`near`), the common one times a power of two; NOTE [cotangents and factors] in ``_sums.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradacc import _dtypes, _where

GROWTH = 20
"""A weight of more than ``2 ** GROWTH`` units makes the unit larger."""


def first(weight: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Of the first weight that is not 0, for a loss of ``dtype``."""
    limit = _limit(_dtypes.sum_dtype(dtype))
    if isinstance(weight, Tensor):
        one = torch.where(weight == 0, 1.0, weight.detach())
        power = _power(one)
        return one / power * power.clamp(2.0 ** -(limit // 2), 2.0 ** (limit // 2))
    return weight if torch.compiler.is_compiling() else _within(weight, limit)


def grown(unit: float | Tensor, weight: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The unit of what has been summed and of one more ``weight``: ``unit``, or a power of two times it."""
    if torch.compiler.is_compiling():
        return unit
    if isinstance(unit, Tensor) or isinstance(weight, Tensor):
        if not _where.transforming():
            return unit
        power = _power(weight / unit)
        moved: Tensor = unit * torch.where(power > 2.0**GROWTH, power, 1.0)
        return moved.clamp(max=2.0 ** _limit(_dtypes.sum_dtype(dtype)))
    more = math.frexp(weight)[1] - math.frexp(unit)[1]
    return unit if more <= GROWTH else _within(math.ldexp(unit, more), _limit(_dtypes.sum_dtype(dtype)))


def near(unit: float | Tensor, weight: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A power of two times the unit, near a ``weight`` of a loss of ``dtype``."""
    limit = _limit(dtype)
    if isinstance(unit, Tensor) or isinstance(weight, Tensor):
        own: Tensor = unit * _power(weight / unit)
        return own.clamp(2.0**-limit, 2.0**limit)
    if torch.compiler.is_compiling():
        return unit
    return _within(math.ldexp(unit, math.frexp(weight)[1] - math.frexp(unit)[1]), limit)


def larger(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The larger unit of two."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def _power(number: Any) -> Tensor:
    """The power of two above a tensor ``>= 0``, exactly; 1 of 0."""
    positive: Tensor = torch.where(number == 0, 0.5, number.detach()).clamp(max=2.0**1000)
    return positive / torch.frexp(positive)[0]


def _limit(dtype: torch.dtype) -> int:
    """The exponent up to which a power of two and its inverse are normal numbers of ``dtype``."""
    return round(-math.log2(torch.finfo(dtype).tiny))


def _within(number: float, limit: int) -> float:
    """A power of two times a number, which leaves it alone where it is within the limit."""
    exponent = math.frexp(number)[1]
    return math.ldexp(number, min(max(exponent, 1 - limit), limit) - exponent)
