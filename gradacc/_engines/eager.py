"""The eager engine: ordinary autograd on detached leaves, accumulated in place while the backward pass runs.

.. code-block:: text

    for microbatch:
        leaf = param.detach().requires_grad_()      # shares param's memory; nothing that the loss does to it stays
        total = loss(leaf, microbatch)
        leaf.grad = buffer                          # autograd adds into it, layer by layer
        backward(total, cotangent, inputs=leaf)

The first micro-batch's gradients become the buffer (autograd hands them over), the later ones are added in place.

NOTE [buffers that nobody else holds]
    Autograd makes a gradient the leaf's ``.grad`` without a copy when no other *tensor object* refers to it. It does not
    look at the storage: the gradients of ``p`` and ``q`` in ``((p.view(2, 3) + q.view(2, 3)) * c).sum()`` are two views of
    one storage, and adding in place to one changes the other (a ``.backward()`` loop returns 3x the gradient for two equal
    micro-batches). A custom ``Function`` that returns a view of something that the user holds has the same effect. So a
    gradient that has just become a buffer is copied if its storage has other owners, is not torch's own (a NumPy array),
    or is larger than the gradient (a slice would keep all of it alive).

NOTE [leaves of a whole call]
    All micro-batches of a call have the same leaves, unless something was done to them (an attribute, ``.data``), or any hook
    was registered meanwhile, which torch counts:
    what `functional` makes of them serves them all too, NOTE [replicas of a whole call]. So what a loss has memoised of them in
    an earlier micro-batch leads to the same leaves, and its gradient is right; but where it is something whose graph is gone
    after one backward pass, torch raises, and we say why.

NOTE [reentrant checkpoints]
    ``checkpoint(..., use_reentrant=True)`` runs a second backward pass inside the first, which torch allows only if that one
    is not restricted to given leaves. Torch raises when it gets there; but where no path from the loss to a leaf leads
    through the checkpoint's *inputs*, it does not get there, and parameters used inside would silently get no gradient. So
    each micro-batch's graph is searched (1 us a node).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from gradacc import _closed, _graph, _left, _tree, _where
from gradacc._engines import Buffer, Deliver, Grads, fused
from gradacc._loss import Outcome
from gradacc._sums import Contribution, Pass


class Tape(NamedTuple):
    """One micro-batch's graph."""

    leaves: list[Tensor]
    targets: list[Tensor]
    edges: list[GradientEdge | None]
    """Of each target; None where it depends on nothing that requires grad."""
    seen: _closed.Seen
    since: int
    """The number of the first node of this micro-batch."""
    hooked: bool = False
    """Whether hooks were registered while the loss ran, maybe on nodes of the graph, which does not show them."""


def guard() -> AbstractContextManager[None]:
    """Normal mode: under ``inference_mode`` nothing could be differentiated, and outputs would be inference tensors."""
    return torch.inference_mode(False)


def init(
    params: Sequence[Tensor], dtypes: Sequence[torch.dtype], grads: Grads | None = None, donated: bool = False
) -> Buffer:
    """With gradients that were accumulated before, if any: in their memory if they are donated, else in copies."""
    grads = [None] * len(params) if grads is None else grads
    alone = _with_own_storage(grads) if donated else set()
    held = [None if grad is None else _to_add_to(grad, i in alone) for i, grad in enumerate(grads)]
    return Buffer([_without_inference(param) for param in params], list(dtypes), held, False, {}, [], 0)


@contextmanager
def calling(arguments: Any, passes: _left.Call) -> Iterator[None]:
    """Around the loss: another ``grad_fn`` that it calls must be differentiable."""
    _closed.note_arguments(arguments)
    with _where.inside_a_loss(), _left.unreadable(passes):
        yield


def admit(tree: Any) -> Any:
    """An argument of the loss: itself, but for inference tensors, which autograd refuses; they are copied."""
    leaves = _tree.flatten(tree)[0]
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        return _tree.map_tensors(_without_inference, tree)
    return tree


