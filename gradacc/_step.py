"""One micro-batch, and the end of a fold: what the loop of `gradacc.accumulate` and `gradacc.accumulator` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _dtypes, _fold, _loss, _split, _sync, _tree
from gradacc._engines import eager, functional
from gradacc._fold import Contribution
from gradacc._loss import Outcome
from gradacc._options import Options
from gradacc._where import transforming

Evaluate = Callable[[_split.Microbatch, Sequence[Tensor]], Outcome]
"""``evaluate(microbatch, leaves)``: the loss of one micro-batch, with these leaves as parameters."""


class Fold(NamedTuple):
    """What is accumulated, and how."""

    options: Options
    engine: Any
    params: list[Tensor]
    treedef: _tree.TreeDef
    accumulated: list[torch.dtype]
    """What each gradient is summed in,"""
    returned: list[torch.dtype]
    """and returned in."""


def engine() -> Any:
    """The one that this place needs."""
    return functional if transforming() else eager


def start(options: Options, params: list[Tensor], treedef: _tree.TreeDef) -> Fold:
    """With the engine that this place needs."""
    accumulated, returned = _dtypes.dtypes(options.dtype, params)
    return Fold(options, engine(), params, treedef, accumulated, returned)


def evaluator(
    fold: Fold, loss_fn: Callable[..., Any], differentiated: Sequence[int], kwargs: dict[str, Any]
) -> Evaluate:
    """The loss as a function of a micro-batch and of leaves."""
    options, engine, treedef = fold.options, fold.engine, fold.treedef
    single = isinstance(options.argnums, int)

    def evaluate(microbatch: _split.Microbatch, leaves: Sequence[Tensor]) -> Outcome:
        tree = _tree.unflatten(treedef, leaves)
        trees = dict(zip(differentiated, (tree,) if single else tree, strict=True))
        positional = [trees[n] if n in trees else engine.admit(arg) for n, arg in enumerate(microbatch.args)]
        named = engine.admit(kwargs)
        with engine.calling():
            out = loss_fn(*positional, **named)
        return _loss.outcome(options, out, microbatch.sizes)

    return evaluate


def stepper(fold: Fold, evaluate: Evaluate) -> Callable[..., tuple[Any, _fold.Sums]]:
    """``step(buffer, sums, microbatch, link=None) -> (buffer, sums)``: one micro-batch, forward and backward."""
    options, engine = fold.options, fold.engine

    def step(
        buffer: Any, sums: _fold.Sums, microbatch: _split.Microbatch, link: _sync.Link | None = None
    ) -> tuple[Any, _fold.Sums]:
        buffer, outcome = engine.update(
            buffer,
            functools.partial(evaluate, microbatch),
            functools.partial(_contribution, options, sums, link),
            None if link is None else link.deliver,
        )
        return buffer, _fold.update(options, sums, outcome, microbatch.sizes)

    return step


def with_types(fold: Fold, evaluate: Evaluate, sums: _fold.Sums, empty: _split.Microbatch | None) -> _fold.Sums:
    """Where there was nothing but an empty micro-batch, it says what types to return."""
    if sums.kind is not None or empty is None:
        return sums
    with fold.engine.guard(), torch.no_grad():  # nothing to differentiate
        return _fold.update_with_nothing(fold.options, sums, evaluate(empty, fold.params), empty.sizes)


def finish(
    fold: Fold,
    link: _sync.Link | _sync.Traced | None,
    buffer: Any,
    sums: _fold.Sums,
    typed: Callable[[_fold.Sums], _fold.Sums],
) -> Any:
    """``finalize . sync``: what ``grad_fn`` returns.

    ``typed``: of sums that have seen nothing, on any rank, those with the types of an empty batch, where there was one.
    """
    options, engine = fold.options, fold.engine
    with engine.guard():
        arrived = engine.arrived(buffer)
        if link is not None:
            grads, sums, arrived = link.cross(buffer.grads, sums, arrived)
            buffer = buffer._replace(grads=grads)
            sums = typed(sums)
        check_dependence(options.name, not sums.differentiated or arrived)
        value, aux = _fold.finalize(options, sums, fold.params[0])
        results = engine.finalize(buffer, fold.returned, _fold.gradient_factor(options, sums))
        grads = _tree.unflatten(fold.treedef, results)
    if link is not None:
        link.done()
    return grads, ((value, aux) if options.has_aux else value)


def check_dependence(name: str, depends: bool) -> None:
    """A loss that no parameter reaches is a mistake, not a gradient of zero."""
    if not depends:
        raise ValueError(
            f"{name}: the loss does not depend on any parameter. Does loss_fn use the params it is given "
            "(and not a module's own), without detach(), no_grad() or .item()?"
        )


def _contribution(
    options: Options, sums: _fold.Sums, link: _sync.Link | None, outcome: Outcome, narrow: bool
) -> Contribution | None:
    """What a micro-batch counts for; where its gradients are sent as they come, the link learns their unit first."""
    if link is not None:
        link.set_unit(_fold.unit(sums, outcome), sums.weight + (0.0 if outcome.weight is None else outcome.weight))
    return _fold.contribution(options, sums, outcome, narrow)
