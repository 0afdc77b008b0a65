"""`clip_by_global_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradacc import _donated, _dtypes, _overlap, _scalars, _tree
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _over_ranks
from gradacc.optim._optimizer import Optimizer


def clip_by_global_norm(optimizer: Optimizer, max_norm: float | Tensor) -> Optimizer:
    """An optimizer whose gradients are scaled down to a norm of at most ``max_norm`` before it sees them.

    .. code-block:: text

        norm = sqrt(sum of squares over all elements of all gradients)
        grads *= min(1, max_norm / (norm + 1e-6))

    The arithmetic of `torch.nn.utils.clip_grad_norm_`, to the last bit eagerly, with the parameters in the order of the
    tree's leaves (dicts are in the order of their keys); under a transform the same sums, and the
    derivative goes through the norm too, where the gradients are not all zero. The state is that of ``optimizer``. As in
    torch, gradients with an inf or NaN in them do not survive: wrap the result in `skip_nonfinite`.

    Of gradients that are divided over ranks (`gradacc.Shard`, DTensors) the norm is that of all ranks, taken of each rank's own
    norm: equal to that of whole gradients to rounding, not to the last bit.

    With ``donate=True`` the gradients are scaled in their own memory, once ``optimizer`` has looked at its state and its
    learning rate. An `Optimizer` of the caller's own cannot be asked beforehand: it gets scaled copies.

    Arguments:
        optimizer: an `Optimizer`.
        max_norm: the largest 2-norm of all gradients together: a number, or a 0-dim floating tensor; not negative;
            ``inf`` clips nothing.

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`, or ``max_norm`` no number.
        ValueError: a negative or NaN ``max_norm``; ``optimizer`` is a `dynamic_loss_scale`, which is outermost. ``step`` also
            raises what `Optimizer` says.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.clip_by_global_norm(gradacc.optim.sgd(1.0), max_norm=1.0)
        >>> params = torch.zeros(2)
        >>> optimizer.step(params, torch.tensor([30.0, 40.0]), optimizer.init(params))[0]
        tensor([-0.6000, -0.8000])
    """
    name = "clip_by_global_norm"
    _check.optimizer(name, optimizer)
    if isinstance(max_norm, Tensor):
        _check.learning_rate(name, max_norm, "max_norm")
    else:
        _check.number(name, "max_norm", max_norm, finite=False)
    check = optimizer.check
    who = _over_ranks.Asker(name)

    def clipped(grads: TensorTree, grad_leaves: list[Tensor], used: list[Any] | None) -> list[Tensor]:
        """In new memory, or in their own, except what is in that of ``used``."""
        factor = _factor(_over_ranks.total_norm(who, grads, torch.nn.utils.get_total_norm(grad_leaves)), max_norm)
        if factor.is_cpu and factor.item() == 1:
            return grad_leaves
        if used is None:
            return _times(grad_leaves, factor, ours=False)
        (own,) = _overlap.in_separate_memory([grad_leaves], used)
        return _times(own, factor, ours=True)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, _, grad_leaves, structure = _check.given(name, params, grads)
        given: list[Any] = []
        if _memory.differentiable(max_norm, grad_leaves):
            # Of which torch's has no derivative.
            norm = _over_ranks.total_norm(who, grads, _dtypes.global_norm(grad_leaves, wide=False))
            factor = _factor(norm, max_norm)
            grad_leaves = [(grad_leaf * factor.to(grad_leaf.device)).to(grad_leaf.dtype) for grad_leaf in grad_leaves]
        else:
            used = None
            if donate:
                held = [*leaves, *_tree.flatten(state)[0]]
                given = [*grad_leaves, *held]
                if check is not None:  # see NOTE [Before anything is changed]
                    check(params, state)
                    used = held
            with torch.no_grad():
                grad_leaves = clipped(grads, grad_leaves, used)
        after = optimizer.step(params, _tree.unflatten(structure, grad_leaves), state, donate=donate)
        return _donated.hand_over(f"{name}.step", given, after)

    return Optimizer(
        optimizer.init, _over_ranks.together(name, step), check, optimizer.report, elementwise=optimizer.elementwise
    )


def _factor(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    if isinstance(max_norm, Tensor):
        max_norm = _scalars.beside(max_norm, norm)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _times(grad_leaves: list[Tensor], factor: Tensor, *, ours: bool) -> list[Tensor]:
    """Times the factor, in their own memory where that is ours."""
    scaled = list(grad_leaves)
    for chunk in _memory.chunks(grad_leaves):
        some = [grad_leaves[i] for i in chunk]
        factor = factor.to(some[0].device)
        if ours:
            torch._foreach_mul_(some, factor)
            continue
        for i, grad_leaf in zip(chunk, torch._foreach_mul(some, factor), strict=True):
            scaled[i] = grad_leaf.to(grad_leaves[i].dtype)  # of two 0-dim tensors the wider dtype wins
    return scaled
