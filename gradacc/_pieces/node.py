"""One node of plain autograd for all pieces of a call.

.. code-block:: text

    recompute:  forward    y_i = func(x_i, w)                       keeps x and w
                backward   run func(x_i, w) again; x_i's and w's gradients from the part of the cotangent that is y_i's
    forward:    forward    s = sum_i func(x_i, w)                   0-dim; takes its gradients g on the way
                backward   cotangent * g

NOTE [what a second run relies on]
    A second run must be the first. Arguments, and what requires grad, are saved as autograd saves; of other tensors that the
    function closes over by name it is known whether they have changed in place, and of its modules' buffers whether it changes
    them. What is neither (a name that was bound anew, a counter, what a list holds, a generator of another library) is the
    caller's.

NOTE [derivatives of derivatives]
    With ``create_graph`` the gradients are computed as they are without, and connected by `_connect.Connection` to the plain
    function of all pieces, which a second backward pass runs, and differentiates twice. It keeps what that keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from gradacc import _connect, _surroundings, _tree, _where
from gradacc._options import Backward
from gradacc._pieces import closed, composite, held, join, outputs, pull
from gradacc._pieces.divide import Piece, Pieces
from gradacc._pieces.forward import Fold, Joined
from gradacc._pieces.gradients import Gradients
from gradacc._pieces.pull import CLOSED, REPLACED, SOURCE, Call, Key


class Plan(NamedTuple):
    """What the backward pass needs, but for tensors."""

    call: Call
    pieces: list[Piece]
    sources: list[Any]
    """None where it is a tensor,"""
    tensors: list[int]
    """as these are."""
    joined: Joined
    differentiable: list[int]
    """Leaves of the output."""
    inputs: list[Key]
    """Of the node."""
    gradients: Gradients | None
    """Taken with the forward pass, where they were."""
    around: _surroundings.Surroundings
    inside: bool
    """Whether a loss of the eager engine was running."""
    around_it: closed.Replacements
    """What pieces of which this call is a part had replaced."""
    before: list[_surroundings.Surroundings]
    """Of each piece, where something else may have drawn random numbers between them."""
    held: dict[str, tuple[Tensor, int]]
    """What the function closes over: NOTE [what a second run relies on]."""


def run(func: Callable[..., Any], of: Pieces, outs: outputs.Outs, backward: Backward) -> Any:
    """What the whole would have returned, connected to what requires grad."""
    joined = Joined(outs, of)
    values = results(func, joined, backward)
    assert joined.first is not None
    return outputs.unflatten(values, joined.first)


def results(func: Callable[..., Any], joined: Joined, backward: Backward) -> list[Any]:
    """The same, leaf by leaf; ``joined`` has then seen all pieces."""
    of = joined.of
    if not torch.is_grad_enabled():
        shared = len(of.sources)
        for piece in of.parts:
            output = outputs.detached(outputs.flatten(composite.called(func, piece, of.sources)))
            joined.add(output, piece.size, piece.order)
            # Nothing is kept of an iterable's pieces.
            del of.sources[shared:]
        return joined.results()
    around = _surroundings.of([leaf for leaf in of.sources if isinstance(leaf, Tensor)])
    fold = Fold(Call(joined.outs.name, func), joined, backward)
    for piece in of.parts:
        fold.step(piece)
        if fold.gradients is not None:
            fold.gradients.forget(fold.call)
    torch.clear_autocast_cache()
    found = joined.results()
    return _connected(fold, found, around) if fold.differentiable else found


def _check_held(fold: Fold) -> None:
    """What a second run would find changed, or change again."""
    name = held.changed(fold.held)
    if name is not None:
        raise ValueError(
            f"{fold.call.name}: func has changed {name} in place, and the backward pass, which runs it again, would change it "
            "once more (running statistics of a module in training mode?). Call eval() on it, or return what is computed"
        )
    if any(leaf._version != version for leaf, version in fold.memory):
        raise ValueError(
            f"{fold.call.name}: a piece has changed in place after its turn: the iterable gives the same memory again. Let it "
            "give new tensors (clone())"
        )


def _connected(fold: Fold, results: list[Any], around: _surroundings.Surroundings) -> list[Any]:
    """The results, with the node of all pieces as their graph."""
    if fold.gradients is None:
        _check_held(fold)
    call, joined = fold.call, fold.joined
    sources = joined.of.sources
    alive = {number: leaf for leaf, number in ((known(), n) for known, n in call.closed.values()) if leaf is not None}
    call.closed = {id(leaf): (ref(leaf), number) for number, leaf in alive.items()}
    inputs: list[tuple[Key, Tensor]] = [((SOURCE, n), sources[n]) for n in sorted(call.sources)]
    inputs += [((REPLACED, n), tensor) for n, tensor in enumerate(call.replaced)]
    inputs += [((CLOSED, n), leaf) for n, leaf in alive.items()]
    differentiable = sorted(fold.differentiable)
    plan = Plan(
        call,
        fold.pieces,
        [None if isinstance(leaf, Tensor) else leaf for leaf in sources],
        [n for n, leaf in enumerate(sources) if isinstance(leaf, Tensor)],
        joined,
        differentiable,
        [key for key, _ in inputs],
        fold.gradients,
        around,
        _where.is_inside_a_loss(),
        closed.active(),
        fold.before,
        held.versions(call.func, buffers=False),
    )
    # What the backward pass frees, or a hook has moved elsewhere, is held by nothing else.
    assert joined.first is not None
    joined.states, joined.first = [], joined.first._replace(leaves=[])
    joined.of = joined.of._replace(sources=[], parts=())
    saved = [leaf for leaf in sources if isinstance(leaf, Tensor)]
    nonlinear = [at for at, i in enumerate(joined.nonlinear) if i in fold.differentiable]
    kept = [torch.as_tensor(values[at]) for values in fold.kept for at in nonlinear]
    outputs: Any = _Pieces.apply(  # type: ignore[no-untyped-call]  # torch's
        plan, saved, kept, [results[i] for i in differentiable], *(tensor for _, tensor in inputs)
    )
    return _tree.placed(results, differentiable, outputs)


class _Pieces(torch.autograd.Function):
    """The node: ``outputs``, computed before, and their derivatives."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, sources: list[Tensor], kept: list[Any], outputs: list[Tensor], *inputs: Tensor
    ) -> Any:
        ctx.plan, ctx.counts = plan, (len(sources), len(kept))
        ctx.save_for_backward(*sources, *kept, *inputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        plan, (first, second) = ctx.plan, ctx.counts
        # Read in any case: what has changed in place since, or was freed by a backward pass, is an error here.
        saved = ctx.saved_tensors
        held, kept, inputs = saved[:first], saved[first : first + second], saved[first + second :]
        given = {i: c for i, c in zip(plan.differentiable, cotangents, strict=True) if c is not None}
        count = sum(key[0] != CLOSED for key in plan.inputs)
        tensors, others = inputs[:count], inputs[count:]
        needed = ctx.needs_input_grad[4:]
        wanted = [n for n in range(count) if needed[n]]
        order = [plan.differentiable.index(i) for i in given]
        pulled = _connect.pullback(_function(plan, held), count, others, order, wanted)
        arguments = [*tensors, *given.values()]

        def compute() -> Sequence[Tensor | None]:
            grads = _taken(plan, _gradients(plan, held, kept, given), given, inputs)
            return [*(grads[n] for n in wanted), *grads[count:]]

        if _where.functorch_is_active() or any(map(torch._C._functorch.is_legacy_batchedtensor, given.values())):
            found: Any = pulled(arguments)
        else:
            # NOTE [derivatives of derivatives]
            found = _connect.derivatives(pulled, arguments, others, compute)
        results = _tree.placed([None] * count, wanted, found[: len(wanted)])
        return None, None, None, None, *results, *found[len(wanted) :]


def _function(plan: Plan, held: Sequence[Tensor]) -> _connect.Function:
    """The differentiable outputs as a function of the inputs, but for leaves that are closed over."""
    own = [n for kind, n in plan.inputs if kind == SOURCE]

    def function(tensors: Sequence[Tensor]) -> Sequence[Any]:
        sources = _tree.placed(_tree.placed(plan.sources, plan.tensors, held), own, tensors[: len(own)])
        whole = plan.joined.of._replace(sources=sources, parts=plan.pieces)
        with _as_before(plan), closed.replacing(plan.call.replaced, list(tensors[len(own) :])) as replace:
            func = closed.seen(plan.call.func, replace)
            values, _ = composite.run(func, whole, plan.joined.outs, functools.partial(_rewind, plan))
        return [values[i] for i in plan.differentiable]

    return function


def _gradients(plan: Plan, held: Sequence[Tensor], kept: Sequence[Tensor], given: dict[int, Tensor]) -> Gradients:
    """Of the inputs: those that were taken, or those of each piece, run again."""
    if plan.gradients is not None:
        return plan.gradients
    joined, sources = plan.joined, _tree.placed(plan.sources, plan.tensors, held)
    call = Call(plan.call.name, plan.call.func, plan.call.sources, plan.call.replaced, plan.call.closed, again=True)
    grads = Gradients(joined.outs.dtype)
    if not given:
        return grads
    of_kept = _of_kept(plan, kept, given)
    linear = {i: cotangent for i, cotangent in given.items() if i not in of_kept}
    cotangents = join.Cotangents(joined.leaves, linear, join.examples(joined.places))
    with _as_before(plan):
        for piece, place in zip(plan.pieces, joined.places, strict=True):
            _rewind(plan, place.piece)
            ran = pull.run(call, piece, sources)
            joined.check_again(ran.output, place.piece)
            own = {i: each[place.piece] for i, each in of_kept.items()}
            grads.add(ran, piece, sources, {**own, **cotangents.of(ran.output.leaves, place)})
            del ran
    pull.check_strange(call)
    return grads


def _of_kept(plan: Plan, kept: Sequence[Tensor], given: dict[int, Tensor]) -> dict[int, Sequence[Tensor | None]]:
    """Cotangents of the pieces of leaves that are not linear."""
    joined = plan.joined
    found: dict[int, Sequence[Tensor | None]] = {}
    nonlinear = [i for i in joined.nonlinear if i in plan.differentiable]
    step = len(nonlinear)
    for at, i in enumerate(nonlinear):
        if i in given:
            with torch.enable_grad():
                values = [value.detach().requires_grad_() for value in kept[at::step]]
                total = join.whole(joined.outs, joined.leaves[i], values, joined.places, join.examples(joined.places))
            found[i] = torch.autograd.grad(total, values, given[i], allow_unused=True)
    return found


def _taken(plan: Plan, grads: Gradients, given: dict[int, Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """For each input its gradient, times the cotangent of the one output where it was taken without."""
    factor, keep = None, False
    if plan.gradients is not None:
        if not given:
            return [None] * len(inputs)
        (i,) = given
        factor, keep = given[i], torch._C._autograd._get_current_graph_task_keep_graph()
        if plan.joined.leaves[i].out == "mean":
            factor = factor / join.examples(plan.joined.places)
    found = []
    for key, tensor in zip(plan.inputs, inputs, strict=True):
        grad = grads.take(key, tensor, factor, keep)
        # As autograd's own nodes do, of what the graph leads to.
        is_zero = grad is None and key in plan.call.reached
        found.append(torch.zeros_like(tensor) if is_zero else grad)
    return found


def _rewind(plan: Plan, piece: int) -> None:
    """Before a piece, where random numbers of its own are known."""
    if plan.before:
        _surroundings.rewind(plan.before[piece])


@contextmanager
def _as_before(plan: Plan) -> Iterator[None]:
    """As the first run was: NOTE [what a second run relies on]."""
    name = held.changed(plan.held)
    if name is not None:
        raise RuntimeError(
            f"{plan.call.name}: {name}, which func closes over, has changed in place since the forward pass, and the backward "
            "pass runs func again. Pass it as an argument, or change it after the backward pass"
        )
    inside = _where.inside_a_loss() if plan.inside else nullcontext()
    with _surroundings.restored(plan.around), inside, closed.again(plan.around_it):
        yield
