"""`Mean`: the monoid element that everything is a fold of.

NOTE [one sum, two meanings]
    ``a + b`` of two `Mean`s pools them: the mean of both together. It has to, since that is what micro-batches, ranks and
    states are combined by. In a loss it looks like something else, ``a.value + b.value``: the usual loss of a detector or of
    several tasks, where each is a mean over something of its own. Both are plausible there (a mean that is computed in chunks
    is pooled), and nothing in the numbers tells them apart; so a `Mean` knows that it was made by ``+``, and as a loss is
    refused until the caller has said which is meant (torch's tree maps and `torch.vmap` keep that). Everything else that would
    be arithmetic of values is refused at once.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NoReturn

from torch import Tensor

from gradacc import _tree
from gradacc._describe import describe

SEVERAL_MEANS = (
    "The sum of several means is not available as a loss in this version. What works: count what each is a mean of over the "
    "whole batch, first; pass the counts as further arguments; and return total_1 / count_1 + total_2 / count_2, with "
    "reduction='sum' (help(gradacc.Mean) has an example)"
)
"""For messages, wherever a loss looks like one."""


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A mean that has not been divided yet: ``value = total / weight``, and ``a + b`` is the mean of both together.

    .. code-block:: text

        Mean(t1, w1) + Mean(t2, w2) = Mean(t1 + t2, w1 + w2)       an Abelian monoid with Mean(0, 0) as identity

    A loss whose mean is over something other than examples (tokens, pixels, edges) returns one, so that micro-batches
    with different numbers of them are weighted right. As a leaf of ``aux``, ``total`` and ``weight`` may have any shapes
    that broadcast (an accuracy per class, say), the same in every micro-batch. It is a pytree node, to optree in our namespace
    and to torch.

    Arguments:
        total: the sum. For a loss: a 0-dim floating tensor that depends on the parameters.
        weight: what the sum is divided by, ``>= 0``: a number (of Python, NumPy, ``Fraction``, ``Decimal``), or a 0-dim tensor,
            counted from the data (it must not depend on the parameters: the gradient of ``total / weight`` would have a second
            term). It is best left where it was counted: on an accelerator it is not read, which would wait for the device.

    Raises:
        TypeError: arithmetic other than the sum of two `Mean`s, comparisons, ``float(mean)``, a format: a result's ``value`` is
            a tensor, of which there are these. In a loss, a factor and a penalty go into the total:
            ``Mean(5.0 * total, weight)``, ``Mean(total + weight * penalty, weight)``.

    Example:
        >>> import torch, gradacc
        >>> a = gradacc.Mean(torch.tensor(6.0), 2) + gradacc.Mean(torch.tensor(3.0), 1)
        >>> a.value
        tensor(3.)

    Several means: the sum of a mean over one thing and a mean over another (a detector's classes and boxes, two tasks) is not
    their ``+``, and a loss that returns that is an error. Count first, over the whole batch, and add up what is divided by the
    counts (a batch without boxes would divide by 0; ``clamp(min=1)`` makes the mean of nothing 0):

        >>> import torch.nn.functional as F
        >>> def loss_fn(params, batch, num_labels, num_boxes):
        ...     logits, boxes = batch["x"] @ params["class"], batch["x"] @ params["box"]
        ...     classes = F.cross_entropy(logits, batch["label"], reduction="sum", ignore_index=-100)
        ...     offsets = ((boxes - batch["box"]).abs().sum(1) * batch["has_box"]).sum()
        ...     return classes / num_labels + 5.0 * offsets / num_boxes
        >>> params = {"class": torch.ones(4, 3), "box": torch.ones(4, 2)}
        >>> batch = {
        ...     "x": torch.arange(24.0).view(6, 4).cos(), "label": torch.tensor([0, 2, -100, 1, -100, 2]),
        ...     "box": torch.zeros(6, 2), "has_box": torch.tensor([1, 0, 0, 1, 0, 0]),
        ... }
        >>> num_labels, num_boxes = (batch["label"] != -100).sum(), batch["has_box"].sum().clamp(min=1)
        >>> grad_fn = gradacc.accumulate_and_value(loss_fn, steps=3, reduction="sum")
        >>> actual = grad_fn(params, batch, num_labels, num_boxes)
        >>> torch.testing.assert_close(actual, torch.func.grad_and_value(loss_fn)(params, batch, num_labels, num_boxes))

    Between ranks the counts are those of all ranks: one ``all_reduce`` of them before.
    """

    total: Tensor
    weight: Tensor | float
    _pooled: bool = field(default=False, init=False, repr=False)
    """Whether ``+`` made it: NOTE [one sum, two meanings]."""

    @property
    def value(self) -> Tensor:
        """``total / weight``; NaN where both are zero: the mean of nothing."""
        return self.total / self.weight

    def __add__(self, other: Mean) -> Mean:
        if not isinstance(other, Mean):
            _refuse_sum(other)
        both = Mean(self.total + other.total, self.weight + other.weight)
        object.__setattr__(both, "_pooled", True)
        return both

    def __radd__(self, other: int) -> Mean:
        if isinstance(other, int) and other == 0:  # what `sum(means)` starts from
            return self
        _refuse_sum(other)

    def __mul__(self, other: object) -> NoReturn:
        _refuse(f"a Mean times {describe(other)}", "Mean(factor * mean.total, mean.weight)")

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> NoReturn:
        _refuse(f"a Mean divided by {describe(other)}", "Mean(mean.total / divisor, mean.weight)")

    def __rtruediv__(self, other: object) -> NoReturn:
        _refuse(f"{describe(other)} divided by a Mean", _VALUE)

    def __neg__(self) -> NoReturn:
        _refuse("minus a Mean", "Mean(-mean.total, mean.weight)")

    def __sub__(self, other: object) -> NoReturn:
        _refuse(f"a Mean minus {describe(other)}", _TERM)

    __rsub__ = __sub__

    def __pow__(self, other: object) -> NoReturn:
        _refuse(f"a power of a Mean ({describe(other)})", _VALUE)

    __rpow__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __matmul__ = __rmatmul__ = __pow__

    def __abs__(self) -> NoReturn:
        _refuse("the absolute value of a Mean", _VALUE)

    def __lt__(self, other: object) -> NoReturn:
        _refuse(f"a comparison of a Mean with {describe(other)}", _VALUE)

    __le__ = __gt__ = __ge__ = __lt__

    def __float__(self) -> NoReturn:
        _refuse("a Mean as a number", _VALUE)

    __int__ = __complex__ = __float__

    def __round__(self, digits: int | None = None) -> NoReturn:
        _refuse("a rounded Mean", _VALUE)

    def __format__(self, spec: str) -> str:
        if spec:
            _refuse(f"a Mean formatted as {spec!r}", _VALUE)
        return str(self)

    def __getattr__(self, name: str) -> NoReturn:
        if hasattr(Tensor, name) and not name.startswith("_"):
            raise AttributeError(f"a gradacc.Mean has no {name!r}; its quotient, mean.value, is a tensor and has it")
        raise AttributeError(f"'Mean' object has no attribute {name!r}")


