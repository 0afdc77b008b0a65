"""What pieces returned, as what the whole would have returned.

============  ===================================  ========================================================
``out``       of pieces that returned ``y_1, …``   cotangent of piece i, of the result's ``c``
============  ===================================  ========================================================
``concat``    ``cat([y_1, …], dim)``               the part of ``c`` that ``y_i`` is
``stack``     ``stack([y_1, …], dim)``             ``c.select(dim, i)``
``sum``       ``y_1 + …``                          ``c``
``mean``      ``(n_1 y_1 + …) / (n_1 + …)``        ``n_i / (n_1 + …) c``
``max``       ``stack([y_1, …]).amax(0)``          `torch.amax`'s: ties share it
``min``       ``stack([y_1, …]).amin(0)``          likewise
a value       ``finalize(… update(init(y_1), …))`` autograd's
============  ===================================  ========================================================

Of pieces whose examples are in another order than the batch's (`gradacc.data.Reordered`), a concatenation is brought back into
that order, and a piece's cotangent is the entries of ``c`` at its examples' places.

The first four are linear: a piece's cotangent is known without its output. The outputs of the others are kept for the backward
pass. Sums are made in what `accumulate` sums in (float32 for half precision, int64 for integers and bools), and cast back once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _dtypes, _order, _tree
from gradacc._describe import describe
from gradacc._parts import widened
from gradacc._pieces.outputs import Leaf, Outs, Place, check_leaf, is_reducer


def is_linear(leaf: Leaf) -> bool:
    """Whether a piece's cotangent is known without its output."""
    return leaf.out in ("concat", "sum", "mean", "stack")


def is_nothing(leaf: Leaf, place: Place) -> bool:
    """Whether a piece has no examples: of a mean it is exactly 0, without a gradient, whatever it returned."""
    return leaf.out == "mean" and place.total is None and place.size == 0


def examples(places: Sequence[Place]) -> float:
    """What shares add up to."""
    return 1.0 if places[0].total is not None else sum(place.share for place in places)


class State(NamedTuple):
    """Of one leaf, what there is of it after some pieces."""

    value: Any = None
    """What is summed, a state of a reducer's; the memory of all pieces, where there is one."""
    pieces: tuple[Any, ...] = ()
    """One tensor a piece, where there is no such memory."""
    filled: int = 0
    """How much of it is filled, along ``dim``."""


def add(outs: Outs, leaf: Leaf, state: State, value: Any, place: Place) -> State:
    """With one piece more; in place, but for what the first returned."""
    check_leaf(outs, leaf, value, place)
    if leaf.out in ("concat", "stack"):
        if not isinstance(value, Tensor):
            return State(pieces=(*state.pieces, value))
        value = value.unsqueeze(_stack_dim(leaf, value)) if leaf.out == "stack" else value
        return _written(outs, leaf, state, value, place)
    if is_reducer(leaf.out):
        start = leaf.out.init(value) if place.piece == 0 else state.value
        after = leaf.out.update(start, value)
        if any(isinstance(each, Tensor) and each.requires_grad for each in _tree.flatten(after)[0]):
            raise ValueError(
                f"{outs.name}: the reducer of {leaf.path} closes over a tensor that requires grad, whose gradient would be "
                "lost. Use that tensor in func, or with what is returned"
            )
        return State(after)
    own = _summable(outs, leaf, value, place)
    if place.piece == 0:
        return State(own)
    if not isinstance(own, Tensor):
        return State(_reduced(leaf, [state.value, own]))
    _check_shapes(outs, leaf, state.value, own)
    if leaf.out in ("max", "min"):
        return State((torch.maximum if leaf.out == "max" else torch.minimum)(state.value, own))
    # The first sum is new memory: the first term may be the caller's.
    return State(state.value + own if place.piece == 1 else state.value.add_(own))


def total(outs: Outs, leaf: Leaf, state: State, value: Any, examples: float) -> Any:
    """What the whole would have returned; ``value``: what a piece did; ``examples``: what shares add up to."""
    if leaf.out in ("concat", "stack"):
        if not isinstance(value, Tensor):
            return _numbers(outs, leaf, state.pieces)
        dim = _dim(leaf, value)
        if state.value is None or state.pieces or state.filled < state.value.size(dim):
            filled = [] if state.value is None else [state.value.narrow(dim, 0, state.filled)]
            return _joined([*filled, *state.pieces], dim)
        return state.value
    if is_reducer(leaf.out):
        return _reduced_by(outs, leaf, leaf.out.finalize(state.value))
    return _finished(outs, leaf, state.value, value, examples)


