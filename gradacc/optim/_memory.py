"""Whose memory an update is made in, and whether it may be made in place at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc import _engines

CHUNK = 1 << 19
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
    places = {leaf.data_ptr() for leaf in leaves}
    if len(places) == len(leaves) and taken.isdisjoint(places) and all(map(_plain, leaves)):
        taken |= places
        return list(leaves)
    ours = []
    for leaf in leaves:
        address = leaf.data_ptr()
        overlaps = not leaf.is_contiguous() and torch._debug_has_internal_overlap(leaf) == 1
        if overlaps or (address and address in taken):
            ours.append(leaf.detach().clone())
        else:
            taken.add(address)
            ours.append(leaf.detach() if leaf.requires_grad else leaf)
    return ours


def _plain(leaf: Tensor) -> bool:
    return leaf.is_contiguous() and not leaf.requires_grad


def addresses(leaves: Iterable[Any]) -> set[int]:
    """Where the tensors among leaves are, for `owned`."""
    return {leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}


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
