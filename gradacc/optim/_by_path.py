"""`by_path`: parameter groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from gradacc import _donated, _overlap, _shard, _tree, _where
from gradacc._describe import describe
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _report
from gradacc.optim._optimizer import Optimizer

_NAME = "by_path"


class Predicate(Protocol):
    """``predicate(path, leaf)``: whether a rule takes this parameter."""

    def __call__(self, path: str, leaf: Tensor, /) -> bool: ...


class ByPathState(NamedTuple):
    """State of `by_path`."""

    inner: tuple[TensorTree, ...]
    """States of the default and of each rule's optimizer, over ``{path: leaf}``; ``()`` where the default has no leaf."""


def by_path(default: Optimizer, *rules: tuple[Predicate, Optimizer]) -> Optimizer:
    """Parameter groups: an optimizer that leaves each parameter to the first rule that takes it, else to ``default``.

    .. code-block:: text

        optimizer of a leaf = the first optimizer of rules whose predicate(path, leaf) is true, else default

    This is ``torch.optim``'s list of ``{"params": ..., **options}``. Each optimizer has a state of its own over its leaves,
    and counts its own steps; a wrapper around one of them (`clip_by_global_norm`) sees its leaves alone, one around the
    whole sees all. With ``donate=True`` none begins before all have looked at their states and learning rates; an `Optimizer`
    of the caller's own cannot be asked beforehand, so it goes first, and its update is made in fresh memory.

    Arguments:
        default: the `Optimizer` of what no rule takes.
        rules: pairs ``(predicate, optimizer)``. ``predicate(path, leaf)`` gets the leaf's path as Python writes it, from
            ``params``: ``"params['blocks.0.norm.bias']"``; and the leaf, for its shape and dtype (not for its values, which
            change). It must answer the same in every step.

    Raises:
        TypeError: ``default`` is no `Optimizer`, or a rule no such pair; a predicate that returns no bool.
        ValueError: a rule that takes no parameter; a `dynamic_loss_scale`, which is outermost. ``step`` also raises what
            `Optimizer` says.

    Example:
        No decay on biases and norms:

        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.by_path(
        ...     gradacc.optim.sgd(0.1, weight_decay=0.5),
        ...     (lambda path, leaf: "norm" in path or "bias" in path, gradacc.optim.sgd(0.1)),
        ... )
        >>> params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> grads = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        >>> optimizer.step(params, grads, optimizer.init(params))[0]
        {'weight': tensor([[0.9500, 0.9500],
                [0.9500, 0.9500]]), 'bias': tensor([1., 1.])}

        Matrices by Muon, the rest by Adam:

        >>> optimizer = gradacc.optim.by_path(
        ...     gradacc.optim.adamw(1e-3),
        ...     (lambda path, leaf: leaf.ndim == 2, gradacc.optim.from_torch(torch.optim.Muon, lr=0.02)),
        ... )
    """
    _check.optimizer(_NAME, default)
    for number, rule in enumerate(rules):
        if type(rule) is not tuple or len(rule) != 2 or not callable(rule[0]):
            raise TypeError(f"{_NAME}: rules[{number}] must be a pair (predicate, optimizer), got {describe(rule)}")
        _check.optimizer(_NAME, rule[1], f"rules[{number}][1]")
    optimizers = (default, *(optimizer for _, optimizer in rules))
    checks = [optimizer.check for optimizer in optimizers]
    turns = sorted(range(len(optimizers)), key=lambda number: checks[number] is not None)
    route = _router([predicate for predicate, _ in rules])

    def init(params: TensorTree) -> TensorTree:
        leaves, treedef = _nodes(params)
        parts = route(leaves, treedef)
        return ByPathState(
            tuple(
                optimizer.init(_leaves_of(leaves, part)) if part else ()
                for optimizer, part in zip(optimizers, parts, strict=True)
            )
        )

    def check_states(leaves: Sequence[Node], parts: Sequence[dict[str, int]], states: Sequence[TensorTree]) -> None:
        """See NOTE [Before anything is changed]."""
        for check, part, inner in zip(checks, parts, states, strict=True):
            if part and check is not None:
                check(_leaves_of(leaves, part), inner)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        held, held_grads, _ = _check.inputs(_NAME, params, grads)
        leaves, treedef = _nodes(params)
        grad_leaves = _tree.flatten(grads, _shard.is_shard)[0]
        states = _states(state, len(optimizers))
        parts = route(leaves, treedef)
        given: list[Any] = []
        if donate and not _memory.differentiable(None, held_grads):
            check_states(leaves, parts, states)
            given = [*held, *held_grads, *_tree.flatten(states)[0]]
            grad_leaves, leaves, states = _in_separate_memory(grad_leaves, leaves, states)
        new: list[Any] = list(leaves)
        for turn in turns:
            part = parts[turn]
            if part:
                moved, states[turn] = optimizers[turn].step(
                    _leaves_of(leaves, part),
                    _leaves_of(grad_leaves, part),
                    states[turn],
                    donate=donate and checks[turn] is not None,
                )
                for path, i in part.items():
                    new[i] = moved[path]
        after = _tree.unflatten(treedef, new), ByPathState(tuple(states))
        return _donated.hand_over(f"{_NAME}.step", given, after)

    def check(params: TensorTree, state: TensorTree) -> None:
        leaves, treedef = _nodes(params)
        states = _states(state, len(optimizers))
        check_states(leaves, route(leaves, treedef), states)

    report = _report.of_groups(_NAME, ByPathState, [optimizer.report for optimizer in optimizers])
    wholes = [optimizer.elementwise for optimizer in optimizers if optimizer.elementwise is not True]

    def elementwise() -> bool | str:
        said = [whole() if callable(whole) else whole for whole in wholes]
        return next((each for each in said if each is not True), True)

    return Optimizer(init, step, None if None in checks else check, report, elementwise=elementwise)


