"""`Moments`: count, mean and squared deviations of a sample, which combine exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc import _dtypes, _tree
from gradacc._describe import describe


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The first two moments of a sample: ``a + b`` are those of both samples together, by Chan's formula.

    .. code-block:: text

        n = na + nb,   d = mean_b - mean_a
        mean = mean_a + d nb / n
        m2   = m2_a + m2_b + d^2 na nb / n                an Abelian monoid with Moments(0, 0, 0) as identity

    As a leaf of a carry (``has_carry=True``) they add up over micro-batches and ranks, so that running statistics are those of
    the large batch, whatever the split. Unlike the sums of x and x^2, the formula loses no digits where the mean is far from 0.

    Arguments:
        count: of how many numbers: a number, or a tensor that broadcasts to ``mean`` (a count for each channel, say), ``>= 0``.
        mean: their mean, a floating tensor of any shape: one for each channel.
        m2: the sum of their squared deviations from it, of the same shape and dtype.

    Raises:
        TypeError: ``+`` with anything else.

    Example:
        >>> import torch, gradacc
        >>> x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]])
        >>> both = gradacc.Moments.of(x[:1], dim=0) + gradacc.Moments.of(x[1:], dim=0)
        >>> both.mean, both.variance(correction=1)
        (tensor([ 2., 30.]), tensor([  1., 700.]))
        >>> torch.var_mean(x, dim=0)
        (tensor([  1., 700.]), tensor([ 2., 30.]))

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979), and
    "Algorithms for computing the sample variance" (1983).
    """

    count: Tensor | float
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int | Sequence[int]) -> Moments:
        """Of a floating tensor over these dimensions; half precision is taken to float32, ``count`` is a 0-dim int64 tensor.

        Raises:
            TypeError: ``x`` is no floating tensor.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = f"a tensor of dtype {x.dtype}" if isinstance(x, Tensor) else describe(x)
            raise TypeError(f"gradacc.Moments.of: moments are of a floating tensor, got {what}; convert it (x.float())")
        dims = [dim] if isinstance(dim, int) else list(dim)
        wide = _dtypes.widened(x)
        number = 1
        for d in dims:
            number *= wide.shape[d]
        count = torch.full((), number, dtype=torch.int64, device=x.device)
        if not isinstance(number, int) or number:
            variance, mean = torch.var_mean(wide, dims, correction=0)
            return cls(count, mean, variance * number)
        zeros = wide.sum(dims)
        return cls(count, zeros, torch.zeros_like(zeros))

    def variance(self, correction: float = 0) -> Tensor:
        """``m2 / (count - correction)``: of the sample itself, or with ``correction=1`` the unbiased estimate."""
        return self.m2 / (self.count - correction)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            raise TypeError(
                f"gradacc.Moments: Moments plus {describe(other)} are not defined; both must be Moments, "
                "gradacc.Moments.of(x, dim)"
            )
        dtype, count = torch.promote_types(self.mean.dtype, other.mean.dtype), self.count + other.count
        share = _ratio(other.count, count, self.mean, dtype)
        distance = other.mean - self.mean
        # In this order nothing overflows that need not: n a nb / n is at most n / 4.
        own = self.count.to(dtype) if isinstance(self.count, Tensor) else self.count
        m2 = self.m2 + other.m2 + distance * distance * (own * share)
        return Moments(count, self.mean + distance * share, m2)

    def __radd__(self, other: int) -> Moments:
        if isinstance(other, int) and other == 0:  # what `sum(moments)` starts from
            return self
        refused: Any = other
        return self + refused  # type: ignore[no-any-return]  # it is an error


def _ratio(part: Tensor | float, whole: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor | float:
    """``part / whole``; 0 of nothing."""
    if not isinstance(whole, Tensor):
        return part / whole if whole else 0.0
    nothing = whole == 0
    over = torch.where(nothing, 1, whole).to(dtype)
    return torch.as_tensor(part, device=whole.device).to(dtype) / over


def stacked(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """The sum of several, which are stacked along the first dimension: Chan's formula for all of them at once."""
    dtype = mean.dtype
    whole = count.sum(0)
    weights = count.to(dtype)
    while weights.ndim < mean.ndim:
        weights = weights.unsqueeze(1)
    shares = weights / torch.where(whole == 0, 1, whole).to(dtype)
    center = (shares * mean).sum(0)
    return Moments(whole, center, (m2 + weights * (mean - center).square()).sum(0))


_tree.register(Moments, lambda moments: (moments.count, moments.mean, moments.m2), ("count", "mean", "m2"))
