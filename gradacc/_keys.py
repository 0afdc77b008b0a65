"""Dict keys as text, and which text another process has for the same key.

NOTE [keys as text]
    A leaf's path has the repr of the keys on its way: in messages, and as its name in a checkpoint. In another process the
    same key must have the same one. Python promises that of its literals and of what is made of them alone: not of an object
    whose repr is its address, nor of a set, whose order changes from process to process, nor of other libraries' scalars,
    whose reprs change with the library's version. What Python escapes in a string depends on its version of Unicode, so texts
    are compared with everything escaped.
"""

from __future__ import annotations

from enum import Enum, Flag
from typing import Any

import torch

_LITERALS = (str, bytes, int, float, complex, bool, type(None))
_OTHERS = (torch.dtype, torch.device, torch.Size)
_REPRS: tuple[Any, ...] = (Enum.__repr__, Flag.__repr__)


def is_stable(key: Any) -> bool:
    """Whether another process has the same repr for it; NOTE [keys as text]."""
    cls = type(key)
    if cls in _LITERALS or cls in _OTHERS:
        return True
    if isinstance(key, Enum):
        return cls.__repr__ in _REPRS and is_stable(key.value)
    named = issubclass(cls, tuple) and hasattr(cls, "_fields")
    return (cls is tuple or named) and all(map(is_stable, key))


def is_literal(key: Any) -> bool:
    """Whether `ast.literal_eval`, which executes nothing, makes it of its repr."""
    if type(key) is tuple:
        return all(map(is_literal, key))
    return type(key) in _LITERALS and (not isinstance(key, (float, complex)) or abs(key) < float("inf"))


def escaped(path: str) -> str:
    """The same for the same path, whatever Python escapes."""
    return path.encode("ascii", "backslashreplace").decode()
