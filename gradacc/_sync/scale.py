"""The unit in which gradients cross. NOTE [scales]

NOTE [scales]
    On the wire a gradient is ``sum_i w_i g_i / scale``, with a power of two for the ``scale``, so that it has the range of a
    mean (a sum over a million tokens would overflow float16) and no bit of it depends on the scale. The right one is near the
    total weight, which a rank learns with the others' records, too late: so it is the total weight of the ``grad_fn``'s last
    call that went through, a number from records that all ranks have.

    Where that is wrong for this call, gradients cross once more, in the right scale. With numbers of the range of float32 it
    takes weights that change by a factor of 2**12 (in float64 2**256): a rank whose own weight is that far above the scale, or
    below an even share of it, sends zeros at first, and says so in its record; what the others have sent counts. Within that
    factor a mean gradient's elements keep their digits down to 1e-34, where float32 itself ends at 1e-38 (where all of the
    weight is on one of W ranks, and has fallen since, to W times that). With float16, whose range is small, everything
    crosses again, not compressed, where the total weight is more than `NARROW` times, or less than 1 / `NARROW` of, the
    scale, where a sum is not finite (which is NaN or inf in the end only if it is without float16 too), and where the largest
    element is so small that float16 has fewer digits there (`NARROWEST`). Its gradients are therefore kept until the
    records have come.

    On an accelerator a rank does not read its weight, and so cannot withhold anything: its gradients are out of its hands when
    it reads the records. Where they do not fit (`UNREAD`; after weights that fall by less, elements below 1e-28 may lose
    digits), it has sent zeros and said so, and the call is an error on all ranks, after which the scale is the right one. A
    weight that is not what it must be (NOTE [weights that are not read] in ``_sums.py``) is NaN in the record, and an error on
    all ranks, too.

    With ``reduction="sum"`` there are no weights: gradients cross as they are.
"""

from __future__ import annotations

import math

from torch import Tensor

from gradacc._sync.wire import Plan

NARROW = 4.0
"""How far the total weight may be from the scale in float16."""

NARROWEST = 2.0**-14
"""The smallest element of which float16 keeps all digits."""

UNREAD = 2.0**32
"""How far a weight that is not read may be from the scale where gradients have the range of float32: beyond that the call is an
error, so not where weights of ordinary use may be."""


def scale(weight: float) -> float:
    """The power of two that is nearest."""
    if not weight or not math.isfinite(weight):
        return 1.0
    return 2.0 ** max(-1000, min(1000, round(math.log2(weight))))


def is_far(weight: float | Tensor, one: float, plan: Plan, world: int) -> bool | Tensor:
    """Whether gradients of so much weight would lose digits in this scale, whatever the others send.

    One of ``world`` ranks has a part of the total weight, which is small among many without anything having changed: where it
    is too small, that is of the average rank's.
    """
    if isinstance(weight, Tensor):
        ratio = weight / one
        limit = max(plan.limit, UNREAD)
        far: Tensor = (weight != 0) & ~((ratio * world >= 1.0 / limit) & (ratio <= limit))
        return far & (not plan.narrow)
    return bool(weight) and not plan.narrow and not 1.0 / (plan.limit * world) <= weight / one <= plan.limit


def is_wrong(weight: float, one: float) -> bool:
    """Whether this is no scale for float16."""
    return bool(weight) and not 1.0 / NARROW <= weight / one <= NARROW
