"""The eager engine: ordinary autograd on detached leaves, accumulated in place while the backward pass runs.

.. code-block:: text

    leaf = param.detach().requires_grad_()          # shares param's memory, collects its own .grad
    for microbatch:                                 # autograd adds into leaf.grad, layer by layer
        backward(loss(leaf, microbatch), seed, inputs=leaves)

The first micro-batch's gradients become the buffer (autograd hands them over), the later ones are added in place.

NOTE [buffers that nobody else holds]
    Autograd makes a gradient the leaf's ``.grad`` without a copy when no other *tensor object* refers to it. It does not
    look at the storage: the gradients of ``p`` and ``q`` in ``((p.view(2, 3) + q.view(2, 3)) * c).sum()`` are two views of
    one storage, and adding in place to one changes the other (a ``.backward()`` loop returns 3x the gradient for two equal
    micro-batches). A custom ``Function`` that returns a view of something that the user holds has the same effect. So a
    gradient that has just become a buffer is copied if its storage has other owners.

NOTE [reentrant checkpoints]
    ``checkpoint(..., use_reentrant=True)`` runs a second backward pass inside the first, which torch allows only if that one
    is not restricted to given leaves. Torch raises when it gets there; but where no path from the loss to a leaf leads
    through the checkpoint's *inputs*, it does not get there, and parameters used inside would silently get no gradient. So
    the graph of a call's first micro-batch is searched (1 us a node).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction

from gradacc import _tree, _validate
from gradacc._outcome import Outcome


class Buffer(NamedTuple):
    """The gradients so far: in ``leaf.grad``, or in ``wide`` where the accumulator's dtype is not the parameter's."""

    leaves: list[Tensor]
    wide: list[Tensor | None]
    new: list[int]
    """Leaves whose ``.grad`` is to be the buffer and has not appeared yet."""
    first: bool
    """Whether there was no backward pass yet."""


def guard() -> AbstractContextManager[None]:
    """Normal mode: under ``inference_mode`` nothing could be differentiated, and outputs would be inference tensors."""
    return torch.inference_mode(False)


def open(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Buffer:
    """Leaves that share the parameters' memory, and nothing accumulated."""
    leaves = [_normal(param).detach().requires_grad_() for param in params]
    wide: list[Tensor | None] = [None] * len(leaves)
    new = []
    for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        if leaf.dtype == dtype:
            new.append(i)
        else:
            leaf.register_post_accumulate_grad_hook(partial(_widen, wide, i, dtype))  # type: ignore[no-untyped-call]
    return Buffer(leaves, wide, new, first=True)


def admit(tree: Any) -> Any:
    """Arguments of the loss: inference tensors, which autograd refuses, are copied."""
    return _tree.map_tensors(_normal, tree)


def add(
    buffer: Buffer, evaluate: Callable[[Sequence[Tensor]], Outcome], seed: Callable[[Outcome], float | None]
) -> tuple[Buffer, Outcome]:
    """Run one micro-batch forward and backward, into the buffer."""
    with torch.enable_grad():
        outcome = evaluate(buffer.leaves)
        scale = seed(outcome)
        target = outcome.target
        if scale is not None and target.requires_grad:
            if buffer.first:
                _validate.reentrant_checkpoint(_uses(CheckpointFunction, target))
            torch.autograd.backward(target, torch.full_like(target, scale), inputs=buffer.leaves)
            waiting = [i for i in buffer.new if not _own(buffer.leaves[i])]
            buffer = buffer._replace(new=waiting, first=False)
    return buffer, outcome.map(Tensor.detach)  # no graph is kept alive


def arrived(buffer: Buffer) -> bool:
    """Whether any parameter has got a gradient."""
    return any(leaf.grad is not None for leaf in buffer.leaves) or any(wide is not None for wide in buffer.wide)


def close(buffer: Buffer, dtypes: Sequence[torch.dtype], factor: float) -> list[Tensor]:
    """The gradients, times ``factor``; each buffer is given up when its result exists."""
    grads = []
    for i, leaf in enumerate(buffer.leaves):
        grad = leaf.grad if buffer.wide[i] is None else buffer.wide[i]
        leaf.grad = buffer.wide[i] = None
        if grad is None:
            grad = torch.zeros_like(leaf, dtype=dtypes[i], requires_grad=False)
        elif factor != 1.0:
            grad.mul_(factor)
        grads.append(grad.to(dtypes[i]))
    return grads


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _widen(wide: list[Tensor | None], index: int, dtype: torch.dtype, leaf: Tensor) -> None:
    """Move a gradient into the accumulator of another dtype as soon as it is there."""
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    sofar = wide[index]
    wide[index] = grad.to(dtype) if sofar is None else sofar.add_(grad)


def _own(leaf: Tensor) -> bool:
    """Make a first gradient ours: dense, in a storage of its own; whether there was one."""
    grad = leaf.grad
    if grad is None:
        return False
    if grad.layout != torch.strided:
        leaf.grad = grad.to_dense()
    elif torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > 2:  # the gradient's reference, and this line's
        leaf.grad = grad.clone()  # NOTE [buffers that nobody else holds]
    return True


def _uses(function: type[torch.autograd.Function], output: Tensor) -> bool:
    """Whether the graph behind ``output`` has a node of this custom Function."""
    seen: set[Node] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, function._backward_cls):
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False
