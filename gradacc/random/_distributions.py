"""Numbers of keys: uniform, normal, and yes or no."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradacc.random import _check, _draw, _real


def uniform(keys: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), of the given shape for each key.

    .. code-block:: text

        uniform(keys, shape)[i] = uniform(keys[i], shape)
        a number                = (a word of the key's stream mod 2**b) / 2**b

    ``b`` is the number of bits of the dtype's significand (float16 11, bfloat16 8, float32 24, float64 53, of two words), so
    numbers are exact, never 1, and the same bits on every device, in every transform, and compiled. In bfloat16 there are
    256 of them: draw in float32 what is compared.

    Arguments:
        keys: uint64, of shape ``(*batch, 2)``.
        shape: of the numbers of one key; () for one number.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        ``(*batch, *shape)``, on the device of ``keys``, without a gradient.

    Raises:
        TypeError: ``keys`` is no uint64 tensor, ``shape`` no tuple of integers, ``dtype`` another one.
        ValueError: ``keys`` has another shape; a size is negative.

    Source: Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; bits and
    order as in ``torch.func._random.uniform``.

    Example:
        >>> import gradacc
        >>> keys = gradacc.random.split(gradacc.random.key(7), 2)
        >>> gradacc.random.uniform(keys, (3,)).shape
        torch.Size([2, 3])
    """
    _check.keys("uniform", keys)
    return _draw.uniform(keys, _check.shape("uniform", shape), _check.dtype("uniform", dtype))


def normal(keys: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of mean 0 and variance 1, of the given shape for each key.

    .. code-block:: text

        normal(keys, shape)[i] = normal(keys[i], shape)
        two numbers            = sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)      u, v uniform in (0, 1]

    Half precision is computed in float32 and rounded. The words are the same everywhere; logarithm, cosine and sine are those
    of the device or compiler at hand, so the last bits may be others elsewhere (in float32 some 1e-6 of the number).

    Arguments:
        keys: uint64, of shape ``(*batch, 2)``.
        shape: of the numbers of one key; () for one number.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        ``(*batch, *shape)``, on the device of ``keys``, without a gradient.

    Raises:
        TypeError: ``keys`` is no uint64 tensor, ``shape`` no tuple of integers, ``dtype`` another one.
        ValueError: ``keys`` has another shape; a size is negative.

    Source: Box and Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 29, 1958; which words
    are u and v as in ``torch.func._random.normal``.

    Example:
        >>> import gradacc
        >>> keys = gradacc.random.split(gradacc.random.key(7), 2)
        >>> gradacc.random.normal(keys, (3,)).shape
        torch.Size([2, 3])
    """
    _check.keys("normal", keys)
    dtype = _check.dtype("normal", dtype)
    return _draw.draw(keys, _check.shape("normal", shape), dtype, _real.normal(dtype))


def bernoulli(keys: Tensor, p: float, shape: Sequence[int] = ()) -> Tensor:
    """True with probability ``p``, of the given shape for each key.

    .. code-block:: text

        bernoulli(keys, p, shape) = uniform(keys, shape) < p

    where ``p`` is rounded up to a multiple of ``2**-24``, so that the same are true everywhere. With 0 none is,
    with 1 all are.

    Arguments:
        keys: uint64, of shape ``(*batch, 2)``.
        p: a number in [0, 1].
        shape: of what one key draws; () for one.

    Returns:
        bool, of shape ``(*batch, *shape)``, on the device of ``keys``.

    Raises:
        TypeError: ``keys`` is no uint64 tensor, ``p`` no number, ``shape`` no tuple of integers.
        ValueError: ``keys`` has another shape; ``p`` is not in [0, 1]; a size is negative.

    Example:
        >>> import gradacc
        >>> keys = gradacc.random.split(gradacc.random.key(7), 2)
        >>> gradacc.random.bernoulli(keys, 0.5, (3,)).shape
        torch.Size([2, 3])
    """
    _check.keys("bernoulli", keys)
    return _draw.below(keys, _check.shape("bernoulli", shape), _check.probability("bernoulli", p))
