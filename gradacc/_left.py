"""What a forward pass leaves on a replica, and a loss looks for on the module.

NOTE [what a forward pass leaves]
    A replica and what was written on it are gone after the pass: NOTE [what belongs to a replica]. A loss that looks for a term
    on the module (the ``l_aux`` of a mixture of experts, a list of penalties) would find none, or an old one, and where it asks
    ``hasattr`` or adds up a list, the term would be missing without a word. So an attribute in which a pass left a tensor
    with a graph cannot be read on the module for as long as that loss runs, in its thread: for that long, such a module is
    of a subclass whose attributes are looked at. Modules on which nothing is left, all of most models, stay as they are.

    It is looked for in the first micro-batch of a call, and not while Dynamo traces, where a module that writes is an error.
    A tensor without a graph, and anything else, is not seen: reading it gives what the module has.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

from torch import nn

Found = list[tuple[nn.Module, frozenset[str]]]
"""Modules, and the attributes that a pass left on their replicas."""


@dataclass(slots=True, eq=False)
class Passes:
    """The forward passes of one module tree in one call of `grad_fn`."""

    found: Found | None = None
    """What they left; None before the first has run."""
    given: list[Any] | None = None
    """What the last one was given: names, and references to tensors."""
    kept: list[Any] = field(default_factory=list)
    """Replicas that may serve again: NOTE [replicas of a whole call]."""
    written: bool = False
    """Whether one has written on its replicas."""


Call: TypeAlias = WeakKeyDictionary[object, Passes]
"""Of one call of `grad_fn`, by the module tree, for as long as there is that tree."""


class Losses(NamedTuple):
    """A loss that runs, within those that run around it."""

    call: Call
    names: dict[int, frozenset[str]]
    """Attributes that cannot be read, by the id of their module."""
    watched: list[nn.Module]
    later: list[tuple[Passes, Any]]
    """Replicas that may serve again when it has ended."""


_running: ContextVar[Losses | None] = ContextVar("of the loss that runs", default=None)
_users: dict[int, int] = {}
"""For a module of a watched class, how many losses run for which it is."""
_lock = threading.Lock()


@contextmanager
def unreadable(call: Call) -> Iterator[None]:
    """While a loss of this call runs, it may not read on a module what a pass left on its replica."""
    outer = _running.get()
    losses = Losses(call, {} if outer is None else dict(outer.names), [], [])
    token = _running.set(losses)
    try:
        yield
    finally:
        _running.reset(token)
        for passes, kept in losses.later:
            passes.kept.append(kept)
        with _lock:
            for module in losses.watched:
                users = _users.pop(id(module)) - 1
                if users:
                    _users[id(module)] = users
                else:
                    object.__setattr__(module, "__class__", plain(type(module)))


def passes(tree: object) -> Passes | None:
    """Those of a module tree in the call whose loss runs; None outside of one."""
    losses = _running.get()
    return None if losses is None else losses.call.setdefault(tree, Passes())


def keep_until_the_loss_has_run(passes: Passes, kept: Any) -> None:
    """These replicas may serve again after this micro-batch."""
    losses = _running.get()
    assert losses is not None
    losses.later.append((passes, kept))


def note(tree: object, find: Callable[[], Found]) -> None:
    """A pass has run; ``find()`` looks for what it left, unless it is known of this ``tree`` in this call."""
    losses, own = _running.get(), passes(tree)
    if losses is None or own is None:
        return
    if own.found is None:
        own.found = find()
    for module, names in own.found:
        if id(module) in losses.names:
            continue
        losses.names[id(module)] = names
        with _lock:
            _users[id(module)] = _users.get(id(module), 0) + 1
            losses.watched.append(module)
            if not isinstance(module, _Watched):
                object.__setattr__(module, "__class__", _watched(type(module)))  # type: ignore[arg-type]  # a class is hashable


def plain(cls: type[Any]) -> type[Any]:
    """The class that a module has else."""
    return cls.__mro__[2] if issubclass(cls, _Watched) else cls


class _Watched(nn.Module):
    """A module whose attributes are looked at."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        losses = _running.get()
        if losses is not None and name in losses.names.get(id(self), ()):
            raise ValueError(
                f"gradacc: the loss reads {name!r} of a {type(self).__name__}, where the forward pass of apply has left a "
                "tensor with a graph: it is on the replica that ran, not on the module, and its gradient would be lost. "
                "Return it from the forward pass"
            )
        return super().__getattribute__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Another thread may copy the module meanwhile: a copy is of the class that the module has else."""
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if make.__name__ == "__newobj__":  # pickle would compare the class
            make = object.__new__
        return make, tuple(plain(arg) if arg is type(self) else arg for arg in args), *rest


@functools.cache
def _watched(cls: type[Any]) -> type[Any]:
    return type(cls.__name__, (_Watched, cls), {"__module__": cls.__module__, "__slots__": ()})
