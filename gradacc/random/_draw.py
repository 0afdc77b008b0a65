"""A draw: numbers of the blocks of keys, by torch's kernels, by tensor code piece by piece, or all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradacc import _where
from gradacc.random import _native, _philox, _real

_PIECE = 1 << 16
"""Blocks of a piece: their words, int64, fit into a processor's cache."""


def draw(keys: Tensor, shape: Sequence[int], dtype: torch.dtype, numbers: _real.Numbers) -> Tensor:
    """``numbers`` of as many blocks of each key as ``shape`` needs: (*batch, *shape)."""
    count, per_block, batch = math.prod(shape), _real.per_block(dtype), keys.shape[:-1]
    blocks = -(-count // per_block)
    if _native.takes(keys) and blocks:
        drawn = torch.stack(numbers(_native.words(keys.reshape(-1, 2), blocks)), -1)
    elif keys.is_cpu and not _where.under_transform() and blocks * math.prod(batch) > _PIECE:
        drawn = _in_pieces(keys.reshape(-1, 2), blocks, dtype, per_block, numbers)
    else:
        drawn = torch.stack(numbers(_philox.blocks(keys, 0, blocks)), -1)
    return drawn.reshape(*batch, blocks * per_block)[..., :count].reshape((*batch, *shape))


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1) of shape (*batch, *shape)."""
    if _native.takes(keys):
        return _native.uniform(keys.reshape(-1, 2), math.prod(shape), dtype).reshape((*keys.shape[:-1], *shape))
    return draw(keys, shape, dtype, _real.UNIFORM[dtype])


def below(keys: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Where ``uniform(keys, shape, torch.float32)`` is below ``p``, rounded up to 24 bits: the same on every path."""
    threshold = math.ceil(p * 2**24)
    if _native.takes(keys):
        return uniform(keys, shape, torch.float32) < threshold / 2**24
    return draw(keys, shape, torch.bool, _real.below(threshold))


def _in_pieces(keys: Tensor, blocks: int, dtype: torch.dtype, per_block: int, numbers: _real.Numbers) -> Tensor:
    """For keys of shape (n, 2): some rows at a time, or a part of one."""
    out = torch.empty((len(keys), blocks, per_block), dtype=dtype, device=keys.device)
    rows, columns = max(1, _PIECE // blocks), min(blocks, _PIECE)
    for row in range(0, len(keys), rows):
        some = keys[row : row + rows]
        for start in range(0, blocks, columns):
            end = min(start + columns, blocks)
            for place, number in enumerate(numbers(_philox.blocks(some, start, end - start))):
                out[row : row + rows, start:end, place] = number
    return out
