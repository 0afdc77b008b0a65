"""The functional engine: `torch.func`, for when a functorch transform is active or Dynamo is tracing.

Nothing is changed in place and no value is read, so that the whole can be batched and differentiated:

.. code-block:: text

    total, pullback = torch.func.vjp(loss, params)  # for every micro-batch
    buffer = growth * buffer + factor * pullback(cotangent)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _left
from gradacc._engines import Buffer, Deliver, Grads
from gradacc._loss import Outcome
from gradacc._sums import Contribution
from gradacc._where import loops, whole_or_not_at_all


class Tape(NamedTuple):
    """One micro-batch's graph."""

    values: list[Tensor]
    """Of each target."""
    pullback: Callable[[list[Tensor]], Any]
    depends: bool


def guard() -> AbstractContextManager[None]:
    """The caller's own mode: `torch.func` enables gradients by itself."""
    return nullcontext()


def init(
    params: Sequence[Tensor], dtypes: Sequence[torch.dtype], grads: Grads | None = None, donated: bool = False
) -> Buffer:
    """With gradients that were accumulated before, if any; nothing is changed in place, donated or not."""
    return Buffer(list(params), list(dtypes), list(grads or [None] * len(params)), False, {}, [], 0)


def calling(arguments: Any, passes: _left.Call) -> AbstractContextManager[None]:
    """Around the loss: nothing to say that functorch does not know."""
    return nullcontext() if torch.compiler.is_compiling() else _left.unreadable(passes)


def admit(tree: Any) -> Any:
    """Arguments of the loss, as they are."""
    return tree


def forward(buffer: Buffer, loss: Callable[[Sequence[Tensor]], Outcome]) -> tuple[Tape, Outcome]:
    """Run the loss of one micro-batch."""
    seen: list[Outcome] = []

    def targets(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # torch.func's has_aux takes tensor leaves only; the rest (weights as numbers, structure) goes around it.
        outcome = loss(params)
        seen.append(outcome)
        return outcome.targets, outcome.tensors()

    values, pullback, tensors = torch.func.vjp(targets, buffer.params, has_aux=True)  # type: ignore[misc]  # 3 with has_aux
    unwrapped = iter(tensors)
    depends = any(target.requires_grad for target in seen[0].targets)
    return Tape(values, pullback, depends), seen[0].map(lambda _: next(unwrapped))


def backward(buffer: Buffer, tape: Tape, counts: Contribution, deliver: Deliver | None = None) -> Buffer:
    """Run it backward."""
    assert deliver is None, "nothing here is final before the end"
    values, pullback, depends = tape
    grown = _times(buffer.grads, counts.growth)
    number, summed = len(buffer.params), []
    for at, own in enumerate(counts.passes):
        before = grown[at * number : (at + 1) * number]
        if own is None:
            summed += before
            continue
        # as_tensor would fix a dynamic number.
        (grads,) = pullback(
            [
                (torch.ones_like(value) * own.cotangent).to(value.dtype) if i == at else torch.zeros_like(value)
                for i, value in enumerate(values)
            ]
        )
        summed += [
            _sum(sofar, _kept(_times_share(grad, own.factor, dtype), own.keeps))
            for sofar, grad, dtype in zip(before, grads, buffer.dtypes, strict=True)
        ]
    return buffer._replace(grads=summed, arrived=buffer.arrived or depends)


# After a break in the loss a graph would begin inside of the transform, and another one have its tensors as inputs.
whole_or_not_at_all(forward)
whole_or_not_at_all(backward)


def _times_share(grad: Tensor, share: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``share * grad`` in the accumulator's dtype."""
    wide = (grad if grad.layout == torch.strided else grad.to_dense()).to(dtype)
    if isinstance(share, Tensor):
        return (wide * share).to(dtype)  # two 0-dim tensors have the wider dtype
    return wide if share == 1.0 else wide * share


def _kept(grad: Tensor, keeps: Tensor | None) -> Tensor:
    return grad if keeps is None else torch.where(keeps, grad, 0)


def merge(a: Grads, b: Grads, shares: tuple[float | Tensor, float | Tensor], donated: bool) -> list[Tensor | None]:
    """``shares[0] * a + shares[1] * b``."""
    return [_sum(one, other) for one, other in zip(_times(a, shares[0]), _times(b, shares[1]), strict=True)]


def finalize(buffer: Buffer, dtypes: Sequence[torch.dtype], factors: Sequence[float | Tensor]) -> list[Tensor]:
    """The gradients of each target times its factor, summed."""
    number = len(buffer.params)
    total: list[Tensor | None] = [None] * number
    for at, factor in enumerate(factors):
        own = buffer.of_targets(len(factors)).grads[at * number : (at + 1) * number]
        total = [_plus(sofar, grad, factor) for sofar, grad in zip(total, own, strict=True)]
    return [
        torch.zeros_like(param, dtype=dtype) if grad is None else grad.to(dtype)
        for param, grad, dtype in zip(buffer.params, total, dtypes, strict=True)
    ]


def _plus(sofar: Tensor | None, grad: Tensor | None, factor: float | Tensor) -> Tensor | None:
    """``sofar + factor * grad``"""
    if grad is None:
        return sofar
    own = grad if isinstance(factor, float) and factor == 1.0 else grad * factor
    return own if sofar is None else sofar + own.to(sofar.dtype)


def _times(grads: Grads, share: float | Tensor) -> list[Tensor | None]:
    if isinstance(share, float) and share == 1.0:
        return list(grads)
    return [None if grad is None else _times_share(grad, share, grad.dtype) for grad in grads]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if not loops():
        return a + b
    from gradacc._engines.compiled import inductor

    return inductor.add(a, b)
