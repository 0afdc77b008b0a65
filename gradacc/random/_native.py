"""Torch's own kernels for the same numbers, where it has them.

NOTE [native kernels]
    torch 2.13 has Philox-4x32-10 as private operators (behind ``torch.func._random``), with kernels for CUDA and none for the
    CPU. Whether a type of device has them is found out once, by comparing a few numbers with the tensor code; what raises,
    or differs in a bit, is not used. (That comparison is read: at the first draw on such a device the program waits.)
    Two operators suffice: ``split`` writes whole blocks as keys, which are the words that everything is made of, and
    ``uniform`` makes of them what we make. Torch's normal numbers are not used: on CUDA they are made by fast
    approximations of logarithm and cosine, whose errors near 0 are of 1e-3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gradacc import _where
from gradacc.random import _philox, _real

_PROBES = [0, 0], [2**64 - 1, 2**64 - 2], [0x299F31D0A4093822, 0x85A308D3243F6A88]


def takes(keys: Tensor) -> bool:
    """Whether the kernels take these keys: plain tensors on such a device, with no transform active."""
    return type(keys) is Tensor and not _where.under_transform() and _device_has_kernels(keys.device.type)


def words(keys: Tensor, count: int) -> _philox.Words:
    """`_philox.blocks` from the first block on, for keys of shape (n, 2) and a count that is not 0."""
    return _philox.unpacked(torch.ops.aten._philox_key_split(keys, count).transpose(0, 1).contiguous())


def uniform(keys: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers of shape (n, count), for keys of shape (n, 2)."""
    out = torch.empty((len(keys), count), dtype=dtype, device=keys.device)
    torch.ops.aten._philox_uniform_(out, keys[:, None])
    return out


@functools.cache
def _device_has_kernels(device: str) -> bool:
    """NOTE [native kernels]."""
    try:
        keys = torch.tensor(_PROBES, dtype=torch.uint64, device=device)
        expected = _philox.blocks(keys, 0, 3)
        same = [torch.equal(mine, other) for mine, other in zip(words(keys, 3), expected, strict=True)]
        for dtype, make in _real.UNIFORM.items():
            numbers = torch.stack(make(expected), -1).flatten(1)[:, :5]
            same.append(torch.equal(uniform(keys, 5, dtype), numbers))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return all(same)
