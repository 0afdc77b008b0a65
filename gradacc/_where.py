"""Where are we: whether values can be read, and whether results go on into a transform."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")

_inside: ContextVar[bool] = ContextVar("inside a loss that the eager engine differentiates", default=False)
_divided: ContextVar[object] = ContextVar("the call whose micro-batches or pieces run", default=None)


def transforming() -> bool:
    """Whether results are differentiated or batched further, so that no value can be read and nothing detached.

    That is where a functorch transform (vmap, grad, jvp, …) is active, a level of forward-mode differentiation, or Dynamo's
    tracing; and inside the loss of another ``grad_fn``, whose gradient goes through this one's result.
    """
    return under_transform() or _inside.get()


def under_transform() -> bool:
    """The same but for a loss of the eager engine, in which plain autograd records."""
    return torch.compiler.is_compiling() or functorch_is_active() or forward_ad._current_level >= 0


def is_inside_a_loss() -> bool:
    """Whether the eager engine runs a loss, whose parameters are leaves of the engine's own."""
    return _inside.get()


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has one value here: under grad and jvp it does, batched or while Dynamo traces it has none."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def loops() -> bool:
    """Whether equal micro-batches are one loop of a graph: while Dynamo traces, unless a functorch transform is active."""
    return torch.compiler.is_compiling() and not functorch_is_active()


def functorch_is_active() -> bool:
    """Whether a functorch transform is."""
    return bool(torch._C._are_functorch_transforms_active())


def whole_or_not_at_all(function: Callable[..., Any]) -> None:
    """Dynamo traces the function as a part of what calls it, or leaves it and all that it calls alone.

    Else, where something in it cannot be traced, Dynamo would run a part of it as it is and compile the rest.
    """
    ways = torch._C._dynamo.eval_frame
    skip = ways._FrameExecStrategy(ways._FrameAction.SKIP, ways._FrameAction.SKIP)
    ways.set_code_exec_strategy(inspect.unwrap(function).__code__, skip)


@contextmanager
def setting(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """While the variable has this value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def inside_a_loss() -> AbstractContextManager[Any]:
    """While the eager engine runs a loss."""
    return setting(_inside, True)


def divided() -> object:
    """Of the innermost call whose micro-batches or pieces run, something that is it and no other; None outside of any."""
    return _divided.get()


def dividing() -> AbstractContextManager[object]:
    """While a call runs its micro-batches or pieces."""
    return nullcontext() if torch.compiler.is_compiling() else setting(_divided, object())
