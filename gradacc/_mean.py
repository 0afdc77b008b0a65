"""`Mean`: the monoid element that everything is a fold of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradacc import _tree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A mean that has not been divided yet: ``value = total / weight``, and ``a + b`` is the mean of both together.

    .. code-block:: text

        Mean(t1, w1) + Mean(t2, w2) = Mean(t1 + t2, w1 + w2)       an Abelian monoid with Mean(0, 0) as identity

    A loss whose mean is over something other than examples (tokens, pixels, edges) returns one, so that micro-batches
    with different numbers of them are weighted right. As a leaf of ``aux``, ``total`` and ``weight`` may have any shapes
    that broadcast (an accuracy per class, say). It is a pytree node, to optree in our namespace and to torch.

    Arguments:
        total: the sum. For a loss: a 0-dim floating tensor that depends on the parameters.
        weight: what the sum is divided by, ``>= 0``: a number, or a 0-dim tensor, counted from the data (it must not
            depend on the parameters: the gradient of ``total / weight`` would have a second term). It is best left where it was
            counted: on an accelerator it is not read, which would wait for the device.

    Example:
        >>> import torch, gradacc
        >>> a = gradacc.Mean(torch.tensor(6.0), 2) + gradacc.Mean(torch.tensor(3.0), 1)
        >>> a.value
        tensor(3.)
    """

    total: Tensor
    weight: Tensor | float

    @property
    def value(self) -> Tensor:
        """``total / weight``; NaN where both are zero: the mean of nothing."""
        return self.total / self.weight

    def __add__(self, other: Mean) -> Mean:
        if not isinstance(other, Mean):
            return NotImplemented
        return Mean(self.total + other.total, self.weight + other.weight)

    def __radd__(self, other: int) -> Mean:
        # What `sum(means)` starts from.
        return self if isinstance(other, int) and other == 0 else NotImplemented


_tree.register(Mean, lambda mean: (mean.total, mean.weight), ("total", "weight"))
