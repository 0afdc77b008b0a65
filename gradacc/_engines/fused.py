"""Weight gradients of matrix products and embeddings, added straight into the buffer.

Of ``y = x @ w`` autograd writes the gradient ``x.mH @ dy`` to new memory, and then reads it again to add it to the buffer; of
``y = w[indices]`` it writes a whole table of zeros for a few rows. Here the node adds by itself:

.. code-block:: text

    grad = x.mH @ dy; buffer += grad        # autograd
    addmm(buffer, x.mH, dy, out=buffer)     # a hook of the product's node, which is then not asked for grad
    buffer.index_add_(0, indices, dy)       # of an embedding's

Against the same engine without it (medians, two cores): eight layers of 512x512 with 32 rows 0.84, of 256x256 0.96, of
128x128 0.98, of 64x64 1.03 to 1.08, and of a GPT-2 of width 64, with 64x256, slower too (hence `_SMALLEST`); the gradient of
an embedding of 50257x256 for 512 tokens 0.0024.

NOTE [reading the graph]
    What is fused is found in the graph that the loss has left, after it ran: nodes of ``mm``, ``addmm`` (`F.linear`,
    ``x @ w``, whatever calls them) and ``embedding`` of which a parameter or its transpose is an operand. So nothing is
    swapped or wrapped while the loss runs, and what the graph does not show as such stays with autograd: compiled losses,
    casts (autocast), `torch.func` inside the loss. A parameter is fused if all its uses are (tied, used twice); otherwise
    none is. Left to autograd are also parameters with hooks, which are to see the gradient, and nodes whose other operand is
    held by a saved-tensor hook (activation checkpointing, offloading), which must be unpacked once; everything in anomaly
    mode, which looks at gradients. What the graph does not show is hooks on its nodes: on a transpose
    (``w.t().register_hook``), on a parameter's ``AccumulateGrad``, or on a product (``y.grad_fn.register_hook``, backward hooks
    of modules), which would find None in the place of a fused gradient, or never run. But torch numbers its hooks, so whether
    any was registered while the loss ran is known, and then that micro-batch is left to autograd altogether.
    What adds is ``addmm`` with ``out=``, the same kernel as ``addmm_``: `torch.utils.flop_counter` and the profiler know
    operations by name, and count nothing for that one.
    An embedding adds its rows one by one to the sum of all micro-batches, as the large batch's own backward pass does.

    A custom ``Function`` may run a backward pass of its own through the same nodes (implicit differentiation does): only the
    pass that began at the loss adds.

    ``backward`` computes what leads to its ``inputs``: fused parameters are not among them, but the edges of their nodes
    are, which makes the engine run these without asking for the parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Add = Callable[[int, Tensor, Tensor, Tensor], None]
"""``add(padding index, target, other operand, gradient of the result)``, the first two of which are bound when it is hooked."""

_SMALLEST = 1 << 15
"""Elements from which a parameter is worth a hook in Python."""


class Use(NamedTuple):
    """A node of which a parameter is an operand."""

    node: Any
    other: Tensor
    """The other operand."""
    add: Add
    transposed: bool
    """Whether the operand is the parameter's transpose."""
    padding: int
    """Of an embedding, the row that gets no gradient."""


def install(
    root: Node,
    uses: Mapping[Node, int],
    leaves: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    keeps: Tensor | None,
    done: Callable[[int], None],
) -> tuple[list[GradientEdge], set[int]]:
    """Fuse what can be fused of a graph: the edges that its backward pass, which begins at ``root``, must lead to instead
    of the leaves whose indices are returned.

    ``uses``: of every node, how many edges lead to it. ``buffers``: a parameter without one is left to autograd, which hands
    its gradient over. ``keeps``: nothing is added where it is given and False, whatever the operands are.
    ``done(index)`` is called when all uses of a fused parameter have been added.
    """
    found = find(uses, leaves, buffers)
    fused = set(found)
    if not fused:
        return [], fused
    task: list[int] = []
    root.register_prehook(partial(_note_task, task))
    edges = []
    for index in fused:
        buffer, left = buffers[index], set(range(len(found[index])))
        assert buffer is not None
        for number, (node, operand, add, transposed, padding) in enumerate(found[index]):
            target = buffer.t() if transposed else buffer
            added = partial(_note_added, left, number, index, done)
            use = partial(_hook, task, partial(add, padding, target), [operand], keeps, added)
            node.register_prehook(use)  # which does not hold the node: a cycle, never freed
            edges.append(GradientEdge(node, 0))
    return edges, fused


