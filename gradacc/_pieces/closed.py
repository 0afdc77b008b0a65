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

import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias
from weakref import ref

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from gradacc import _tree, _where

Edge = tuple[Node, int]
"""A node, and which of its results."""


def graph(roots: Iterable[Node], since: int) -> tuple[dict[Node, int], list[Edge]]:
    """As `_graph.nodes`, of what was recorded from ``since`` on (all leaves were); and the edges to what was not."""
    uses = dict.fromkeys(roots, 0)
    stack = list(uses)
    edges: dict[Edge, None] = {}
    while stack:
        for parent, number in stack.pop().next_functions:
            if parent is None:
                continue
            if parent._sequence_nr() < since:
                edges[parent, number] = None
                continue
            if parent not in uses:
                uses[parent] = 0
                stack.append(parent)
            uses[parent] += 1
    return uses, list(edges)


def writes(graph: Iterable[Node]) -> bool:
    """Whether there is a BatchNorm in training mode that keeps running statistics, among these nodes."""
    nodes: list[Any] = [node for node in graph if type(node).__name__ in _NORMS]
    return any(
        getattr(node, "_saved_training", True) and getattr(node, "_saved_running_mean", None) is not None
        for node in nodes
    )


_NORMS = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}


def wanted(edges: Iterable[Edge], leaves: Iterable[Tensor]) -> Callable[[Tensor], bool]:
    """Whether a tensor is one of these."""
    nodes, ids = set(edges), {id(leaf) for leaf in leaves}
    return lambda tensor: id(tensor) in ids or (tensor.grad_fn, tensor.output_nr) in nodes


Replacements: TypeAlias = tuple[tuple[list[Tensor], list[Tensor]], ...]
"""Tensors, and those in their place, of functions around functions."""

_active: ContextVar[Replacements] = ContextVar("what is replaced", default=())


class Mode(TorchFunctionMode):
    """Each tensor that a function of torch is given, replaced; ``see`` is told what it returns."""

    def __init__(self, replace: Callable[[Tensor], Tensor], see: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        self.replace, self.see = replace, see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = {name: _mapped(self.replace, value) for name, value in (kwargs or {}).items()}
        result = func(*(_mapped(self.replace, value) for value in args), **own)
        if self.see is not None:
            for leaf in torch_pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
        return result


def _mapped(replace: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Every tensor in an argument of a function of torch, which takes sequences of any class."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(replace, item) for item in value))
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(_mapped(replace, item) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(replace, item) for key, item in value.items()}
    return value


@contextmanager
def under(mode: Mode) -> Iterator[None]:
    """With the mode, in which compiled functions run as they were written: Dynamo would trace the mode into them."""
    with _uncompiled(), mode:
        yield


_lock = threading.Lock()
_stances: list[Any] = []
"""Of all threads: torch has one for the process."""


@contextmanager
def _uncompiled() -> Iterator[None]:
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        _stances.append(torch.compiler.set_stance("force_eager") if not _stances else None)
        if len(_stances) == 1:
            _stances[0].__enter__()
    try:
        yield
    finally:
        with _lock:
            if len(_stances) == 1:
                _stances[0].__exit__(None, None, None)
                _stances.clear()
            else:
                _stances.pop()


@contextmanager
def replacing(
    tensors: list[Tensor], leaves: list[Tensor], wanted: Callable[[Tensor], bool] | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """With ``leaves`` in the place of ``tensors``; what is ``wanted`` is added to both when it is met.

    What the function returns no mode sees: it is to go through the function that is yielded.
    """
    if not tensors and wanted is None:
        yield lambda tensor: tensor
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

    with _where.setting(_active, (*_active.get(), (tensors, leaves))), under(Mode(replace)):
        yield replace


def active() -> Replacements:
    """What is replaced here, as it is now."""
    return tuple((list(tensors), list(leaves)) for tensors, leaves in _active.get())


@contextmanager
def again(replacements: Replacements) -> Iterator[None]:
    """What was replaced there: pieces of pieces, run again, close over what the outer ones had in its place."""
    with ExitStack() as stack:
        for tensors, leaves in replacements:
            stack.enter_context(replacing(tensors, leaves))
        yield


def seen(func: Callable[..., Any], replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """``func``, with what it returns replaced too."""

    def seeing(*args: Any, **kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        leaves, treedef = _tree.flatten(output)
        others = [replace(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return output if all(map(operator.is_, leaves, others)) else _tree.unflatten(treedef, others)

    return seeing


@contextmanager
def meeting(inputs: Sequence[Tensor], met: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """What is of a transform or requires grad, and is neither an input nor made meanwhile, is ``met``: it takes its place."""
    own = set(map(id, inputs))
    made: dict[int, ref[Tensor]] = {}

    def replace(tensor: Tensor) -> Tensor:
        known = made.get(id(tensor))
        if id(tensor) in own or (known is not None and known() is tensor):
            return tensor
        is_foreign = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.requires_grad
        return met(tensor) if is_foreign else tensor

    def see(tensor: Tensor) -> None:
        made[id(tensor)] = ref(tensor)

    with under(Mode(replace, see)):
        yield replace
