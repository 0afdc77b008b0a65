"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc._describe import describe
from gradacc._dtypes import as_real
from gradacc._tree import TensorTree
from gradacc.optim import _check
from gradacc.optim._arithmetic import Arithmetic, Tensors, pure
from gradacc.optim._elementwise import elementwise
from gradacc.optim._optimizer import LearningRate, Optimizer


class AdamState(NamedTuple):
    """State of `adam` and `adamw`."""

    step: Tensor
    """Updates so far, 0-dim int64."""
    exp_avg: TensorTree
    """Running mean of the gradients, like the parameters."""
    exp_avg_sq: TensorTree
    """Running mean of their squares, like the parameters."""
    max_exp_avg_sq: TensorTree
    """The largest such mean so far, like the parameters; ``()`` without ``amsgrad``."""


def adam(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam: `torch.optim.Adam` as pure functions.

    .. code-block:: text

        g = grads + weight_decay * params
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        params -= lr / (1 - beta1 ** t) * m / (sqrt(v / (1 - beta2 ** t)) + eps)      t = 1, 2, ...

    Eagerly to the last bit what ``torch.optim.Adam(foreach=False)`` computes (with ``foreach=True`` too, except that
    torch refuses a tensor ``lr`` there). Under a transform the bias corrections are tensors, computed in float64: equal up
    to a rounding or two a step (relative 1e-6 in float32). Torch's own ``capturable=True`` computes them in float32, and is
    further off. There the derivative of the square root at 0 is taken as 0, so that a leaf whose gradient is zero does not
    make derivatives through the step NaN.

    Arguments:
        lr: the learning rate: a number, a 0-dim floating tensor, or a function of the step (0, 1, …) that returns one, as
            `schedule` makes them; not negative.
        betas: decay of the two running means, each in [0, 1).
        eps: added to the denominator, not negative.
        weight_decay: the factor of the L2 penalty's gradient, not negative.
        amsgrad: divide by the largest ``v`` so far.

    Raises:
        TypeError: an option of another type.
        ValueError: an option that is NaN or out of its range. ``step`` also raises what `Optimizer` says.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; ``amsgrad``: Reddi, Kale and Kumar, "On
    the Convergence of Adam and Beyond", ICLR 2018.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.adam(0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.step(params, torch.tensor([0.5, -3.0]), state)
        >>> params
        tensor([0.9000, 2.1000])
    """
    return _adam("adam", lr, betas, eps, weight_decay, amsgrad, decoupled=False)


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay: `torch.optim.AdamW` as pure functions.

    .. code-block:: text

        params = (1 - lr * weight_decay) * params, and then `adam` without weight decay

    Equal to ``torch.optim.AdamW`` as `adam` is to ``torch.optim.Adam``. For parameters without decay (biases, norms), see
    `by_path`.

    Arguments:
        lr: the learning rate, as for `adam`.
        betas: decay of the two running means, each in [0, 1).
        eps: added to the denominator, not negative.
        weight_decay: the share of the parameters that a step of ``lr=1`` takes off, not negative.
        amsgrad: divide by the largest running mean of squares so far.

    Raises:
        TypeError: an option of another type.
        ValueError: an option that is NaN or out of its range. ``step`` also raises what `Optimizer` says.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.adamw(0.1, weight_decay=0.5)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = optimizer.step(params, torch.zeros(2), optimizer.init(params))
        >>> params
        tensor([0.9500, 1.9000])
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, decoupled=True)


def _adam(
    name: str,
    lr: LearningRate,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    *,
    decoupled: bool,
) -> Optimizer:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{name}: betas must be a pair of numbers, got {describe(betas)}")
    beta1, beta2 = (_check.number(name, f"betas[{i}]", beta, below=1) for i, beta in enumerate(betas))
    _check.number(name, "eps", eps)
    _check.number(name, "weight_decay", weight_decay)
    _check.flag(name, "amsgrad", amsgrad)

    def update(
        ops: Arithmetic, params: Tensors, grads: Tensors, slots: list[Tensors], lr: Any, step: Any
    ) -> tuple[Tensors, list[Tensors]]:
        if weight_decay != 0 and decoupled:
            params = ops.mul(params, ops.read(1 - lr * weight_decay))
        elif weight_decay != 0:
            grads = ops.plus(grads, params, weight_decay)
        mean, square, *largest = ([as_real(leaf) for leaf in slot] for slot in slots)
        real, grads = [as_real(leaf) for leaf in params], [as_real(leaf) for leaf in grads]
        mean = ops.lerp(mean, grads, 1 - beta1)
        square = ops.addcmul(ops.mul(square, beta2), grads, grads, 1 - beta2)
        peak = ops.maximum(largest[0], square) if amsgrad else []

        time = (step + 1).to(torch.float64) if ops is pure else float(step + 1)
        correction1, correction2 = 1 - beta1**time, 1 - beta2**time
        size = -(
            lr
            / (correction1.to(lr.device) if isinstance(correction1, Tensor) and isinstance(lr, Tensor) else correction1)
        )
        denominator = ops.shift(ops.div(ops.sqrt(peak if amsgrad else square), correction2**0.5), eps)
        real = ops.addcdiv(real, mean, denominator, ops.read(size))
        return _like(real, params), [_like(out, slot) for out, slot in zip((mean, square, peak), slots, strict=True)]

    return elementwise(name, AdamState, (True, True, amsgrad), lr, update)


def _like(leaves: Tensors, originals: Tensors) -> Tensors:
    """Back from `as_real`."""
    return [
        torch.view_as_complex(leaf) if original.is_complex() else leaf
        for leaf, original in zip(leaves, originals, strict=True)
    ]
