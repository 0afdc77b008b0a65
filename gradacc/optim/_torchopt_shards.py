"""Parts of parameters, for a transformation that knows tensors only: `from_torchopt` inside of `sharded`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradacc import _shard, _tree
from gradacc._shard import Shard, ShardFacts
from gradacc._tree import TensorTree


def without_facts(tree: TensorTree) -> tuple[TensorTree, list[ShardFacts] | None]:
    """The tree with tensors in the place of `Shard`s, and what these are parts of; None where there are none."""
    leaves, treedef = _tree.flatten(tree, _shard.is_shard)
    facts = [leaf.facts for leaf in leaves if isinstance(leaf, Shard)]
    if not facts:
        return tree, None
    return _tree.unflatten(treedef, [leaf.values if isinstance(leaf, Shard) else leaf for leaf in leaves]), facts


Owners: TypeAlias = Callable[[_tree.TreeDef, tuple[torch.dtype, ...]], list[int | None]]
"""`owners` of one transformation."""


def with_facts(owners: Owners, state: TensorTree, params: TensorTree, facts: Sequence[ShardFacts]) -> TensorTree:
    """A state with a `Shard` in the place of every tensor that is like a parameter."""
    leaves, treedef = _tree.flatten(params)
    held, structure = _tree.flatten(state)
    found = owners(treedef, tuple([leaf.dtype for leaf in leaves]))
    if len(found) != len(held):
        raise ValueError(
            "from_torchopt: the state's structure depends on the shapes of parameters, so nothing says what is divided over "
            "ranks; use it without sharded"
        )
    return _tree.unflatten(
        structure,
        [leaf if owner is None else Shard(leaf, facts[owner]) for leaf, owner in zip(held, found, strict=True)],
    )


def owners(transformation: Any, treedef: _tree.TreeDef, dtypes: tuple[torch.dtype, ...]) -> list[int | None]:
    """Of each tensor of a state, which parameter it is like: seen by lengths that only one of them has."""
    lengths = [1000 + index for index in range(len(dtypes))]
    small = [torch.zeros(length, dtype=dtype) for length, dtype in zip(lengths, dtypes, strict=True)]
    with _as_it_was(transformation):
        state = _tree.flatten(transformation.init(_tree.unflatten(treedef, small)))[0]
    shapes: dict[tuple[int, ...], int] = {(length,): index for index, length in enumerate(lengths)}
    return [shapes.get(tuple(leaf.shape)) if isinstance(leaf, Tensor) else None for leaf in state]


_SHAPES = {"a": (2, 2), "b": (3, 1), "c": (4,), "d": (1,)}
_CUTS = {"a": 1, "b": 2, "c": 1, "d": 1}
_SIZES = (1.0, 1e12, 1e-12)


def is_elementwise(transformation: Any) -> bool:
    """Whether updates of parts of parameters, flat, are parts of the updates: an experiment, with gradients of three sizes."""
    generator = torch.Generator().manual_seed(0)
    params, *grads = (
        {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in _SHAPES.items()}
        for _ in range(1 + len(_SIZES))
    )
    sized = [{name: grad * size for name, grad in each.items()} for each, size in zip(grads, _SIZES, strict=True)]
    try:
        with _as_it_was(transformation):
            whole = _updates(transformation, params, sized)
        for part in (slice(None, 1), slice(1, None)):
            at = {name: slice(part.start and cut, part.stop and cut) for name, cut in _CUTS.items()}
            own = [{name: each[name].view(-1)[at[name]].clone() for name in each} for each in (params, *sized)]
            with _as_it_was(transformation):
                updates = _updates(transformation, own[0], own[1:])
            for one, other in zip(updates, whole, strict=True):
                for name in one:
                    expected = other[name].reshape(-1)[at[name]]
                    torch.testing.assert_close(one[name], expected, rtol=1e-9, atol=0.0)
    except Exception:  # whatever a transformation does with parameters that are not the ones it is for
        return False
    return True


@contextlib.contextmanager
def _as_it_was(transformation: Any) -> Iterator[None]:
    """What its functions remember in closures (TorchOpt's trace: whether it has been called) is put back."""
    cells: dict[int, tuple[Any, Any]] = {}
    left = [transformation, getattr(transformation, "init", None), getattr(transformation, "update", None)]
    seen = set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, (tuple, list)):
            left += each
        left += [getattr(each, "func", None), getattr(each, "__func__", None), getattr(each, "__wrapped__", None)]
        for cell in getattr(each, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty one
                cells[id(cell)] = cell, cell.cell_contents
                left.append(cell.cell_contents)
    try:
        yield
    finally:
        for cell, contents in cells.values():
            cell.cell_contents = contents


def _updates(
    transformation: Any, params: dict[str, Tensor], grads: Sequence[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        state, found = transformation.init(params), []
        for grad in grads:
            updates, state = transformation.update(
                {name: each.clone() for name, each in grad.items()}, state, params=params, inplace=False
            )
            found.append({name: updates[name].clone() for name in params})
    return found
