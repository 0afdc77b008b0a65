"""Micro-batches whose examples are in another order than the batch's, and the way back.

.. code-block:: text

    torch.cat(microbatches) = batch[order]                  where order is that of all micro-batches, one behind the other
    restored(torch.cat(outputs), order)[order] = torch.cat(outputs)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc._describe import describe

Order = tuple[int, ...]
"""Of one micro-batch: where each of its examples is in the batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Reordered:
    """Micro-batches of examples in another order than the batch's, as ``split=`` returns them: results are in the batch's.

    .. code-block:: text

        microbatches[i] = batch[order[i]]                   each example in exactly one of them

    `gradacc.accumulate` then returns what is concatenated of ``aux``, and `gradacc.microbatch` what is concatenated of its
    output (``out="concat"``), in the order of the batch, with derivatives. Each micro-batch must return one row for each of its
    examples. Sums and means have no order; ``out="stack"`` and reducers see micro-batches in the order in which they come.

    Arguments:
        microbatches: an iterable of micro-batches, read once, one at a time.
        order: for each micro-batch, the positions of its examples in the batch: sequences of ints, or integer tensors. All
            together they are 0, 1, … up to the number of examples, each once.

    Raises:
        TypeError: ``microbatches`` is not iterable; ``order`` is no sequence of sequences of ints.
        ValueError: an example is in no micro-batch, or in two. Later, in the call: as many micro-batches do not come as
            ``order`` has entries; one has another number of examples, or of rows in what is concatenated.

    Example:
        >>> import torch, gradacc
        >>> def longest_first(x):                                           # a split= of your own
        ...     order = x.count_nonzero(dim=1).argsort(descending=True).split(2)
        ...     return gradacc.data.Reordered([x[some] for some in order], order)
        >>> x = torch.tensor([[1, 0, 0], [2, 2, 2], [3, 3, 0]])
        >>> gradacc.microbatch(lambda x: x.sum(1), split=longest_first)(x)
        tensor([1, 6, 6])
    """

    microbatches: Iterable[Any]
    order: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if isinstance(self.microbatches, Tensor) or not hasattr(self.microbatches, "__iter__"):
            raise TypeError(f"Reordered: microbatches must be an iterable of them, got {describe(self.microbatches)}")
        try:
            items = [some.tolist() if isinstance(some, Tensor) else some for some in self.order]
            order = tuple(tuple(map(operator.index, some)) for some in items)
        except TypeError as error:
            raise TypeError(
                "Reordered: order must be a sequence with a sequence of ints for each micro-batch (the positions of its "
                f"examples in the batch), got {describe(self.order)}: {error}"
            ) from error
        found = sorted(place for some in order for place in some)
        if found != list(range(len(found))):
            wrong = next(n for n, place in enumerate(found) if place != n)
            which = (
                f"{found[wrong]} twice"
                if wrong and found[wrong] == found[wrong - 1]
                else f"{found[wrong]}, and not {wrong}"
            )
            raise ValueError(
                f"Reordered: order has {len(found)} positions, which must be 0 to {len(found) - 1}, each once; it has {which}. "
                "Each example of the batch is in exactly one micro-batch"
            )
        object.__setattr__(self, "order", order)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.microbatches)


def each(name: str, microbatches: Iterable[Any]) -> Iterator[tuple[Any, Order | None]]:
    """One micro-batch after the other; and its order, where they are not in the batch's."""
    if not isinstance(microbatches, Reordered):
        for microbatch in microbatches:
            yield microbatch, None
        return
    orders: list[Any] = list(microbatches.order)
    number = 0
    for microbatch in microbatches:
        if number < len(orders):
            yield microbatch, orders[number]
        number += 1
    if number != len(orders):
        raise ValueError(
            f"{name}: gradacc.data.Reordered has {number} micro-batches, and an order of {len(orders)}; give a sequence of "
            "positions for each micro-batch"
        )


def check_size(name: str, size: int | None, order: Order | None) -> None:
    """A micro-batch has as many examples as its order says; None where nothing says how many it has."""
    if order is not None and size is not None and size != len(order):
        raise ValueError(
            f"{name}: split put {len(order)} examples into a micro-batch whose tensors have size {size} along the dimension "
            "that in_dims says. Examples of gradacc.data.token_budget are along dim 0; in gradacc.data.Reordered give the "
            "position of each example"
        )


def check_rows(what: str, rows: Sequence[int], orders: Sequence[Order]) -> None:
    """Each micro-batch returned one row an example; ``what`` begins a message."""
    for own, order in zip(rows, orders, strict=True):
        if own != len(order):
            raise ValueError(
                f"{what} has {own} rows of a micro-batch of {len(order)} examples, and split took the examples out of their "
                "order, into which only one row an example can be brought back. Return one row an example, or reduce it (a "
                "gradacc.Mean)"
            )


def restored(tensor: Tensor, orders: Sequence[Order], dim: int = 0) -> Tensor:
    """What micro-batches returned, one behind the other along ``dim``, in the order of the batch."""
    inverse = [0] * sum(map(len, orders))
    for row, place in enumerate(place for order in orders for place in order):
        inverse[place] = row
    return taken(tensor, inverse, dim)


def taken(tensor: Tensor, places: Sequence[int], dim: int) -> Tensor:
    """The entries at these places, in their order: new memory."""
    return tensor.index_select(dim, torch.tensor(places, dtype=torch.int64).to(tensor.device, non_blocking=True))