Node: TypeAlias = Tensor | _shard.Shard
"""A parameter or gradient, or a part of one."""


def _nodes(params: TensorTree) -> tuple[list[Node], _tree.TreeDef]:
    """The parameters, checked, and their structure."""
    _check.params(_NAME, params)
    return _tree.flatten(params, _shard.is_shard)


def _states(state: Any, number: int) -> list[TensorTree]:
    """The states of so many optimizers."""
    _check.state(_NAME, state, ByPathState)
    if len(state.inner) != number:
        raise ValueError(
            f"{_NAME}: state is of {len(state.inner)} optimizers, not of these {number}; pass what init(params) "
            "or the last step returned"
        )
    return list(state.inner)


def _leaves_of(leaves: Sequence[Node], part: dict[str, int]) -> dict[str, Node]:
    return {path: leaves[i] for path, i in part.items()}


def _in_separate_memory(
    grad_leaves: list[Node], leaves: list[Node], states: list[TensorTree]
) -> tuple[list[Node], list[Node], list[TensorTree]]:
    """What is donated, without memory that two optimizers would share."""
    trees = [_tree.flatten(tree) for tree in (leaves, grad_leaves, states)]
    separate = _overlap.in_separate_memory([held for held, _ in trees])
    leaves, grad_leaves, states = (
        _tree.unflatten(treedef, held) for held, (_, treedef) in zip(separate, trees, strict=True)
    )
    return grad_leaves, leaves, states


def _router(
    predicates: Sequence[Callable[[str, Tensor], bool]],
) -> Callable[[Sequence[Node], _tree.TreeDef], list[dict[str, int]]]:
    """`_route` of leaves and their structure, whose paths are remembered: they take as long as a step of a small model."""
    remembered = functools.lru_cache(maxsize=8)(_paths)

    def route(leaves: Sequence[Node], treedef: _tree.TreeDef) -> list[dict[str, int]]:
        return _route(predicates, leaves, _paths(treedef) if _where.transforming() else remembered(treedef))

    return route


def _paths(treedef: _tree.TreeDef) -> list[str]:
    return _tree.paths(treedef, "params")


def _route(
    predicates: Sequence[Callable[[str, Tensor], bool]], leaves: Sequence[Node], paths: Sequence[str]
) -> list[dict[str, int]]:
    """For the default and each rule, its leaves' paths and positions."""
    parts: list[dict[str, int]] = [{} for _ in range(1 + len(predicates))]
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        chosen = 0
        for number, predicate in enumerate(predicates, start=1):
            takes = predicate(path, _shard.whole_like(leaf) if isinstance(leaf, _shard.Shard) else leaf)
            if not isinstance(takes, bool):
                raise TypeError(
                    f"{_NAME}: the predicate of rules[{number - 1}] returned {describe(takes)} for {path}; it must return "
                    "a bool"
                )
            if takes:
                chosen = number
                break
        parts[chosen][path] = index
    for number, part in enumerate(parts[1:]):
        if not part:
            shown = ", ".join(paths[:3]) + (", ..." if paths[3:] else "")
            raise ValueError(
                f"{_NAME}: rules[{number}] takes none of the {len(paths)} parameters ({shown}), or earlier rules took them; "
                "correct its predicate, or leave the rule out"
            )
    return parts