def find(uses: Mapping[Node, int], leaves: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> dict[int, list[Use]]:
    """What can be fused of a graph: by the index of its leaf, the nodes that use it, all of them."""
    indices = {id(leaf): i for i, leaf in enumerate(leaves) if _suits(leaf, buffers[i])}
    if not indices or torch.is_anomaly_enabled():
        return {}
    found: dict[int, list[Use]] = {}
    expected: dict[int, int] = {}
    for node in uses:
        operands = _FUSED.get(type(node).__name__)
        if operands is None:
            continue
        parents = node.next_functions
        for place, other, add in operands:
            parent: Any
            parent, transposed = parents[place][0], False
            if _transposes(parent) and uses[parent] == 1:
                parent, transposed = parent.next_functions[0][0], True
            if type(parent).__name__ != "AccumulateGrad":
                continue
            index = indices.get(id(parent.variable))
            operand = None if index is None else _plain(node, other)
            if index is not None and operand is not None:
                padding = getattr(node, "_saved_padding_idx", 0)
                found.setdefault(index, []).append(Use(node, operand, add, transposed, padding))
                expected[index] = uses[parent]
    return {index: nodes for index, nodes in found.items() if len(nodes) == expected[index]}


def add(use: Use, buffer: Tensor, grad: Tensor) -> None:
    """``grad``, of a use's node, as a part of the parameter's gradient into its ``buffer``."""
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    use.add(use.padding, buffer.t() if use.transposed else buffer, use.other, grad)


def _suits(leaf: Tensor, buffer: Tensor | None) -> bool:
    return (
        buffer is not None
        and leaf.ndim == 2
        and leaf.numel() >= _SMALLEST
        and not leaf._backward_hooks
        and not leaf._post_accumulate_grad_hooks
    )


def _transposes(node: Any) -> bool:
    """Whether it is the transpose of a matrix, however that was written: ``w.t()``, ``w.T``, ``w.mT``."""
    name = type(node).__name__
    if name == "PermuteBackward0":
        # Negative ones are read as unsigned, and even stays even.
        return tuple(dim % 2 for dim in node._saved_dims) == (1, 0)
    if name == "TransposeBackward0":
        return bool(node._saved_dim0 % 2 != node._saved_dim1 % 2)
    return name == "TBackward0"


def _plain(node: Any, other: str) -> Tensor | None:
    """The other operand, if it is simply there, and nothing scales the gradient."""
    if getattr(node, "_raw_saved_" + other).unpack_hook is not None:
        return None
    operand: Tensor = getattr(node, "_saved_" + other)
    if operand.layout != torch.strided:
        return None
    if other == "indices":  # on a GPU, index_add_ is not deterministic, and autograd's sum of rows is
        return operand if not node._saved_scale_grad_by_freq and operand.device.type == "cpu" else None
    return operand.detach() if getattr(node, "_saved_alpha", 1) == 1 else None


def _note_task(task: list[int], _: Any) -> None:
    task.append(torch._C._current_graph_task_id())


def _hook(
    task: list[int],
    add: Callable[[Tensor, Tensor], None],
    operand: list[Tensor],
    keeps: Tensor | None,
    added: Callable[[], None],
    grads: tuple[Tensor | None, ...],
) -> None:
    """Before the node runs; ``operand`` is emptied, so that nothing lives longer than it would."""
    if task != [torch._C._current_graph_task_id()]:
        return
    other, grad = operand.pop(), grads[0]
    if grad is not None:
        grad = grad if grad.layout == torch.strided else grad.to_dense()
        if keeps is not None:  # both: 0 times NaN is NaN
            keeps = keeps.to(grad.device)
            other, grad = torch.where(keeps, other, 0), torch.where(keeps, grad, 0)
        add(other, grad)
    added()


def _note_added(left: set[int], number: int, index: int, done: Callable[[int], None]) -> None:
    """Of the uses of a parameter, this one."""
    left.discard(number)
    if not left:
        done(index)


def _left(_: int, target: Tensor, other: Tensor, grad: Tensor) -> None:
    torch.addmm(target, grad, other.mH, out=target)


def _right(_: int, target: Tensor, other: Tensor, grad: Tensor) -> None:
    torch.addmm(target, other.mH, grad, out=target)


def _rows(padding: int, target: Tensor, indices: Tensor, grad: Tensor) -> None:
    kept = target[padding].clone() if padding < len(target) else None  # without one it is -1, read as unsigned
    target.index_add_(0, indices.flatten(), grad.reshape(-1, grad.shape[-1]))
    if kept is not None:
        target[padding] = kept


_FUSED: dict[str, tuple[tuple[int, str, Add], ...]] = {
    "MmBackward0": ((0, "mat2", _left), (1, "self", _right)),
    "AddmmBackward0": ((1, "mat2", _left), (2, "mat1", _right)),
    "EmbeddingBackward0": ((0, "indices", _rows),),
}
"""Of a node, for each operand: its place among next_functions, the attribute that saves the other one, how to add."""
