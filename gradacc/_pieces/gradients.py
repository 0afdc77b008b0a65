"""Gradients of a call's inputs, over its pieces: summed, or put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradacc import _dtypes
from gradacc._engines import eager, fused
from gradacc._pieces.divide import Piece
from gradacc._pieces.pull import CLOSED, Call, Key, Ran

_BLOCK = 1 << 20
"""Elements that are cast at once."""


class Gradients:
    """Of every input of the node, over pieces."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.sums: dict[Key, Tensor] = {}
        """Of what every piece has whole, in the accumulators' dtype."""
        self.parts: dict[Key, tuple[Tensor, int, list[tuple[int, int]]]] = {}
        """Of what is split: all of it, the dimension, and where there is something in it: offset and size."""

    def add(self, ran: Ran, piece: Piece, sources: Sequence[Any], cotangents: Mapping[int, Tensor | None]) -> None:
        """A piece's: the vector-Jacobian product with ``cotangents``, by the number of the leaf of the output."""
        pairs = [(ran.roots[i], own) for i, own in cotangents.items() if i in ran.roots and own is not None]
        if not pairs or not ran.inputs:
            return
        leaves = [leaf for _, leaf, _ in ran.inputs]
        buffers = [self._fusible(key, leaf) for key, leaf, _ in ran.inputs]
        found = {} if ran.hooked else fused.find(ran.uses, leaves, buffers)
        rest = [n for n in range(len(leaves)) if n not in found]
        uses = [(n, use) for n, uses in found.items() for use in uses]
        inputs: list[Any] = [*(leaves[n] for n in rest), *(GradientEdge(use.node, 0) for _, use in uses)]
        grads: list[Tensor | None] = list(
            torch.autograd.grad([root for root, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True)
        )
        del inputs
        for at, n in enumerate(rest):
            (key, leaf, dim), grad = ran.inputs[n], grads[at]
            grads[at] = None
            if grad is None:
                continue
            if dim is None:
                self._sum(key, leaf, grad)
            else:
                self._put(key, sources[key[1]], (dim, piece), grad)
        for at, (n, use) in enumerate(uses, len(rest)):
            buffer, grad = buffers[n], grads[at]
            grads[at] = None
            if grad is not None:
                assert buffer is not None
                fused.add(use, buffer, grad)

    def forget(self, call: Call) -> None:
        """What the function made itself is gone, and nobody's gradient."""
        alive = {number for held, number in call.closed.values() if held() is not None}
        for key in [key for key in self.sums if key[0] == CLOSED and key[1] not in alive]:
            del self.sums[key]

    def take(self, key: Key, like: Tensor, factor: Tensor | None = None, keep: bool = False) -> Tensor | None:
        """An input's, times ``factor``, in its dtype; it is given up, unless it is to be kept."""
        if key in self.parts:
            grad, dim, filled = self.parts[key]
            self._fill(grad, dim, filled)
        elif key in self.sums:
            grad = self.sums[key]
        else:
            return None
        if not keep:
            self.parts.pop(key, None)
            self.sums.pop(key, None)
        if factor is not None:
            wide = _dtypes.sum_dtype(grad.dtype)
            factor = factor.to(device=grad.device, dtype=wide)
            grad = grad.to(wide) * factor if keep or grad.dtype != wide else grad.mul_(factor)
        return grad.to(like.dtype)

    def _fusible(self, key: Key, leaf: Tensor) -> Tensor | None:
        """The buffer into which a matrix product may add, where there is one of its dtype."""
        buffer = self.sums.get(key)
        return buffer if buffer is not None and buffer.dtype == leaf.dtype else None

    def _sum(self, key: Key, leaf: Tensor, grad: Tensor) -> None:
        buffer = self.sums.get(key)
        grad = grad if grad.layout == torch.strided else grad.to_dense()
        if buffer is None:
            dtype = _dtypes.dtypes(self.dtype, [leaf])[0][0]
            self.sums[key] = eager.as_buffer(grad) if grad.dtype == dtype else grad.to(dtype)
        else:
            _add(buffer, grad)

    def _put(self, key: Key, source: Tensor, place: tuple[int, Piece], grad: Tensor) -> None:
        """A piece's part of a gradient in its place."""
        dim, piece = place
        if key not in self.parts:
            self.parts[key] = torch.empty_like(source, requires_grad=False), dim, []
        assert piece.size is not None
        whole, _, filled = self.parts[key]
        whole.narrow(dim, piece.offset, piece.size).copy_(grad)
        filled.append((piece.offset, piece.size))

    @staticmethod
    def _fill(grad: Tensor, dim: int, filled: list[tuple[int, int]]) -> None:
        """Zeros where no piece has put anything."""
        end = 0
        for offset, size in [*sorted(filled), (grad.size(dim), 0)]:
            if offset > end:
                grad.narrow(dim, end, offset - end).zero_()
            end = offset + size
        filled[:] = [(0, grad.size(dim))]


def _add(buffer: Tensor, grad: Tensor) -> None:
    """Add in place. Of another dtype on a CPU, torch casts all of it first: here, block by block."""
    if buffer.dtype == grad.dtype or not buffer.is_cpu or buffer.ndim == 0 or buffer.numel() <= _BLOCK:
        buffer.add_(grad)
        return
    rows = max(1, _BLOCK * len(buffer) // buffer.numel())
    for part, own in zip(torch.split(buffer, rows), torch.split(grad, rows), strict=True):
        part.add_(own)