def forward(buffer: Buffer, loss: Callable[[Sequence[Tensor]], Outcome]) -> tuple[Tape, Outcome]:
    """Run the loss of one micro-batch."""
    leaves = buffer.leaves
    if buffer.hooks != RemovableHandle.next_id or not _are_as_made(leaves, buffer.params):
        leaves = [param.detach().requires_grad_() for param in buffer.params]
    if not buffer.arrived:
        # Of later micro-batches of a call, the parameters' memory tells enough.
        _closed.mark(leaves)
    with torch.enable_grad(), _closed.seeing() as seen:
        # Torch counts the hooks that it has ever been given.
        since, hooks = _graph.now(leaves[0]), RemovableHandle.next_id
        outcome = loss(leaves)
        # A node of our own, through which no other pass goes: a node of the loss may differentiate it again.
        roots = [target.view_as(target) for target in outcome.targets]
    _check_untouched(leaves)
    edges = [get_gradient_edge(root) if root.requires_grad else None for root in roots]
    # From here on the edges alone keep the graph.
    outcome = outcome.map(_without_graph)
    return Tape(leaves, outcome.targets, edges, seen, since, RemovableHandle.next_id != hooks), outcome


def give_up(buffer: Buffer, tape: Tape) -> Buffer:
    """The buffer, where a tape is not to be played back: its leaves are as they were made, NOTE [leaves of a whole call]."""
    _forget_casts(tape.leaves)
    return buffer._replace(leaves=[] if tape.hooked else tape.leaves, hooks=RemovableHandle.next_id)


def backward(buffer: Buffer, tape: Tape, counts: Contribution, deliver: Deliver | None = None) -> Buffer:
    """Run it backward, into the buffer: ``buffer.grads`` is changed in place."""
    _grow(buffer.grads, counts.growth)
    pairs = list(zip(tape.edges, counts.passes, strict=True))
    reached = [at for at, (edge, own) in enumerate(pairs) if edge is not None and own is not None]
    number = len(buffer.params)
    for at in reached:
        # One target's gradients are the buffer's own list, into which others may look meanwhile.
        single = len(pairs) == 1
        part = buffer if single else buffer._replace(grads=buffer.grads[at * number : (at + 1) * number])
        try:
            after = _backward(part, tape, at, counts, deliver, at == reached[-1])
        except RuntimeError as error:
            _closed.check_age(_graph.nodes([edge.node for edge in tape.edges if edge is not None]), tape.since, error)
            raise
        buffer.grads[at * number : (at + 1) * number] = after.grads
        buffer = after._replace(grads=buffer.grads)
    return buffer


def _backward(
    buffer: Buffer, tape: Tape, at: int, counts: Contribution, deliver: Deliver | None, is_last: bool
) -> Buffer:
    """Of one target; only the last pass through a graph gives it up."""
    leaves, edge, own = tape.leaves, tape.edges[at], counts.passes[at]
    assert edge is not None
    assert own is not None
    uses = _graph.nodes([edge.node])
    _graph.check_checkpoints(uses, "gradacc: the loss", "the parameters")
    closes = _note_closed(buffer, leaves, uses, tape.seen)
    reached: set[int] = set()
    done = partial(_done, buffer.grads, reached, deliver)
    edges: list[GradientEdge] = []
    added: set[int] = set()
    # NOTE [reading the graph]
    if not (counts.narrow or tape.hooked):
        edges, added = fused.install(edge.node, uses, leaves, buffer.grads, own.keeps, done)
    rest = [i for i in range(len(leaves)) if i not in added]
    hook: Callable[[int, Tensor], None] | None = None
    if counts.narrow or own.keeps is not None:
        hook = partial(_add_leaf_grad, buffer, own, done)
    else:
        for i in rest:
            leaves[i].grad = buffer.grads[i]
        # Without anybody to deliver to, what is there is taken when all is over: no hook at all.
        hook = None if deliver is None else partial(_take_leaf_grad, buffer.grads, done)
    handles: list[RemovableHandle] = []
    if hook is not None:
        for i, leaf in enumerate(leaves):
            handles.append(leaf.register_post_accumulate_grad_hook(partial(hook, i)))  # type: ignore[no-untyped-call]  # torch's
    # A pass that leads to our leaves alone need not be restricted to them, which costs as much as many small nodes.
    inputs: list[Any] | None = [*(leaves[i] for i in rest), *edges] if closes or edges else None
    hooks = RemovableHandle.next_id
    cotangent = _like(tape.targets[at], own.cotangent)
    torch.autograd.backward(edge, cotangent, retain_graph=not is_last, inputs=inputs)
    if not is_last:
        # The next pass ends in the same leaves.
        for handle in handles:
            handle.remove()
    if hook is None:
        reached.update(_take_leaf_grads(buffer.grads, leaves))
    _forget_casts(leaves)
    # NOTE [leaves of a whole call]
    kept = leaves if hook is None and not tape.hooked and hooks == RemovableHandle.next_id else []
    return buffer._replace(arrived=buffer.arrived or bool(reached), leaves=kept, hooks=hooks)


