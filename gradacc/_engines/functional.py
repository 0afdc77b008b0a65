"""The functional engine: `torch.func`, for when a functorch transform is active or Dynamo is tracing.

Nothing is changed in place and no value is read, so that the whole can be batched and differentiated:

.. code-block:: text

    total, pullback = torch.func.vjp(loss, params)  # for every micro-batch
    buffer = buffer + pullback(seed)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc._outcome import Outcome


class Buffer(NamedTuple):
    """The gradients so far, None where nothing arrived."""

    params: list[Tensor]
    dtypes: list[torch.dtype]
    grads: Sequence[Tensor | None]
    depends: bool


def guard() -> AbstractContextManager[None]:
    """The caller's own mode: `torch.func` enables gradients by itself."""
    return nullcontext()


def open(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Buffer:
    """Nothing accumulated."""
    return Buffer(list(params), list(dtypes), [None] * len(params), depends=False)


def admit(tree: Any) -> Any:
    """Arguments of the loss, as they are."""
    return tree


def add(
    buffer: Buffer, evaluate: Callable[[Sequence[Tensor]], Outcome], seed: Callable[[Outcome], float | Tensor | None]
) -> tuple[Buffer, Outcome]:
    """Run one micro-batch forward and backward; a seed of 0 contributes exactly 0, whatever the gradient says."""
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
    scale = seed(outcome)
    if scale is None:
        return buffer._replace(depends=depends), outcome
    scale = torch.as_tensor(scale, dtype=value.dtype, device=value.device)
    (grads,) = pullback(scale.expand_as(value))
    summed = [
        _sum(sofar, torch.where(scale == 0, 0, grad).to(dtype))
        for sofar, grad, dtype in zip(buffer.grads, grads, buffer.dtypes, strict=True)
    ]
    return buffer._replace(grads=summed, depends=depends), outcome


def arrived(buffer: Buffer) -> bool:
    """Whether any loss depended on the parameters."""
    return buffer.depends


def close(buffer: Buffer, dtypes: Sequence[torch.dtype], factor: float | Tensor) -> list[Tensor]:
    """The gradients, times ``factor``."""
    return [
        torch.zeros_like(param, dtype=dtype)
        if grad is None
        else (grad if isinstance(factor, float) and factor == 1.0 else grad * factor).to(dtype)
        for param, grad, dtype in zip(buffer.params, buffer.grads, dtypes, strict=True)
    ]


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
