"""The streaming form: the fold of `gradacc.accumulate`, one micro-batch at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from gradacc import (
    _call,
    _carry,
    _connect,
    _donated,
    _loop,
    _options,
    _split,
    _state,
    _sums,
    _sync,
    _tree,
    _where,
)
from gradacc._describe import describe
from gradacc._engines import eager
from gradacc._options import AccumulatorOptions, Nonfinite, Options, Reduction, Sync
from gradacc._state import AccumulatorState

_UPDATE = "update(state, params, microbatch)"


class Accumulator(NamedTuple):
    """What `accumulator` returns: four functions of a state.

    Example:
        >>> import torch, gradacc
        >>> acc = gradacc.accumulator(lambda w, x: (w * x).square().mean())
        >>> w = torch.ones(())
        >>> acc.finalize(acc.update(acc.init(w), w, torch.arange(3.0)))
        (tensor(3.3333), tensor(1.6667))
    """

    init: Callable[..., AccumulatorState]
    """``init(params) -> state``: nothing accumulated, and no memory for it; with ``has_carry``, ``init(params, carry=c)``."""

    update: Callable[..., AccumulatorState]
    """``update(state, params, microbatch, *args, **kwargs) -> state``: with one more micro-batch."""

    merge: Callable[[AccumulatorState, AccumulatorState], AccumulatorState]
    """``merge(a, b) -> state``: what is in either."""

    finalize: Callable[[AccumulatorState], tuple[Any, Any]]
    """``finalize(state) -> (grads, value)``, or ``(grads, (value, aux))``: divided."""


@overload
def accumulator(loss_fn: Callable[..., Any], **options: Unpack[AccumulatorOptions]) -> Accumulator: ...
@overload
def accumulator(
    loss_fn: None = None, **options: Unpack[AccumulatorOptions]
) -> Callable[[Callable[..., Any]], Accumulator]: ...
def accumulator(
    loss_fn: Callable[..., Any] | None = None,
    *,
    in_dims: tuple[Any, ...] | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    dtype: torch.dtype | None = None,
    sync: Sync | None = None,
    nonfinite: Nonfinite = "keep",
    has_carry: bool = False,
    donate: bool = False,
    **others: Any,
) -> Accumulator | Callable[[Callable[..., Any]], Accumulator]:
    """The gradient and the value of one large batch, from micro-batches that arrive one at a time.

    .. code-block:: text

        finalize(update(update(init(params), params, a), params, b)) = torch.func.grad_and_value(f)(params, a and b)
        finalize(merge(update(init(params), params, a), update(init(params), params, b))) = the same

    `gradacc.accumulate_and_value` is this loop (of an iterable of micro-batches with the same bits, outside transforms and
    compiled functions):

    .. code-block:: python

        state = init(params)
        for microbatch in microbatches:
            state = update(state, params, microbatch)
        grads, value = finalize(state)

    Taken apart, the loop can stop and go on: in another process (the state is a pytree of tensors, which
    `gradacc.checkpoint.save` writes), on several devices or workers (`merge`), or as part of a loop that does other things.
    The states are a monoid: `merge` is commutative, associative up to rounding, and has ``init(params)`` as its identity. So
    micro-batches may be grouped and ordered in any way. ``docs/training.md`` has the edge cases (empty micro-batches, errors,
    ``update`` after ``finalize``), and says how states behave under transforms, autograd and checkpoints.

    Arguments:
        loss_fn, in_dims, argnums, has_aux, reduction, dtype, nonfinite: as of `gradacc.accumulate_and_value`.
            ``in_dims`` says along which dimensions examples are counted, in any argument that is not differentiated; by
            default along dim 0 of the first one. Without ``loss_fn`` the result is a decorator: ``@accumulator(has_aux=True)``.
        sync: `gradacc.all_reduce` or `gradacc.reduce_scatter`: ``finalize`` is then of the union of all ranks' states, which
            cross once a call (with one more exchange at first use), empty ones too; every rank gets the same bits, or its
            parts of them. There is no backward pass to overlap that with, so ``overlap`` is left out. An ``update`` that
            raises tells no other rank: a rank that catches the error calls ``finalize`` all the same, with the state before
            it. If it begins another state by ``init`` instead, and not all ranks do so, the next ``finalize`` and all later
            ones of this accumulator are errors on all of them; if it ends, the others wait for the group's timeout.
        has_carry: ``init(params, carry=c)`` says what it begins with, each ``update`` threads it, and ``finalize`` returns
            ``(usual, carry)``. ``merge`` adds `Mean`s and `gradacc.Moments`, and goes on with what ``a`` began with; a tensor
            in the carry of two states that have both seen micro-batches is an error: ``docs/state.md``.
        donate: the memory of a state given to ``update``, ``merge`` or ``finalize`` may be reused; using the state, or a
            tensor of it, afterwards is an error. Without ``donate`` nothing that the caller holds changes, which costs a copy
            of all gradients an update.

    Returns:
        An `Accumulator`:

        - ``init(params) -> state``; with a tuple of ``argnums``, ``init`` takes the tuple of differentiated arguments. It
          allocates nothing: the first micro-batch's gradients become the buffer.
        - ``update(state, params, microbatch, *args, **kwargs) -> state``: after the state come the arguments of ``loss_fn``,
          in its order. ``params`` may have changed in the meantime, but not their structure, shapes and dtypes.
        - ``merge(a, b) -> state``, of states of the same parameters and options.
        - ``finalize(state) -> (grads, value)``, or ``(grads, (value, aux))`` with ``has_aux``: as
          `gradacc.accumulate_and_value` returns them, new tensors (with `gradacc.reduce_scatter` a `gradacc.Shard` in the
          place of each gradient). (Weights of a `Mean` that were numbers are 0-dim tensors under a functorch transform and
          compiled.)

    Raises:
        TypeError, ValueError: as `gradacc.accumulate_and_value`; and for what is not a state, for a state of an accumulator
            with another ``reduction``, ``dtype`` or ``has_aux``, for parameters, or two states, that differ in structure,
            shapes or dtypes, and for states of losses of different kinds. A loss that does not depend on the parameters is
            an error of ``finalize``.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, x):
        ...     return (w * x).sum(dim=1).square().mean()
        >>> init, update, merge, finalize = gradacc.accumulator(loss_fn)
        >>> w, x = torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> here = update(init(w), w, x[:1])
        >>> there = update(update(init(w), w, x[1:2]), w, x[2:])
        >>> finalize(merge(here, there))
        (tensor([52.6667, 66.6667]), tensor(59.6667))

    Source: ``optax.microbatching.Accumulator`` (init, update, finalize); `merge` is the combine of a parallel fold.
    """
    _check_others(others)
    given: dict[str, Any] = {
        "in_dims": in_dims,
        "argnums": argnums,
        "has_aux": has_aux,
        "reduction": reduction,
        "dtype": dtype,
        "sync": sync,
        "nonfinite": nonfinite,
        "has_carry": has_carry,
    }
    if loss_fn is None:
        return functools.partial(accumulator, **given, donate=donate)
    options = _options.options("accumulator", loss_fn, **given)
    if not isinstance(donate, bool):
        raise TypeError(f"accumulator: donate must be True or False, got {describe(donate)}")
    if options.sync is not None:
        options = options._replace(sync=dataclasses.replace(options.sync, overlap=False))
    agreed = None if options.sync is None else _sync.Agreed(options.name, loss_fn, options.sync.group)

    def init(params: Any, **carried: Any) -> AccumulatorState:
        """Nothing accumulated; with ``has_carry``, ``carry=`` is what it begins with."""
        if agreed is not None and not torch.compiler.is_compiling():
            agreed.begun.begin()
        return _init(options, params, carried)

    def update(state: AccumulatorState, *args: Any, **kwargs: Any) -> AccumulatorState:
        """One more micro-batch: ``args`` and ``kwargs`` are what ``loss_fn`` takes."""
        if agreed is None or torch.compiler.is_compiling():
            return _update(options, loss_fn, donate, state, args, kwargs)
        try:
            return _update(options, loss_fn, donate, state, args, kwargs)
        except BaseException:
            agreed.begun.raised = True
            raise

    def merge(a: AccumulatorState, b: AccumulatorState) -> AccumulatorState:
        """What is in either state."""
        return _merge(options, donate, a, b)

    def finalize(state: AccumulatorState) -> tuple[Any, Any]:
        """``(grads, value)``, or ``(grads, (value, aux))``."""
        return _finalize(options, agreed, donate, state)

    return Accumulator(init, update, merge, finalize)


def _check_others(others: dict[str, Any]) -> None:
    """Options of another form, and of none."""
    for option in others:
        why = "which is no option of it"
        if option in ("steps", "microbatch_size", "split", "weights"):
            why = "which says of a whole batch what update is given one by one: its micro-batches; leave it out"
        if option == "through":
            why = (
                "whose loss needs the outputs of the whole batch, while update is given one micro-batch; use "
                "gradacc.accumulate_and_value(loss_fn, through=...)"
            )
        raise TypeError(f"accumulator: got {option}, {why}")


_NO_GRAPH = (
    "a state keeps no micro-batches, so nothing can be computed again. Differentiate with torch.func (torch.func.grad around "
    "all of it) or through accumulate_and_value; or call update under torch.no_grad(), or with parameters that do not require "
    "grad, for results without a graph"
)


def _init(options: Options, params: Any, carried: dict[str, Any]) -> AccumulatorState:
    leaves, treedef = _tree.flatten(params)
    found = _call.check_parameters(options.name, leaves, treedef, "params")
    others, given = (
        _carry.of_call(options.name, carried, "init(params, carry=c)") if options.has_carry else (carried, None)
    )
    if others:
        raise TypeError(
            f"{options.name}: init got {', '.join(others)}; it takes params, and with has_carry=True carry=, which is in "
            "the state from then on"
        )
    if given is None:
        return _state.initial(options, found, treedef, None, None)
    detached = _loop.engine() is eager
    own = _tree.map_tensors(lambda leaf: (leaf.detach() if detached else leaf).clone(), given.leaves)
    carry = _tree.unflatten(given.treedef, own)
    return _state.initial(options, found, treedef, carry, _carry.start(given, detached))


def _update(
    options: Options,
    loss_fn: Callable[..., Any],
    donate: bool,
    state: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AccumulatorState:
    before = _state.check(options, state, _UPDATE)
    differentiated, batch = _call.positions(options, args, _UPDATE)
    params, treedef = _call.parameters(options, args, differentiated)
    like = _state.of_params(params)
    _state.check_alike(options, before, like, treedef, params, "params")
    microbatch = _split.undivided(options, args, differentiated, batch)
    # On the devices where they are now.
    facts = before.facts._replace(params=like)
    rest = [state, *(arg for n, arg in enumerate(args) if n not in differentiated), kwargs]
    call = _connect.call_to_connect((state, args, kwargs), params, rest)
    called = functools.partial(_tried, loss_fn) if microbatch.empty else loss_fn
    carry = _carry_of(options, before, kwargs)
    loss = _loop.loss_of(options, called, args, differentiated, treedef, (kwargs, carry))
    fold = _loop.start(options, params, treedef, loss, carry=carry)
    engine, readable = fold.engine, fold.engine is eager
    if microbatch.empty:
        if before.sums.value is not None:
            return before
        try:
            sums = _loop.typed(fold, fold.nothing(), microbatch)
            sums = dataclasses.replace(sums, carry=before.sums.carry)
        except _RaisedError:
            return before
        with engine.guard():
            nothing = facts._replace(arrived=False, empty=True)
            return _state.pack(nothing, treedef, [None] * len(params), sums, readable, before.carry)
    closed: list[Tensor] = []

    def more() -> AccumulatorState:
        grads, _, sums = _state.unpack(before, readable)
        known, sums = (
            (facts._replace(plain=(), empty=False), _sums.nothing(sums.carry)) if facts.empty else (facts, sums)
        )
        if carry is not None:
            # NOTE [memory of a carry]
            sums = dataclasses.replace(sums, carry=_tree.map_tensors(Tensor.clone, sums.carry))
        buffer = engine.init(params, fold.accumulated, grads, donate)._replace(arrived=facts.arrived)
        buffer, sums = _loop.step(fold, buffer, sums, microbatch)
        if call is not None:
            closed.extend(buffer.closed_over())
        return _state.pack(known._replace(arrived=buffer.arrived), treedef, buffer.grads, sums, readable, before.carry)

    with engine.guard():
        after = _donated.written_by("accumulator.update", before, more) if donate and readable else more()
    return after if call is None else _connect.connect(options.name, call, after, closed, _NO_GRAPH)


_where.whole_or_not_at_all(_update)


class _RaisedError(Exception):
    """A loss has raised that was asked for no more than its types."""


def _tried(loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return loss_fn(*args, **kwargs)
    except Exception as error:  # whatever a loss does with no examples
        raise _RaisedError from error


def _merge(options: Options, donate: bool, one: Any, other: Any) -> AccumulatorState:
    a, b = _state.check(options, one, "merge(a, b)", "a"), _state.check(options, other, "merge(a, b)", "b")
    call = _connect.call_to_connect((a, b), (), (a, b))
    engine = _loop.engine()
    readable = engine is eager
    with engine.guard():
        grads, treedef, sums = _state.unpack(a, readable)
        others, structure, more = _state.unpack(b, readable)
        _state.check_alike(options, a, b.facts.params, structure, others, "b")
        if options.has_carry:
            _carry.check_alike(options.name, a.carry, b.carry)
        if not _counts(a) or not _counts(b):  # a known type says more than nothing
            return a if _counts(a) or (not _counts(b) and b.sums.value is None) else b
        _sums.check_kind(options.name, sums.value, more.value)
        losses = _sums.dtypes(sums), _sums.dtypes(more)
        if losses[0] != losses[1]:
            one, other = (" and ".join(map(str, found)) for found in losses)
            raise ValueError(
                f"{options.name}: the losses of a and b are {one}, and {other}; merge takes states of the same loss"
            )

        def both() -> AccumulatorState:
            merged, shares = _sums.merge(options, sums, more)
            total = engine.merge(grads, others, shares, donate)
            plain = tuple(x and y for x, y in zip(a.facts.plain, b.facts.plain, strict=True))
            facts = a.facts._replace(plain=plain, arrived=a.facts.arrived or b.facts.arrived)
            return _state.pack(facts, treedef, total, merged, readable, a.carry)

        after = _donated.written_by("accumulator.merge", (a, b), both) if donate and readable else both()
    return after if call is None else _connect.connect(options.name, call, after, (), _NO_GRAPH)


def _counts(state: AccumulatorState) -> bool:
    """Whether it has seen more than an empty micro-batch."""
    return state.sums.value is not None and not state.facts.empty


def _finalize(options: Options, agreed: _sync.Agreed | None, donate: bool, state: Any) -> tuple[Any, Any]:
    boundary = _sync.connect(options, agreed)
    try:
        state = _state.check(options, state, "finalize(state)")
        call = _connect.call_to_connect((state,), (), state)
        engine = _loop.engine()
        with engine.guard():
            params, treedef = _state.like_params(state)
            fold = _loop.start(options, params, treedef, None, carry=_carry_of(options, state, {}))
            boundary.bind(params, treedef, fold.accumulated, None)
            grads, _, sums = _state.unpack(state, engine is eager)
            if not donate:
                # Nothing that is returned, or changed on the way, is the state's; what crosses comes back in new memory.
                sums = _tree.map_tensors(Tensor.clone, sums)
                grads = grads if boundary.crosses else [None if grad is None else grad.clone() for grad in grads]
            buffer = engine.init(params, fold.accumulated, grads, donated=True)
            buffer = buffer._replace(arrived=state.facts.arrived)
            # Each buffer is to die when its result exists.
            del grads
        typed, sums = sums, _sums.nothing(sums.carry) if state.facts.empty else sums
    except BaseException as error:
        boundary.fail(error)
        raise

    def end() -> tuple[tuple[Any, Any], Any]:
        return _loop.finish(fold, buffer, sums, boundary, lambda sums: typed if sums.value is None else sums)

    results, carried = _donated.written_by("accumulator.finalize", state, end) if donate and engine is eager else end()
    if call is not None:
        results = _connect.connect(options.name, call, results, (), _NO_GRAPH)
    return (results, carried) if options.has_carry else results


def _carry_of(options: Options, state: AccumulatorState, kwargs: dict[str, Any]) -> _carry.Given | None:
    """What a state's carry began with."""
    if not options.has_carry:
        return None
    if "carry" in kwargs:
        raise TypeError(
            f"{options.name}: update got carry=; the carry is given to init(params, carry=c), and is in the state from then on"
        )
    return _carry.given(options.name, state.carry)
