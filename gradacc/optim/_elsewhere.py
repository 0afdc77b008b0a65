"""What a torch optimizer of the caller's own keeps where a pytree of its slots does not have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TORCH = {"state", "param_groups", "_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured"}
"""Attributes of an optimizer that torch itself changes in a step."""


class _Seen(NamedTuple):
    """An object, held so that its identity stays its own, and how often it was written."""

    path: str
    value: Any
    version: int


def attributes(made: torch.optim.Optimizer) -> list[_Seen]:
    """What is in its attributes before a step, for `check`."""
    return list(_seen(made))


def check(name: str, made: torch.optim.Optimizer, before: Sequence[_Seen], leaves: Sequence[Tensor]) -> None:
    """Nothing but what is under a parameter in its ``state`` has changed in a step.

    Raises:
        TypeError: it has.
    """
    own = set(map(id, leaves))
    names = [f"state[{key!r}]" for key in made.state if not (isinstance(key, Tensor) and id(key) in own)]
    after = {seen.path: seen for seen in _seen(made)}
    old = {seen.path: seen for seen in before}
    names += [path for path in after if path not in old or not _is_same(old[path], after[path])]
    names += [path for path in old if path not in after]
    if names:
        raise TypeError(
            f"{name}: {type(made).__name__} keeps state elsewhere than under a parameter in its state ({', '.join(names)}), "
            "which would be lost between two steps; write it as gradacc.optim.Optimizer(init, step)"
        )


def _seen(made: torch.optim.Optimizer) -> Iterator[_Seen]:
    stack = [(key, value) for key, value in vars(made).items() if key not in _TORCH]
    done: set[int] = set()
    while stack:
        path, value = stack.pop()
        inside: list[tuple[Any, Any]] = []
        if id(value) in done:
            # A container that is in itself, or seen already.
            pass
        elif isinstance(value, Mapping):
            inside = list(value.items())
        elif isinstance(value, (list, tuple)):
            inside = list(enumerate(value))
        done.add(id(value))
        stack += [(f"{path}[{key if isinstance(key, (int, str)) else id(key)!r}]", each) for key, each in inside]
        yield _Seen(
            path, value, value._version if isinstance(value, Tensor) and not value.is_inference() else len(inside)
        )


def _is_same(old: _Seen, new: _Seen) -> bool:
    if old.version != new.version:
        return False
    alike = isinstance(old.value, (int, float, str)) and type(old.value) is type(new.value) and old.value == new.value
    return old.value is new.value or alike