def whole(outs: Outs, leaf: Leaf, values: Sequence[Any], places: Sequence[Place], examples: float) -> Any:
    """The same of all pieces at once: a pure function of ``values``."""
    for value, place in zip(values, places, strict=True):
        check_leaf(outs, leaf, value, place)
    if leaf.out in ("concat", "stack"):
        if not isinstance(values[0], Tensor):
            return _numbers(outs, leaf, values)
        for value in values:
            _check_pieces(outs, leaf, values[0], value)
        if leaf.out == "stack":
            return torch.stack(list(values), _stack_dim(leaf, values[0]))
        lengths = [length(leaf, value) for value in values]
        return in_order(outs, leaf, _joined(values, _dim(leaf, values[0])), places, lengths)
    if is_reducer(leaf.out):
        state = leaf.out.init(values[0])
        for value in values:
            state = leaf.out.update(state, value)
        return _reduced_by(outs, leaf, leaf.out.finalize(state))
    terms = [_summable(outs, leaf, value, place) for value, place in zip(values, places, strict=True)]
    if isinstance(terms[0], Tensor):
        for term in terms:
            _check_shapes(outs, leaf, terms[0], term)
    return _finished(outs, leaf, _reduced(leaf, terms), values[0], examples)


class Cotangents:
    """Of one piece after another: the table in this module's docstring, of linear leaves."""

    def __init__(self, leaves: Sequence[Leaf], given: Mapping[int, Tensor], examples: float) -> None:
        """``given``: those of the result, by the number of the leaf; ``examples``: what all shares add up to."""
        self.leaves, self.given, self.examples = leaves, given, examples
        self.before = dict.fromkeys(given, 0)
        """How much of each concatenation earlier pieces are."""

    def of(self, values: Sequence[Any], place: Place) -> dict[int, Tensor]:
        """Of the next piece, which returned these leaves, but for those of nothing."""
        found = {}
        for i, whole in self.given.items():
            leaf, value = self.leaves[i], values[i]
            if isinstance(value, Tensor) and not is_nothing(leaf, place):
                found[i] = self._of(leaf, whole, value, (place, self.before[i]))
            self.before[i] += length(leaf, value)
        return found

    def check_all(self, outs: Outs) -> None:
        """All of each concatenation was some piece's."""
        for i, whole in self.given.items():
            if self.leaves[i].out == "concat":
                check_length(outs, whole.size(_dim(self.leaves[i], whole)), self.before[i])

    def _of(self, leaf: Leaf, whole: Tensor, value: Tensor, at: tuple[Place, int]) -> Tensor:
        place, before = at
        if leaf.out == "concat":
            dim = _dim(leaf, value)
            if place.order is not None:
                return _order.taken(whole, place.order, dim)
            return whole.narrow(dim, before, value.size(dim))
        if leaf.out == "stack":
            return whole.select(_stack_dim(leaf, value), place.piece)
        if leaf.out == "mean":
            whole = whole * (place.share / self.examples)
        return whole.to(value.dtype)


def length(leaf: Leaf, value: Any) -> int:
    """How much of a concatenation a piece is."""
    return value.size(_dim(leaf, value)) if leaf.out == "concat" and isinstance(value, Tensor) else 0


def check_length(outs: Outs, before: int, now: int) -> None:
    """What was run again has as many rows: else a piece would get the cotangents of another."""
    if now != before:
        raise RuntimeError(
            f"{outs.name}: func, run again for the gradients, returned {now} rows, and {before} the first time. Both runs "
            "must be the same: what it changes (a counter, an attribute) differs. Pass what changes as an argument"
        )


def in_order(outs: Outs, leaf: Leaf, result: Any, places: Sequence[Place], lengths: Sequence[int]) -> Any:
    """A concatenation in the order of the batch; ``lengths``: how much of it each piece is. What is none stays."""
    orders = [place.order for place in places if place.order is not None]
    if leaf.out != "concat" or not isinstance(result, Tensor) or not orders:
        return result
    _order.check_rows(f"{outs.name}: {leaf.path}", lengths, orders)
    return _order.restored(result, orders, leaf.dim % result.ndim)


def _reduced_by(outs: Outs, leaf: Leaf, result: Any) -> Any:
    if not isinstance(result, (Tensor, bool, int, float, complex)):
        raise TypeError(
            f"{outs.name}: finalize of {leaf.path} returned {describe(result)}; it must be a tensor or a number"
        )
    return result


def _dim(leaf: Leaf, value: Tensor) -> int:
    """Of a piece's tensor, that of a concatenation; for a stack, ``value`` is what was returned."""
    return _stack_dim(leaf, value) if leaf.out == "stack" else leaf.dim % value.ndim


def _stack_dim(leaf: Leaf, value: Tensor) -> int:
    return leaf.dim % (value.ndim + 1)


