"""A call with ``through=`` in the eager engine: encode, differentiate the loss by outputs, encode again.

.. code-block:: text

    1  outputs = concat(encode(params, microbatch))          each graph is given up
    2  loss(params, outputs, batch)                          its gradients by params go into the buffer; those by outputs, kept
    3  encode(params, microbatch) again                      and its outputs' cotangents go back, into the buffer

NOTE [encoded twice]
    The second run must be the first. The micro-batches are decided once, random numbers and autocast are those of then, and
    the outputs are compared with those of the first run: on a CPU a difference is an error that names the output. On an
    accelerator reading would wait for the device, each time: there the first call of a ``grad_fn`` reads, and later ones make
    the cotangents of what differs, and with them the gradients, NaN. Rounding is let pass (a square root of the dtype's
    epsilon, of the largest number).

    An encoder with one micro-batch keeps that one's graph, and is not run again; nor is one whose outputs have no cotangent:
    they depend on no parameter (a frozen tower), or the loss does not depend on them (`detach`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _dtypes, _loop, _loss, _order, _split, _sums, _surroundings, _sync, _tree
from gradacc._engines import Buffer, eager
from gradacc._loop import Fold
from gradacc._loss import Outcome
from gradacc._pieces import held, outputs
from gradacc._pieces.divide import Pieces
from gradacc._pieces.forward import Joined
from gradacc._sums import Contribution, Pass
from gradacc._through import composed, encoders, union
from gradacc._through.encoders import Division, Encoded, Encoder, Ran


class Given(NamedTuple):
    """A call."""

    loss_fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: tuple[Sequence[int], int]
    """Of what is differentiated, and of the batch."""

    @property
    def batch(self) -> int:
        """The position of the batch."""
        return self.positions[1]


def run(fold: Fold, given: Given, boundary: _sync.Boundary, first: Callable[[], bool]) -> tuple[Fold, _loop.Folded]:
    """As `_loop.run`; and the fold, as it is then. ``first``: whether this is a first call: NOTE [encoded twice]."""
    options = fold.options
    whole = options._replace(steps=1, microbatch_size=None, split=None)
    loss = composed.composed(options, given.loss_fn, given.positions)
    fold = fold._replace(
        options=whole,
        loss=_loop.loss_of(whole, loss, given.args, given.positions[0], fold.treedef, (given.kwargs, None)),
    )
    one = _split.microbatches(whole, given.args, *given.positions)
    fold = fold._replace(known=one.examples)
    divisions: list[Division] = []
    if fold.engine is eager:
        divisions = [encoders.divided(each, given.args, *given.positions) for each in encoders.encoders(options)]
    if boundary.gather is None and all(len(division.microbatches) <= 1 for division in divisions):
        return fold, _loop.run(fold, one, boundary)
    with fold.engine.guard():
        buffer = fold.engine.init(fold.params, fold.accumulated)
        encoded = []
        for division in divisions:
            buffer, found = _encode(fold, given, buffer, division)
            encoded.append(found)
        _check_sizes(options.name, encoded, one.examples)
        dims = encoders.in_dims(options, given.args, *given.positions)
        seen = union.of(options, given.args, dims, encoded, boundary.gather)
        if seen is None:
            return fold, (buffer, _sums.NOTHING, one.whole)
        stage = union.nothing(seen)
        if seen.size:
            buffer, stage = _differentiate(fold, given, buffer, seen)
        stage = union.own(seen, stage, buffer.grads, boundary.gather)
        buffer = _pull(fold, given, buffer, (encoded, stage, first), boundary)
    return fold, (buffer, stage.sums, one.whole if one.examples == 0 else None)


def _encode(fold: Fold, given: Given, buffer: Buffer, division: Division) -> tuple[Buffer, Encoded]:
    """The first run of an encoder."""
    encoder, around = division.encoder, _around(given)
    microbatches = division.microbatches
    sizes = [microbatch.sizes[0] if len(microbatch.sizes) == 1 else None for microbatch in microbatches]
    total = sum(size for size in sizes if size is not None) if None not in sizes else None
    joined = Joined(outputs.Outs(encoder.name, "concat", 0, None), Pieces([], (), total, len(microbatches)))
    before, differentiable, rows = held.versions(encoder.func), set(), []
    kept = None
    for microbatch, size in zip(microbatches, sizes, strict=True):
        ran = _run(fold, given, buffer, encoder, microbatch)
        joined.add(ran.output, size, microbatch.order)
        differentiable.update(ran.differentiable)
        rows.append(next(leaf.size(0) for leaf in ran.output.leaves if isinstance(leaf, Tensor)))
        kept = ran if len(microbatches) == 1 else None
        buffer = eager.give_up(buffer, ran.tape)
        del ran
    changed = held.changed(before)
    if changed is not None and kept is None:
        raise ValueError(
            f"{encoder.name}: encode has changed {changed} in place, and is run again for the gradients, which would change it "
            "once more (running statistics of a module in training mode?). Call eval() on it, or return what is computed"
        )
    if joined.first is None:
        return buffer, Encoded(division, around, [], None, [], rows, kept)
    return buffer, Encoded(division, around, joined.results(), joined.first.treedef, sorted(differentiable), rows, kept)


def _around(given: Given) -> _surroundings.Surroundings:
    """Random numbers and autocast of now."""
    return _surroundings.of([leaf for leaf in _tree.flatten((given.args, given.kwargs))[0] if isinstance(leaf, Tensor)])


def _run(fold: Fold, given: Given, buffer: Buffer, encoder: Encoder, microbatch: _split.Microbatch) -> Ran:
    """One run for one micro-batch."""
    cotangents: list[Tensor] = []
    found: list[tuple[outputs.Output, list[int]]] = []

    def encode(*own: Any) -> Tensor:
        flat = outputs.flatten(encoder.func(*own))
        encoders.check_rows(encoder, flat, microbatch.sizes)
        leaves = [i for i, leaf in enumerate(flat.leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        found.append((outputs.detached(flat), leaves))
        target: Tensor = _Pullback.apply(cotangents, *(flat.leaves[i] for i in leaves))  # type: ignore[no-untyped-call]  # torch's
        return target

    own = encoders.arguments(given.args, *given.positions)
    plain = encoder.options._replace(reduction="sum", has_aux=False, through=None)
    loss = _loop.loss_of(plain, encode, own, given.positions[0], fold.treedef, ({}, None))
    tape, _ = fold.engine.forward(buffer, functools.partial(loss, microbatch, {}))
    ((output, differentiable),) = found
    return Ran(output, differentiable, tape, cotangents)


class _Pullback(torch.autograd.Function):
    """A number in the place of outputs: when it is differentiated, they get their cotangents, which are filled in before."""

    @staticmethod
    def forward(ctx: Any, cotangents: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.cotangents


def _differentiate(fold: Fold, given: Given, buffer: Buffer, whole: union.Whole) -> tuple[Buffer, union.Stage]:
    """The loss of the whole batch: its gradients by the parameters are the buffer's first."""
    options, count = fold.options, len(fold.params)
    leaves = whole.tensors[: whole.pulled]
    accumulated = [*fold.accumulated, *_dtypes.dtypes(None, leaves)[0]]
    microbatch = _split.Microbatch(whole.args, (whole.size,))

    def loss(tensors: Sequence[Tensor]) -> Outcome:
        # The loss may change its outputs in place.
        found = whole.outputs([tensor.clone() for tensor in (*tensors[count:], *whole.tensors[whole.pulled :])])

        def with_outputs(*args: Any, **kwargs: Any) -> Any:
            return composed.call(options, given.loss_fn, (args, kwargs), given.batch, found, whole.rows)

        own = _loop.loss_of(options, with_outputs, whole.args, given.positions[0], fold.treedef, (given.kwargs, None))
        return _loss.divided(options, own(microbatch, {}, tensors[:count]), None)

    own = fold.engine.init([*fold.params, *leaves], accumulated)
    before = _around(given)
    tape, outcome = fold.engine.forward(own, loss)
    if whole.replicated:
        _check_drawn(options.name, before, _around(given))
    counts = _sums.contribution(options, _sums.NOTHING, outcome, whole.size, _loop.is_narrow(own, outcome.targets))
    if counts.counts:
        own = fold.engine.backward(own, tape, counts, None)
    sums = _sums.add(options, _sums.NOTHING, outcome, counts, microbatch.sizes)
    (only,) = counts.passes
    grads, cotangents = own.grads[:count], own.grads[count:]
    arrived = any(grad is not None for grad in grads)
    buffer = buffer._replace(grads=grads, arrived=arrived, closed={**buffer.closed, **own.closed})
    return buffer, union.Stage(sums, cotangents, None if only is None else only.keeps)


