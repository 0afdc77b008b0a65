"""What a function closes over: tensors that require grad and are not among its arguments.

NOTE [closed-over tensors]
    Plain autograd follows what a function closes over (a module's parameters, hidden states) like its arguments. A node of our
    own does not: what is not its input gets no gradient, without a word. So the graph of each piece is searched for what leads
    out of it:

    - a leaf of somebody else's becomes an input of the node. Its gradient is asked of the backward pass of a piece as a number:
      nothing is added to its ``.grad``, and its ``AccumulateGrad``, to which DDP hangs hooks, runs once, behind the node;
    - a tensor with a graph (made of parameters before the call), and a leaf with hooks of its own, would be passed through, or
      would have its hooks run, with each piece. The piece is run again, with another tensor in its place (`replacing`), a leaf
      of ours, and so are all that follow;
    - where neither is possible (a custom ``Function`` takes it, which no mode sees) it is an error that says what to do.

    A node is recognised by its number, as what was recorded before the piece began; a leaf that dies with the piece's graph
    was made by the function itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

_LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # the node of a leaf

Edge = tuple[Node, int]
"""A node, and which of its results."""


class Graph(NamedTuple):
    """The graph of one piece."""

    uses: dict[Node, int]
    """Its nodes, each with the number of edges that lead to it."""
    leaves: list[Tensor]
    """Leaves in it that are not the piece's own."""
    edges: list[Edge]
    """What leads out of it."""


def now() -> int:
    """The number that the next node has at least."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True)
        return get_gradient_edge(probe.view_as(probe)).node._sequence_nr()


def graph(roots: Iterable[Node], own: Iterable[Tensor], since: int) -> Graph:
    """What ``roots`` lead to, as far as it was recorded from ``since`` on."""
    uses = dict.fromkeys(roots, 0)
    stack, known = list(uses), {id(leaf) for leaf in own}
    leaves: list[Tensor] = []
    edges: dict[Edge, None] = {}
    while stack:
        node: Any = stack.pop()
        if type(node) is _LEAF:
            if id(node.variable) not in known:
                leaves.append(node.variable)
            continue
        for parent, number in node.next_functions:
            if parent is None:
                continue
            if type(parent) is not _LEAF and parent._sequence_nr() < since:
                edges[parent, number] = None
                continue
            if parent not in uses:
                uses[parent] = 0
                stack.append(parent)
            uses[parent] += 1
    return Graph(uses, leaves, list(edges))


def leaves(graph: Graph) -> set[int]:
    """All of its leaves, by identity."""
    nodes: list[Any] = [node for node in graph.uses if type(node) is _LEAF]
    return {id(node.variable) for node in nodes}


def writes(graph: Graph) -> bool:
    """Whether there is a BatchNorm in training mode that keeps running statistics."""
    nodes: list[Any] = [node for node in graph.uses if type(node).__name__ in _NORMS]
    return any(
        getattr(node, "_saved_training", True) and getattr(node, "_saved_running_mean", None) is not None
        for node in nodes
    )


_NORMS = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}


def wanted(edges: Iterable[Edge], leaves: Iterable[Tensor]) -> Callable[[Tensor], bool]:
    """Whether a tensor is one of these."""
    nodes, ids = set(edges), {id(leaf) for leaf in leaves}
    return lambda tensor: id(tensor) in ids or (tensor.grad_fn, tensor.output_nr) in nodes


class Mode(TorchFunctionMode):
    """Each tensor that a function of torch is given, replaced; ``see`` is told what it returns."""

    def __init__(self, replace: Callable[[Tensor], Tensor], see: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        self.replace, self.see = replace, see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = torch_pytree.tree_map_only(Tensor, self.replace, (args, dict(kwargs or {})))
        result = func(*args, **kwargs)
        if self.see is not None:
            for leaf in torch_pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
        return result


@contextmanager
def under(mode: Mode) -> Iterator[None]:
    """With the mode, in which compiled functions run as they were written: Dynamo would trace the mode into them."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(), mode:
        yield


@contextmanager
def replacing(
    tensors: list[Tensor], leaves: list[Tensor], wanted: Callable[[Tensor], bool] | None = None
) -> Iterator[None]:
    """With ``leaves`` in the place of ``tensors``; what is ``wanted`` is added to both when it is met."""
    if not tensors and wanted is None:
        yield
        return
    table = {id(tensor): leaf for tensor, leaf in zip(tensors, leaves, strict=True)}
    own = {id(leaf) for leaf in leaves}

    def replace(tensor: Tensor) -> Tensor:
        found = table.get(id(tensor))
        if found is None and wanted is not None and id(tensor) not in own and wanted(tensor):
            # A transform inside of the function would not have it be a leaf.
            with temporarily_clear_interpreter_stack():
                found = tensor.detach().requires_grad_()
            own.add(id(found))
            table[id(tensor)] = found
            tensors.append(tensor)
            leaves.append(found)
        return tensor if found is None else found

    with under(Mode(replace)):
        yield
