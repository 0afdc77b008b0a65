"""While Dynamo traces: a run of micro-batches of one size as one `scan`, so that the graph does not grow with their number.

.. code-block:: text

    state, each = scan(step, zeros, all micro-batches of the run, stacked)

The carry is the buffer and everything else that is summed and is a tensor. What is a Python number (a number of examples) is
the same for every micro-batch of a run: it advances by what the first one added.

NOTE [one copy of the loss]
    What the state is (which numbers are tensors, what aux has) only a micro-batch can say, so the first one is traced outside
    the loop too, for that and for the unit of the weights. (Where there can be no loop, the others follow it: NOTE [what cannot
    be a loop].) The rest is removed as dead code, and what is compiled is one copy of the loss. Starting the scan from its
    results instead saves filling the accumulators with zeros, and doubles the time to compile. (A loss that draws random
    numbers draws them once more for every run of micro-batches of one size: dead draws are not removed. And a weight that
    comes out of the forward pass keeps the first one's alive.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradacc import _fold
from gradacc._engines.attempt import attempt
from gradacc._engines.functional import Buffer
from gradacc._split import Cut, Microbatch, Run

Step = Callable[[Buffer, _fold.Sums, Microbatch], tuple[Buffer, _fold.Sums]]

UNROLLED = 4
"""Micro-batches of a run up to which the loop is unrolled: an unrolled one needs no zeros, and fuses across micro-batches."""


def fold(name: str, step: Step, buffer: Buffer, sums: _fold.Sums, cut: Cut) -> tuple[Buffer, _fold.Sums]:
    """``for microbatch in cut: buffer, sums = step(buffer, sums, microbatch)``."""
    loops = (
        torch.compiler.is_dynamo_compiling()
    )  # not so in torch.export(strict=False), where scan cannot trace its body
    for run in cut.runs:
        start = buffer, sums
        buffer, sums = step(*start, cut.at(run.offset, run.size))
        rest = functools.partial(_unrolled, step, buffer, sums, cut, run)
        if run.repeats <= UNROLLED or not loops:
            buffer, sums = rest()
        else:
            whole = functools.partial(_scan, step, *start, buffer, sums, cut, run)
            (buffer, sums), loops = attempt(whole, rest, f"{name}: {_UNROLLING}")
    return buffer, sums


_UNROLLING = (
    "the loss cannot be traced as the body of a loop, so the compiled graph holds every micro-batch, and the time to compile "
    "it grows with their number"
)


def _unrolled(step: Step, buffer: Buffer, sums: _fold.Sums, cut: Cut, run: Run) -> tuple[Buffer, _fold.Sums]:
    """The run's micro-batches after the first one."""
    for i in range(1, run.repeats):
        buffer, sums = step(buffer, sums, cut.at(run.offset + i * run.size, run.size))
    return buffer, sums


def _scan(
    step: Step, buffer: Buffer, before: _fold.Sums, seen: Buffer, sums: _fold.Sums, cut: Cut, run: Run
) -> tuple[Buffer, _fold.Sums]:
    """The whole run, from ``buffer`` and ``before``; ``seen`` and ``sums``: after its first micro-batch."""
    from torch._higher_order_ops.scan import scan

    tail: list[Any] = [part if not isinstance(part, list) else [] for part in sums.aux or ()]
    template = sums._replace(aux=tail)
    numbers = [*_fold.numbers(sums), sums.weight]
    is_tensor = [isinstance(number, Tensor) for number in numbers]

    def state(carry: list[Tensor]) -> tuple[Buffer, _fold.Sums]:
        left = iter(carry)
        grads = [next(left) for _ in buffer.grads]
        *own, weight = [next(left) if tensor else 0 for tensor in is_tensor]
        return seen._replace(grads=grads), _fold.with_numbers(template, own)._replace(weight=weight)

    def body(carry: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        after, summed = step(*state(carry), cut.unstacked(tensors, run.size))
        found = [*_fold.numbers(summed), summed.weight]
        kept = [number for number, tensor in zip(found, is_tensor, strict=True) if tensor]
        each = [part[0].clone() for part in summed.aux or () if isinstance(part, list)]
        return [*after.grads, *kept], each  # no gradient is None: torch.func returns zeros

    first = [*_fold.numbers(before), before.weight] if before.kind is not None else [0] * len(numbers)
    start = [
        torch.zeros_like(param, dtype=dtype) if grad is None else grad.clone()  # dense: a sum's gradient is expanded
        for param, dtype, grad in zip(buffer.params, buffer.dtypes, buffer.grads, strict=True)
    ]
    start += [
        old if isinstance(old, Tensor) else _number(number, old)
        for old, number in zip(first, numbers, strict=True)
        if isinstance(number, Tensor)
    ]
    carry, each = scan(body, start, cut.stacked(run))
    buffer, summed = state(carry)
    total = [
        new if tensor else old + (number - old) * run.repeats
        for new, number, old, tensor in zip(
            [*_fold.numbers(summed), summed.weight], numbers, first, is_tensor, strict=True
        )
    ]
    summed = _fold.with_numbers(summed, total[:-1])._replace(weight=total[-1])
    ends = iter(each)
    aux = [
        [*part[:-1], next(ends).flatten(0, 1)] if isinstance(part, list) else new
        for part, new in zip(sums.aux or (), summed.aux or (), strict=True)
    ]
    return buffer, summed._replace(aux=aux)


def _number(like: Tensor, value: float) -> Tensor:
    zero = torch.zeros_like(like)
    return (zero + value).to(like.dtype) if value else zero
