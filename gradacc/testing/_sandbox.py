"""What a loss may change besides its result, and how it is put back: random generators, and modules it closes over."""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Snapshot(NamedTuple):
    """The state of the global random generators, and of modules."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]
    modules: list[_ModuleState]


class _ModuleState(NamedTuple):
    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, Tensor | None]
    contents: dict[str, Tensor]
    containers: list[tuple[Any, Any]]
    """Lists, dicts, sets and deques that attributes lead to (hooks and submodules too), and what they hold."""


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """The state of now."""
    numpy = sys.modules.get("numpy")
    return Snapshot(
        python=random.getstate(),
        numpy=None if numpy is None else numpy.random.get_state(),
        cpu=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        modules=[
            _ModuleState(
                module,
                dict(vars(module)),
                dict(module._buffers),
                {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None},
                _containers(vars(module)),
            )
            for module in modules
        ],
    )


def restore(state: Snapshot, *, modules: bool = True) -> None:
    """Put it back; ``modules=False``: the generators only."""
    random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
    if modules:
        for each in state.modules:
            _restore(each)


def seed(number: int) -> None:
    """Another state of every global generator that a snapshot holds."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)


def find_modules(*roots: Any) -> list[nn.Module]:
    """The modules that can be reached: from closures, globals that a function names, partials, methods, containers."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
    stack = [(root, 0) for root in roots]
    while stack:
        value, depth = stack.pop()
        if id(value) in seen or depth > 8:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found |= {id(module): module for module in value.modules()}
        else:
            stack.extend((inner, depth + 1) for inner in _reached(value))
    return list(found.values())


def _restore(state: _ModuleState) -> None:
    attributes = vars(state.module)
    for name in attributes.keys() - state.attributes.keys():
        del attributes[name]
    attributes.update(state.attributes)
    for container, held in state.containers:
        _refill(container, held)
    state.module._buffers.clear()
    state.module._buffers.update(state.buffers)
    with torch.no_grad():
        for name, content in state.contents.items():
            buffer = state.buffers[name]
            if buffer is not None and not torch.equal(buffer, content):
                buffer.copy_(content)


def _containers(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    found: dict[int, tuple[Any, Any]] = {}
    stack = list(attributes.values())
    while stack:
        value = stack.pop()
        if isinstance(value, (list, dict, set, deque)) and id(value) not in found:
            found[id(value)] = value, (dict(value) if isinstance(value, dict) else list(value))
            stack.extend(itertools.islice(value.values() if isinstance(value, dict) else value, 1024))
        elif isinstance(value, tuple):
            stack.extend(value)
    return list(found.values())


def _refill(container: Any, held: Any) -> None:
    """What it held, in its order; nothing is done where it does."""
    now = dict(container) if isinstance(container, dict) else list(container)
    pairs = zip(_flat(now), _flat(held), strict=False)
    if len(now) == len(held) and all(one is other for one, other in pairs):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(held)
    else:
        container.extend(held)


def _flat(held: Any) -> Iterable[Any]:
    return itertools.chain(held, held.values()) if isinstance(held, dict) else held


def _reached(value: Any) -> Iterable[Any]:
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        if (value.__module__ or "").partition(".")[0] == "torch":  # exec gives functions without a module
            return ()
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        return (*cells, *named, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        # A long one is data, not modules.
        return tuple(itertools.islice(value.values() if isinstance(value, dict) else value, 1024))
    if isinstance(value, (type, types.ModuleType, Tensor)):
        return ()
    return tuple(getattr(value, "__dict__", {}).values())


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False