def _check_drawn(name: str, before: _surroundings.Surroundings, after: _surroundings.Surroundings) -> None:
    """NOTE [two forms of a loss over ranks]: random numbers would be others on each rank."""
    drawn = [before.cpu, *before.states], [after.cpu, *after.states]
    if not all(torch.equal(one, other) for one, other in zip(*drawn, strict=True)):
        raise ValueError(
            f"{name}: loss_fn draws random numbers, which are others on each rank, and every rank evaluates it for the whole "
            "batch. Draw them in the encoder and return them, or let loss_fn take rows, and return a gradacc.Mean over this "
            "rank's own"
        )


def _pull(
    fold: Fold,
    given: Given,
    buffer: Buffer,
    found: tuple[Sequence[Encoded], union.Stage, Callable[[], bool]],
    boundary: _sync.Boundary,
) -> Buffer:
    """The second run of the encoders: cotangents of their outputs, into the buffer."""
    encoded, stage, first = found
    read = first()
    cotangents = iter(stage.cotangents)
    each = [(one, [next(cotangents) for _ in one.differentiable]) for one in encoded]
    each = [(one, own) for one, own in each if any(cotangent is not None for cotangent in own)]
    deliver = boundary.deliver if boundary.overlaps else None
    if deliver is not None:
        boundary.set_unit(stage.sums.unit, stage.sums.weight)
    for n, (one, own) in enumerate(each):
        begin, last = 0, len(one.rows) - 1
        with _surroundings.restored(one.around):
            for m, (microbatch, rows) in enumerate(zip(one.division.microbatches, one.rows, strict=True)):
                ran = one.kept
                if ran is None:
                    ran = _run(fold, given, buffer, one.division.encoder, microbatch)
                parts = [None if each is None else _rows(each, microbatch, begin, rows) for each in own]
                same = True if ran is one.kept else _compared(one, ran, (microbatch, begin), read)
                _fill(one, ran, parts, same)
                narrow = _loop.is_narrow(buffer, [])
                counts = Contribution(True, stage.sums.unit, 1.0, None, [Pass(1.0, 1.0, stage.keeps)], None, narrow)
                is_last = n == len(each) - 1 and m == last
                buffer = fold.engine.backward(buffer, ran.tape, counts, deliver if is_last else None)
                begin += rows
    return buffer


