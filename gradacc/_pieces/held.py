"""What a function holds beside its arguments: tensors that a second run would find changed, or change again."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def versions(func: Callable[..., Any], buffers: bool = True) -> dict[str, tuple[Tensor, int]]:
    """Tensors that it closes over and the buffers of its modules, each with the number of times that it was written.

    A module may be more than what the function calls, and its buffers others' to change, once the function has run.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    for name, value in _held(func, "func", set()):
        if isinstance(value, nn.Module):
            for key, buffer in value.named_buffers() if buffers else ():
                found[f"{name}.{key}"] = buffer, _version(buffer)
        else:
            found[name] = value, _version(value)
    return found


def changed(seen: dict[str, tuple[Tensor, int]]) -> str | None:
    """The first that was written since."""
    return next((name for name, (tensor, version) in seen.items() if _version(tensor) != version), None)


def sharded(func: Callable[..., Any]) -> bool:
    """Whether it is, or closes over and may call, a module that FSDP shards, whose hooks must see the whole call."""
    modules = [value for _, value in _held(func, "func", set()) if isinstance(value, nn.Module)]
    return any(
        {cls.__name__ for cls in type(inside).__mro__} & _SHARDED for each in modules for inside in each.modules()
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _held(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (nn.Module, Tensor)):
        yield name, value
    elif isinstance(value, functools.partial):
        for place, part in enumerate((value.func, *value.args, *value.keywords.values())):
            yield from _held(part, f"{name}[{place}]", seen)
    elif isinstance(value, types.MethodType):
        yield from _held(value.__self__, f"{name}.__self__", seen)
        yield from _held(value.__func__, name, seen)
    elif isinstance(value, types.FunctionType):
        inside = getattr(value, "__wrapped__", None)
        if inside is not None:
            yield from _held(inside, name, seen)
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield from _held(cell.cell_contents, key, seen)
            except ValueError:  # an empty cell
                continue
        for key in {each.argval for each in dis.get_instructions(value) if each.opname == "LOAD_GLOBAL"}:
            found = value.__globals__.get(key)
            if isinstance(found, (nn.Module, Tensor, types.FunctionType)) and not _is_library(found):
                yield from _held(found, key, seen)


def _is_library(value: Any) -> bool:
    """A function of torch or of ours holds nothing of the caller's."""
    return str(getattr(value, "__module__", "")).split(".")[0] in ("torch", "gradacc") and isinstance(
        value, types.FunctionType
    )
