"""The functional engine: `torch.func`, for when a functorch transform is active or Dynamo is tracing.

Nothing is changed in place and no value is read, so that the whole can be batched and differentiated:

.. code-block:: text

    total, pullback = torch.func.vjp(loss, params)  # for every micro-batch
    buffer = growth * buffer + share * pullback(cotangent)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc._engines import inductor
from gradacc._fold import Contribution
from gradacc._loss import Outcome
from gradacc._where import loops


class Buffer(NamedTuple):
    """The gradients so far, None where nothing arrived."""

    params: list[Tensor]
    dtypes: list[torch.dtype]
    grads: Sequence[Tensor | None]
    depends: bool


def guard() -> AbstractContextManager[None]:
    """The caller's own mode: `torch.func` enables gradients by itself."""
    return nullcontext()


def init(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Buffer:
    """Nothing accumulated."""
    return Buffer(list(params), list(dtypes), [None] * len(params), depends=False)


def resume(
    params: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    grads: Sequence[Tensor | None],
    arrived: bool,
    donated: bool,
) -> Buffer:
    """With gradients that were accumulated before; nothing is changed in place, donated or not."""
    return Buffer(list(params), list(dtypes), list(grads), depends=arrived)


def calling() -> AbstractContextManager[None]:
    """Around the loss: nothing to say that functorch does not know."""
    return nullcontext()


def admit(tree: Any) -> Any:
    """Arguments of the loss, as they are."""
    return tree


def update(
    buffer: Buffer,
    evaluate: Callable[[Sequence[Tensor]], Outcome],
    contribution: Callable[[Outcome, bool], Contribution | None],
    deliver: Callable[[int, Tensor], None] | None = None,
) -> tuple[Buffer, Outcome]:
    """Run one micro-batch forward and backward."""
    assert deliver is None, "nothing here is final before the end"
    seen: list[Outcome] = []

    def target(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # torch.func's has_aux takes tensor leaves only; the rest (weights as numbers, structure) goes around it.
        outcome = evaluate(params)
        seen.append(outcome)
        return outcome.target, outcome.tensors()

    value, pullback, tensors = torch.func.vjp(target, buffer.params, has_aux=True)  # type: ignore[misc]  # 3 with has_aux
    depends = buffer.depends or seen[0].target.requires_grad
    unwrapped = iter(tensors)
    outcome = seen[0].map(lambda _: next(unwrapped))
    wide = value.dtype.itemsize >= 4 and all(p.dtype == d for p, d in zip(buffer.params, buffer.dtypes, strict=True))
    counts = contribution(outcome, not wide)
    if counts is None:
        return buffer._replace(depends=depends), outcome
    cotangent, share, growth, keeps = counts
    if wide:
        cotangent, share = cotangent * share, 1.0  # one multiplication instead of one for each gradient
    (grads,) = pullback((torch.ones_like(value) * cotangent).to(value.dtype))  # as_tensor would fix a dynamic number
    summed = [
        _sum(sofar, _kept(_scaled(grad, share, dtype), keeps))
        for sofar, grad, dtype in zip(_times(buffer.grads, growth), grads, buffer.dtypes, strict=True)
    ]
    return buffer._replace(grads=summed, depends=depends), outcome


def _scaled(grad: Tensor, share: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``share * grad`` in the accumulator's dtype."""
    wide = (grad if grad.layout == torch.strided else grad.to_dense()).to(dtype)
    if isinstance(share, Tensor):
        return (wide * share).to(dtype)  # two 0-dim tensors have the wider dtype
    return wide if share == 1.0 else wide * share


def _kept(grad: Tensor, keeps: Tensor | None) -> Tensor:
    return grad if keeps is None else torch.where(keeps, grad, 0)


def arrived(buffer: Buffer) -> bool:
    """Whether any loss depended on the parameters."""
    return buffer.depends


def merge(
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    shares: tuple[float | Tensor, float | Tensor],
    donated: bool,
) -> list[Tensor | None]:
    """``shares[0] * a + shares[1] * b``."""
    return [_sum(one, other) for one, other in zip(_times(a, shares[0]), _times(b, shares[1]), strict=True)]


def finalize(buffer: Buffer, dtypes: Sequence[torch.dtype], factor: float | Tensor) -> list[Tensor]:
    """The gradients, times ``factor``."""
    return [
        torch.zeros_like(param, dtype=dtype)
        if grad is None
        else (grad if isinstance(factor, float) and factor == 1.0 else grad * factor).to(dtype)
        for param, grad, dtype in zip(buffer.params, buffer.grads, dtypes, strict=True)
    ]


def _times(grads: Sequence[Tensor | None], share: float | Tensor) -> list[Tensor | None]:
    if isinstance(share, float) and share == 1.0:
        return list(grads)
    return [None if grad is None else _scaled(grad, share, grad.dtype) for grad in grads]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return inductor.add(a, b) if loops() else a + b
