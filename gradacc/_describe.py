"""What arrived, in words, for messages."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def describe(value: Any) -> str:
    """What arrived, for a message: a value where it is short, else its type."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor of {value.size(0)} items"
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r} ({type(value).__name__})" if value is not None else "None"
    module = type(value).__module__
    return f"a {'' if module == 'builtins' else module + '.'}{type(value).__qualname__}"
