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
    each micro-batch's graph is searched (1 us a node).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from gradacc import _tree, _validate
from gradacc._outcome import Contribution, Outcome


class Buffer(NamedTuple):
    """The gradients so far: in ``leaf.grad``, or in ``summed`` where a hook adds each one as soon as it is there."""

    leaves: list[Tensor]
    dtypes: list[torch.dtype]
    new: list[int]
    """Leaves whose ``.grad`` is to be the buffer and has not appeared yet."""
    summed: list[Tensor | None]
    share: list[float]
    """What the hooks multiply with: one number, set before each backward pass; empty where there are no hooks."""


def guard() -> AbstractContextManager[None]:
    """Normal mode: under ``inference_mode`` nothing could be differentiated, and outputs would be inference tensors."""
    return torch.inference_mode(False)


def init(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Buffer:
    """Leaves that share the parameters' memory, and nothing accumulated."""
    leaves = [_normal(param).detach().requires_grad_() for param in params]
    buffer = Buffer(leaves, list(dtypes), list(range(len(leaves))), [None] * len(leaves), [])
    if any(leaf.dtype != dtype for leaf, dtype in zip(leaves, dtypes, strict=True)):
        _hook(buffer)
    return buffer


def admit(tree: Any) -> Any:
    """An argument of the loss: itself, but for inference tensors, which autograd refuses; they are copied."""
    leaves = _tree.flatten(tree)[0]
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        return _tree.map_tensors(_normal, tree)
    return tree


def update(
    buffer: Buffer,
    evaluate: Callable[[Sequence[Tensor]], Outcome],
    contribution: Callable[[Outcome], Contribution | None],
) -> tuple[Buffer, Outcome]:
    """Run one micro-batch forward and backward, into the buffer."""
    with torch.enable_grad():
        outcome = evaluate(buffer.leaves)
        counts = contribution(outcome)
        edge = get_gradient_edge(outcome.target) if counts is not None and outcome.target.requires_grad else None
        outcome = outcome.map(_bare)  # from here on the edge alone keeps the graph
        if counts is not None and edge is not None:
            _validate.reentrant_checkpoint(_uses(CheckpointFunction, edge.node))
            if outcome.target.dtype.itemsize < 4 and not buffer.share and len(buffer.new) == len(buffer.leaves):
                _hook(buffer)
            buffer = _backward(buffer, edge, outcome.target, counts)
    return buffer, outcome


def arrived(buffer: Buffer) -> bool:
    """Whether any parameter has got a gradient."""
    return any(leaf.grad is not None for leaf in buffer.leaves) or any(grad is not None for grad in buffer.summed)


def finalize(buffer: Buffer, dtypes: Sequence[torch.dtype], factor: float) -> list[Tensor]:
    """The gradients, times ``factor``; each buffer is given up when its result exists."""
    grads = []
    for i, leaf in enumerate(buffer.leaves):
        grad = leaf.grad if buffer.summed[i] is None else buffer.summed[i]
        leaf.grad = buffer.summed[i] = None
        if grad is None:
            grad = torch.zeros_like(leaf, dtype=dtypes[i], requires_grad=False)
        elif factor != 1.0:
            grad.mul_(factor)
        grads.append(grad.to(dtypes[i]))
    return grads


def _bare(tensor: Tensor) -> Tensor:
    """Without its graph; a 0-dim one in a storage of its own (mse_loss returns a view of one as large as its input)."""
    return tensor.detach().clone() if tensor.ndim == 0 else tensor.detach()


def _backward(buffer: Buffer, edge: GradientEdge, target: Tensor, counts: Contribution) -> Buffer:
    cotangent, share = float(counts.cotangent), float(counts.share)
    if buffer.share:
        buffer.share[0] = share
    else:
        cotangent *= share
    torch.autograd.backward(edge, torch.full_like(target, cotangent), inputs=buffer.leaves)
    return buffer if buffer.share else buffer._replace(new=[i for i in buffer.new if not _own(buffer.leaves[i])])


def _hook(buffer: Buffer) -> None:
    """From now on each gradient is added by us, as soon as it is there, in the accumulator's dtype."""
    buffer.share.append(1.0)
    for i, leaf in enumerate(buffer.leaves):
        hook = partial(_add, buffer.summed, i, buffer.dtypes[i], buffer.share)
        leaf.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types here


def _add(summed: list[Tensor | None], index: int, dtype: torch.dtype, share: list[float], leaf: Tensor) -> None:
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    sofar = summed[index]
    if sofar is None:
        grad = grad.to(dtype, copy=True)  # NOTE [buffers that nobody else holds]
        summed[index] = grad.mul_(share[0]) if share[0] != 1.0 else grad
    else:
        sofar.add_(grad, alpha=share[0])


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


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


def _uses(function: type[torch.autograd.Function], root: Node) -> bool:
    """Whether the graph that ``root`` ends has a node of this custom Function."""
    wanted = function._backward_cls
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        if type(node) is wanted:
            return True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return False