def merge(a: Grads, b: Grads, shares: tuple[float | Tensor, float | Tensor], donated: bool) -> list[Tensor | None]:
    """``shares[0] * a + shares[1] * b``, one of them 1: its sum is the one that is added to."""
    swapped = isinstance(shares[0], float) and shares[0] != 1.0
    (large, one), (small, share) = ((b, shares[1]), (a, shares[0])) if swapped else ((a, shares[0]), (b, shares[1]))
    alone, n = _with_own_storage([*large, *small]) if donated else set(), len(large)
    return [
        _merged(mine, one, theirs, share, i in alone, i + n in alone)
        for i, (mine, theirs) in enumerate(zip(large, small, strict=True))
    ]


def finalize(buffer: Buffer, dtypes: Sequence[torch.dtype], factors: Sequence[float | Tensor]) -> list[Tensor]:
    """The gradients of each target times its factor, summed; each buffer is given up when its result exists."""
    # Of the last micro-batch, where it counted for nothing.
    _forget_casts(buffer.params)
    results, number = [], len(buffer.params)
    for i, (param, dtype) in enumerate(zip(buffer.params, dtypes, strict=True)):
        total: Tensor | None = None
        for at, factor in zip(range(i, len(buffer.grads), number), factors, strict=False):
            grad, buffer.grads[at] = buffer.grads[at], None
            if grad is not None:
                total = _times(grad, factor) if total is None else total.add_(_times(grad, factor))
        total = torch.zeros_like(param, dtype=dtype, requires_grad=False) if total is None else total
        results.append(total.to(dtype))
    return results


