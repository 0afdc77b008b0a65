"""What is treated as the dict that it is: mappings of any class, and dataclasses.

NOTE [mappings and dataclasses]
    Batches come in classes of their own: transformers' ``BatchEncoding`` (a ``UserDict``), dict subclasses, dataclasses. They
    are nodes of a tree without being registered anywhere:

    - the children of a ``Mapping`` are its values, by its keys; another one is made as ``cls(items)``. What else an instance
      holds (a tokenizer's encodings, of every example of the whole batch) is left behind, since it would not be true of a part;
    - the children of a dataclass are its fields; another one is an instance with those fields, made without ``__init__``, as it
      need not take them.

    A class that torch's registry knows is what it is there; gradacc's own that are not registered are leaves. An object that
    holds itself is no tree: where there is one, these classes are leaves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Record(NamedTuple):
    """How instances of a class are taken apart and made."""

    is_mapping: bool
    """Whether its children are items; else attributes."""
    names: Callable[[Any], tuple[Any, ...]]
    values: Callable[[Any], tuple[Any, ...]]
    make: Callable[[tuple[Any, ...], Sequence[Any]], Any]
    """``make(names, values)``."""


@functools.cache
def of(cls: type[Any]) -> Record | None:
    """Of a class; None where it is neither a mapping nor a dataclass."""
    if issubclass(cls, Mapping):
        return Record(True, tuple, lambda node: tuple(node.values()), functools.partial(_mapping, cls))
    if dataclasses.is_dataclass(cls) and cls.__module__.partition(".")[0] != "gradacc":
        return Record(False, _fields, _attributes, functools.partial(_dataclass, cls))
    return None


def _mapping(cls: type[Any], names: tuple[Any, ...], values: Sequence[Any]) -> Any:
    items = dict(zip(names, values, strict=True))
    try:
        made = cls(items)
        if made.keys() != items.keys():
            raise ValueError(f"it has the keys {list(made)}, not {list(items)}")
    except Exception as error:  # whatever a constructor does with it
        raise TypeError(
            f"gradacc: a part of a {cls.__qualname__}, a mapping, is made as {cls.__qualname__}(items): {error}. Pass "
            "dict(batch), or register the class as a pytree node (torch.utils._pytree.register_pytree_node)"
        ) from error
    return made


def _fields(node: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(node) if hasattr(node, field.name))


def _attributes(node: Any) -> tuple[Any, ...]:
    return tuple(getattr(node, name) for name in _fields(node))


def _dataclass(cls: type[Any], names: tuple[str, ...], values: Sequence[Any]) -> Any:
    made = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made
