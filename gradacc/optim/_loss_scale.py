"""Loss scaling for float16: `dynamic_loss_scale` and `scaled_loss`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _donated, _dtypes, _loss, _options, _overlap, _scalars, _tree, _values
from gradacc._mean import Mean
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _over_ranks, _report
from gradacc.optim._arithmetic import in_place
from gradacc.optim._optimizer import Optimizer
from gradacc.optim._skip import all_finite, count_skipped, take_if

_NAME = "dynamic_loss_scale"


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`."""

    scale: Tensor
    """What the next loss is multiplied by, 0-dim float32."""
    growth_tracker: Tensor
    """Updates since the scale changed last, 0-dim int64."""
    skipped: Tensor
    """Updates skipped so far, 0-dim int64."""
    inner: TensorTree
    """State of the optimizer that is wrapped."""


def dynamic_loss_scale(
    optimizer: Optimizer,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Optimizer:
    """An optimizer of gradients of ``scale * loss``, with a scale that keeps float16 from under- and overflowing.

    .. code-block:: text

        all gradients finite:  params, inner = optimizer.step(params, grads / scale, inner)
                               growth_tracker += 1;  at growth_interval: scale *= growth_factor, growth_tracker = 0
        otherwise:             skipped += 1;  scale *= backoff_factor, growth_tracker = 0

    It is `torch.amp.GradScaler` as a pure function: on the same gradients the same scale and, eagerly, the same parameters,
    to the last bit. (Gradients are multiplied by the reciprocal of the scale, rounded to float32. A scale does not grow past
    float32's largest number. As there, nothing stops it from backing off to 0 where gradients are never finite: watch
    ``skipped``.) The scale is taken off once, at the boundary, from gradients that have been summed over micro-batches and
    ranks, so an inf on one rank makes all of them skip; and before ``optimizer`` sees them, so that this clips what it seems
    to: ``dynamic_loss_scale(clip_by_global_norm(adamw(1e-3), 1.0))``. It is outermost: what is around it would see scaled
    gradients, and `gradacc.train_step` looks for a scale there only, so other wrappers refuse it. The loss is a `scaled_loss`;
    `gradacc.train_step` refuses one that takes no scale, whose steps would be smaller by the factor ``scale``. In a loop of
    one's own, nobody can know: the gradients that ``step`` is given are taken to be those of ``scale * loss``, and so is the
    ``loss=`` that it passes on to a `skip_spikes`.

    Eagerly the test is read, one value a step (on an accelerator that waits for the gradients); under a transform, both
    outcomes are computed and ``torch.where`` takes one, per member of an ensemble, each of which has a scale of its own. With
    ``donate=True`` the scale is taken off in the memory of the gradients, once ``optimizer`` has looked at its state and its
    learning rate. An `Optimizer` of the caller's own cannot be asked beforehand: it gets unscaled copies.

    **float16.** Gradients come in the dtype of their parameters. In float16 they underflow again as soon as the scale is
    taken off; such parameters are refused, as by GradScaler. Keep them in float32, and let ``torch.autocast`` compute in
    float16, inside of the loss. bfloat16 has the range of float32 and needs no scale.

    Arguments:
        optimizer: an `Optimizer`. It must return a state of the structure that it was given.
        init_scale: the first scale, positive.
        growth_factor: greater than 1.
        backoff_factor: between 0 and 1.
        growth_interval: so many updates in a row without an overflow make the scale grow.

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`; an option of another type; float16 parameters; a state of another
            optimizer.
        ValueError: an option out of its range; ``optimizer`` has a loss scale already. ``step`` also raises what `Optimizer`
            says.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018; `torch.amp.GradScaler`.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, x):
        ...     with torch.autocast("cpu", dtype=torch.float16):
        ...         return torch.nn.functional.linear(x, w).float().square().mean()
        >>> grad_fn = gradacc.accumulate_and_value(gradacc.optim.scaled_loss(loss_fn), steps=2)
        >>> optimizer = gradacc.optim.dynamic_loss_scale(gradacc.optim.sgd(0.5))
        >>> step = gradacc.train_step(grad_fn, optimizer)
        >>> w = torch.ones(1, 2)
        >>> state = gradacc.TrainState(w, optimizer.init(w))
        >>> for x in (1e4 * torch.eye(2), torch.eye(2)):
        ...     state, metrics = step(state, x)
        ...     print(state.params, state.opt_state.scale, metrics["loss"])
        tensor([[1., 1.]]) tensor(32768.) tensor(100000000.)
        tensor([[0.5000, 0.5000]]) tensor(32768.) tensor(1.)
    """
    _check.optimizer(_NAME, optimizer, with_loss=True)
    _between("init_scale", init_scale, 0, torch.finfo(torch.float32).max)
    _between("growth_factor", growth_factor, 1, math.inf)
    _between("backoff_factor", backoff_factor, 0, 1)
    interval = _values.positive_int(_NAME, "growth_interval", growth_interval)

    def init(params: TensorTree) -> TensorTree:
        _wide_enough(*_check.params(_NAME, params, divided=True))
        scale = torch.full((), init_scale, dtype=torch.float32, device="cpu")
        return LossScaleState(scale, _check.zero(), _check.zero(), optimizer.init(params))

    inner_check, who = optimizer.check, _over_ranks.Asker(_NAME)

    def checked(state: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The scale and the two counts of a state."""
        _check.state(_NAME, state, LossScaleState)
        return (
            _check.scalar(_NAME, "state.scale", state.scale, torch.float32),
            _check.counter(_NAME, "state.growth_tracker", state.growth_tracker),
            _check.counter(_NAME, "state.skipped", state.skipped),
        )

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, loss: Tensor | None = None, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, treedef, grad_leaves, structure = _check.given(_NAME, params, grads)
        _wide_enough(leaves, treedef)
        scale, tracker, skipped = checked(state)
        named = {} if loss is None else {"loss": _unscaled_loss(optimizer, loss, scale)}
        look = None if inner_check is None else functools.partial(inner_check, params, state.inner)
        traced = _memory.differentiable(None, grad_leaves)
        held = [*leaves, *_tree.flatten(state)[0]] if donate and not traced else []
        given = [*grad_leaves, *held] if held else []

        def take(donate: bool) -> tuple[TensorTree, TensorTree]:
            used = None
            if donate and look is not None:  # see NOTE [Before anything is changed]
                look()
                used = held
            unscaled = _unscaled(grad_leaves, scale, used)
            return optimizer.step(params, _tree.unflatten(structure, unscaled), state.inner, donate=donate, **named)

        finite = _over_ranks.everywhere(who, grads, all_finite(grad_leaves, traced))
        new, inner = take_if(finite, take, look, (params, state.inner), donate=donate, traced=traced)
        scale, tracker = _moved(scale, tracker, finite.to(scale.device), growth_factor, backoff_factor, interval)
        after = new, LossScaleState(scale, tracker, count_skipped(skipped, finite), inner)
        return _donated.hand_over(f"{_NAME}.step", given, after)

    report = _report.of_wrapper(_NAME, LossScaleState, optimizer.report)
    scale_of = lambda state: checked(state)[0]  # noqa: E731
    return Optimizer(
        init, _over_ranks.together(_NAME, step), report=report, loss_scale=scale_of, takes_loss=optimizer.takes_loss
    )


def scaled_loss(loss_fn: Callable[..., Any], *, has_aux: bool = False, has_carry: bool = False) -> Callable[..., Any]:
    """The same loss times ``loss_scale``, for `dynamic_loss_scale`.

    .. code-block:: python

        def scaled(*args, loss_scale, **kwargs):
            return loss_fn(*args, **kwargs) * loss_scale

    The product is in float32 at least, so a float16 loss is not multiplied in float16. Of a `Mean`, the total is scaled and
    the weight is not; ``aux`` stays as it is. `gradacc.train_step` passes ``loss_scale`` and takes it off what it reports;
    elsewhere the value that ``accumulate_and_value`` returns is the scaled one.

    Arguments:
        loss_fn: ``loss_fn(params, batch, *args, **kwargs)``, as for `gradacc.accumulate`.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.
        has_carry: ``loss_fn`` returns ``(usual, carry)``; the carry stays as it is.

    Returns:
        ``scaled(params, batch, *args, loss_scale, **kwargs)``. ``loss_scale``, a keyword argument, is a number or a 0-dim
        floating tensor: ``state.scale``.

    Raises:
        TypeError: ``loss_fn`` is no function (an ``nn.Module``, say); when called, no or another ``loss_scale``, and what
            `gradacc.accumulate` says of a loss, such as a tuple without ``has_aux``.
        ValueError: ``loss_fn`` takes ``loss_scale`` already; when called, a ``loss_scale`` or a loss that is not 0-dim.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, x):
        ...     return (w * x).mean()
        >>> grad_fn = gradacc.accumulate(gradacc.optim.scaled_loss(loss_fn), steps=2)
        >>> grad_fn(torch.ones(()), torch.arange(5.0), loss_scale=8.0)
        tensor(16.)
    """
    options = _options.options("scaled_loss", loss_fn, has_aux=has_aux, has_carry=has_carry)
    signature = _with_scale(loss_fn)

    @functools.wraps(loss_fn, updated=())
    def scaled(*args: Any, loss_scale: Any = _MISSING, **kwargs: Any) -> Any:
        factor = _factor(loss_scale)
        usual = loss_fn(*args, **kwargs)
        usual, carry = _loss.with_carry(options, usual) if has_carry else (usual, None)
        value, aux = _loss.returned(options, usual)
        losses, treedef = _loss.losses(options, value)
        loss = _tree.unflatten(treedef, [_times(each, factor) for each in losses])
        scaled_usual = (loss, aux) if has_aux else loss
        return (scaled_usual, carry) if has_carry else scaled_usual

    scaled.__signature__ = signature  # type: ignore[attr-defined]  # which `takes_keyword` reads, through functools.wraps
    return scaled


def _times(target: Any, factor: float | Tensor) -> Any:
    if isinstance(target, Mean):
        return Mean(_times(target.total, factor), target.weight)
    return _dtypes.widened(target) * (_scalars.beside(factor, target) if isinstance(factor, Tensor) else factor)


_MISSING = object()


def _with_scale(loss_fn: Callable[..., Any]) -> inspect.Signature:
    """The loss's signature and ``loss_scale``."""
    if _values.takes_keyword(loss_fn, "loss_scale"):
        raise ValueError(
            "scaled_loss: loss_fn takes loss_scale itself, which it would not get: a loss that is scaled already (twice, "
            "by scaled_loss) is passed as it is, and a parameter that means something else needs another name"
        )
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    parameters = list(signature.parameters.values())
    rest = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    own = inspect.Parameter("loss_scale", inspect.Parameter.KEYWORD_ONLY)
    return signature.replace(parameters=[*parameters[: len(parameters) - len(rest)], own, *rest])


def _factor(loss_scale: Any) -> float | Tensor:
    if loss_scale is _MISSING:
        raise TypeError(
            "scaled_loss: no loss_scale was given. gradacc.train_step passes it where its optimizer is a dynamic_loss_scale, "
            "outermost, with a state that its init made; elsewhere pass loss_scale=state.scale to grad_fn"
        )
    if not isinstance(loss_scale, Tensor):
        return _check.number("scaled_loss", "loss_scale", loss_scale)
    if loss_scale.ndim != 0 or not loss_scale.is_floating_point():
        raise ValueError(
            f"scaled_loss: loss_scale is a {loss_scale.dtype} tensor of shape {tuple(loss_scale.shape)}; it must be a number "
            "or a 0-dim floating tensor, the scale of dynamic_loss_scale's state. For one scale per member of an ensemble, "
            "torch.vmap over it"
        )
    return loss_scale


def _between(option: str, value: Any, low: float, high: float) -> None:
    _check.number(_NAME, option, value, finite=False)
    if not low < value < high:
        raise ValueError(f"{_NAME}: {option} must be greater than {low} and less than {high}, got {value}")


def _wide_enough(leaves: list[Tensor], treedef: _tree.TreeDef) -> None:
    """Gradients are in the parameters' dtypes, which must hold them without the scale."""
    narrow = [index for index, leaf in enumerate(leaves) if leaf.dtype in (torch.float16, torch.complex32)]
    if narrow:
        path = _tree.paths(treedef, "params")[narrow[0]]
        raise TypeError(
            f"{_NAME}: {path} is a tensor of dtype {leaves[narrow[0]].dtype}, in which its gradients underflow again as soon "
            "as the scale is taken off. Keep params in float32, and compute in float16 with "
            "torch.autocast(device_type, dtype=torch.float16) inside loss_fn"
        )


def _unscaled_loss(optimizer: Optimizer, loss: Any, scale: Tensor) -> Tensor:
    """What the optimizer inside is told of the loss."""
    if not optimizer.takes_loss:
        raise TypeError(f"{_NAME}: step was given a loss, which the optimizer inside does not take; leave loss= out")
    value = _dtypes.widened(_check.loss(_NAME, loss).detach())
    return value / _scalars.beside(scale, value)


def _unscaled(grad_leaves: list[Tensor], scale: Tensor, used: list[Any] | None) -> list[Tensor]:
    """The gradients times the reciprocal of the scale: in new memory, or in their own, except what is in that of ``used``."""
    inverse = scale.double().reciprocal().float()  # as GradScaler rounds it
    if _memory.differentiable(None, grad_leaves):
        return [
            (_dtypes.widened(grad_leaf) * inverse.to(grad_leaf.device)).to(grad_leaf.dtype) for grad_leaf in grad_leaves
        ]
    with torch.no_grad():
        number = inverse.item()  # a number promotes no 0-dim gradient
        if used is None:
            return [grad_leaf.detach() * number for grad_leaf in grad_leaves]
        (ours,) = _overlap.in_separate_memory([grad_leaves], used)
        for chunk in _memory.chunks(ours):
            in_place.mul([ours[index] for index in chunk], number)
        return ours


def _moved(
    scale: Tensor, tracker: Tensor, finite: Tensor, growth: float, backoff: float, interval: int
) -> tuple[Tensor, Tensor]:
    """The scale and its tracker after an update: ``torch._amp_update_scale_``, which multiplies in float64."""
    exact = scale.double()
    larger, smaller = (exact * growth).float(), (exact * backoff).float()
    tracked = tracker + 1
    due = tracked >= interval
    grown = torch.where(due & larger.isfinite(), larger, scale)
    return torch.where(finite, grown, smaller), torch.where(finite & ~due, tracked, 0)
