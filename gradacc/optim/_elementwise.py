"""Optimizers whose state is a step count and trees like the parameters, updated leaf by leaf: `sgd`, `adam`, `adamw`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradacc import _donated, _overlap, _tree
from gradacc._tree import TensorTree
from gradacc.optim import _check, _lr, _memory
from gradacc.optim._arithmetic import Arithmetic, Tensors, donating, in_place, pure
from gradacc.optim._optimizer import LearningRate, Optimizer, OptimizerReport

Update: TypeAlias = Callable[[Arithmetic, Tensors, Tensors, list[Tensors], Any, Any], tuple[Tensors, list[Tensors]]]
"""``update(ops, params, grads, slots, lr, step) -> (params, slots)``, of lists of leaves.

``params`` and ``slots`` may be reused, ``grads`` by ``ops.plus``; ``step`` counts the updates made before: a number in place, a
0-dim tensor under a transform.
"""


def elementwise(name: str, kind: type, slots: Sequence[bool], lr: LearningRate, update: Update) -> Optimizer:
    """The optimizer of an update rule.

    Arguments:
        name: the factory's, for messages.
        kind: the state's class, a NamedTuple: ``step``, then one field for each of ``slots``.
        slots: which of these are used; the others are empty tuples.
        lr: as the factory was given it.
        update: the rule.
    """
    lr = _lr.check_option(name, lr)
    fields = kind._fields[1:]  # type: ignore[attr-defined]

    def init(params: TensorTree) -> TensorTree:
        leaves, treedef = _check.params(name, params)
        return kind(
            _check.zero(),
            *(_tree.unflatten(treedef, [_zeros(leaf) for leaf in leaves]) if used else () for used in slots),
        )

    def checked(
        leaves: list[Tensor], treedef: _tree.TreeDef, state: Any
    ) -> tuple[Tensor, list[list[Tensor]], float | Tensor]:
        """Of a state of such parameters: the count, the slots' leaves, and the learning rate now."""
        _check.state(name, state, kind)
        count = _check.counter(name, "state.step", state[0])
        empty = _tree.flatten(())[1]  # here, where Dynamo can compare it
        held = [
            _check.slot(name, f"state.{field}", tree, leaves if used else [], treedef if used else empty)
            for field, tree, used in zip(fields, state[1:], slots, strict=True)
        ]
        return count, held, _lr.at_step(name, lr, count)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, grad_leaves, treedef = _check.inputs(name, params, grads)
        count, held, rate = checked(leaves, treedef, state)
        if _memory.differentiable(rate, grad_leaves):
            new, moved = update(pure, leaves, grad_leaves, held, _tensor(rate), count)
            following = count + 1
        else:
            number = int(count)
            with torch.no_grad():
                ops = donating if donate else in_place
                new, moved = _apply(
                    lambda some, grad_leaves, slots: update(ops, some, grad_leaves, slots, rate, number),
                    leaves,
                    grad_leaves,
                    held,
                    donate,
                )
                following = count + 1
                if donate:
                    _donated.retire(f"{name}.step", [count], leaves, grad_leaves, *held)
        trees = (_tree.unflatten(treedef, slot) if used else () for slot, used in zip(moved, slots, strict=True))
        return _tree.unflatten(treedef, new), kind(following, *trees)

    def updates(state: Any) -> Tensor:
        _check.state(name, state, kind)
        return _check.counter(name, "state.step", state[0])

    return Optimizer(
        init,
        step,
        check=lambda params, state: checked(*_check.params(name, params), state),
        report=OptimizerReport(rate=lambda state: _lr.at_step(name, lr, updates(state)), updates=updates),
        elementwise=True,
    )


def _apply(
    rule: Callable[[Tensors, Tensors, list[Tensors]], object],
    leaves: list[Tensor],
    grad_leaves: list[Tensor],
    held: list[list[Tensor]],
    donate: bool,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The rule in place, a chunk at a time, on what is donated or on copies."""
    new, moved = list(leaves), [list(slot) for slot in held]
    if donate:
        leaves, grad_leaves, *held = _overlap.in_separate_memory([leaves, grad_leaves, *held])
        new, *moved = ([leaf.detach() for leaf in each] for each in (leaves, *held))  # see NOTE [use after donation]
    for chunk in _memory.chunks(leaves):
        if not donate:  # here, where the cache still has them afterwards
            for each in (new, *moved):
                if each:
                    for i in chunk:
                        each[i] = each[i].detach().clone()
        slots = [[slot[i] for i in chunk] if slot else [] for slot in moved]
        rule([new[i] for i in chunk], [grad_leaves[i] for i in chunk], slots)
    return new, moved


def _tensor(lr: float | Tensor) -> float | Tensor:
    """Coefficients are computed in float64, as Python does."""
    return lr.to(torch.float64) if isinstance(lr, Tensor) else lr


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, memory_format=torch.preserve_format)
