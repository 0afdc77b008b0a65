"""Whether an update may be made in place, and how much of it at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradacc import _where

CHUNK = 1 << 19
"""Elements of parameters that are updated together on a CPU: one list op after another finds them in the cache."""


def differentiable(lr: object, grads: Iterable[Tensor]) -> bool:
    """Whether the result is differentiated, batched or traced, so that nothing can be read or written in place."""
    if _where.transforming():
        return True
    if not torch.is_grad_enabled():
        return False
    return (isinstance(lr, Tensor) and lr.requires_grad) or any(grad.requires_grad for grad in grads)


def copies(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Without a graph, in memory of their own."""
    return [leaf.detach().clone() for leaf in leaves]


def chunks(leaves: Sequence[Tensor], size: int = CHUNK) -> Iterator[list[int]]:
    """Indices of the leaves, in lists that are updated together: of one dtype and device; ``size`` elements on a CPU."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault((leaf.device, leaf.dtype), []).append(index)
    for (device, _), indices in groups.items():
        if device.type != "cpu":
            yield indices
            continue
        chunk: list[int] = []
        total = 0
        for index in indices:
            more = leaves[index].numel()
            if chunk and total + more > size:
                yield chunk
                chunk, total = [], 0
            chunk.append(index)
            total += more
        yield chunk
