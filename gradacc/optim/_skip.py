"""`skip_nonfinite`, and what a step is that is taken only if all gradients are finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _donated, _dtypes, _tree
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _over_ranks, _report
from gradacc.optim._optimizer import Optimizer


class SkipState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: Tensor
    """Updates skipped so far, 0-dim int64."""
    inner: TensorTree
    """State of the optimizer that is wrapped."""


def skip_nonfinite(optimizer: Optimizer) -> Optimizer:
    """An optimizer that skips an update whose gradients hold an inf or a NaN, and counts it.

    .. code-block:: text

        all gradients finite:  params, inner = optimizer.step(params, grads, inner)
        otherwise:             skipped += 1

    A skipped update changes neither the parameters nor the inner state, and is no step of an ``lr`` that is a function
    of the step. Eagerly the test is read, one value a step (on an accelerator that waits for the gradients), and of
    a skipped update nothing is computed; under a transform, both outcomes are computed and ``torch.where`` takes one, per
    member of an ensemble. `gradacc.train_step` reports how many were ``skipped``, and how many ``updates`` were made.

    Arguments:
        optimizer: an `Optimizer`. It must return a state of the structure that it was given.

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`; a state of another optimizer. ``step`` also raises what `Optimizer` says, of
            an update that is skipped too.
        ValueError: ``optimizer`` is a `dynamic_loss_scale`, which is outermost (and skips such updates itself).

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.skip_nonfinite(gradacc.optim.sgd(1.0))
        >>> params = torch.zeros(2)
        >>> params, state = optimizer.step(params, torch.tensor([1.0, float("nan")]), optimizer.init(params))
        >>> params, state.skipped, state.inner.step
        (tensor([0., 0.]), tensor(1), tensor(0))
    """
    name = "skip_nonfinite"
    _check.optimizer(name, optimizer)
    inner_check, who = optimizer.check, _over_ranks.Asker(name)

    def init(params: TensorTree) -> TensorTree:
        return SkipState(_check.zero(), optimizer.init(params))

    def checked(state: Any) -> Tensor:
        _check.state(name, state, SkipState)
        return _check.counter(name, "state.skipped", state.skipped)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, _, grad_leaves, _ = _check.given(name, params, grads)
        skipped = checked(state)
        look = None if inner_check is None else functools.partial(inner_check, params, state.inner)

        def take(donate: bool) -> tuple[TensorTree, TensorTree]:
            return optimizer.step(params, grads, state.inner, donate=donate)

        traced = _memory.differentiable(None, grad_leaves)
        given = [*leaves, *grad_leaves, *_tree.flatten(state)[0]] if donate and not traced else []
        finite = _over_ranks.everywhere(who, grads, all_finite(grad_leaves, traced))
        new, inner = take_if(finite, take, look, (params, state.inner), donate=donate, traced=traced)
        after = new, SkipState(count_skipped(skipped, finite), inner)
        return _donated.hand_over(f"{name}.step", given, after)

    def check(params: TensorTree, state: TensorTree) -> None:
        checked(state)
        if inner_check is not None:
            inner_check(params, state.inner)

    report = _report.of_wrapper(name, SkipState, optimizer.report)
    return Optimizer(
        init,
        _over_ranks.together(name, step),
        None if inner_check is None else check,
        report,
        elementwise=optimizer.elementwise,
    )


def take_if(
    fine: Tensor,
    take: Callable[[bool], tuple[TensorTree, TensorTree]],
    look: Callable[[], object] | None,
    before: tuple[TensorTree, TensorTree],
    *,
    donate: bool,
    traced: bool,
) -> tuple[TensorTree, TensorTree]:
    """``take(donate)``, the parameters and state after a step, if ``fine`` (0-dim, bool); otherwise those ``before`` it.

    Eagerly the step is taken or not (then ``look()`` raises what it would have raised, where it can be asked); under a
    transform ``torch.where`` chooses.
    """
    params, inner = before
    if traced:
        new, moved = take(False)
        return _where(fine, new, params), _where(fine, moved, inner)
    if bool(fine):
        return take(donate)
    if look is not None:
        look()
    with torch.no_grad():
        leaves, treedef = _tree.flatten(params)
        kept = [leaf.detach() for leaf in leaves] if donate else _memory.copies(leaves)
        same = _tree.map_tensors(lambda leaf: leaf.detach() if donate else leaf.detach().clone(), inner)
        return _tree.unflatten(treedef, kept), same


def count_skipped(skipped: Tensor, fine: Tensor) -> Tensor:
    """One more, unless all was fine."""
    return skipped + (~fine).to(skipped.device, skipped.dtype)


def all_finite(grad_leaves: list[Tensor], traced: bool) -> Tensor:
    """Whether every element is: 0-dim, bool; eagerly on the CPU, which reads it.

    Eagerly by the extremes, which NaN passes through: one pass, and no temporary.
    """
    parts = [_dtypes.as_real(grad_leaf) for grad_leaf in grad_leaves if grad_leaf.numel()]
    if not parts:
        return torch.tensor(True, device="cpu")
    device = parts[0].device
    if traced:
        return torch.stack([part.isfinite().all().to(device) for part in parts]).all()
    ends = torch.stack([end.to(device) for part in parts for end in part.detach().aminmax()])
    return ends.isfinite().all().cpu()


def _where(condition: Tensor, yes: TensorTree, no: TensorTree) -> TensorTree:
    ours, treedef = _tree.flatten(yes)
    return _tree.unflatten(
        treedef,
        [
            torch.where(condition.to(a.device), a, b) if isinstance(a, Tensor) else a
            for a, b in zip(ours, _tree.flatten(no)[0], strict=True)
        ],
    )
