"""Philox-4x32-10 in tensor operations, the same bits on every device, in every transform, and compiled.

NOTE [a key is a place in a stream]
    A key is ``(seed, offset)``, two uint64. Block ``n`` of its stream is Philox-4x32-10 of the key ``seed`` and the counter
    ``offset + n``: four words of 32 bits. Draws use blocks 0, 1, …; `fold_in` by ``i`` makes a key of block ``i``: its first
    two words are the seed, the others the offset, the low ones first. So it is in ``torch.func._random``, to the bit.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def blocks(keys: Tensor, start: int, count: int) -> Words:
    """Blocks ``start`` to ``start + count`` of the streams of ``keys`` (*batch, 2): words, int64 of shape (*batch, count)."""
    seed, offset = _halves(keys)
    counter = torch.arange(start, start + count, device=keys.device) + offset
    zero = torch.zeros_like(counter)
    return philox((counter & WORD, counter >> 32, zero, zero), (seed & WORD, seed >> 32))


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox-4x32-10 of words in int64, of which the key's broadcast to the counter's.

    A product of two words fits int64 as a pattern of bits, and so does all else: torch's integers wrap. Bits above a word
    stay in what is xored only, and go at the mask after it; `>>` copies the sign into such bits. What is
    changed in place was made here.
    """
    x0, x1, x2, x3 = counter
    for turn in range(_ROUNDS):
        if turn:
            key = key[0] + _WEYL[0], key[1] + _WEYL[1]
        low, high = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = (high >> 32).bitwise_xor_(x1).bitwise_xor_(key[0]).bitwise_and_(WORD)
        x2 = (low >> 32).bitwise_xor_(x3).bitwise_xor_(key[1]).bitwise_and_(WORD)
        x1, x3 = high, low
    return x0, x1.bitwise_and_(WORD), x2, x3.bitwise_and_(WORD)


def shifted(keys: Tensor, by: int | Tensor) -> Tensor:
    """Keys whose streams begin ``by`` blocks later, modulo 2**64; an int64 tensor broadcasts with the batch."""
    seed, offset = (half[..., 0] for half in _halves(keys))
    offset = offset + by
    return torch.stack([seed.expand(offset.shape), offset], -1).view(torch.uint64)


def packed(words: Words) -> Tensor:
    """The keys that blocks stand for."""
    return torch.stack([words[0] | words[1] << 32, words[2] | words[3] << 32], -1).view(torch.uint64)


def unpacked(keys: Tensor) -> Words:
    """The words of blocks that are written as keys."""
    seed, offset = (half[..., 0] for half in _halves(keys))
    return seed & WORD, (seed >> 32) & WORD, offset & WORD, (offset >> 32) & WORD


def signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = keys.view(torch.int64)
    return bits[..., :1], bits[..., 1:]
