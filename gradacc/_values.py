"""Values that callers pass: integers, and functions that take a keyword."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from gradacc._describe import describe


def positive_int(name: str, option: str, value: Any) -> int:
    """``value`` as an int of at least 1; bools and floats are not ints."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: {option} must be an int, got {describe(value)}")
    if operator.index(value) < 1:
        raise ValueError(f"{name}: {option} must be at least 1, got {value}")
    return operator.index(value)


def takes_keyword(func: Callable[..., Any], keyword: str) -> bool:
    """Whether a function says that it takes ``keyword``, by a parameter of this name; ``**kwargs`` says nothing."""
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):  # of a built-in function, say
        return False
    return keyword in parameters and parameters[keyword].kind is not inspect.Parameter.VAR_KEYWORD
