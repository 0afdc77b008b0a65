"""What a call meets at its end, and what that is where there is nobody on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc import _shard as shards
from gradacc import _tree
from gradacc._rows import Homes
from gradacc._sums import Sums
from gradacc._sync.gather import Gather


class Boundary:
    """What a call meets at its end. Here everything is the union already, and nobody asks or waits."""

    crosses = False
    """Whether there is anybody on the other side."""
    overlaps = False
    """Whether gradients are to be delivered before `cross`."""
    gather: Gather | None = None
    """Of the rows of all ranks, where the loss is of the whole batch."""

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype], batch: Any) -> None:
        """Say what is differentiated, and what the batch is, as soon as it is known."""

    def set_unit(self, unit: float | Tensor | None, weight: float | Tensor) -> None:
        """Say in which unit this rank's gradients are, and how much they count for, before the first one is delivered."""

    def deliver(self, index: int, grad: Tensor) -> None:
        """A gradient that is final."""

    def cross(
        self, grads: list[Tensor | None], sums: Sums, arrived: bool, types: Callable[[Sums], Sums]
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """The union's gradients (in the unit of the returned sums), sums, and whether any rank's loss reached its parameters.

        Takes the gradients out of ``grads``. ``types`` gives sums that have seen nothing their types.
        """
        return grads, types(sums), arrived

    def returned(self, results: list[Tensor]) -> list[Any]:
        """What a call returns in the place of the gradients of its parameters: themselves, or this rank's parts of them."""
        return results

    def fail(self, error: BaseException) -> None:
        """This rank's call raises."""

    def done(self) -> None:
        """It returns what it is to return."""


class Alone(Boundary):
    """Of a rank that is all there is."""

    def __init__(self, parts: bool, homes: Homes) -> None:
        self._parts = parts
        """Whether this rank is to have its part of every gradient: the whole."""
        self._homes = homes

    def returned(self, results: list[Tensor]) -> list[Any]:
        if not self._parts:
            return results
        homes = self._homes or [None] * len(results)
        return [
            shards.of_whole(result) if home is None else home.dtensor(result.reshape(-1))
            for result, home in zip(results, homes, strict=True)
        ]