_VALUE = "mean.value, if the quotient is meant (of a result; within a loss it is the micro-batch's alone)"
_TERM = "Mean(mean.total + mean.weight * term, mean.weight) for a term that is no mean"


def _refuse_sum(other: object) -> NoReturn:
    _refuse(f"a Mean plus {describe(other)}", _TERM)


def _refuse(what: str, instead: str) -> NoReturn:
    raise TypeError(
        f"gradacc.Mean: {what} is not available in this version; a Mean is a total that has not been divided, and only the "
        f"sum of two is defined (the mean of both together). Write {instead}. {SEVERAL_MEANS}"
    )


def are_means(value: Any) -> bool:
    """Whether it is a tuple, list or dict of several `Mean`s, and nothing else."""
    items = list(value.values()) if isinstance(value, dict) else value
    return isinstance(items, (tuple, list)) and len(items) > 1 and all(isinstance(item, Mean) for item in items)


def with_plain_weight(mean: Mean) -> Mean:
    """The same, with a weight that is a number as Python's int or float; one that is neither a number nor a tensor stays."""
    weight: Any = mean.weight
    if isinstance(weight, Tensor) or type(weight) is float or (type(weight) is int and -_EXACT < weight < _EXACT):
        return mean
    if type(weight).__module__ == "numpy" and getattr(weight, "ndim", None) == 0:
        weight = weight.item()
    if isinstance(weight, numbers.Integral) and -_EXACT < int(weight) < _EXACT:
        return Mean(mean.total, int(weight))
    if isinstance(weight, (numbers.Real, Decimal)):
        try:
            return Mean(mean.total, float(weight))
        except OverflowError:
            return Mean(mean.total, float("inf"))
    return mean


_EXACT = 2**53
"""Integers below this are exact in float64, and some thousand of them add up in int64; larger ones are taken as floats."""


_tree.register(Mean, lambda mean: (mean.total, mean.weight), ("total", "weight"), mark="_pooled")
