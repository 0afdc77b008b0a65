"""What a call has kept, where it may drop micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """The value of a call with ``nonfinite="drop"``: of the large batch without the micro-batches that were dropped.

    Example:
        >>> import torch, gradacc
        >>> grad_fn = gradacc.accumulate_and_value(lambda w, x: (w * x).sqrt().mean(), steps=3, nonfinite="drop")
        >>> grads, kept = grad_fn(torch.ones(()), torch.tensor([1.0, 4.0, -1.0]))
        >>> grads, kept.value, kept.dropped
        (tensor(0.7500), tensor(1.5000), tensor(1))
    """

    value: Any
    """What it is otherwise: of the type that ``loss_fn`` returns."""
    dropped: Tensor
    """How many micro-batches, on all ranks: 0-dim, int64."""
