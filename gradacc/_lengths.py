"""Of how many micro-batches the lists were for which a ``grad_fn`` has been compiled.

NOTE [lists in a graph]
    To Dynamo the tensors of a list are inputs, each for itself, and its length is a part of the graph: of every other number of
    micro-batches it makes another one, until it gives up. Nothing that is traced can change that. (Where we cut one batch
    the number of micro-batches is symbolic, see ``_engines/compiled/loop.py``.) So at the third number there is a warning: a
    last window that is shorter makes two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gradacc import _batch

T = TypeVar("T")

_MANY = 3


def lengths(name: str) -> Callable[[int], None]:
    """``note(number)`` for one ``grad_fn``: called while Dynamo traces, it warns of the third number."""
    seen: list[int] = []

    def note(number: int) -> None:
        if number in seen:
            return
        seen.append(number)
        if len(seen) == _MANY:
            first, second, third = sorted(seen)
            _batch.warn(
                f"{name}: compiled for lists of {first}, {second} and {third} micro-batches. Each number of micro-batches is a "
                "graph of its own, and after 8 of them (torch.compile's recompile_limit) torch raises with fullgraph=True, and "
                "without it no longer compiles. accumulate(torch.compile(loss_fn)) compiles one micro-batch, for any number of "
                "them. Micro-batches of one size can be concatenated to one batch and cut with microbatch_size=, which is two "
                "graphs for any number"
            )

    mark: Any = note
    # As in torch.compiler.assume_constant_result, which imports Dynamo.
    mark._dynamo_marked_constant = True
    return note


def counting(parts: Iterable[T], note: Callable[[int], None]) -> Iterator[T]:
    """The same, one after the other as they are asked for; their number is noted at the end."""
    number = 0
    for part in parts:
        number += 1
        yield part
    note(number)
