"""Whose memory an update is made in, and whether it may be made in place at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradacc import _engines

_CHUNK = 1 << 17
"""Elements of parameters that are updated together on a CPU: one list op after another finds them in the cache."""


def differentiable(lr: object, grads: Iterable[Tensor]) -> bool:
    """Whether the result is differentiated, batched or traced, so that nothing can be read or written in place."""
    if _engines.transforming():
        return True
    if not torch.is_grad_enabled():
        return False
    return (isinstance(lr, Tensor) and lr.requires_grad) or any(grad.requires_grad for grad in grads)


def owned(leaves: Sequence[Tensor], donate: bool, taken: set[int]) -> list[Tensor]:
    """Leaves without a graph that may be written to: the given ones, or copies.

    ``taken`` holds the addresses of memory that is in use already; what is taken here is added. A donated leaf is copied
    where another leaf has its memory, or where its own elements share some (an expanded tensor).
    """
    if not donate:
        return [leaf.detach().clone() for leaf in leaves]
    ours = []
    for leaf in leaves:
        address = leaf.data_ptr()
        if (address and address in taken) or torch._debug_has_internal_overlap(leaf) == 1:
            ours.append(leaf.detach().clone())
        else:
            taken.add(address)
            ours.append(leaf.detach() if leaf.requires_grad else leaf)
    return ours


def addresses(leaves: Iterable[Tensor]) -> set[int]:
    """Where leaves are, for `owned`."""
    return {leaf.data_ptr() for leaf in leaves}


def chunks(leaves: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the leaves, in lists that are updated together: of one dtype and device; small ones on a CPU."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault((leaf.device, leaf.dtype), []).append(index)
    for (device, _), indices in groups.items():
        if device.type != "cpu":
            yield indices
            continue
        chunk: list[int] = []
        size = 0
        for index in indices:
            if chunk and size + leaves[index].numel() > _CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(index)
            size += leaves[index].numel()
        yield chunk
