"""`skip_spikes`: no step whose loss or gradients are far above those of the steps before it."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _donated, _dtypes, _tree, _values
from gradacc._describe import describe
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _over_ranks, _report
from gradacc.optim._optimizer import Optimizer
from gradacc.optim._skip import count_skipped, take_if

_NAME = "skip_spikes"


class SpikesState(NamedTuple):
    """State of `skip_spikes`."""

    recent: Tensor
    """Losses (first row) and gradient norms of the last steps, oldest first, float64; inf where there is none."""
    skipped: Tensor
    """Updates skipped so far, 0-dim int64."""
    inner: TensorTree
    """State of the optimizer that is wrapped."""


def skip_spikes(optimizer: Optimizer, window: int = 128, sigma: float = 6.0) -> Optimizer:
    """An optimizer that skips an update whose loss or gradient norm is far above those of the steps before, and counts it.

    .. code-block:: text

        x_1 ... x_n:  the losses of the last steps, at most window of them, skipped ones too
        mean = sum x_i / n                  std = sqrt(sum (x_i - mean)^2 / (n - 1))
        spike(loss) = n >= max(2, window // 2 - 1)  and  loss - mean > sigma * std
        spike(norm): the same of the Euclidean norms of all gradients as one vector

        loss and norm finite, neither a spike:  params, inner = optimizer.step(params, grads, inner)
        otherwise:                              skipped += 1

    This is the rule of OLMo's ``SkipStepOptimizer``, with its numbers. As there, a spike that was skipped does enter the
    window: it widens ``std`` until it has left, so a smaller one behind it may pass; in return a level that lasts is not
    skipped for ever (of equal ones that are far off, with these numbers, the fifth is taken). What is not finite is skipped
    too, from the first step on, and never enters, so there is no need for `skip_nonfinite`. (In OLMo it enters, and then
    every step is skipped until it has left. And a window of less than 6, which judges by a single step there, whose ``std``
    is NaN, waits for a second one here.)

    A skipped update changes neither the parameters nor the inner state, and is no step of an ``lr`` that is a function of
    the step. Eagerly loss and norm are read, together, once a step (on an accelerator that waits for the gradients), and of a
    skipped update nothing is computed; under a transform, both outcomes are computed and ``torch.where`` takes one, per
    member of an ensemble, each judged by its own past. `gradacc.train_step` reports how many were ``skipped``, and how many
    ``updates`` were made. With ``sync=`` all ranks have the same loss and gradients, so all skip or none does.

    **The loss** comes as ``optimizer.step(params, grads, state, loss=value)``; `gradacc.train_step` passes it. Without it a
    step is judged by its gradients alone. The loss of nothing, a mean of weight 0, is NaN: that step is skipped.

    **Order.** It is around the whole, where it sees all gradients as they are:
    ``skip_spikes(clip_by_global_norm(adamw(1e-3), 1.0))``. `clip_by_global_norm`, `by_path` and `skip_nonfinite` refuse one
    inside. Only a `dynamic_loss_scale` goes around it, which takes its scale off the gradients and the loss; what overflows
    there is skipped there, and does not enter the window.

    Arguments:
        optimizer: an `Optimizer`. It must return a state of the structure that it was given.
        window: how many steps a step is compared with, at least 2.
        sigma: how many standard deviations above their mean are too many, positive.

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`, ``window`` no int or ``sigma`` no number; a state of another optimizer; a
            loss that is no 0-dim floating tensor. ``step`` also raises what `Optimizer` says, of an update that is skipped too.
        ValueError: ``window`` or ``sigma`` out of range; a state of another ``window``; ``optimizer`` is a `dynamic_loss_scale`
            or another `skip_spikes`.

    Source: ``olmo_core.optim.SkipStepOptimizer`` of OLMo-core (github.com/allenai/OLMo-core).

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.skip_spikes(gradacc.optim.sgd(1.0), window=4, sigma=3.0)
        >>> params = torch.zeros(())
        >>> state = optimizer.init(params)
        >>> for loss in (1.0, 1.2, 9.0, 1.1):
        ...     params, state = optimizer.step(params, torch.ones(()), state, loss=torch.tensor(loss))
        ...     print(params, state.skipped)
        tensor(-1.) tensor(0)
        tensor(-2.) tensor(0)
        tensor(-2.) tensor(1)
        tensor(-3.) tensor(1)
    """
    _check.optimizer(_NAME, optimizer)
    length = _at_least_two(window)
    _positive(sigma)
    inner_check, who = optimizer.check, _over_ranks.Asker(_NAME)

    def init(params: TensorTree) -> TensorTree:
        recent = torch.full((2, length), math.inf, dtype=torch.float64, device="cpu")
        return SpikesState(recent, _check.zero(), optimizer.init(params))

    def checked(state: Any) -> tuple[Tensor, Tensor]:
        """The window and the count of a state."""
        _check.state(_NAME, state, SpikesState)
        return _window_of(state.recent, length), _check.counter(_NAME, "state.skipped", state.skipped)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, loss: Tensor | None = None, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, _, grad_leaves, _ = _check.given(_NAME, params, grads)
        recent, skipped = checked(state)
        if loss is not None:
            _check.loss(_NAME, loss)
        look = None if inner_check is None else functools.partial(inner_check, params, state.inner)

        def take(donate: bool) -> tuple[TensorTree, TensorTree]:
            return optimizer.step(params, grads, state.inner, donate=donate)

        traced = _memory.differentiable(None, grad_leaves)
        given = [*leaves, *grad_leaves, *_tree.flatten(state)[0]] if donate and not traced else []
        norm = _dtypes.global_norm([grad_leaf.detach() for grad_leaf in grad_leaves], wide=True)
        fine, recent = _judged(recent, loss, _over_ranks.total_norm(who, grads, norm), sigma)
        new, inner = take_if(fine, take, look, (params, state.inner), donate=donate, traced=traced)
        after = new, SpikesState(recent, count_skipped(skipped, fine), inner)
        return _donated.hand_over(f"{_NAME}.step", given, after)

    def check(params: TensorTree, state: TensorTree) -> None:
        checked(state)
        if inner_check is not None:
            inner_check(params, state.inner)

    report = _report.of_wrapper(_NAME, SpikesState, optimizer.report)
    return Optimizer(
        init, _over_ranks.together(_NAME, step), None if inner_check is None else check, report, takes_loss=True
    )


def _judged(recent: Tensor, loss: Tensor | None, norm: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Whether a step is to be taken, 0-dim and bool, and the window behind it.

    Both are on the device of ``recent``, the CPU: the way there is the one read. A decision has no derivative.
    """
    values = norm.reshape(1)
    if loss is not None:
        dtype = torch.promote_types(_dtypes.sum_dtype(loss.dtype), norm.dtype)
        values = torch.stack([loss.detach().to(norm.device, dtype), norm.to(dtype)])
    values = values.to(recent.device).double()
    finite = values.isfinite().all()
    if loss is None:
        values = torch.cat([torch.full_like(values, math.inf), values])
    spikes = values.isfinite() & _far_above(recent, values, sigma)
    after = torch.where(finite, torch.cat([recent[:, 1:], values[:, None]], 1), recent)
    return finite & ~spikes.any(), after


def _far_above(recent: Tensor, values: Tensor, sigma: float) -> Tensor:
    """Of each value, whether it is a spike beside those of its row."""
    known = recent.isfinite()
    number = known.sum(1)
    mean = torch.where(known, recent, 0).sum(1) / number
    off = torch.where(known, recent - mean[:, None], 0)
    std = (off.square().sum(1) / (number - 1)).sqrt()
    return (number >= max(2, recent.shape[1] // 2 - 1)) & (values - mean > sigma * std)


def _window_of(recent: Any, length: int) -> Tensor:
    """The losses and norms of a state."""
    if not isinstance(recent, Tensor) or recent.dtype != torch.float64 or recent.ndim != 2 or len(recent) != 2:
        got = f"{recent.dtype}, {describe(recent)}" if isinstance(recent, Tensor) else describe(recent)
        raise TypeError(
            f"{_NAME}: state.recent must be a tensor of dtype torch.float64 and shape (2, {length}), got {got}; pass the "
            "state that init(params) or the last step returned, or torch.vmap the step over a state that is batched"
        )
    if recent.shape[1] != length:
        raise ValueError(
            f"{_NAME}: state.recent has a window of {recent.shape[1]} steps, where this optimizer has window={length}. Is it "
            "the state of another one? Pass what init(params) or the last step returned"
        )
    return recent


def _at_least_two(window: Any) -> int:
    length = _values.positive_int(_NAME, "window", window)
    if length < 2:
        raise ValueError(f"{_NAME}: window must be at least 2, as one step has no standard deviation, got {window}")
    return length


def _positive(sigma: Any) -> None:
    if not _check.number(_NAME, "sigma", sigma) > 0:
        raise ValueError(f"{_NAME}: sigma must be greater than 0, got {sigma}")
