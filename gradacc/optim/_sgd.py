"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc._tree import TensorTree
from gradacc.optim import _check
from gradacc.optim._arithmetic import Arithmetic, Tensors, pure
from gradacc.optim._elementwise import elementwise
from gradacc.optim._optimizer import LearningRate, Optimizer


class SgdState(NamedTuple):
    """State of `sgd`."""

    step: Tensor
    """Updates so far, 0-dim int64."""
    momentum_buffer: TensorTree
    """Like the parameters; ``()`` without momentum."""


def sgd(
    lr: LearningRate,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, with momentum where asked for: `torch.optim.SGD` as pure functions.

    .. code-block:: text

        g = grads + weight_decay * params
        b = g                                    in the first step
            momentum * b + (1 - dampening) * g   later
        params -= lr * (g                        without momentum
                        b                        with momentum
                        g + momentum * b)        with nesterov

    To the last bit what `torch.optim.SGD` computes, eagerly, with any real or complex dtype, and under a transform where
    ``lr`` is a number. Where ``lr`` is a tensor under a transform, ``lr * b`` is rounded before it is subtracted: one
    rounding more a step (relative 1e-7 in float32).

    Arguments:
        lr: the learning rate: a number, a 0-dim floating tensor, or a function of the step (0, 1, …) that returns one, as
            `schedule` makes them; not negative.
        momentum: the factor of the previous buffer, not negative.
        dampening: what is taken off the gradient's share in the buffer, at most 1.
        weight_decay: the factor of the L2 penalty's gradient, not negative.
        nesterov: look ahead with Nesterov's momentum; needs momentum, and no dampening.

    Raises:
        TypeError: an option of another type.
        ValueError: a negative or NaN option; ``nesterov`` without momentum or with dampening. ``step`` also raises what
            `Optimizer` says.

    Source: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning", ICML
    2013; with torch's convention, in which ``lr`` is outside the buffer.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.sgd(0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.step(params, {"w": torch.tensor([1.0, -1.0])}, state)
        >>> params["w"], state.step
        (tensor([0.9000, 2.1000]), tensor(1))

        An ensemble, each member with its own learning rate, and the derivative of a step by the learning rate:

        >>> def descend(lr, w):
        ...     optimizer = gradacc.optim.sgd(lr)
        ...     return optimizer.step(w, 2 * w, optimizer.init(w))[0]
        >>> torch.vmap(descend)(torch.tensor([0.1, 0.2]), torch.ones(2))
        tensor([0.8000, 0.6000])
        >>> torch.func.grad(descend)(torch.tensor(0.1), torch.ones(()))
        tensor(-2.)
    """
    name = "sgd"
    _check.number(name, "momentum", momentum)
    _check.number(name, "dampening", dampening)
    _check.number(name, "weight_decay", weight_decay)
    if _check.flag(name, "nesterov", nesterov) and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"{name}: nesterov=True needs a momentum and no dampening, got momentum={momentum}, dampening={dampening}"
        )

    def update(
        ops: Arithmetic, params: Tensors, grads: Tensors, slots: list[Tensors], lr: Any, step: Any
    ) -> tuple[Tensors, list[Tensors]]:
        if weight_decay != 0:
            grads = ops.plus(grads, params, weight_decay)
        if momentum == 0:
            return ops.add(params, grads, ops.read(-lr)), slots
        if ops is pure:
            buffer = ops.add(ops.mul(slots[0], momentum), grads, 1 - dampening)
            if dampening != 0:
                buffer = [_first(step, g, b) for g, b in zip(grads, buffer, strict=True)]
        elif step == 0:
            buffer = ops.copy(slots[0], grads)
        else:
            buffer = ops.add(ops.mul(slots[0], momentum), grads, 1 - dampening)
        if nesterov:
            grads = (ops.add if weight_decay != 0 else ops.plus)(grads, buffer, momentum)
        return ops.add(params, grads if nesterov else buffer, ops.read(-lr)), [buffer]

    return elementwise(name, SgdState, (momentum != 0,), lr, update)


def _first(step: Tensor, grad: Tensor, buffer: Tensor) -> Tensor:
    return torch.where(step.to(grad.device) == 0, grad, buffer)
