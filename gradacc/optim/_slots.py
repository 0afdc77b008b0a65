"""What a torch optimizer keeps for a parameter, as a pytree of tensors and back.

A tensor is itself. A number is a 0-dim tensor under a marked name, ``"step:int"``, so that it gets its own type back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradacc import _tree
from gradacc._describe import describe

Slot: TypeAlias = dict[str, Any]
"""Tensors by name."""

SHAPE = tuple(range(2, 66))
"""The first of these are the shape of a small parameter of so many dimensions."""


class Entry(NamedTuple):
    """What a tensor in a slot must be like."""

    like_parameter: bool
    """Of the parameter's shape."""
    ndim: int
    dtype: torch.dtype
    device: torch.device


class Like(NamedTuple):
    """What the structure of a slot depends on."""

    ndim: int
    dtype: torch.dtype
    device: torch.device


_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}
_NONE = "None"


def written(name: str, owner: str, kept: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """`tensors` of what is kept for each parameter."""
    if set(map(type, itertools.chain.from_iterable(map(dict.values, kept)))) == {Tensor}:
        return tuple(kept)
    return tuple([tensors(name, owner, each) for each in kept])


def tensors(name: str, owner: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What is kept, as tensors.

    Raises:
        TypeError: something that is no tensor, number or None.
    """
    out: dict[str, Any] = {}
    for key, value in kept.items():
        kind = type(value).__name__
        if isinstance(value, Tensor):
            out[key] = value
        elif value is None:
            out[f"{key}:{_NONE}"] = ()
        elif kind in _NUMBERS:
            out[f"{key}:{kind}"] = torch.tensor(value, dtype=_NUMBERS[kind][1])
        else:
            raise TypeError(
                f"{name}: {owner} keeps {key!r} for a parameter, {describe(value)}, which is no tensor or number and has no "
                "place in a pytree of tensors; write it as gradacc.optim.Optimizer(init, step)"
            )
    return out


def restored(slot: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `tensors`, in a dict of its own."""
    for key in slot:
        if ":" in key:
            break
    else:
        return dict(slot)
    out: dict[str, Any] = {}
    for key, value in slot.items():
        plain, _, kind = key.rpartition(":")
        if kind == _NONE:
            out[plain] = None
        elif kind in _NUMBERS and plain:
            out[plain] = _NUMBERS[kind][0](value.item())
        else:
            out[key] = value
    return out


def zeros(name: str, owner: str, kept: dict[str, Any]) -> dict[str, Any]:
    """A slot of the structure of ``kept`` that says nothing yet."""
    zeroed: dict[str, Any] = _tree.map_tensors(torch.zeros_like, tensors(name, owner, kept))
    return zeroed


def entries(slot: Slot, like: Like) -> dict[str, Entry | None]:
    """What `check` expects, from the slot of a parameter of shape ``SHAPE[:like.ndim]``; None for what is no tensor."""
    shape = SHAPE[: like.ndim]
    return {
        key: Entry(shape != () and entry.shape == shape, entry.ndim, entry.dtype, entry.device)
        if isinstance(entry, Tensor)
        else None
        for key, entry in slot.items()
    }


def check(
    name: str, owner: str, slots: Any, leaves: Sequence[Tensor], model: Callable[[Like], dict[str, Entry | None]]
) -> None:
    """Slots are one dict for each parameter, with the entries and shapes that this optimizer gives one of its kind.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(slots, tuple) or len(slots) != len(leaves) or not all(isinstance(slot, dict) for slot in slots):
        found = f"for {len(slots)} parameters" if isinstance(slots, tuple) else describe(slots)
        raise ValueError(f"{name}: state.slots is {found}, where params has {len(leaves)} leaves. {_FIX}")
    models: dict[tuple[int, torch.dtype, torch.device], dict[str, Entry | None]] = {}
    for index, (slot, leaf) in enumerate(zip(slots, leaves, strict=True)):
        shape = leaf.shape
        like = len(shape), leaf.dtype, leaf.device
        expected = models.get(like)
        if expected is None:
            expected = models[like] = model(Like(*like))
        if slot.keys() != expected.keys():
            raise ValueError(
                f"{name}: state.slots[{index}] has {sorted(slot)}, where {owner} keeps {sorted(expected)} for a parameter of "
                f"shape {tuple(shape)}. {_FIX}"
            )
        for key, entry in expected.items():
            given = slot[key]
            if entry is not None and not (isinstance(given, Tensor) and _fits(given, entry, shape)):
                of = f" of {given.dtype} on {given.device}" if isinstance(given, Tensor) else ""
                raise ValueError(
                    f"{name}: state.slots[{index}][{key!r}] is {describe(given)}{of}, for a parameter of shape "
                    f"{tuple(shape)}, {leaf.dtype}, on {leaf.device}. {_FIX}"
                )


def _fits(given: Tensor, entry: Entry, shape: torch.Size) -> bool:
    if given.dtype != entry.dtype or given.device != entry.device:
        return False
    return given.shape == shape if entry.like_parameter else given.ndim == entry.ndim


_FIX = "Is it the state of another optimizer, or of other parameters? Pass what init(params) or the last step returned"
