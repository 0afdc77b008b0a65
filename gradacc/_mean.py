"""`Mean`: the monoid element that everything is a fold of.

NOTE [one sum, two meanings]
    ``a + b`` of two `Mean`s pools them: the mean of both together. It has to, since that is what micro-batches, ranks and
    states are combined by. In a loss it looks like something else, ``a.value + b.value``: the usual loss of a detector or of
    several tasks, where each is a mean over something of its own. Both are plausible there (a mean that is computed in chunks
    is pooled), and nothing in the numbers tells them apart; so a `Mean` knows that it was made by ``+``, and as a loss is
    refused until the caller has said which is meant (torch's tree maps and `torch.vmap` keep that): a tuple, list or dict of
    `Mean`s is the sum of their values. A factor has one meaning, whichever of the two sums is meant. Everything else that would
    be arithmetic of values is refused at once.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradacc import _tree
from gradacc._describe import describe

SEVERAL_MEANS = (
    "Where the sum of several means is meant, a.value + 5.0 * b.value, return them as a tuple, list or dict: (a, 5.0 * b). "
    "Each is divided by its own weight"
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
        TypeError: arithmetic other than the sum of two `Mean`s and a factor (``5.0 * mean``, ``mean / 2``, ``-mean``: of the
            value, and so of the total), comparisons, ``float(mean)``, a format: a result's ``value`` is a tensor, of which
            there are these. In a loss, a penalty goes into the total: ``Mean(total + weight * penalty, weight)``.

    Example:
        >>> import torch, gradacc
        >>> a = gradacc.Mean(torch.tensor(6.0), 2) + gradacc.Mean(torch.tensor(3.0), 1)
        >>> a.value
        tensor(3.)

    Several means: the sum of a mean over one thing and a mean over another (a detector's classes and boxes, two tasks) is not
    their ``+``, and a loss that returns that is an error. Return them in a tuple, list or dict; the value is one like it:

        >>> import torch.nn.functional as F
        >>> def loss_fn(params, batch):
        ...     logits, boxes = batch["x"] @ params["class"], batch["x"] @ params["box"]
        ...     classes = F.cross_entropy(logits, batch["label"], reduction="sum", ignore_index=-100)
        ...     offsets = ((boxes - batch["box"]).abs().sum(1) * batch["has_box"]).sum()
        ...     return {
        ...         "class": gradacc.Mean(classes, (batch["label"] != -100).sum()),
        ...         "box": 5.0 * gradacc.Mean(offsets, batch["has_box"].sum()),
        ...     }
        >>> params = {"class": torch.ones(4, 3), "box": torch.ones(4, 2)}
        >>> batch = {
        ...     "x": torch.arange(24.0).view(6, 4).cos(), "label": torch.tensor([0, 2, -100, 1, -100, 2]),
        ...     "box": torch.zeros(6, 2), "has_box": torch.tensor([1, 0, 0, 1, 0, 0]),
        ... }
        >>> grads, value = gradacc.accumulate_and_value(loss_fn, steps=3)(params, batch)
        >>> def whole(params):
        ...     loss = loss_fn(params, batch)
        ...     return loss["class"].value + loss["box"].value
        >>> expected = torch.func.grad_and_value(whole)(params)
        >>> torch.testing.assert_close((grads, value["class"].value + value["box"].value), expected)

    ``docs/batches.md`` says what that costs, and how to count the weights first (``weights=``), which costs nothing.
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
        return as_pooled(Mean(self.total + other.total, self.weight + other.weight))

    def __radd__(self, other: int) -> Mean:
        if isinstance(other, int) and other == 0:  # what `sum(means)` starts from
            return self
        _refuse_sum(other)

    __array_ufunc__ = None  # NumPy's numbers leave arithmetic to what follows

    def __mul__(self, factor: object) -> Mean:
        return self._scaled(operator.mul, factor, "times")

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Mean:
        return self._scaled(operator.truediv, divisor, "divided by")

    def _scaled(self, func: Callable[[Any, Any], Any], number: object, words: str) -> Mean:
        """Its value ``func(value, number)``, of the same weight; a sum of two stays one."""
        factor: Any = number
        if isinstance(number, (Fraction, Decimal)):
            factor = float(number)
        if not isinstance(factor, numbers.Real) and not (isinstance(factor, Tensor) and factor.ndim == 0):
            _refuse(f"a Mean {words} {describe(number)}", "it with a number or a 0-dim tensor")
        scaled = Mean(func(self.total, factor), self.weight)
        return as_pooled(scaled) if self._pooled else scaled

    def __rtruediv__(self, other: object) -> NoReturn:
        _refuse(f"{describe(other)} divided by a Mean", _VALUE)

    def __neg__(self) -> Mean:
        return self * -1

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
        f"gradacc.Mean: {what} is not defined; a Mean is a total that has not been divided, which has factors and the sum "
        f"of two (the mean of both together). Write {instead}. {SEVERAL_MEANS}"
    )


def are_means(value: Any, some: bool = False) -> bool:
    """Whether it is a tuple, list or dict of `Mean`s, a loss that is the sum of several; or whether ``some`` of it are."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(items, (tuple, list)) or not items:
        return False
    return (any if some else all)([isinstance(item, Mean) for item in items])


def flatten(value: Any) -> tuple[list[Any], _tree.TreeDef]:
    """Leaves, of which a `Mean` is one, and structure."""
    return _tree.flatten(value, lambda leaf: isinstance(leaf, Mean))


def value_of(value: Any) -> Tensor:
    """What a loss or a result stands for: a tensor, the quotient of a `Mean`, of several the sum of their quotients.

    In that sum one of weight 0 counts for nothing, as in the gradient.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mean):
        return value.value
    quotients = [_quotient_or_zero(mean) for mean in flatten(value)[0]]
    return functools.reduce(operator.add, quotients)


def _quotient_or_zero(mean: Mean) -> Tensor:
    if not isinstance(mean.weight, Tensor):
        return mean.total / mean.weight if mean.weight else torch.zeros_like(mean.total)
    nothing = mean.weight == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, mean.total) / torch.where(nothing, 1, mean.weight))


def as_pooled(mean: Mean) -> Mean:
    """A new mean, marked as made by ``+``: NOTE [one sum, two meanings]."""
    object.__setattr__(mean, "_pooled", True)
    return mean


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
