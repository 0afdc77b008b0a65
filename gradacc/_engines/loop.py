"""While Dynamo traces: a run of micro-batches of one size as one `scan`, so that the graph does not grow with their number.

.. code-block:: text

    state = step(state, first micro-batch)          # outside: it says what the state is, and nothing is filled with zeros
    state, each = scan(step, state, the others, stacked)

The carry is the buffer and everything else that is summed and is a tensor. What is a Python number (a number of examples) is
the same for every micro-batch of a run: it advances by what the first one added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradacc import _fold
from gradacc._engines.functional import Buffer
from gradacc._split import Cut, Microbatch, Run

Step = Callable[[Buffer, _fold.Sums, Microbatch], tuple[Buffer, _fold.Sums]]

UNROLLED = 4
"""Micro-batches of a run up to which the loop is unrolled: a scan's carry costs a copy of the buffer in every iteration."""


def fold(step: Step, buffer: Buffer, sums: _fold.Sums, cut: Cut) -> tuple[Buffer, _fold.Sums]:
    """``for microbatch in cut: buffer, sums = step(buffer, sums, microbatch)``."""
    for run in cut.runs:
        if run.repeats <= UNROLLED:
            for i in range(run.repeats):
                buffer, sums = step(buffer, sums, cut.at(run.offset + i * run.size, run.size))
        else:
            buffer, sums = _scan(step, buffer, sums, cut, run)
    return buffer, sums


def _scan(step: Step, buffer: Buffer, before: _fold.Sums, cut: Cut, run: Run) -> tuple[Buffer, _fold.Sums]:
    from torch._higher_order_ops.scan import scan

    buffer, sums = step(buffer, before, cut.at(run.offset, run.size))
    rest = run._replace(offset=run.offset + run.size, repeats=run.repeats - 1)
    tail: list[Any] = [part if not isinstance(part, list) else [] for part in sums.aux or ()]
    template = sums._replace(aux=tail)
    numbers = [*_fold.numbers(sums), sums.weight]
    is_tensor = [isinstance(number, Tensor) for number in numbers]

    def state(carry: list[Tensor]) -> tuple[Buffer, _fold.Sums]:
        left = iter(carry)
        grads = [next(left) for _ in buffer.grads]
        *own, weight = [next(left) if tensor else 0 for tensor in is_tensor]
        return buffer._replace(grads=grads), _fold.with_numbers(template, own)._replace(weight=weight)

    def body(carry: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        after, summed = step(*state(carry), cut.unstacked(tensors, run.size))
        found = [*_fold.numbers(summed), summed.weight]
        kept = [number for number, tensor in zip(found, is_tensor, strict=True) if tensor]
        each = [part[0].clone() for part in summed.aux or () if isinstance(part, list)]
        return [*after.grads, *kept], each  # no gradient is None: torch.func returns zeros

    start = [*buffer.grads, *(number for number in numbers if isinstance(number, Tensor))]
    carry, each = scan(body, start, cut.stacked(rest))
    buffer, summed = state(carry)
    first = [*_fold.numbers(before), before.weight] if before.kind is not None else [0] * len(numbers)
    total = [
        new if tensor else number + (number - old) * rest.repeats
        for new, number, old, tensor in zip(
            [*_fold.numbers(summed), summed.weight], numbers, first, is_tensor, strict=True
        )
    ]
    summed = _fold.with_numbers(summed, total[:-1])._replace(weight=total[-1])
    ends = iter(each)
    aux = [
        [*part, next(ends).flatten(0, 1)] if isinstance(part, list) else new
        for part, new in zip(sums.aux or (), summed.aux or (), strict=True)
    ]
    return buffer, summed._replace(aux=aux)
