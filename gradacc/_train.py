"""The training step: a gradient and an update, as one function of an explicit state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _donated, _dtypes, _mean, _overlap, _rows, _scalars, _tree, _values, _where
from gradacc._describe import describe
from gradacc._kept import Kept
from gradacc._mean import Mean
from gradacc.optim import LossScaleState, Optimizer, SpikesState, _over_ranks


class TrainState(NamedTuple):
    """All that training carries from one step to the next: a pytree.

    Arguments:
        params: the parameters.
        opt_state: what ``optimizer.init(params)`` returned.
        step: steps so far, with those whose update was skipped: an int, or a 0-dim integer tensor (which a compiled step does
            not compile anew for). Optimizers count the updates that they made, which is what a learning rate that is a
            function of the step goes by.
        carry: what a ``grad_fn`` with ``has_carry=True`` begins with (running statistics, a hidden state). None and the empty
            tuple, the default, are no carry. (The default is not None, which `torch.vmap` takes for a leaf.)

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.sgd(lr=0.1)
        >>> params = {"w": torch.ones(3)}
        >>> gradacc.TrainState(params, optimizer.init(params)).step
        0
    """

    params: Any
    opt_state: Any
    step: int | Tensor = 0
    carry: Any = ()


def train_step(
    grad_fn: Callable[..., Any], optimizer: Optimizer, *, donate: bool = False
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """One update from one large batch, as a function.

    .. code-block:: python

        def step(state, batch, *args):
            grads, value = grad_fn(state.params, batch, *args)                        # or with a carry, which it keeps
            params, opt_state = optimizer.step(state.params, grads, state.opt_state)  # and loss=, if it takes_loss
            return TrainState(params, opt_state, state.step + 1), metrics

    Arguments:
        grad_fn: from `gradacc.accumulate_and_value`, differentiating its first argument; or any function that returns
            ``(grads, value)`` or ``(grads, (value, aux))``, `torch.func.grad_and_value` for instance. Leaves that require grad
            (a module's own parameters) reach it, and the optimizer, detached: a training step has no graph of what was before.
        optimizer: a `gradacc.optim.Optimizer`. The state of `gradacc.optim.dynamic_loss_scale` (outermost) has a scale, which
            ``grad_fn`` then gets as ``loss_scale=state.opt_state.scale``: its loss is a `gradacc.optim.scaled_loss`, or it
            says that it multiplies the loss itself, by a parameter of that name. One that takes the loss
            (`gradacc.optim.skip_spikes`) gets it.
        donate: the update may reuse the memory of ``state.params`` and ``state.opt_state`` (and of the gradients that
            ``grad_fn`` returns), whose tensors cannot be used afterwards: an average of parameters begins with
            ``{name: leaf.clone() for name, leaf in state.params.items()}``. See `gradacc.optim.Optimizer`.

    Returns:
        ``step(state, batch, *args, **kwargs) -> (state, metrics)``. ``metrics`` is a dict of detached tensors: ``loss`` (of a
        `Mean`, ``total / weight``), ``grad_norm`` (the Euclidean norm of all gradients as one vector, before any clipping,
        at least float32), and, where there are any, ``weight`` (of a `Mean`: tokens, say) and ``aux``. Of several means
        ``loss`` is the sum of their values (one of weight 0 counts for nothing), ``terms`` are the values (NaN of weight 0),
        and ``weight`` their weights, both in the structure of the loss. Further:

        - ``lr``: the learning rate of this step (of an update that was skipped: what it would have been), where the optimizer
          is one of `gradacc.optim` but `gradacc.optim.from_torchopt`. It is asked for once more, so a function of the step is
          called twice. With `gradacc.optim.by_path` it is a tuple, one for each optimizer, the default first; NaN of one that
          has no parameters, or does not say.
        - ``skipped`` and ``updates``, of an optimizer that may skip updates: how many it has skipped so far, and how many it
          has made. ``TrainState.step`` counts both. With `by_path` inside, ``updates`` is a tuple like ``lr``, and ``skipped``
          is one where groups skip on their own.
        - ``dropped``, with ``nonfinite="drop"``: how many micro-batches were, on all ranks.
        - ``loss_scale``: this step's, with which ``loss`` and ``grad_norm`` are divided.

    Raises:
        TypeError: ``optimizer`` is a `gradacc.optim.dynamic_loss_scale`, and ``grad_fn`` takes no ``loss_scale`` (its loss is
            not scaled, and its steps would be too small). When called: ``grad_fn`` returned gradients alone
            (`gradacc.accumulate`); the state is no `TrainState`.
        ValueError: when called, the state of a `gradacc.optim.dynamic_loss_scale` is inside of another one's, where its scale
            does not reach the loss, or that of a `gradacc.optim.skip_spikes`, which the loss does not reach; a tensor of the
            state has been donated.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(params, batch):
        ...     return (batch @ params["w"] - 1).square().mean()
        >>> grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2)
        >>> optimizer = gradacc.optim.sgd(lr=0.1)
        >>> params = {"w": torch.zeros(2)}
        >>> state = gradacc.TrainState(params, optimizer.init(params))
        >>> step = gradacc.train_step(grad_fn, optimizer)
        >>> for _ in range(3):
        ...     state, metrics = step(state, torch.eye(2).repeat(4, 1))
        >>> state.step, round(metrics["loss"].item(), 4)
        (3, 0.6561)

    Source: ``flax.training.train_state`` (the state); optax (the update).
    """
    if not callable(grad_fn):
        raise TypeError(f"train_step: grad_fn must be a function that returns (grads, value), got {describe(grad_fn)}")
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "step"):
        raise TypeError(
            f"train_step: optimizer must be a gradacc.optim.Optimizer, got {describe(optimizer)}. "
            "gradacc.optim.from_torch makes one of a torch.optim class"
        )

    takes = True if torch.compiler.is_compiling() else _values.takes_keyword(grad_fn, "loss_scale")
    known = optimizer if isinstance(optimizer, Optimizer) else Optimizer(optimizer.init, optimizer.step)
    if known.loss_scale is not None and not takes:
        raise TypeError(_UNSCALED)
    how = _How(known, _over_ranks.Asker("train_step"), donate)

    def step(state: TrainState, batch: Any, *args: Any, **kwargs: Any) -> tuple[TrainState, dict[str, Any]]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"train_step: the state must be a TrainState, got {describe(state)}. "
                "Begin with TrainState(params, optimizer.init(params))"
            )
        _check_inside(known, state.opt_state, kwargs)
        scale = _scale(known, state.opt_state, takes, kwargs)
        start, carry = _without_graph(state.params), state.carry
        named: dict[str, Any] = {} if scale is None else {"loss_scale": scale}
        has_carry = not (carry is None or (isinstance(carry, tuple) and not carry))
        if has_carry:
            named["carry"] = _without_graph(carry)
        results = grad_fn(start, batch, *args, **named, **kwargs)
        if has_carry:
            results, carry = _split_carry(results)
        with _over_ranks.telling("train_step", results):
            number = state.step + 1  # here, where an error loses nothing
            params, opt_state, metrics = _update(how, state, start, results, scale)
            return TrainState(params, opt_state, number, carry), metrics

    return step


class _How(NamedTuple):
    """What a step was made of."""

    optimizer: Optimizer
    who: _over_ranks.Asker
    donate: bool


def _update(
    how: _How, state: TrainState, start: Any, results: Any, scale: Tensor | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Parameters, the optimizer's state and metrics of one step, from what ``grad_fn`` returned for ``start``."""
    optimizer, report = how.optimizer, how.optimizer.report
    grads, value, aux, dropped = _split_result(results)
    loss, told = _of_value(value, scale)
    metrics = {"loss": loss, "grad_norm": _norm(how.who, grads, scale), **told}
    judged = {"loss": _mean.value_of(value)} if optimizer.takes_loss else {}
    if aux is not None:
        metrics["aux"] = aux
    if dropped is not None:
        metrics["dropped"] = dropped
    if report.rate is not None:
        metrics["lr"] = _numbers(report.rate(state.opt_state), torch.float64)
    if scale is not None:
        metrics["loss_scale"] = scale.clone()
    donated = how.donate and not _where.transforming()
    given = _tree.flatten((state.params, grads, state.opt_state))[0] if donated else []
    metrics = _in_separate_memory(_tree.map_tensors(Tensor.detach, metrics), given)
    moved = optimizer.step(start, grads, state.opt_state, donate=how.donate, **judged)
    params, opt_state = _donated.hand_over("train_step", given, moved)  # of an optimizer of the caller's own
    if report.skipped is not None:
        metrics["skipped"] = _numbers(report.skipped(opt_state), torch.int64)
        if report.updates is not None:
            metrics["updates"] = _numbers(report.updates(opt_state), torch.int64)
    return params, opt_state, metrics


