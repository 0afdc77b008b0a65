"""One piece of a call that plain autograd differentiates: run, and run backward into gradients of the whole call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from gradacc import _graph, _surroundings
from gradacc._pieces import closed, outputs
from gradacc._pieces.divide import Piece

SOURCE, REPLACED, CLOSED = "source", "replaced", "closed"

Key: TypeAlias = tuple[str, int]
"""An input of the node: a source that is differentiated, or what is closed over, by its number among them."""


@dataclass(slots=True, eq=False)
class Call:
    """What the pieces of a call have in common."""

    name: str
    func: Callable[..., Any]
    sources: set[int] = field(default_factory=set)
    """The numbers of those that are differentiated."""
    replaced: list[Tensor] = field(default_factory=list)
    """What the function closes over and is replaced: NOTE [closed-over tensors]."""
    closed: dict[int, tuple[ref[Tensor], int]] = field(default_factory=dict)
    """By identity, leaves that it closes over, or made itself, which are gone with their piece; and their numbers."""
    met: int = 0
    """How many there were: an identity may be somebody else's later."""
    strange: list[ref[Tensor]] = field(default_factory=list)
    """Of a second run, leaves that the first had not."""
    reached: set[Key] = field(default_factory=set)
    """Inputs to which some graph has led."""
    again: bool = False
    """Whether this is a second run."""


class Ran(NamedTuple):
    """One piece after its forward pass."""

    output: outputs.Output
    """Of values without their graphs."""
    roots: dict[int, Tensor]
    """By the number of a leaf of the output that is differentiable: it, with a node of our own as its graph."""
    inputs: list[tuple[Key, Tensor, int | None]]
    """Leaves of the graph. Their gradients are a part of the whole's along a dimension, or without one summed over pieces."""
    uses: dict[Node, int]
    """The nodes of the graph, each with the number of edges that lead to it."""
    nodes: list[Node]
    """Of its own leaves, guarded: they live as long as their graph, or this."""
    hooked: bool
    """Whether hooks were registered meanwhile, maybe on nodes of the graph."""


def run(call: Call, piece: Piece, sources: Sequence[Any]) -> Ran:
    """Run one piece, in grad mode."""
    own = [leaf for leaf in piece.leaves(sources) if isinstance(leaf, Tensor)]
    before = None if call.again else _surroundings.of(own)
    ran, foreign = _run(call, piece, sources, None)
    if foreign is None:
        return ran
    if before is None:
        raise _changed(call)
    del ran
    _surroundings.rewind(before)
    ran, foreign = _run(call, piece, sources, foreign)
    if foreign is not None:
        raise ValueError(
            f"{call.name}: func closes over a tensor that requires grad and is not a leaf, or has hooks, and gives it to a "
            "function that hides it (a custom autograd.Function, a scripted one): its gradient would be lost. Pass it to func "
            "as an argument (in_dims=None where it is whole)"
        )
    return ran


def check_strange(call: Call) -> None:
    """After a second run: it closed over nothing else than the first.

    Raises:
        RuntimeError: it did.
    """
    if any(leaf() is not None for leaf in call.strange):
        raise _changed(call)


def _changed(call: Call) -> RuntimeError:
    return RuntimeError(
        f"{call.name}: func, run again in the backward pass, uses a tensor that requires grad and that it did not use in the "
        "forward pass, so that its gradient would be lost. Pass what it uses as arguments, and change nothing in between"
    )


def _run(
    call: Call, piece: Piece, sources: Sequence[Any], wanted: Callable[[Tensor], bool] | None
) -> tuple[Ran, Callable[[Tensor], bool] | None]:
    """And what it closes over and is to be replaced, where there is something left."""
    inputs: list[tuple[Key, Tensor, int | None]] = []
    arguments = piece.leaves(sources)
    given = [(leaf, leaf._version) for leaf in arguments if isinstance(leaf, Tensor)]
    for at, (source, dim) in enumerate(piece.picks):
        if source in call.sources:
            arguments[at] = arguments[at].detach().requires_grad_()
            inputs.append(((SOURCE, source), arguments[at], dim))
    aliases = [tensor.detach().requires_grad_() for tensor in call.replaced]
    nodes = [_guarded(call, leaf) for leaf in (*(leaf for _, leaf, _ in inputs), *aliases)]
    # Else a cast of an earlier piece's, or of before, would lead out of this one's graph.
    torch.clear_autocast_cache()
    with torch.enable_grad():
        since, hooks = _graph.now(torch.zeros((), requires_grad=True)), RemovableHandle.next_id
        with closed.replacing(call.replaced, aliases, wanted) as replace:
            output = outputs.flatten(piece.call(closed.seen(call.func, replace), arguments), _Nothing.apply)
        _check_unchanged(call, given)
        roots = {
            i: value.view_as(value)
            for i, value in enumerate(output.leaves)
            if isinstance(value, Tensor) and value.requires_grad
        }
    inputs += [((REPLACED, n), alias, None) for n, alias in enumerate(aliases)]
    uses, edges = closed.graph([root.grad_fn for root in roots.values() if root.grad_fn is not None], since)
    _graph.check_checkpoints(uses, f"{call.name}: func", "inputs")
    leaves, own = _graph.leaves(uses), {id(leaf) for _, leaf, _ in inputs}
    others = [leaf for leaf in leaves if id(leaf) not in own]
    hooked = [leaf for leaf in others if leaf._backward_hooks]
    foreign = closed.wanted(edges, hooked) if edges or hooked else None
    if foreign is None:
        for leaf in others:
            number = _number_of(call, leaf)
            if number is not None:
                inputs.append(((CLOSED, number), leaf, None))
        reached = set(map(id, leaves))
        call.reached.update(key for key, leaf, _ in inputs if id(leaf) in reached)
    return Ran(outputs.detached(output), roots, inputs, uses, nodes, hooks != RemovableHandle.next_id), foreign


def _guarded(call: Call, leaf: Tensor) -> Node:
    """The node of a leaf of ours. Only what func has left somewhere, and did not return, leads a backward pass to it."""

    def refuse(_: Any) -> None:
        raise RuntimeError(
            f"{call.name}: a backward pass has reached a tensor that func left in another place (an attribute, a list) and "
            "did not return, and the gradient of func's arguments would be lost there. Return it from func"
        )

    node = get_gradient_edge(leaf).node
    node.register_prehook(refuse)
    return node


def _check_unchanged(call: Call, given: Sequence[tuple[Tensor, int]]) -> None:
    """A second run is to be given the same."""
    for leaf, version in given:
        if leaf._version != version:
            raise ValueError(
                f"{call.name}: func changes its argument in place (a tensor of shape {tuple(leaf.shape)}, {leaf.dtype}). "
                "The backward pass, which runs it again, would find what it has left. Let func work on a copy: x = x.clone()"
            )


def _number_of(call: Call, leaf: Tensor) -> int | None:
    """Of a leaf that is an input of the node, as far as it can be known; None where a second run has met a new one."""
    known = call.closed.get(id(leaf))
    if known is not None and known[0]() is leaf:
        return known[1]
    if call.again:
        call.strange.append(ref(leaf))
        return None
    call.met += 1
    call.closed[id(leaf)] = ref(leaf), call.met
    return call.met


class _Nothing(torch.autograd.Function):
    """A zero that depends on its argument, which gets no gradient at all: 0 times what may be infinite is none."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return torch.zeros_like(total)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> None:
        return None
