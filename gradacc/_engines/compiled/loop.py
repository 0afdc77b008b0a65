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
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gradacc import _sums
from gradacc._engines import Buffer
from gradacc._engines.compiled.attempt import attempt
from gradacc._split import Cut, Microbatch, Run
from gradacc._sums import Sums

State = tuple[Buffer, Sums]
Step = Callable[[Buffer, Sums, Microbatch], State]

UNROLLED = 4
"""Micro-batches of a run up to which the loop is unrolled: an unrolled one needs no zeros, and fuses across micro-batches.

A symbolic number of them, where batches are of several sizes, is a loop however small: unrolled it would be fixed.
"""


def run(name: str, step: Step, buffer: Buffer, sums: Sums, cut: Cut) -> tuple[Buffer, Sums]:
    """``for microbatch in cut: buffer, sums = step(buffer, sums, microbatch)``."""
    # Not so in torch.export(strict=False), where scan cannot trace its body.
    loops = torch.compiler.is_dynamo_compiling()
    for run in cut.runs:
        start = buffer, sums
        buffer, sums = step(*start, cut.at(run.offset, run.size))
        rest = functools.partial(_unrolled, step, buffer, sums, cut, run)
        if statically_known_true(run.repeats <= UNROLLED) or not loops:
            buffer, sums = rest()
        else:
            whole = functools.partial(_scan, step, start, (buffer, sums), cut, run)
            (buffer, sums), loops = attempt(whole, rest, f"{name}: {_UNROLLING}")
    return buffer, sums


_UNROLLING = (
    "the loss cannot be traced as the body of a loop, so the compiled graph holds every micro-batch, and the time to compile "
    "it grows with their number"
)


def _unrolled(step: Step, buffer: Buffer, sums: Sums, cut: Cut, run: Run) -> tuple[Buffer, Sums]:
    """The run's micro-batches after the first one."""
    for i in range(1, run.repeats):
        buffer, sums = step(buffer, sums, cut.at(run.offset + i * run.size, run.size))
    return buffer, sums


def _scan(step: Step, start: State, seen: State, cut: Cut, run: Run) -> State:
    """The whole run, from ``start``; ``seen``: what was there after its first micro-batch."""
    from torch._higher_order_ops.scan import scan

    (buffer, before), (after, sums) = start, seen
    numbers, rest, pieces = _sums.numbers(sums)
    numbers.append(sums.weight)
    is_tensor = [isinstance(number, Tensor) for number in numbers]

    def state(carry: list[Tensor]) -> State:
        left = iter(carry)
        grads: list[Tensor | None] = [next(left) for _ in after.grads]
        *own, weight = [next(left) if tensor else 0 for tensor in is_tensor]
        return after._replace(grads=grads), _sums.with_numbers(rest, own, [[] for _ in pieces], weight, sums.unit)

    def body(carry: list[Tensor], tensors: list[Tensor]) -> tuple[list[Any], list[Tensor]]:
        after, summed = step(*state(carry), cut.unstacked(tensors, run.size))
        found, _, each = _sums.numbers(summed)
        kept = [number for number, tensor in zip([*found, summed.weight], is_tensor, strict=True) if tensor]
        # No gradient is None: torch.func returns zeros.
        return [*after.grads, *kept], [piece[0].clone() for piece in each]

    first = [*_sums.numbers(before)[0], before.weight]
    if before.value is None:
        # What there is before the first micro-batch is the carry.
        first = [0] * (len(numbers) - len(first)) + [*first[:-1], 0]
    number = len(buffer.params)
    targets = len(after.grads) // number
    zeros: list[Tensor] = [
        # Dense: a sum's gradient is expanded.
        torch.zeros_like(buffer.params[i % number], dtype=buffer.dtypes[i % number]) if grad is None else grad.clone()
        for i, grad in enumerate(buffer.of_targets(targets).grads)
    ]
    zeros += [
        old if isinstance(old, Tensor) else _number(number, old)
        for old, number in zip(first, numbers, strict=True)
        if isinstance(number, Tensor)
    ]
    carry, each = scan(body, zeros, cut.stacked(run))
    buffer, summed = state(carry)
    *total, weight = [
        new if tensor else old + (number - old) * run.repeats
        for new, number, old, tensor in zip(
            [*_sums.numbers(summed)[0], summed.weight], numbers, first, is_tensor, strict=True
        )
    ]
    joined = [[*piece[:-1], end.flatten(0, 1)] for piece, end in zip(pieces, each, strict=True)]
    return buffer, _sums.with_numbers(rest, total, joined, weight, sums.unit)


def _number(like: Tensor, value: float) -> Tensor:
    zero = torch.zeros_like(like)
    return (zero + value).to(like.dtype) if value else zero