def _without_graph(tree: Any) -> Any:
    """What a step begins with: parameters that a module holds are leaves that require grad, and training ends there.

    Others are results of a step that is itself differentiated (with respect to its learning rate, say).
    """
    if _where.transforming():
        return tree
    return _tree.map_tensors(lambda leaf: leaf.detach() if leaf.requires_grad and leaf.is_leaf else leaf, tree)


_UNSCALED = (
    "train_step: the optimizer is a dynamic_loss_scale, which takes its scale off the gradients, but grad_fn takes no "
    "loss_scale: gradients that were not multiplied by it would make steps smaller by that factor (65536 at first). Scale the "
    "loss: accumulate_and_value(gradacc.optim.scaled_loss(loss_fn)). A grad_fn of your own that does says so by a parameter of "
    "that name, not by **kwargs: lambda params, batch, loss_scale: ..."
)


def _scale(optimizer: Optimizer, opt_state: Any, takes: bool, kwargs: dict[str, Any]) -> Tensor | None:
    """The loss scale of the optimizer's state, which the loss is to be multiplied by; None where it has none."""
    if optimizer.loss_scale is not None or isinstance(opt_state, LossScaleState):
        if not takes:
            raise TypeError(_UNSCALED)
        if "loss_scale" in kwargs:
            raise TypeError(
                "train_step: loss_scale was passed to the step, which passes the optimizer's own to grad_fn; leave it out"
            )
        scale: Tensor = opt_state.scale if optimizer.loss_scale is None else optimizer.loss_scale(opt_state)
        return scale
    return None