def _are_as_made(leaves: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether these are leaves of the parameters, to which nothing has been done: NOTE [leaves of a whole call]."""
    return (
        {*map(type, leaves)} == {Tensor}
        and all(
            leaf.requires_grad and leaf.grad_dtype == leaf.dtype and (leaf.is_cpu or leaf.is_cuda) for leaf in leaves
        )
        and {key for leaf in leaves for key in leaf.__dict__} <= {_closed.MARK}
        and all(map(Tensor.is_set_to, leaves, params))
    )


def _forget_casts(leaves: Sequence[Tensor]) -> None:
    """Autocast would keep its casts of these leaves until the outermost one ends."""
    device = leaves[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()


def _check_untouched(leaves: Sequence[Tensor]) -> None:
    """A loss that calls ``.backward()`` on the parameters would add to what is accumulated."""
    if [leaf.grad for leaf in leaves].count(None) < len(leaves):
        raise ValueError(
            "gradacc: the loss called .backward() through the parameters that it was given. Use torch.autograd.grad or "
            "torch.func.grad for a gradient inside a loss, or detach() the parameters there"
        )


def _note_closed(buffer: Buffer, leaves: Sequence[Tensor], uses: Mapping[Node, int], seen: _closed.Seen) -> bool:
    """NOTE [leaves that are not parameters]; whether there are some."""
    own = set(map(id, leaves))
    others = [leaf for leaf in _graph.leaves(uses) if id(leaf) not in own]
    if others:
        closed = buffer.closed
        _closed.check_replaced(others, seen)
        _closed.check_memory(
            [leaf for leaf in others if id(leaf) not in closed or closed[id(leaf)]() is not leaf], buffer.params, seen
        )
        closed.update((id(leaf), weakref.ref(leaf)) for leaf in others)
    return bool(others)


def _like(target: Tensor, number: float | Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device=target.device, dtype=target.dtype)
    return torch.full_like(target, number)


def _grow(grads: Grads, growth: float | Tensor) -> None:
    """All that has been summed, in a larger unit."""
    if isinstance(growth, Tensor) or growth != 1.0:
        for grad in grads:
            if grad is not None:
                _times(grad, growth)


def _done(grads: list[Tensor | None], reached: set[int], deliver: Deliver | None, index: int) -> None:
    """This micro-batch's part of a gradient is in the buffer."""
    reached.add(index)
    grad = grads[index]
    if deliver is not None and grad is not None:
        deliver(index, grad)
        grads[index] = None


def _take_leaf_grad(grads: list[Tensor | None], done: Callable[[int], None], index: int, leaf: Tensor) -> None:
    """A leaf's ``.grad`` is the buffer: the one that it was given, or a first gradient."""
    for _ in _take_leaf_grads(grads, [leaf], index):
        done(index)


def _take_leaf_grads(grads: list[Tensor | None], leaves: Sequence[Tensor], first: int = 0) -> list[int]:
    """The same of all that have one, from the ``first`` on: which they are."""
    found = [(i, leaf, leaf.grad) for i, leaf in enumerate(leaves, first) if leaf.grad is not None]
    for i, leaf, grad in found:
        leaf.grad = None
        if grads[i] is None:
            assert grad is not None
            grads[i] = as_buffer(grad)
    return [i for i, _, _ in found]


def _add_leaf_grad(buffer: Buffer, own: Pass, done: Callable[[int], None], index: int, leaf: Tensor) -> None:
    """Move a gradient into its accumulator, by hand, as soon as it is there."""
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    dtype, sofar, factor, keeps = buffer.dtypes[index], buffer.grads[index], own.factor, own.keeps
    if isinstance(factor, Tensor):
        # Two 0-dim tensors have the wider dtype.
        grad, factor = (grad.to(dtype) * factor.to(grad.device)).to(dtype), 1.0
    if keeps is not None:
        grad = torch.where(keeps.to(grad.device), grad, 0)
    if sofar is None:
        # NOTE [buffers that nobody else holds]
        grad = grad.to(dtype, copy=keeps is None)
        buffer.grads[index] = grad.mul_(factor) if factor != 1.0 else grad
    else:
        sofar.add_(grad, alpha=factor)
    done(index)


def _without_graph(tensor: Tensor) -> Tensor:
    """Without its graph; a number in a storage of its own, which may be larger than it is (mse_loss's is)."""
    return tensor.detach().clone() if tensor.dim() == 0 else tensor.detach()


def _without_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def as_buffer(grad: Tensor) -> Tensor:
    """A first gradient as a buffer of ours: dense, in a storage of its own; NOTE [buffers that nobody else holds]."""
    if grad.layout != torch.strided:
        return grad.to_dense()
    storage = grad.untyped_storage()
    owners = torch._C._storage_Use_Count(storage._cdata) - 1  # less this function's `storage`
    ours = owners == 1 and storage.resizable() and storage.nbytes() == grad.nbytes
    return grad if ours else grad.clone()


def _with_own_storage(grads: Grads) -> set[int]:
    """Which of them share their storage with no other."""
    storages = [None if grad is None else grad.untyped_storage()._cdata for grad in grads]
    counts = Counter(storages)
    return {i for i, storage in enumerate(storages) if storage is not None and counts[storage] == 1}


def _to_add_to(grad: Tensor, donated: bool) -> Tensor:
    """A state's gradient, to be added to: itself if it may be, else a copy."""
    if donated and not grad.is_inference() and not grad.requires_grad:
        return as_buffer(grad)
    return grad.detach().clone()


def _merged(
    large: Tensor | None, one: float | Tensor, small: Tensor | None, share: float | Tensor, ours: bool, theirs: bool
) -> Tensor | None:
    """``one * large + share * small``; ``ours``, ``theirs``: in whose memory it may be."""
    if large is None:
        return None if small is None else _times(_to_add_to(small, theirs), share)
    held = _times(_to_add_to(large, ours), one)
    if small is None:
        return held
    if isinstance(share, Tensor):
        return held.add_(_times(small.detach().clone(), share))
    return held.add_(small.detach(), alpha=share)


def _times(grad: Tensor, factor: float | Tensor) -> Tensor:
    """In place; nothing where the factor is known to be 1."""
    if isinstance(factor, Tensor):
        return grad.mul_(factor.to(grad.device))
    return grad if factor == 1.0 else grad.mul_(factor)
