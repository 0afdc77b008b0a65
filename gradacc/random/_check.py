"""Checks of what is passed; they return what they checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gradacc._describe import describe
from gradacc.random import _real

_MADE = "gradacc.random.key, split and fold_in make them"
_INTEGERS = {
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}


def keys(call: str, value: Any) -> Tensor:
    """Keys of any batch."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{call}: keys is {describe(value)}; keys are uint64 tensors of shape (*batch, 2): {_MADE}")
    if value.dtype != torch.uint64 or value.ndim == 0 or value.shape[-1] != 2:
        error = TypeError if value.dtype != torch.uint64 else ValueError
        raise error(
            f"{call}: keys is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; "
            f"keys are uint64 tensors of shape (*batch, 2): {_MADE}"
        )
    return value


def shape(call: str, value: Any) -> Sequence[int]:
    """The shape of what each key draws."""
    if not isinstance(value, (tuple, list)) or not all(_is_integer(size) for size in value):
        raise TypeError(f"{call}: shape is a tuple of sizes, () for one number a key; got {describe(value)}")
    if any(size < 0 for size in value):
        raise ValueError(f"{call}: no size of a shape is negative, got {tuple(value)}")
    return value


def dtype(call: str, value: Any) -> torch.dtype:
    """A floating dtype of 16 bits or more."""
    if value not in _real.UNIFORM:
        raise TypeError(f"{call}: dtype is float16, bfloat16, float32 or float64; got {value}")
    found: torch.dtype = value
    return found


def probability(call: str, value: Any) -> float:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{call}: p is a number in [0, 1]; got {describe(value)}")
    if not 0 <= value <= 1:  # NaN too
        raise ValueError(f"{call}: p is a number in [0, 1]; got {value}")
    return value


def unsigned(call: str, name: str, value: Any) -> int:
    """An integer in [0, 2**64)."""
    if not _is_integer(value):
        raise TypeError(f"{call}: {name} is an integer; got {describe(value)}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{call}: {name} is an integer in [0, 2**64); got {value}")
    return value


def number_of_keys(call: str, value: Any) -> int:
    """Not negative."""
    if not _is_integer(value):
        raise TypeError(f"{call}: n is the number of keys, an integer; got {describe(value)}")
    if value < 0:
        raise ValueError(f"{call}: n is the number of keys, not negative; got {value}")
    return value


def data(call: str, value: Tensor, keys: Tensor) -> Tensor:
    """Integers to fold in, on the device of the keys and of a shape that goes with them; as int64 of the same bits."""
    if value.dtype not in _INTEGERS:
        raise TypeError(
            f"{call}: data is an integer, or an integer tensor; got {describe(value)} and dtype {value.dtype}"
        )
    if value.device != keys.device:
        raise ValueError(f"{call}: data is on {value.device} and keys on {keys.device}; data.to(keys.device)")
    batch = keys.shape[:-1]
    for mine, other in zip(reversed(value.shape), reversed(batch), strict=False):
        if mine != other and 1 not in (mine, other):
            raise ValueError(
                f"{call}: data of shape {tuple(value.shape)} for keys of shape {tuple(keys.shape)}: "
                f"data has the batch's shape {tuple(batch)}, or broadcasts with it"
            )
    return value.view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)


def of_examples(call: str, x: Any, keys: Tensor) -> Tensor:
    """What keys are for: its first dimensions are theirs."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{call}: x is {describe(x)}; it must be a tensor")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{call}: x is a tensor of dtype {x.dtype}; what is scaled must be floating or complex")
    if x.device != keys.device:
        raise ValueError(f"{call}: x is on {x.device} and keys on {keys.device}; keys.to(x.device)")
    batch = keys.shape[:-1]
    if x.shape[: len(batch)] != batch:
        raise ValueError(
            f"{call}: keys of shape {tuple(keys.shape)} for x of shape {tuple(x.shape)}: the first dimensions of x must be "
            f"{tuple(batch)}, a key for each example, as split(key, {math.prod(x.shape[:1])}) makes them; "
            "one key of shape (2,) is for all of x"
        )
    return x


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
