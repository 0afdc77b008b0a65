"""Activation checkpoints: what they run again draws the same numbers again.

NOTE [replay by checkpoints]
    A checkpoint that is not reentrant runs its function again in the backward pass, when the context is left. While it runs it
    first, its saved-tensor hooks are on torch's stack, and the function that runs it again is in their closure: at
    the first draw inside, that one is put into a context with the same keys, which counts on from the same number. It does
    not depend on ``preserve_rng_state``, as torch's generators have no part in it. A reentrant one is a `Function` whose
    forward pass cannot be told what to run again, so a draw inside is an error.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint

_hooks = torch._C._autograd

_REENTRANT: CodeType = checkpoint.CheckpointFunction.forward.__code__


def checkpoints() -> list[Any]:
    """The checkpoints whose first run this is, the outermost first; None for other saved-tensor hooks."""
    popped: list[tuple[Any, Any]] = []
    while (top := _hooks._top_saved_tensors_default_hooks(True)) is not None:
        popped.append(top)
        _hooks._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(popped):
        _hooks._push_saved_tensors_default_hooks(pack, unpack)
    return [_checkpoint(pack) for pack, _ in reversed(popped)]


def _checkpoint(pack: Any) -> Any:
    """Of a hook that is a checkpoint's."""
    if not inspect.isfunction(pack):
        return None
    found = _closed_over(pack, "frame")
    return found if isinstance(found, checkpoint._CheckpointFrame) else None


def _closed_over(function: Any, name: str) -> Any:
    """What a function has by a name of what it was defined in."""
    if name not in function.__code__.co_freevars:
        return None
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def enter_again(frame: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let a checkpoint run its function in ``context()`` when it runs it again."""
    recompute = frame.recompute_fn
    if isinstance(recompute, functools.partial) and recompute.func is _again:
        return
    if not isinstance(_closed_over(recompute, "recompute_context"), nullcontext):
        raise NotImplementedError(
            "keyed: a draw inside of torch.utils.checkpoint.checkpoint(..., context_fn=...) or debug=True, which may run a "
            "part of it again only, so that draws would get other numbers; leave context_fn out, or enter keyed inside of the "
            "function that is checkpointed"
        )
    frame.recompute_fn = functools.partial(_again, recompute, context)


def _again(recompute: Callable[..., None], context: Callable[[], AbstractContextManager[Any]], *args: Any) -> None:
    with context():
        recompute(*args)


def reentrant() -> int:
    """How many reentrant checkpoints' functions this is inside of."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        count += frame.f_code is _REENTRANT
        frame = frame.f_back
    return count
