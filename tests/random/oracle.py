"""Philox-4x32-10 and what is made of it, once more: in Python's integers, written from the paper."""

import contextlib
import math

import torch

M, W = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
WORD, LONG = 2**32 - 1, 2**64 - 1


def philox(counter, key):
    """Four words of a counter of four and a key of two."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = x[0] * M[0], x[2] * M[1]
        x = [(b >> 32) ^ x[1] ^ k[0], b & WORD, (a >> 32) ^ x[3] ^ k[1], a & WORD]
        k = [(k[0] + W[0]) & WORD, (k[1] + W[1]) & WORD]
    return x


def block(key, n):
    """Block ``n`` of the stream of a key ``(seed, offset)``."""
    seed, offset = key
    place = (offset + n) & LONG
    return philox((place & WORD, place >> 32, 0, 0), (seed & WORD, seed >> 32))


def child(key, n):
    a, b, c, d = block(key, n)
    return (a | b << 32, c | d << 32)


def uniform(key, count, dtype):
    """As Python's floats, which hold them exactly."""
    if dtype == torch.float64:
        words = [w for n in range(count) for a, b, c, d in [block(key, n)] for w in (a << 32 | b, c << 32 | d)]
    else:
        words = [w for n in range(count) for w in block(key, n)]
    bits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    return [(w % 2**bits) / 2**bits for w in words[:count]]


def normal(key, count, dtype):
    """In double precision, of words as they are."""
    numbers = []
    for n in range(count):
        w = block(key, n)
        if dtype == torch.float64:
            pairs = [((w[0] + (w[1] + 0.5) / 2**32) / 2**32, (w[2] + (w[3] + 0.5) / 2**32) / 2**32)]
        else:
            pairs = [tuple((v + 0.5) / 2**32 for v in pair) for pair in (w[:2], w[2:])]
        for u, v in pairs:
            radius = math.sqrt(-2 * math.log(u))
            numbers += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return numbers[:count]


def as_pairs(keys):
    """Keys of shape (n, 2) as Python's integers."""
    return [tuple(key) for key in keys.tolist()]


@contextlib.contextmanager
def kernels(*, flip=0, error=None):
    """Torch's operators with kernels for the CPU, which count their calls: as documented, with a wrong bit, or raising."""
    calls = {"split": 0, "uniform": 0}

    def split(keys, n):
        calls["split"] += 1
        if error is not None:
            raise error
        new = [[child(key, i) for key in as_pairs(keys.reshape(-1, 2))] for i in range(n)]
        return (torch.tensor(new, dtype=torch.uint64).view(torch.int64) ^ flip).view(torch.uint64).view(n, *keys.shape)

    def uniform_(out, keys, low=0.0, high=1.0):
        calls["uniform"] += 1
        n, count = out.shape  # one key of shape (n, 1, 2) a row
        assert keys.shape == (n, 1, 2)
        assert (low, high) == (0, 1)
        rows = [uniform(key, count, out.dtype) for key in as_pairs(keys[:, 0])]
        return out.copy_(torch.tensor(rows, dtype=torch.float64).view(n, count))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_philox_key_split", split, "CPU")
    library.impl("_philox_uniform_", uniform_, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
