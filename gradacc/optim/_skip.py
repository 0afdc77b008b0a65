"""`skip_nonfinite`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradacc import _tree
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory
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

    A skipped update changes neither the parameters nor the inner state, nor does it count as a step of an ``lr`` that is a
    function of the step. Eagerly the test is read (on an accelerator that waits for the gradients), and a skipped update
    costs nothing; under a transform, both outcomes are computed and ``torch.where`` takes one, per member of an ensemble.

    Arguments:
        optimizer: an `Optimizer`. It must return a state of the structure that it was given.

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`; a state of another optimizer. ``step`` also raises what `Optimizer` says.

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

    def init(params: TensorTree) -> TensorTree:
        return SkipState(torch.zeros((), dtype=torch.int64), optimizer.init(params))

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, treedef = _check.params(name, params)
        slopes = _check.grads(name, grads, leaves, treedef)
        _check.state(name, state, SkipState)
        skipped = _check.counter(name, "state.skipped", state.skipped)
        if not _memory.differentiable(None, slopes):
            if bool(_finite(slopes, False)):
                new, inner = optimizer.step(params, grads, state.inner, donate=donate)
                return new, SkipState(skipped.clone(), inner)
            with torch.no_grad():
                kept = _memory.owned(leaves, donate, set())
                inner = _tree.map_tensors(lambda leaf: leaf if donate else leaf.detach().clone(), state.inner)
                return _tree.unflatten(treedef, kept), SkipState(skipped + 1, inner)
        finite = _finite(slopes, True)
        new, inner = optimizer.step(params, grads, state.inner, donate=False)
        count = skipped + (~finite).to(skipped.device, skipped.dtype)
        return _where(finite, new, params), SkipState(count, _where(finite, inner, state.inner))

    return Optimizer(init, step)


def _finite(slopes: list[Tensor], traced: bool) -> Tensor:
    """Whether every element is. Eagerly by the extremes, which NaN passes through: one pass, and no temporary."""
    parts = [torch.view_as_real(slope) if slope.is_complex() else slope for slope in slopes if slope.numel()]
    if not parts:
        return torch.tensor(True)
    device = parts[0].device
    if traced:
        return torch.stack([part.isfinite().all().to(device) for part in parts]).all()
    return torch.stack([end.to(device) for part in parts for end in part.detach().aminmax()]).isfinite().all()


def _where(condition: Tensor, yes: TensorTree, no: TensorTree) -> TensorTree:
    ours, treedef = _tree.flatten(yes)
    return _tree.unflatten(
        treedef,
        [
            torch.where(condition.to(a.device), a, b) if isinstance(a, Tensor) else a
            for a, b in zip(ours, _tree.flatten(no)[0], strict=True)
        ],
    )
