"""The fold: one loop over micro-batches, and its end.

.. code-block:: text

    accumulate = finalize . sync . fold(forward, contribution, backward, add) . init
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradacc import _call, _carry, _dtypes, _left, _loss, _nonfinite, _order, _split, _sums, _sync, _tree, _weights
from gradacc._engines import Buffer, Engine, eager, functional
from gradacc._kept import Kept
from gradacc._loss import Outcome
from gradacc._options import Options
from gradacc._sums import Sums
from gradacc._where import loops, transforming

Folded: TypeAlias = tuple[Buffer, Sums, _split.Microbatch | None]
"""Gradients, what is summed beside them, and the first empty micro-batch, if there is any."""

Loss = Callable[[_split.Microbatch, dict[str, Any], Sequence[Tensor]], Outcome]
"""``loss(microbatch, named, leaves)``: the loss of one micro-batch, with these leaves as parameters.

``named``: the keyword argument ``carry``, where there is one.
"""


class Fold(NamedTuple):
    """What is accumulated, and how."""

    options: Options
    engine: Engine
    loss: Loss | None
    params: list[Tensor]
    treedef: _tree.TreeDef
    accumulated: list[torch.dtype]
    """What each gradient is summed in,"""
    returned: list[torch.dtype]
    """and returned in."""
    divisors: _loss.Divisors | None = None
    """What several means are divided by, where it was counted."""
    known: int | None = None
    """The number of examples of all micro-batches, where it is known beforehand."""
    carry: _carry.Given | None = None
    """What was passed in, where there is a carry."""

    def nothing(self) -> Sums:
        """Before the first micro-batch."""
        return _sums.NOTHING if self.carry is None else _sums.nothing(_carry.start(self.carry, self.engine is eager))


def engine() -> Engine:
    """The one that this place needs."""
    return functional if transforming() else eager


def start(
    options: Options,
    params: list[Tensor],
    treedef: _tree.TreeDef,
    loss: Loss | None,
    divisors: _loss.Divisors | None = None,
    carry: _carry.Given | None = None,
) -> Fold:
    """With the engine that this place needs."""
    accumulated, returned = _dtypes.dtypes(options.dtype, params)
    return Fold(options, engine(), loss, params, treedef, accumulated, returned, divisors, carry=carry)


def loss_of(
    options: Options,
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    differentiated: Sequence[int],
    treedef: _tree.TreeDef,
    named: tuple[dict[str, Any], _carry.Given | None],
) -> Loss:
    """``loss_fn`` as a function of a micro-batch and of leaves, in a call with these arguments.

    ``named``: keyword arguments but the carry, and the carry that the call was given.
    """
    kwargs, given = named
    single, own = isinstance(options.argnums, int), engine()
    passes: _left.Call = WeakKeyDictionary()
    rest = [arg for n, arg in enumerate(args) if n not in differentiated], kwargs

    def loss(microbatch: _split.Microbatch, carried: dict[str, Any], leaves: Sequence[Tensor]) -> Outcome:
        tree = _tree.unflatten(treedef, leaves)
        trees = dict(zip(differentiated, (tree,) if single else tree, strict=True))
        positional = [trees[n] if n in trees else own.admit(arg) for n, arg in enumerate(microbatch.args)]
        named = own.admit({**kwargs, **carried})
        try:
            with own.calling(rest, passes):
                out = _called(options.name, functools.partial(loss_fn, *positional, **named))
        except Exception as error:
            _call.note_unsplit(error, options, args, kwargs)
            raise
        return _loss.outcome(options, out, microbatch.sizes, given)

    return loss


def _called(name: str, loss: Callable[[], Any]) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        return loss()
    from gradacc._engines.compiled import explain

    return explain.explained(name, loss)


def run(fold: Fold, divided: _split.Microbatches, boundary: _sync.Boundary) -> Folded:
    """All micro-batches."""
    with fold.engine.guard():
        buffer = fold.engine.init(fold.params, fold.accumulated)
        sums = fold.nothing()
    empty = divided.whole if divided.examples == 0 else None
    fold = fold._replace(known=divided.examples)
    orders: list[_order.Order | None] = []
    if divided.cut is not None and loops():
        from gradacc._engines.compiled import loop

        return *loop.run(fold.options.name, functools.partial(step, fold), buffer, sums, divided.cut), empty
    for microbatch, is_last in _with_last(divided.parts, ahead=boundary.overlaps):
        if microbatch.empty:
            empty = empty or microbatch
            continue
        # The caller's iterator runs in the caller's modes, not under the guard.
        with fold.engine.guard():
            buffer, sums = step(fold, buffer, sums, microbatch, boundary if is_last else None)
        orders.append(microbatch.order)
    with fold.engine.guard():
        return buffer, _sums.restored(fold.options.name, sums, orders), empty


def step(
    fold: Fold, buffer: Buffer, sums: Sums, microbatch: _split.Microbatch, boundary: _sync.Boundary | None = None
) -> tuple[Buffer, Sums]:
    """One micro-batch; where there is a ``boundary``, its gradients are delivered there as they become final."""
    options, engine = fold.options, fold.engine
    tape, outcome = engine.forward(buffer, functools.partial(_evaluate, fold, microbatch, _carried(fold, sums)))
    counts = _sums.contribution(options, sums, outcome, fold.known, is_narrow(buffer, outcome.targets))
    # Gradients of one target are final with the last micro-batch; those of several are added up behind the boundary.
    deliver = None if boundary is None or len(outcome.targets) > 1 else boundary.deliver
    if boundary is not None:
        boundary.set_unit(counts.unit, sums.weight + _sums.weight_of(outcome))
    if counts.counts:
        buffer = buffer.of_targets(len(outcome.targets))
        if options.nonfinite == "drop":
            buffer, outcome, counts = _nonfinite.backward(engine, buffer, tape, outcome, counts)
        else:
            buffer = engine.backward(buffer, tape, counts, deliver)
    return buffer, _sums.add(options, sums, outcome, counts, microbatch.sizes)


def _evaluate(fold: Fold, microbatch: _split.Microbatch, carried: dict[str, Any], leaves: Sequence[Tensor]) -> Outcome:
    assert fold.loss is not None
    return _loss.divided(fold.options, fold.loss(microbatch, carried, leaves), fold.divisors)


def _carried(fold: Fold, sums: Sums) -> dict[str, Any]:
    return {} if fold.carry is None else {"carry": _carry.tree(fold.carry, sums.carry)}


def typed(fold: Fold, sums: Sums, empty: _split.Microbatch | None) -> Sums:
    """Where there was nothing but an empty micro-batch, it says what types to return."""
    if sums.value is not None or empty is None:
        return sums
    assert fold.loss is not None
    # Nothing to differentiate.
    with fold.engine.guard(), torch.no_grad():
        return _sums.add_types(
            fold.options, sums, fold.loss(empty, _carried(fold, sums), fold.params), fold.known, empty.sizes
        )


def finish(
    fold: Fold, buffer: Buffer, sums: Sums, boundary: _sync.Boundary, types: Callable[[Sums], Sums]
) -> tuple[tuple[Any, Any], Any]:
    """``finalize . sync``: what ``grad_fn`` usually returns, and the carry.

    ``types``: of sums that have seen nothing, on any rank, those with the types of an empty batch, where there was one.
    """
    with fold.engine.guard():
        grads, sums, arrived, carry = _crossed(fold, buffer, sums, boundary, types)
        usual = divided(fold, buffer._replace(grads=grads), sums, arrived, boundary.returned)
    boundary.done()
    return usual, carry


def divided(
    fold: Fold, buffer: Buffer, sums: Sums, arrived: bool, returned: Callable[[list[Tensor]], list[Any]]
) -> tuple[Any, Any]:
    """``finalize``, behind the boundary: what ``grad_fn`` usually returns, of the union's gradients and sums.

    ``returned``: what is returned in the place of gradients, `Boundary.returned`.
    """
    options = fold.options
    check_dependence(options.name, not sums.differentiated or arrived)
    value, aux = _sums.finalize(options, sums, fold.params[0])
    if options.nonfinite == "drop":
        value = Kept(value, _sums.dropped(sums, fold.params[0]))
    factors = _sums.gradient_factors(options, sums)
    if fold.divisors is not None:
        factors = [factor * _weights.check(options, sums, fold.divisors) for factor in factors]
    results = fold.engine.finalize(buffer, fold.returned, factors)
    tree = _tree.unflatten(fold.treedef, returned(results))
    return tree, ((value, aux) if options.has_aux else value)


def _crossed(
    fold: Fold, buffer: Buffer, sums: Sums, boundary: _sync.Boundary, types: Callable[[Sums], Sums]
) -> tuple[list[Tensor | None], Sums, bool, Any]:
    """`Boundary.cross`, and the carry."""
    if fold.carry is None:
        return *boundary.cross(buffer.grads, sums, buffer.arrived, types), None
    parts = sums.carry
    if boundary.crosses:
        sums = dataclasses.replace(sums, carry=_carry.that_crosses(fold.carry, parts))

    def typed(sums: Sums) -> Sums:
        # An empty batch, which is asked for types, gets what was given.
        return dataclasses.replace(types(dataclasses.replace(sums, carry=parts)), carry=sums.carry)

    grads, sums, arrived = boundary.cross(buffer.grads, sums, buffer.arrived, typed)
    whole = _carry.crossed(sums.carry, parts) if boundary.crosses and sums.carry is not None else parts
    return grads, sums, arrived, _carry.final(fold.carry, whole)


def check_dependence(name: str, depends: bool) -> None:
    """A loss that no parameter reaches is a mistake, not a gradient of zero."""
    if not depends:
        raise ValueError(
            f"{name}: the loss does not depend on any parameter. Does loss_fn use the params it is given "
            "(and not a module's own), without detach(), no_grad() or .item()? (What is trainable in a module may have changed "
            "since gradacc.functional(module), as set_adapter does: call it again.)"
        )


def is_narrow(buffer: Buffer, targets: Sequence[Tensor]) -> bool:
    """Whether the backward pass has numbers of fewer digits than the buffer: NOTE [cotangents and factors]."""
    return any(target.dtype.itemsize < 4 for target in targets) or any(
        param.dtype != dtype for param, dtype in zip(buffer.params, buffer.dtypes, strict=True)
    )


def _with_last(parts: Iterable[_split.Microbatch], ahead: bool) -> Iterator[tuple[_split.Microbatch, bool]]:
    """Each micro-batch, and whether it is the last one, whose backward pass overlaps with the boundary.

    Known only by reading one ahead, which is not done where nothing overlaps.
    """
    if not ahead:
        for part in parts:
            yield part, False
        return
    held: list[_split.Microbatch] = []
    for part in parts:
        if held:
            yield held.pop(), False
        held.append(part)
    for part in held:
        yield part, True
