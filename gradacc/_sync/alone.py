"""The boundary where there is nobody on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradacc import _tree
from gradacc._sums import Sums


class Alone:
    """Everything is the union already."""

    crosses = overlaps = False

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype]) -> None:
        """Nobody asks."""

    def set_unit(self, unit: float | Tensor | None, weight: float | Tensor) -> None:
        """Nobody asks."""

    def deliver(self, index: int, grad: Tensor) -> None:
        """Nothing overlaps."""

    def cross(
        self, grads: list[Tensor | None], sums: Sums, arrived: bool, types: Callable[[Sums], Sums]
    ) -> tuple[list[Tensor | None], Sums, bool]:
        """What there is."""
        return grads, types(sums), arrived

    def fail(self, error: BaseException) -> None:
        """Nobody waits."""

    def done(self) -> None:
        """Nobody waits."""