def _written(outs: Outs, leaf: Leaf, state: State, value: Tensor, place: Place) -> State:
    """A piece in the memory of all of them, where their number is known and it has a row for each example."""
    stacks, dim = leaf.out == "stack", leaf.dim % value.ndim
    rows = value.size(dim)
    if place.piece == 0:
        full = place.pieces if stacks else place.total
        if full is None or place.pieces == 1 or not (stacks or rows == place.size):
            return State(pieces=(value,))
        shape = [full if d == dim else size for d, size in enumerate(value.shape)]
        memory = value.new_empty(shape)
        memory.narrow(dim, 0, rows).copy_(value)
        return State(memory, (), rows)
    like = state.pieces[0] if state.value is None else state.value
    _check_pieces(outs, leaf._replace(out="concat", dim=dim), like, value)
    if state.value is None or state.pieces or state.filled + rows > state.value.size(dim):
        return state._replace(pieces=(*state.pieces, value))
    state.value.narrow(dim, state.filled, rows).copy_(value)
    return state._replace(filled=state.filled + rows)


def _check_pieces(outs: Outs, leaf: Leaf, first: Tensor, other: Any) -> None:
    """All of one dtype, and of one shape but along the dimension of a concatenation."""
    fits = isinstance(other, Tensor) and (first.dtype, first.device, first.ndim) == (
        other.dtype,
        other.device,
        other.ndim,
    )
    dim = _dim(leaf, first) if leaf.out == "concat" else -1
    if not fits or any(a != b for d, (a, b) in enumerate(zip(first.shape, other.shape, strict=True)) if d != dim):
        raise ValueError(
            f"{outs.name}: {leaf.path} is {_kind(first)} in one piece and {_kind(other)} in another, which cannot be put "
            f"together by {leaf.out!r}. Pad it to one shape, reduce it to one row an example, or to a sum: out='sum', or a "
            "gradacc.Mean"
        )


def _check_shapes(outs: Outs, leaf: Leaf, first: Any, other: Any) -> None:
    if not isinstance(first, Tensor) or not isinstance(other, Tensor) or first.shape != other.shape:
        raise ValueError(
            f"{outs.name}: {leaf.path} is {_kind(first)} in one piece and {_kind(other)} in another, which are not reduced to "
            f"one by {leaf.out!r}. Sum over the examples first"
        )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return describe(value)
    hidden = torch.compiler.is_compiling()
    return f"{str(value.dtype).removeprefix('torch.')}{'' if hidden else list(value.shape)}"


def _numbers(outs: Outs, leaf: Leaf, values: Sequence[Any]) -> Any:
    """What is no tensor: the same of every piece, or one tensor of all."""
    if leaf.out == "stack":
        return torch.stack([torch.as_tensor(value) for value in values])
    if any(type(value) is not type(values[0]) or value != values[0] for value in values):
        different = next(value for value in values if value != values[0])
        raise ValueError(
            f"{outs.name}: {leaf.path} is {describe(values[0])} in one piece and {describe(different)} in another, which "
            "cannot be concatenated: say what the whole would have returned (out='sum', 'mean', 'max', 'min'), or return a "
            "tensor"
        )
    return values[0]


def _joined(values: Sequence[Tensor], dim: int) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values), dim)


def _summable(outs: Outs, leaf: Leaf, value: Any, place: Place) -> Any:
    """A term of a sum, in what is summed in."""
    if is_nothing(leaf, place):
        value = torch.zeros_like(value) if isinstance(value, Tensor) else 0.0
    if not isinstance(value, Tensor):
        value = int(value) if isinstance(value, bool) and leaf.out == "sum" else value
        return value * place.share if leaf.out == "mean" else value
    if leaf.out in ("max", "min"):
        return value
    own = widened(value if value.layout == torch.strided else value.to_dense())
    if outs.dtype is not None and _dtypes.is_inexact(own):
        own = own.to(outs.dtype.to_complex() if own.is_complex() else outs.dtype)
    return own * place.share if leaf.out == "mean" and place.share != 1.0 else own


def _reduced(leaf: Leaf, terms: Sequence[Any]) -> Any:
    if leaf.out in ("max", "min"):
        if not isinstance(terms[0], Tensor):
            # As of tensors, NaN wherever it is.
            return next((term for term in terms if term != term), (max if leaf.out == "max" else min)(terms))
        if len(terms) == 1:
            return terms[0]
        stacked = torch.stack(list(terms))
        return stacked.amax(0) if leaf.out == "max" else stacked.amin(0)
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def _finished(outs: Outs, leaf: Leaf, reduced: Any, value: Any, examples: float) -> Any:
    """Divided, and in the dtype that the whole would have had."""
    if leaf.out == "mean" and examples != 1.0:
        reduced = reduced / examples if examples or isinstance(reduced, Tensor) else math.nan
    if not isinstance(value, Tensor) or leaf.out in ("max", "min") or not _dtypes.is_inexact(value):
        return reduced
    return reduced if outs.dtype is not None else reduced.to(value.dtype)
