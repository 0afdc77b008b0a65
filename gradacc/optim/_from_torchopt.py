"""`from_torchopt`: gradient transformations of TorchOpt, or of anyone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from gradacc import _donated, _overlap, _shard, _tree, _where
from gradacc._describe import describe
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _torchopt_shards
from gradacc.optim._optimizer import Optimizer


class GradientTransformation(Protocol):
    """``torchopt.base.GradientTransformation``."""

    def init(self, params: Any) -> Any: ...
    def update(self, updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]: ...


def from_torchopt(transformation: GradientTransformation) -> Optimizer:
    """A TorchOpt gradient transformation, or anything with its ``init`` and ``update``, as an `Optimizer`.

    .. code-block:: python

        updates, state = transformation.update(grads, state, params=params, inplace=donate)
        params = params + updates                # torchopt.apply_updates, in their dtypes; None is no update

    Its state is the transformation's own, and keeps the structure, shapes and dtypes that ``init`` gives it: a state of others
    is refused. (They are found by an ``init`` of parameters without memory; where that reads values, no state is refused.)
    Whether it runs under `torch.vmap`, ``torch.func`` and `torch.compile` is up to the transformation. TorchOpt 0.7's momentum
    keeps in a closure whether it has been called, and leaves out dampening in the first call of the object rather than in the
    first step of the state: make a new one for each run where you use that.

    Arguments:
        transformation: ``torchopt.adam(lr)``, ``torchopt.chain(...)``, or an object with ``init(params) -> state`` and
            ``update(grads, state, *, params, inplace) -> (updates, state)``, where ``updates`` has the structure of
            ``params`` and is to be added.

    Raises:
        TypeError: no such object.
        ValueError: a state of another transformation or of other parameters; updates that do not fit the parameters.
            ``step`` also raises what `Optimizer` says.

    Source: https://github.com/metaopt/torchopt.

    Example:
        >>> import torch, gradacc
        >>> class Descent:
        ...     def init(self, params):
        ...         return ()
        ...
        ...     def update(self, updates, state, *, params=None, inplace=True):
        ...         return {name: -0.1 * grad for name, grad in updates.items()}, state
        >>> optimizer = gradacc.optim.from_torchopt(Descent())
        >>> params = {"w": torch.ones(2)}
        >>> optimizer.step(params, {"w": torch.ones(2)}, optimizer.init(params))
        ({'w': tensor([0.9000, 0.9000])}, ())
    """
    name = "from_torchopt"
    if not (callable(getattr(transformation, "init", None)) and callable(getattr(transformation, "update", None))):
        raise TypeError(
            f"{name}: the transformation must have init(params) and update(grads, state, *, params, inplace), as "
            f"torchopt.adam(0.1) has, got {describe(transformation)}"
        )

    @functools.lru_cache(maxsize=8)
    def model(treedef: _tree.TreeDef, kinds: tuple[tuple[torch.Size, torch.dtype], ...]) -> TensorTree:
        """A state of such parameters without memory; `_UNKNOWN` where ``init`` needs values."""
        without = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
        try:
            return transformation.init(_tree.unflatten(treedef, without))
        except (RuntimeError, TypeError, ValueError):  # which values of meta tensors raise: item(), numpy()
            return _UNKNOWN

    owners = functools.lru_cache(maxsize=8)(functools.partial(_torchopt_shards.owners, transformation))

    def check(params: TensorTree, state: TensorTree) -> None:
        (params, _), (state, _) = _torchopt_shards.without_facts(params), _torchopt_shards.without_facts(state)
        leaves, treedef = _check.params(name, params)
        expected = model(treedef, tuple([(leaf.shape, leaf.dtype) for leaf in leaves]))
        if expected is not _UNKNOWN:
            _state(name, state, expected)

    def init(params: TensorTree) -> TensorTree:
        leaves, _ = _check.params(name, params)
        plain, facts = _torchopt_shards.without_facts(params)
        made = _in_separate_memory(transformation.init(_tree.map_tensors(lambda leaf: leaf, plain)), leaves)
        return made if facts is None else _torchopt_shards.with_facts(owners, made, plain, facts)

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        _check.inputs(name, params, grads)
        outer = _tree.flatten(params, _shard.is_shard)[1]
        (params, facts), (grads, _), (state, _) = map(_torchopt_shards.without_facts, (params, grads, state))
        leaves, grad_leaves, treedef = _check.inputs(name, params, grads)
        pure = _memory.differentiable(None, grad_leaves)
        in_place = donate and not pure
        given: list[Any] = []
        if not pure:
            check(params, state)
        with contextlib.nullcontext() if pure else torch.no_grad():
            if in_place:
                held, structure = _tree.flatten(state)
                given = [*leaves, *grad_leaves, *held]
                leaves, grad_leaves, held = _overlap.in_separate_memory([leaves, grad_leaves, held])
                params, grads = _tree.unflatten(treedef, leaves), _tree.unflatten(treedef, grad_leaves)
                state = _tree.unflatten(structure, held)
            updates, new = transformation.update(grads, state, params=params, inplace=in_place)
            changes = _updates(name, updates, leaves, treedef)
            new = _in_separate_memory(new, leaves if in_place else (*leaves, *grad_leaves, *_tree.flatten(state)[0]))
            moved = _moved_in_place(leaves, changes) if in_place else _moved(leaves, changes)
        if facts is not None:
            new = _torchopt_shards.with_facts(owners, new, params, facts)
        nodes = moved if facts is None else [_shard.Shard(*each) for each in zip(moved, facts, strict=True)]
        return _donated.hand_over(f"{name}.step", given, (_tree.unflatten(outer, nodes), new))

    whole = f"{name}: this transformation gave parts of parameters other updates than whole ones (a norm, say)"
    return Optimizer(init, step, check, elementwise=lambda: _torchopt_shards.is_elementwise(transformation) or whole)


def _moved(leaves: list[Tensor], changes: list[Tensor | None]) -> list[Tensor]:
    return [p.clone() if u is None else (p + u).to(p.dtype) for p, u in zip(leaves, changes, strict=True)]


def _moved_in_place(leaves: list[Tensor], changes: list[Tensor | None]) -> list[Tensor]:
    read = _overlap.shared(changes, leaves)
    moved = [leaf.detach() for leaf in leaves]
    steps = [u.clone() if u is not None and late else u for u, late in zip(changes, read, strict=True)]
    for p, u in zip(moved, steps, strict=True):
        if u is not None:
            p.add_(u)
    return moved


_UNKNOWN = object()


def _in_separate_memory(tree: TensorTree, given: Iterable[Any]) -> TensorTree:
    """The tree, with copies of those of its tensors that are in the memory of one that is given."""
    places = {_memory_of(leaf) for leaf in given if isinstance(leaf, Tensor)}
    return _tree.map_tensors(lambda leaf: leaf.clone() if _memory_of(leaf) in places else leaf, tree)


def _memory_of(leaf: Tensor) -> int:
    """Whose memory it is, views included; under a transform, where memory cannot be told, who it is."""
    return id(leaf) if _where.transforming() else leaf.untyped_storage().data_ptr() or id(leaf)


def _state(name: str, given: TensorTree, expected: TensorTree) -> None:
    """A state has the structure, shapes and dtypes of another."""
    leaves, treedef = _tree.flatten(given)
    others, other = _tree.flatten(expected)
    fix = "Is it the state of another transformation, or of other parameters? Pass what init(params) or the last step returned"
    if treedef != other:
        raise ValueError(
            f"{name}: state is {describe(given)} of structure {treedef}, where this transformation's is {other}. {fix}"
        )
    for leaf, like, path in zip(leaves, others, _tree.paths(treedef, "state"), strict=True):
        if isinstance(like, Tensor) and not (
            isinstance(leaf, Tensor) and leaf.shape == like.shape and leaf.dtype == like.dtype
        ):
            of = f" of {leaf.dtype}" if isinstance(leaf, Tensor) else ""
            raise ValueError(
                f"{name}: {path} is {describe(leaf)}{of}, where this transformation keeps a {like.dtype} tensor of shape "
                f"{tuple(like.shape)}. {fix}"
            )


def _updates(name: str, updates: Any, leaves: list[Tensor], treedef: _tree.TreeDef) -> list[Tensor | None]:
    """One update, or None, for each parameter."""
    changes = _tree.broadcast_prefix(updates, _tree.unflatten(treedef, leaves))
    for index, (change, leaf) in enumerate(zip(changes, leaves, strict=True)):
        if change is not None and not (
            isinstance(change, Tensor)
            and change.shape == leaf.shape
            and (change.dtype == leaf.dtype or torch.can_cast(change.dtype, leaf.dtype))
        ):
            of = f" of {change.dtype}" if isinstance(change, Tensor) else ""
            raise ValueError(
                f"{name}: {_tree.paths(treedef, 'updates')[index]} is {describe(change)}{of}, for a parameter of shape "
                f"{tuple(leaf.shape)}, {leaf.dtype}; the transformation must return updates like params"
            )
    return changes