def _check_inside(optimizer: Optimizer, opt_state: Any, kwargs: dict[str, Any]) -> None:
    """No wrapper of the caller's own hides that what is inside of it needs the loss's factor, or the loss."""
    inside = _inside(opt_state)
    unscaled = optimizer.loss_scale is None and not isinstance(opt_state, LossScaleState)
    if unscaled and LossScaleState in inside and "loss_scale" not in kwargs:
        raise ValueError(
            f"train_step: the optimizer's state, {describe(opt_state)}, has that of a dynamic_loss_scale inside, whose scale "
            "does not reach the loss. Put it outermost: dynamic_loss_scale(what is around it now); or pass its scale to the "
            "step, as loss_scale="
        )
    if not optimizer.takes_loss and (isinstance(opt_state, SpikesState) or SpikesState in inside):
        raise ValueError(
            f"train_step: the optimizer's state, {describe(opt_state)}, is that of a skip_spikes or has one inside, which the "
            "loss does not reach: it would judge gradients alone. Put it around the whole: skip_spikes(what is around it "
            "now); or pass the loss on: Optimizer(init, step, takes_loss=True), whose step takes loss="
        )


def _inside(opt_state: Any, depth: int = 0) -> set[type]:
    """Which of these a wrapper's state has in it, in a container, a dataclass or an object of any class.

    Trees of parameters, which are larger or deeper, are not searched.
    """
    if isinstance(opt_state, Mapping):
        parts = list(opt_state.values())
    elif isinstance(opt_state, (tuple, list)):
        parts = list(opt_state)
    elif isinstance(opt_state, (Tensor, type)) or torch.compiler.is_compiling():
        return set()
    elif dataclasses.is_dataclass(opt_state):
        parts = [getattr(opt_state, field.name) for field in dataclasses.fields(opt_state)]
    else:
        parts = list(getattr(opt_state, "__dict__", {}).values())
    if len(parts) > 16 or depth > 8:
        return set()
    found = {kind for kind in (LossScaleState, SpikesState) if any(isinstance(part, kind) for part in parts)}
    return found.union(*(_inside(part, depth + 1) for part in parts))


