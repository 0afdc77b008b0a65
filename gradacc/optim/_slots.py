"""What a torch optimizer keeps for a parameter, as a pytree of tensors and back.

A tensor is itself. A number is a 0-dim tensor under a marked name, ``"step:int"``, so that it gets its own type back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
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


def make_dense(leaves: Iterable[Tensor]) -> None:
    """Of a parameter with gaps between its elements the tensor object, which must be ours, goes to memory without."""
    for leaf in leaves:
        if not leaf.is_contiguous() and leaf.stride() != torch.empty_like(leaf, device="meta").stride():
            leaf.data = leaf.clone()


def with_strides_of(leaf: Tensor, entry: Any) -> Any:
    """A gradient, or what is kept for a parameter: itself, or a copy with the parameter's strides if it is of its shape."""
    if not isinstance(entry, Tensor) or entry.shape != leaf.shape or entry.stride() == leaf.stride():
        return entry
    return torch.empty_like(leaf, dtype=entry.dtype, device=entry.device).copy_(entry)


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
    name: str,
    owner: str,
    slots: Any,
    leaves: Sequence[Tensor],
    treedef: _tree.TreeDef,
    model: Callable[[Like], dict[str, Entry | None]],
) -> None:
    """Slots are like the parameters, one dict for each, with the entries and shapes that this optimizer gives one of its kind.

    Raises:
        ValueError: they are not.
    """
    try:
        each: list[Any] | None = treedef.flatten_up_to(slots)
    except (ValueError, TypeError):
        each = None
    if each is None or not all(isinstance(slot, dict) for slot in each):
        raise ValueError(f"{name}: state.slots has another structure than params: {_differing(slots, treedef)}. {_FIX}")
    models: dict[tuple[int, torch.dtype, torch.device], dict[str, Entry | None]] = {}
    for index, (slot, leaf) in enumerate(zip(each, leaves, strict=True)):
        shape = leaf.shape
        like = len(shape), leaf.dtype, leaf.device
        expected = models.get(like)
        if expected is None:
            expected = models[like] = model(Like(*like))
        if slot.keys() != expected.keys():
            raise ValueError(
                f"{name}: {_path(treedef, index)} has {sorted(slot)}, where {owner} keeps {sorted(expected)} for a parameter "
                f"of shape {tuple(shape)}. {_FIX}"
            )
        for key, entry in expected.items():
            given = slot[key]
            if entry is not None and not (isinstance(given, Tensor) and _fits(given, entry, shape)):
                of = f" of {given.dtype} on {given.device}" if isinstance(given, Tensor) else ""
                raise ValueError(
                    f"{name}: {_path(treedef, index)}[{key!r}] is {describe(given)}{of}, for a parameter of shape "
                    f"{tuple(shape)}, {leaf.dtype}, on {leaf.device}. {_FIX}"
                )


def _path(treedef: _tree.TreeDef, index: int) -> str:
    return _tree.paths(treedef, "state.slots")[index]


def _differing(slots: Any, treedef: _tree.TreeDef) -> str:
    """What is missing or too much in slots."""
    here, there = _tree.paths(treedef, "state.slots"), _tree.paths(_tree.flatten(slots)[1], "state.slots")
    missing = [path for path in here if not any(other.startswith(path) for other in there)]
    odd = [other for other in there if not any(other.startswith(path) for path in here)]
    if missing:
        return f"it misses {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    return f"it has {odd[0]}, which params has not" if odd else f"it is {describe(slots)}"


def _fits(given: Tensor, entry: Entry, shape: torch.Size) -> bool:
    if given.dtype != entry.dtype or given.device != entry.device:
        return False
    return given.shape == shape if entry.like_parameter else given.ndim == entry.ndim


_FIX = "Is it the state of another optimizer, or of other parameters? Pass what init(params) or the last step returned"
