"""`by_path`: parameter groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gradacc import _engines, _tree
from gradacc._describe import describe
from gradacc._tree import TensorTree
from gradacc.optim import _check
from gradacc.optim._optimizer import Optimizer


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
    whole sees all. They run one after the other: with ``donate=True``, an error of a later one (its state does not fit)
    comes when earlier ones have used their leaves' memory.

    Arguments:
        default: the `Optimizer` of what no rule takes.
        rules: pairs ``(predicate, optimizer)``. ``predicate(path, leaf)`` gets the leaf's path as Python writes it, from
            ``params``: ``"params['blocks.0.norm.bias']"``; and the leaf, for its shape and dtype (not for its values, which
            change). It must answer the same in every step.

    Raises:
        TypeError: ``default`` is no `Optimizer`, or a rule no such pair; a predicate that returns no bool.
        ValueError: a rule that takes no parameter. ``step`` also raises what `Optimizer` says.

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
    name = "by_path"
    _check.optimizer(name, default)
    for number, rule in enumerate(rules):
        if type(rule) is not tuple or len(rule) != 2 or not callable(rule[0]):
            raise TypeError(f"{name}: rules[{number}] must be a pair (predicate, optimizer), got {describe(rule)}")
        _check.optimizer(name, rule[1], f"rules[{number}][1]")
    remembered = functools.lru_cache(maxsize=8)(_paths)  # as long as a step of a small model
    optimizers = (default, *(optimizer for _, optimizer in rules))
    predicates = [predicate for predicate, _ in rules]

    def init(params: TensorTree) -> TensorTree:
        leaves, treedef = _check.params(name, params)
        paths = _paths(treedef) if _engines.transforming() else remembered(treedef)
        parts = _route(name, predicates, leaves, paths)
        return ByPathState(
            tuple(
                optimizer.init({path: leaves[i] for path, i in part.items()}) if part else ()
                for optimizer, part in zip(optimizers, parts, strict=True)
            )
        )

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, treedef = _check.params(name, params)
        slopes = _check.grads(name, grads, leaves, treedef)
        _check.state(name, state, ByPathState)
        if len(state.inner) != len(optimizers):
            raise ValueError(
                f"{name}: state is of {len(state.inner)} optimizers, not of these {len(optimizers)}; pass what init(params) "
                "or the last step returned"
            )
        paths = _paths(treedef) if _engines.transforming() else remembered(treedef)
        parts = _route(name, predicates, leaves, paths)
        new: list[Any] = list(leaves)
        states = []
        for optimizer, part, inner in zip(optimizers, parts, state.inner, strict=True):
            if part:
                moved, inner = optimizer.step(
                    {path: leaves[i] for path, i in part.items()},
                    {path: slopes[i] for path, i in part.items()},
                    inner,
                    donate=donate,
                )
                for path, i in part.items():
                    new[i] = moved[path]
            states.append(inner)
        return _tree.unflatten(treedef, new), ByPathState(tuple(states))

    return Optimizer(init, step)


def _paths(treedef: _tree.TreeDef) -> list[str]:
    return _tree.paths(treedef, "params")


def _route(
    name: str, predicates: Sequence[Callable[[str, Tensor], bool]], leaves: Sequence[Tensor], paths: Sequence[str]
) -> list[dict[str, int]]:
    """For the default and each rule, its leaves' paths and positions."""
    parts: list[dict[str, int]] = [{} for _ in range(1 + len(predicates))]
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        chosen = 0
        for number, predicate in enumerate(predicates, start=1):
            takes = predicate(path, leaf)
            if not isinstance(takes, bool):
                raise TypeError(
                    f"{name}: the predicate of rules[{number - 1}] returned {describe(takes)} for {path}; it must return a bool"
                )
            if takes:
                chosen = number
                break
        parts[chosen][path] = index
    for number, part in enumerate(parts[1:]):
        if not part:
            shown = ", ".join(paths[:3]) + (", ..." if paths[3:] else "")
            raise ValueError(
                f"{name}: rules[{number}] takes none of the {len(paths)} parameters ({shown}), or earlier rules took them; "
                "correct its predicate, or leave the rule out"
            )
    return parts
