"""How one micro-batch's gradient gets into the buffer.

An engine is a module of functions; the caller never chooses one (`gradacc._accumulate` does):

- ``guard()``: the context for everything but the caller's own iterator;
- ``init(params, dtypes) -> buffer``; ``resume(params, dtypes, grads, arrived, donated) -> buffer``: of a state, whose
  gradients (None where nothing arrived) are only changed if they are ``donated``;
- ``calling()``: the context of the loss itself;
- ``admit(tree)``: arguments on their way to the loss;
- ``update(buffer, evaluate, contribution, deliver) -> (buffer, outcome)``: ``outcome = evaluate(leaves)`` and, where
  ``contribution(outcome, narrow)`` is not None, ``buffer = growth * buffer + cotangent * share * gradient of outcome.target``
  (``narrow``: whether a number of the backward pass has fewer digits than the buffer); with ``deliver``,
  ``deliver(index, gradient)`` of each as soon as it is final, which takes it out of the buffer;
- ``arrived(buffer)``: whether any loss depended on the parameters;
- ``merge(a, b, shares, donated) -> gradients``: ``shares[0] * a + shares[1] * b``, where one of the shares is 1;
- ``finalize(buffer, dtypes, factor) -> gradients``: ``factor * buffer``, zeros where nothing arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

_inside: ContextVar[bool] = ContextVar("inside a loss that the eager engine differentiates", default=False)


def transforming() -> bool:
    """Whether results are differentiated or batched further, so that no value can be read and nothing detached.

    That is where a functorch transform (vmap, grad, jvp, …) is active, a level of forward-mode differentiation, or Dynamo's
    tracing; and inside the loss of another ``grad_fn``, whose gradient goes through this one's result.
    """
    return torch.compiler.is_compiling() or functorch_is_active() or forward_ad._current_level >= 0 or _inside.get()


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


def graph(roots: Iterable[Node | None]) -> dict[Node, int]:
    """The nodes of an autograd graph, each with the number of edges that lead to it."""
    uses = {root: 0 for root in roots if root is not None}
    stack = list(uses)
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None:
                count = uses.get(parent)
                if count is None:
                    count = 0
                    stack.append(parent)
                uses[parent] = count + 1
    return uses


@contextmanager
def inside_a_loss() -> Iterator[None]:
    """While the eager engine runs a loss."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
