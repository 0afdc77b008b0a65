"""Parts of parameters, for a transformation that knows tensors only: `from_torchopt` inside of `sharded`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

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


def with_facts(transformation: Any, state: TensorTree, params: TensorTree, facts: Sequence[ShardFacts]) -> TensorTree:
    """A state with a `Shard` in the place of every tensor that is like a parameter."""
    leaves, treedef = _tree.flatten(params)
    held, structure = _tree.flatten(state)
    owners = _owners(transformation, treedef, tuple(leaf.dtype for leaf in leaves))
    if len(owners) != len(held):
        raise ValueError(
            "from_torchopt: the state's structure depends on the shapes of parameters, so nothing says what is divided over "
            "ranks; use it without sharded"
        )
    return _tree.unflatten(
        structure,
        [leaf if owner is None else Shard(leaf, facts[owner]) for leaf, owner in zip(held, owners, strict=True)],
    )


@functools.lru_cache(maxsize=8)
def _owners(transformation: Any, treedef: _tree.TreeDef, dtypes: tuple[torch.dtype, ...]) -> list[int | None]:
    """Of each tensor of a state, which parameter it is like: seen by lengths that only one of them has."""
    lengths = [1000 + index for index in range(len(dtypes))]
    small = [torch.zeros(length, dtype=dtype) for length, dtype in zip(lengths, dtypes, strict=True)]
    state = _tree.flatten(transformation.init(_tree.unflatten(treedef, small)))[0]
    shapes: dict[tuple[int, ...], int] = {(length,): index for index, length in enumerate(lengths)}
    return [shapes.get(tuple(leaf.shape)) if isinstance(leaf, Tensor) else None for leaf in state]


def is_elementwise(transformation: Any) -> bool:
    """Whether updates of parts of parameters are parts of the updates: an experiment, with gradients of three sizes."""
    generator = torch.Generator().manual_seed(0)
    params, *grads = (
        {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in (("a", 4), ("b", 3))}
        for _ in range(4)
    )
    sized = [
        {name: grad * scale for name, grad in each.items()}
        for each, scale in zip(grads, (1.0, 1e12, 1e-12), strict=True)
    ]
    parts = ({"a": slice(0, 1), "b": slice(0, 2)}, {"a": slice(1, 4), "b": slice(2, 3)})
    try:
        whole = _updates(transformation, params, sized)
        for part in parts:
            own = [{name: each[name][part[name]].clone() for name in each} for each in (params, *sized)]
            for one, other in zip(_updates(transformation, own[0], own[1:]), whole, strict=True):
                for name in one:
                    torch.testing.assert_close(one[name], other[name][part[name]], rtol=1e-9, atol=0.0)
    except Exception:  # whatever a transformation does with parameters that are not the ones it is for
        return False
    return True


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
