"""Real numbers of the words of a block; every function returns the block's numbers, in their order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradacc.random._philox import Words

Numbers = Callable[[Words], tuple[Tensor, ...]]


def per_block(dtype: torch.dtype) -> int:
    """How many numbers a block has: one a word, or of two words in float64."""
    return 2 if dtype == torch.float64 else 4


def _fractions(bits: int, dtype: torch.dtype) -> Numbers:
    """The low bits of each word, as a fraction: exact in ``dtype``, and never 1."""

    def numbers(words: Words) -> tuple[Tensor, ...]:
        return tuple(((word & (2**bits - 1)).to(torch.float32) * 2.0**-bits).to(dtype) for word in words)

    return numbers


def _doubles(words: Words) -> tuple[Tensor, ...]:
    w0, w1, w2, w3 = words
    return tuple(((w << 32 | v) & (2**53 - 1)).to(torch.float64) * 2.0**-53 for w, v in ((w0, w1), (w2, w3)))


UNIFORM: dict[torch.dtype, Numbers] = {
    torch.float16: _fractions(11, torch.float16),
    torch.bfloat16: _fractions(8, torch.bfloat16),
    torch.float32: _fractions(24, torch.float32),
    torch.float64: _doubles,
}
"""In [0, 1): as many bits as the significand of the dtype has."""


def normal(dtype: torch.dtype) -> Numbers:
    """Box and Muller's: two numbers of two that are uniform in (0, 1]; computed in float32 for half precision."""

    def numbers(words: Words) -> tuple[Tensor, ...]:
        if dtype == torch.float64:
            w0, w1, w2, w3 = (word.to(dtype) for word in words)
            return _box_muller(w0 * 2.0**-32 + (w1 + 0.5) * 2.0**-64, w2 * 2.0**-32 + (w3 + 0.5) * 2.0**-64)
        u0, u1, u2, u3 = (word.to(torch.float32) * 2.0**-32 + 2.0**-33 for word in words)
        return tuple(number.to(dtype) for number in (*_box_muller(u0, u1), *_box_muller(u2, u3)))

    return numbers


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = (-2.0 * u.log()).sqrt(), v * (2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def below(threshold: int) -> Numbers:
    """Whether the uniform float32 number of each word is below ``threshold / 2**24``."""
    return lambda words: tuple((word & (2**24 - 1)) < threshold for word in words)