def _numbers(answer: Any, dtype: torch.dtype) -> Any:
    """What an optimizer reports, as detached tensors in memory of their own: ``dtype`` is that of Python numbers."""
    leaves, treedef = _tree.flatten(answer)
    return _tree.unflatten(
        treedef,
        [
            leaf.detach().clone() if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=dtype, device="cpu")
            for leaf in leaves
        ],
    )


def _in_separate_memory(metrics: Any, given: Sequence[Any]) -> Any:
    """Metrics that an update in the memory of what is donated does not change: aux may be a parameter."""
    if not given:
        return metrics
    leaves, treedef = _tree.flatten(metrics)
    shared = _overlap.shared(leaves, given)
    return _tree.unflatten(treedef, [leaf.clone() if late else leaf for leaf, late in zip(leaves, shared, strict=True)])


def _norm(who: _over_ranks.Asker, grads: Any, scale: Tensor | None) -> Tensor:
    """Of all gradients, at least in float32; ``scale`` is taken off first, as squares of scaled ones may overflow."""
    grads = _rows.as_shards("train_step", grads, "grads")
    leaves = (leaf for leaf in _tree.flatten(grads)[0] if isinstance(leaf, Tensor))
    if scale is not None:
        leaves = (_dtypes.widened(leaf) / _scalars.beside(scale, leaf) for leaf in leaves)
    return _over_ranks.total_norm(who, grads, _dtypes.global_norm(leaves, wide=True))


def _of_value(value: Any, scale: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and the metrics of a `Mean` (``weight``), of several means ``terms`` too. A ``scale`` is taken off."""

    def unscaled(loss: Tensor) -> Tensor:
        return loss if scale is None else loss / _scalars.beside(scale, loss)

    told: dict[str, Any] = {}
    loss = unscaled(_mean.value_of(value))
    if isinstance(value, Tensor):
        return loss, told
    means, treedef = _mean.flatten(value)
    if not isinstance(value, Mean):
        told["terms"] = _tree.unflatten(treedef, [unscaled(mean.value) for mean in means])
    return loss, {**told, "weight": _tree.unflatten(treedef, [_weight(mean) for mean in means])}


def _weight(value: Mean) -> Tensor:
    if isinstance(value.weight, Tensor):
        return value.weight
    return _scalars.scalar(value.weight, value.total.device, torch.get_default_dtype())


def _split_carry(returned: Any) -> tuple[Any, Any]:
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], tuple)):
        raise TypeError(
            f"train_step: the state has a carry, and grad_fn returned {describe(returned)}; it must return "
            "((grads, value), carry). Make it with gradacc.accumulate_and_value(loss_fn, has_carry=True)"
        )
    return returned


def _split_result(returned: Any) -> tuple[Any, Any, Any, Tensor | None]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            f"train_step: grad_fn returned {describe(returned)}; it must return (grads, value). "
            "Make it with gradacc.accumulate_and_value, not accumulate"
        )
    grads, rest = returned
    is_pair = isinstance(rest, tuple) and len(rest) == 2 and not isinstance(rest, Kept)
    if is_pair and _mean.are_means(rest):
        raise TypeError(
            "train_step: grad_fn returned two Means behind the gradients: a loss of two means, or a loss and its aux. "
            "Return the one as a dict or list of Means, or the other as {'name': Mean}"
        )
    value, aux = rest if is_pair else (rest, None)
    value, dropped = value if isinstance(value, Kept) else (value, None)
    if not isinstance(value, (Tensor, Mean)) and not _mean.are_means(value):
        raise TypeError(
            f"train_step: grad_fn returned {describe(value)} as its value; it must be a tensor, a Mean or several. "
            "Make it with gradacc.accumulate_and_value, not accumulate"
        )
    return grads, value, aux, dropped
