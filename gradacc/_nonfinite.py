"""``nonfinite="drop"``: a micro-batch whose loss or gradient has a NaN or an inf counts as one of weight 0.

NOTE [micro-batches that are dropped]
    Whether a gradient is finite is known when all of it is there. So that of a micro-batch is a buffer of its own until then,
    and no matrix product adds to what was accumulated: one more buffer, one more pass over it to look, one to add. Where it can
    be read for nothing (a CPU, outside of transforms), it decides. Elsewhere nothing is read: gradient, weight, value and aux
    are replaced by 0 where it is not finite, and weights are tensors from then on. The unit of the sums (NOTE [units]) stays
    what it is with the micro-batch: only what has been summed, and its weight, is without it.

    Concatenated leaves of aux keep the rows of a micro-batch that is dropped: a row an example, read or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc import _dtypes, _where
from gradacc._engines import Buffer, Engine
from gradacc._loss import Outcome, Terms
from gradacc._mean import Mean
from gradacc._sums import Contribution


def backward(
    engine: Engine, buffer: Buffer, tape: Any, outcome: Outcome, counts: Contribution
) -> tuple[Buffer, Outcome, Contribution]:
    """`Engine.backward`, and what is left of the micro-batch to be summed. NOTE [micro-batches that are dropped]"""
    before = buffer.grads
    own = engine.backward(buffer._replace(grads=[None] * len(before)), tape, counts._replace(growth=1.0), None)
    grads = own.grads
    finite = _is_finite([*_that_count(outcome, counts), *(grad for grad in grads if grad is not None)])
    if finite is True:
        return own._replace(grads=engine.merge(before, grads, (counts.growth, 1.0), True)), outcome, counts
    left = _masked(outcome, finite)
    share = None if counts.share is None else _if(finite, counts.share)
    if finite is False:
        # What has been summed stays in the unit that it is in.
        counts = counts._replace(counts=False, unit=None, growth=1.0, share=share, dropped=1)
        return own._replace(grads=before, arrived=buffer.arrived), left, counts
    grads = [None if grad is None else torch.where(finite.to(grad.device), grad, 0) for grad in grads]
    counts = counts._replace(share=share, dropped=(~finite).to(torch.int64))
    return own._replace(grads=engine.merge(before, grads, (counts.growth, 1.0), True)), left, counts


def _that_count(outcome: Outcome, counts: Contribution) -> list[Tensor]:
    """The targets, but one of weight 0, which contributes nothing whatever it is; 0 where that is not read."""
    return [
        target if own.keeps is None else torch.where(own.keeps, target, 0.0)
        for target, own in zip(outcome.targets, counts.passes, strict=True)
        if own is not None
    ]


def _is_finite(tensors: Sequence[Tensor]) -> bool | Tensor:
    """Whether all elements are: a tensor where that is not read."""
    parts = [_dtypes.as_real(tensor) for tensor in tensors if tensor.numel()]
    device = parts[0].device
    if _where.transforming() or not all(part.is_cpu for part in parts):
        return torch.stack([part.isfinite().all().to(device) for part in parts]).all()
    # By the extremes, which NaN passes through: one pass, and no temporary.
    return all(math.isfinite(end) for part in parts for end in torch.aminmax(part))


def _masked(outcome: Outcome, finite: bool | Tensor) -> Outcome:
    """The same where it is finite, else of weight 0; what is concatenated, or averaged by its share, stays."""
    aux = outcome.aux._replace(leaves=[_masked_mean(leaf, finite) for leaf in outcome.aux.leaves])
    weight = None if outcome.weight is None else _if(finite, outcome.weight)
    value: Any = outcome.value
    if isinstance(value, Terms):
        value = value._replace(means=[_masked_mean(mean, finite) for mean in value.means])
    else:
        value = _masked_mean(value, finite) if isinstance(value, Mean) else _if(finite, value)
    return outcome._replace(value=value, weight=weight, aux=aux)


def _masked_mean(leaf: Any, finite: bool | Tensor) -> Any:
    if not isinstance(leaf, Mean) or not isinstance(leaf.total, Tensor):
        return leaf
    return Mean(_if(finite, leaf.total), _if(finite, leaf.weight))


def _if(finite: bool | Tensor, number: Any) -> Any:
    """A tensor or a weight, or 0 where it is not finite."""
    if finite is True:
        return number
    if finite is False:
        return torch.zeros_like(number) if isinstance(number, Tensor) else 0.0
    if not isinstance(number, Tensor):
        # float64 counts to more than 2 ** 24; Apple's GPUs have none.
        dtype = torch.float64 if finite.device.type != "mps" else torch.float32
        number = torch.zeros((), dtype=dtype, device=finite.device) + number
    return torch.where(finite.to(number.device), number, torch.zeros_like(number))
