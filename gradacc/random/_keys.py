"""Keys: made of a seed, and of other keys."""

from __future__ import annotations

import torch
from torch import Tensor

from gradacc.random import _check, _native, _philox


def key(seed: int, *, device: torch.device | str | int | None = None) -> Tensor:
    """One key, made of a seed.

    .. code-block:: text

        key(seed) = [seed, 0]

    Arguments:
        seed: an integer in ``[0, 2**64)``.
        device: where the key is, and what is made of it; the default device if there is none.

    Returns:
        A uint64 tensor of shape (2,): ``(seed, offset)``, as ``torch.func._random`` has it.

    Raises:
        TypeError: ``seed`` is no integer.
        ValueError: ``seed`` is out of range.

    Example:
        >>> import gradacc
        >>> gradacc.random.key(7)
        tensor([7, 0], dtype=torch.uint64)
    """
    bits = torch.full((2,), _philox.signed(_check.unsigned("key", "seed", seed)), dtype=torch.int64, device=device)
    bits[1] = 0
    return bits.view(torch.uint64)


def split(keys: Tensor, n: int) -> Tensor:
    """``n`` new keys of each key, which share no draw with each other.

    .. code-block:: text

        split(keys, n)[..., i, :] = fold_in(keys, i)

    The usual call makes the keys of a batch: ``split(key(seed), len(batch))``. A key that keys were made of is used up: what it
    draws itself are the bits of those keys. (Nothing enforces that.)

    Arguments:
        keys: uint64, of shape ``(*batch, 2)``.
        n: how many, 0 or more.

    Returns:
        uint64, of shape ``(*batch, n, 2)``. The batch stays in front, so that it can be split; ``torch.func._random.split`` has
        ``n`` in front.

    Raises:
        TypeError: ``keys`` is no uint64 tensor, ``n`` no integer.
        ValueError: ``keys`` has another shape; ``n`` is negative.

    Source: Claessen and Pałka, "Splittable pseudorandom number generators using cryptographic hashing", Haskell 2013; as in
    ``jax.random``.

    Example:
        >>> import gradacc
        >>> keys = gradacc.random.split(gradacc.random.key(7), 3)
        >>> keys.shape
        torch.Size([3, 2])
        >>> first, second = gradacc.random.split(keys, 2).unbind(-2)
        >>> first.shape
        torch.Size([3, 2])
    """
    _check.keys("split", keys)
    n = _check.number_of_keys("split", n)
    if n and _native.takes(keys):
        words = _native.words(keys.reshape(-1, 2), n)
        return _philox.packed(words).reshape(*keys.shape[:-1], n, 2)
    return _philox.packed(_philox.blocks(keys, 0, n))


def fold_in(keys: Tensor, data: int | Tensor) -> Tensor:
    """New keys, of keys and integers: a step, a layer, the number of an example in its data set.

    .. code-block:: text

        fold_in(keys, i) = block i of the stream of keys, read as (seed, offset)

    Different integers make keys that share no draw. A key that keys were made of is used up, as after `split`, which makes the
    same keys.

    Arguments:
        keys: uint64, of shape ``(*batch, 2)``.
        data: an integer in ``[0, 2**64)``; or a tensor of integers, taken modulo ``2**64``, of the batch's shape or
            one that broadcasts with it. ``fold_in(key, index)`` of one key and ``n`` integers is ``n`` keys.

    Returns:
        uint64, of shape ``(*batch, 2)``, where batch is that of ``keys`` and ``data`` broadcast.

    Raises:
        TypeError: ``keys`` is no uint64 tensor; ``data`` no integer and no tensor of integers.
        ValueError: ``keys`` has another shape; ``data`` is out of range, on another device, or does not broadcast.

    Source: ``jax.random.fold_in``; ``torch.func._random.fold_in``, whose bits these are.

    Example:
        >>> import torch, gradacc
        >>> key = gradacc.random.key(7)
        >>> keys = gradacc.random.fold_in(key, torch.tensor([5, 2, 8]))
        >>> torch.equal(keys[1], gradacc.random.fold_in(key, 2))
        True
    """
    _check.keys("fold_in", keys)
    if isinstance(data, Tensor):
        moved = _philox.shifted(keys, _check.data("fold_in", data, keys))
    else:
        moved = _philox.shifted(keys, _philox.signed(_check.unsigned("fold_in", "data", data)))
    return split(moved, 1)[..., 0, :]
