"""What a loss closes over: leaves of its graph that are not its parameters.

NOTE [leaves that are not parameters]
    A leaf that the loss was not given as a parameter is a constant: a teacher's weights, the other network of a GAN. Two kinds
    are no constants but mistakes, whose gradient would be lost without a word, so they are errors:

    - a parameter of a module in whose place `apply` was given another tensor that is differentiated: a penalty over
      ``module.parameters()``, ``module(x)`` beside ``apply(params, x)``, or a forward pass that reaches the module's own
      parameters where NOTE [the module's own tensors] does not see it (through a view, a thread, a scripted function);
    - a tensor in the memory of a parameter, or a leaf that the engine made of a parameter for an earlier micro-batch: the
      caller's own parameters, closed over, or a memo that outlived its micro-batch (``memo.setdefault("wt", w.t())``).

    What is meant as a constant has no graph (``weight.detach()``), or is an argument of the call.

    This is read from the graph that the eager engine differentiates. Under torch.func's transforms and while Dynamo traces
    there is none, and a constant is a constant, as it is for `torch.func.grad`; and a graph does not show what was
    computed without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

from gradacc import _tree, _where


class Seen(NamedTuple):
    """Of one run of a loss."""

    arguments: list[Any]
    """Trees: what the call was given beside its parameters."""
    replaced: list[dict[str, Tensor]]
    """By name, parameters of modules for which `apply` was given others that are differentiated."""


MARK = "_gradacc_leaf"
"""The attribute of a leaf that the engine made of a parameter."""
_running: ContextVar[Seen | None] = ContextVar("of the loss that the eager engine runs", default=None)


def seeing() -> AbstractContextManager[Seen]:
    """While the eager engine runs a loss."""
    return _where.setting(_running, Seen([], []))


def note_arguments(arguments: Any) -> None:
    """The loss that runs belongs to a call with these."""
    seen = _running.get()
    if seen is not None:
        seen.arguments.append(arguments)


def note_replaced(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """The loss that runs uses ``given`` in the place of a module's ``own``."""
    seen = _running.get()
    if seen is not None:
        seen.replaced.append({name: tensor for name, tensor in own.items() if given[name].requires_grad})


def mark(leaves: Iterable[Any]) -> None:
    """Leaves that the engine made of parameters."""
    for leaf in leaves:
        # Which a copy of it has not.
        setattr(leaf, MARK, id(leaf))


def check_replaced(closed: Iterable[Tensor], seen: Seen) -> None:
    """Of leaves that are not the loss's parameters, none is a module's in whose place `apply` was given another.

    Raises:
        ValueError: NOTE [leaves that are not parameters].
    """
    names = {id(tensor): name for replaced in seen.replaced for name, tensor in replaced.items()}
    for leaf in closed:
        name = names.get(id(leaf))
        if name is not None and not _is_among(leaf, seen.arguments):
            raise ValueError(
                f"gradacc: the loss uses the module's own {name!r} ({_describe(leaf)}) beside apply, which was given another "
                "tensor for it: the gradient that flows there would be lost. Use the params that loss_fn is given, also for a "
                "penalty (sum(p.square().sum() for p in params.values())) and for another pass (apply instead of module). If "
                f"the loss does neither, the forward pass reaches {name!r} through another thread, a view, a scripted "
                "function or what an earlier pass left on the module. What is meant as a constant is its detach()"
            )


def check_memory(closed: Iterable[Tensor], params: Sequence[Tensor], seen: Seen) -> None:
    """Of leaves that are not the loss's parameters, none is or was a parameter under another name.

    Raises:
        ValueError: NOTE [leaves that are not parameters].
    """
    memory: dict[int, list[int]] = {}
    for number, param in enumerate(params):
        memory.setdefault(param.untyped_storage()._cdata, []).append(number)
    for leaf in closed:
        same = memory.get(leaf.untyped_storage()._cdata, ())
        inside = [number for number in same if _overlap(leaf, params[number])]
        if not inside and getattr(leaf, MARK, None) != id(leaf):
            continue
        # One that is an argument is connected: NOTE [connected results].
        if _is_among(leaf, (params, seen.arguments)):
            continue
        if isinstance(leaf, nn.Parameter):
            raise ValueError(
                f"gradacc: the loss uses an nn.Parameter ({_describe(leaf)}) in the memory of one that it is given, leaf "
                f"{inside[0]} of params, instead of that one: the gradient that flows there would be lost. Use the params that "
                "loss_fn is given; what is meant as a constant is its detach()"
            )
        raise ValueError(
            f"gradacc: the loss uses what was made of params before this micro-batch ({_describe(leaf)}), and the gradient "
            f"that flows there would be lost. {_MEMO}"
        )


def check_age(nodes: Iterable[Node], since: int, error: BaseException) -> None:
    """Autograd has raised ``error``: no graph's node is one whose tensors a backward pass has freed before this micro-batch,
    which began at ``since``.

    Raises:
        ValueError: there is one among ``nodes``.
    """
    # Not out of memory, say.
    if type(error) is not RuntimeError:
        return
    old = next((node for node in nodes if node._sequence_nr() < since and _is_freed(node)), None)
    if old is not None:
        raise ValueError(
            f"gradacc: the loss uses what was made of params before this micro-batch (by {old.name()}), and the graph of "
            f"that is gone. {_MEMO}"
        ) from error


def _is_freed(node: Any) -> bool:
    """Whether what it has saved is gone."""
    for name in dir(node):
        if name.startswith("_saved_"):
            try:
                getattr(node, name)
            except RuntimeError:
                return True
    return False


_MEMO = (
    "Something computed from the params is kept in a memo (a class attribute, a global, a dict, functools.cache), or loss_fn "
    "closes over them: compute it anew from the params that each call of loss_fn is given. What is meant as a constant is its "
    "detach()"
)


def _is_among(leaf: Tensor, trees: Any) -> bool:
    return any(leaf is other for other in _tree.flatten(trees)[0])


def _describe(leaf: Tensor) -> str:
    return f"of shape {tuple(leaf.shape)} and dtype {leaf.dtype}"


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Of one storage: whether the places from their first to their last element have some in common."""
    (first, last), (start, end) = _extent(one), _extent(other)
    return first < end and start < last


def _extent(tensor: Tensor) -> tuple[int, int]:
    first, size = int(tensor.storage_offset()), tensor.element_size()
    length = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return first * size, (first + (length if tensor.numel() else 0)) * size
