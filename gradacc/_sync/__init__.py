"""The boundary: what crosses between ranks, once a call.

`gradacc.all_reduce` is a value that says how; a call does this with it:

.. code-block:: text

    boundary = connect(...)
    boundary.bind(params, ...)
    buffer, sums = fold(...)                    # on each rank by itself; boundary.fail(error) where it raises
    grads, sums = boundary.cross(buffer, sums)  # the union's
    boundary.done()                             # it was divided, and is returned

It is `Alone` where there is nobody to talk to, a `Link` to the other ranks, or `Traced` into a graph.

NOTE [one collective]
    Gradients, and beside them a *record* of everything that is not one (weight, value, scalar metrics, whether this rank
    failed), are packed into one tensor per accumulator dtype and device, and cross together, in one of the ways of
    ``crossing.py``, NOTE [ways]. A record is cut into bytes, so that it is exact although it rides among floats. Where the
    backend sums them (`SUMMED`, `REDUCED`), each rank writes its own into a slot of its own, where every other rank adds zeros;
    elsewhere the records of all ranks arrive side by side. All ranks then do the same arithmetic with the same records, in
    float64.

NOTE [agreement]
    To pack alike, ranks must know alike what there is to pack; a rank without a micro-batch has not even seen what the loss
    returns. So at first use (of a ``grad_fn``, with parameters of this structure, in this group) they exchange descriptions,
    and compare them. Later calls rely on it. Ranks must therefore make the same calls in the same order; what happens where
    they do not is told in ``channel.py``, NOTE [turns].

NOTE [failing together]
    A rank that raises takes part in the collective all the same, with a record that says so, and then raises its own error;
    the others raise one that names it. Nobody waits, and nobody is a collective ahead of the others afterwards. Where it
    cannot wait for them (a KeyboardInterrupt), it does so at the beginning of its next call. What later calls rely on (the
    channel, agreements, scales) changes only by what all ranks have read in the same records, when all of them went through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradacc import _shard as shards
from gradacc import _tree, _where
from gradacc._options import Options
from gradacc._reduce_scatter import ReduceScatter
from gradacc._rows import Homes
from gradacc._sums import Sums
from gradacc._sync import group as groups
from gradacc._sync.agreement import Agreed as Agreed
from gradacc._sync.gather import Gather as Gather
from gradacc._sync.link import Link
from gradacc._sync.traced import Traced
from gradacc._sync.whole import whole as whole


class Boundary(Protocol):
    """What a call meets at its end."""

    @property
    def crosses(self) -> bool:
        """Whether there is anybody on the other side."""

    @property
    def overlaps(self) -> bool:
        """Whether gradients are to be delivered before `cross`."""

    @property
    def gather(self) -> Gather | None:
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

    def returned(self, results: list[Tensor]) -> list[Any]:
        """What a call returns in the place of the gradients of its parameters: themselves, or this rank's parts of them."""

    def fail(self, error: BaseException) -> None:
        """This rank's call raises."""

    def done(self) -> None:
        """It returns what it is to return."""


class Alone:
    """Everything is the union already."""

    crosses = overlaps = False
    gather = None

    def __init__(self, parts: bool, homes: Homes) -> None:
        self._parts = parts
        """Whether this rank is to have its part of every gradient: the whole."""
        self._homes = homes

    def bind(self, params: Sequence[Tensor], treedef: _tree.TreeDef, dtypes: Sequence[torch.dtype], batch: Any) -> None:
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

    def returned(self, results: list[Tensor]) -> list[Any]:
        """All of them."""
        if not self._parts:
            return results
        homes = self._homes or [None] * len(results)
        return [
            shards.of_whole(result) if home is None else home.dtensor(result.reshape(-1))
            for result, home in zip(results, homes, strict=True)
        ]

    def fail(self, error: BaseException) -> None:
        """Nobody waits."""

    def done(self) -> None:
        """Nobody waits."""


def connect(options: Options, agreed: Agreed | None, homes: Homes = ()) -> Boundary:
    """The boundary of one call; ``homes``: how its parameters were divided before it."""
    parts = isinstance(options.sync, ReduceScatter)
    if options.sync is None or agreed is None:
        return Alone(parts, homes)
    group = groups.resolve(options.name, options.sync.group)
    if group is None:
        return Alone(parts, homes)
    if _where.loops():
        if options.through is not None:
            raise NotImplementedError(
                f"{options.name}: through= with sync= in a compiled function is not available; compile loss_fn and the "
                "encoder, and call grad_fn outside"
            )
        return Traced(options, group)
    if _where.transforming():
        raise NotImplementedError(
            f"{options.name}: sync= inside a functorch transform or another grad_fn's loss is not available in "
            "this version; call it outside, or leave sync out"
        )
    if agreed.begun.apart:
        raise RuntimeError(
            f"{options.name}: an earlier finalize has found that ranks of {groups.named(group)} are in different windows. Make "
            "another accumulator on every rank, and go on from the same place"
        )
    link = Link(options, group, agreed, homes)
    link.begin()
    return link
