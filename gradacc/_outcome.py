"""What one call of ``loss_fn`` gave, in the one shape that the engines and the fold know."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gradacc import _tree
from gradacc._aux import Aux
from gradacc._mean import Mean


class Contribution(NamedTuple):
    """``buffer = growth * buffer + cotangent * share * gradient``; NOTE [cotangents and shares] in ``_fold.py``.

    Without defaults: with ``dynamic=True`` Dynamo holds a float that is one symbolic.
    """

    cotangent: float | Tensor
    """Goes through the backward pass."""

    share: float | Tensor
    """Of this micro-batch."""

    growth: float | Tensor
    """Not 1 where the unit has grown; NOTE [units] in ``_units.py``."""

    keeps: Tensor | None
    """Where the weight is not read, whether it is not 0: else nothing is added, whatever the gradient says."""


class Outcome(NamedTuple):
    """One micro-batch's loss."""

    target: Tensor
    """0-dim, floating: what is differentiated. The loss, or the total of a `Mean`."""

    value: Tensor | Mean
    """As ``loss_fn`` returned it."""

    weight: float | Tensor | None
    """What its mean is over: the number of examples, or the weight of a `Mean`. A tensor where its value cannot be read,
    None where nothing says it (then the loss is a sum)."""

    aux: Aux

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order in which `map` visits them."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def map(self, func: Callable[[Tensor], Tensor]) -> Outcome:
        """The same with ``func`` of every tensor."""
        target, value, weight, aux = _tree.map_tensors(func, (self.target, self.value, self.weight, self.aux.leaves))
        return Outcome(target, value, weight, self.aux._replace(leaves=aux))
