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
    epsilon, of a number and of the usual size of all).

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

from gradacc import _dtypes, _graph, _loop, _loss, _split, _sums, _surroundings, _sync, _tree
from gradacc._describe import describe
from gradacc._engines import Buffer, eager
from gradacc._loop import Fold
from gradacc._loss import Outcome
from gradacc._pieces import closed, held, outputs
from gradacc._pieces.divide import Pieces
from gradacc._pieces.forward import Joined
from gradacc._sums import Contribution, Pass
from gradacc._through import compared, composed, encoders, union
from gradacc._through.encoders import Encoded, Encoder, Ran


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
    one = _split.microbatches(whole, given.args, *given.positions)
    fold = fold._replace(
        options=whole,
        loss=_loop.loss_of(whole, loss, given.args, given.positions[0], fold.treedef, (given.kwargs, None)),
        known=one.examples,
    )
    divided: list[tuple[Encoder, list[_split.Microbatch]]] = []
    if fold.engine is eager:
        each = encoders.encoders(options)
        divided = [(encoder, encoders.divided(encoder, given.args, *given.positions)) for encoder in each]
    if boundary.gather is None and all(len(microbatches) <= 1 for _, microbatches in divided):
        return fold, _loop.run(fold, one, boundary)
    with fold.engine.guard():
        buffer = fold.engine.init(fold.params, fold.accumulated)
        encoded = []
        for encoder, microbatches in divided:
            buffer, found = _encode(fold, given, buffer, encoder, microbatches, boundary)
            encoded.append(found)
        encoders.check_total(options.name, {each.name: sum(each.rows) for each in encoded}, one.examples)
        dims = encoders.in_dims(options, given.args, *given.positions)
        seen = union.of(options, given.args, dims, encoded, boundary.gather)
        if seen is None:
            return fold, (buffer, _sums.NOTHING, one.whole)
        stage = union.nothing(seen)
        if seen.size:
            buffer, stage = _differentiate(fold, given, buffer, seen)
        stage = union.own(seen, stage, buffer.grads, boundary.gather)
        # The rows of all ranks.
        del seen
        buffer = _pull(fold, given, buffer, (encoded, stage, first), boundary)
    return fold, (buffer, stage.sums, one.whole if one.examples == 0 else None)


def _encode(
    fold: Fold,
    given: Given,
    buffer: Buffer,
    encoder: Encoder,
    microbatches: list[_split.Microbatch],
    boundary: _sync.Boundary,
) -> tuple[Buffer, Encoded]:
    """The first run of an encoder."""
    around = _around(given)
    sizes = [microbatch.sizes[0] if len(microbatch.sizes) == 1 else None for microbatch in microbatches]
    total = sum(size for size in sizes if size is not None) if None not in sizes else None
    joined = Joined(outputs.Outs(encoder.name, "concat", 0, None), Pieces([], (), total, len(microbatches)))
    before, differentiable, kept = held.versions(encoder.func), set(), None
    alone = len(microbatches) == 1 and boundary.gather is None
    for microbatch, size in zip(microbatches, sizes, strict=True):
        ran = _run(fold, given, buffer, encoder, microbatch)
        if not alone:
            _check_norms(encoder, ran)
        if joined.first is not None:
            _check_alike(encoder, joined.first, ran.output)
        joined.add(ran.output, size, microbatch.order)
        differentiable.update(ran.differentiable)
        kept = ran if len(microbatches) == 1 else None
        buffer = eager.give_up(buffer, ran.tape)
        del ran
    changed = held.changed(before)
    if changed is not None and kept is None:
        raise ValueError(
            f"{encoder.name}: encode has changed {changed} in place, and is run again for the gradients, which would change it "
            "once more (running statistics of a module in training mode?). Call eval() on it, or return what is computed"
        )
    # What is no tensor has no length.
    rows = [max(lengths) for lengths in joined.lengths]
    found = Encoded(encoder, microbatches, around, [], None, sorted(differentiable), rows, kept)
    if joined.first is not None:
        found = found._replace(leaves=joined.results(), treedef=joined.first.treedef)
    return buffer, found


def _check_norms(encoder: Encoder, ran: Ran) -> None:
    """Of what is normalized with the statistics of a micro-batch, no micro-batches are the whole batch."""
    edges = [edge.node for edge in ran.tape.edges if edge is not None]
    if closed.writes(_graph.nodes(edges)):
        raise ValueError(
            f"{encoder.name}: encode has a BatchNorm in training mode, which normalizes each micro-batch by itself, so that "
            "its outputs are not the whole batch's. Call eval() on it, or use another normalization (GroupNorm, LayerNorm)"
        )


def _check_alike(encoder: Encoder, first: outputs.Output, other: outputs.Output) -> None:
    """Outputs of micro-batches can be put together."""
    if first.treedef != other.treedef:
        raise ValueError(
            f"{encoder.name}: encode returned {first.treedef} for one micro-batch and {other.treedef} for another; what is put "
            "together has one structure"
        )
    for n, (one, two) in enumerate(zip(first.leaves, other.leaves, strict=True)):
        both = isinstance(one, Tensor) and isinstance(two, Tensor)
        if both and (one.shape[1:], one.dtype, one.device) != (two.shape[1:], two.dtype, two.device):
            path = _tree.paths(first.treedef, "outputs")[n]
            raise ValueError(
                f"{encoder.name}: {path} is {describe(one)} and {one.dtype} of one micro-batch, {describe(two)} and "
                f"{two.dtype} of another, which are not put together. Return rows of one shape and dtype (pad them, or reduce "
                "them to one row an example)"
            )


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
    return buffer, union.Stage(outcome.targets[0], sums, cotangents, None if only is None else only.keeps)


def _check_drawn(name: str, before: _surroundings.Surroundings, after: _surroundings.Surroundings) -> None:
    """NOTE [two forms of a loss over ranks]: random numbers would be others on each rank."""
    drawn = [before.cpu, *before.states], [after.cpu, *after.states]
    if not all(torch.equal(one, other) for one, other in zip(*drawn, strict=False)):
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
            for m, (microbatch, rows) in enumerate(zip(one.microbatches, one.rows, strict=True)):
                ran = one.kept
                if ran is None:
                    ran = _run(fold, given, buffer, one.encoder, microbatch)
                parts = [None if each is None else compared.rows_of(each, microbatch, begin, rows) for each in own]
                same = True if ran is one.kept else compared.compared(one, ran, (microbatch, begin), read)
                _fill(one, ran, parts, same)
                narrow = _loop.is_narrow(buffer, [])
                counts = Contribution(True, stage.sums.unit, 1.0, None, [Pass(1.0, 1.0, stage.keeps)], None, narrow)
                is_last = n == len(each) - 1 and m == last
                buffer = fold.engine.backward(buffer, ran.tape, counts, deliver if is_last else None)
                begin += rows
    return buffer


def _fill(one: Encoded, ran: Ran, parts: Sequence[Tensor | None], same: bool | Tensor) -> None:
    """What the tape of a micro-batch plays back."""
    by_leaf = dict(zip(one.differentiable, parts, strict=True))
    for i in ran.differentiable:
        part, leaf = by_leaf.get(i), ran.output.leaves[i]
        part = torch.zeros_like(leaf) if part is None else part.to(device=leaf.device, dtype=leaf.dtype)
        ran.cotangents.append(torch.where(same, part, math.nan) if isinstance(same, Tensor) else part)