def _rows(whole: Tensor, microbatch: _split.Microbatch, begin: int, number: int) -> Tensor:
    """Those of a micro-batch, of what has a row for each example of the batch."""
    return whole[begin : begin + number] if microbatch.order is None else _order.taken(whole, microbatch.order, 0)


def _fill(one: Encoded, ran: Ran, parts: Sequence[Tensor | None], same: bool | Tensor) -> None:
    """What the tape of a micro-batch plays back."""
    by_leaf = dict(zip(one.differentiable, parts, strict=True))
    for i in ran.differentiable:
        part, leaf = by_leaf.get(i), ran.output.leaves[i]
        part = torch.zeros_like(leaf) if part is None else part.to(leaf.dtype)
        ran.cotangents.append(torch.where(same, part, math.nan) if isinstance(same, Tensor) else part)


def _compared(one: Encoded, ran: Ran, at: tuple[_split.Microbatch, int], read: bool) -> bool | Tensor:
    """NOTE [encoded twice]: whether the outputs are those of the first run, where that is not read; ``at``: of which rows."""
    same: bool | Tensor = True
    if ran.output.treedef != one.treedef:
        raise _changed(one, f"{one.treedef}, then {ran.output.treedef}")
    paths = functools.partial(_tree.paths, one.treedef, one.name)
    for i, leaf in enumerate(ran.output.leaves):
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            continue
        first = _rows(one.leaves[i], *at, len(leaf))
        if first.shape != leaf.shape or first.dtype != leaf.dtype:
            raise _changed(one, f"{paths()[i]} of shape {tuple(first.shape)}, then {tuple(leaf.shape)}")
        if leaf.is_cpu:
            if not torch.equal(first, leaf) and not _is_near(first, leaf):
                raise _changed(one, f"another {paths()[i]} (by up to {_distance(first, leaf):.2g})")
            continue
        near = _is_near(first, leaf)
        if read and not near:
            raise _changed(one, f"another {paths()[i]}")
        same = near if same is True else same & near
    return same


def _is_near(first: Tensor, again: Tensor) -> Tensor:
    """Equal but for rounding; NaN is the same as NaN."""
    if not first.numel():
        return torch.ones((), dtype=torch.bool, device=first.device)
    if not _dtypes.is_inexact(first):
        return (first == again).all()
    near = torch.finfo(first.dtype).eps ** 0.5
    one, other = (_dtypes.as_real(each) for each in (first, again))
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs())
    largest = torch.where(one.isfinite(), one.abs(), 0).max()
    found: Tensor = (apart <= near * largest).all()
    return found


def _distance(first: Tensor, again: Tensor) -> float:
    return (
        float((first.to(torch.float64) - again.to(torch.float64)).abs().max()) if not first.is_complex() else math.nan
    )


def _changed(one: Encoded, what: str) -> RuntimeError:
    encoder = one.division.encoder
    return RuntimeError(
        f"{encoder.name}: encode, run again for the gradients, returned {what}. Both runs must be the same: what it changes (a "
        "counter, an attribute, an argument in place) or draws by itself (NumPy, random, a torch.Generator of its own) differs."
        " Pass what changes as arguments, and draw with torch's own random numbers"
    )


def _check_sizes(name: str, encoded: Sequence[Encoded], examples: int | None) -> None:
    """All encoders have encoded the same batch."""
    totals = {one.name: sum(one.rows) for one in encoded}
    if len(set(totals.values())) > 1 or (examples is not None and set(totals.values()) != {examples}):
        found = " and ".join(f"{total} rows of {key}" for key, total in totals.items())
        raise ValueError(
            f"{name}: {found} were encoded{'' if examples is None else f' of a batch of {examples} examples'}; the "
            "micro-batches that split yields must be all of the batch"
        )
