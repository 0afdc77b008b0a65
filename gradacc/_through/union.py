"""What the loss stage sees: the outputs of the whole batch, of all ranks where there are several.

NOTE [two forms of a loss over ranks]
    A loss that says nothing is evaluated by every rank on the union of all outputs and all batches: each rank then knows the
    cotangents of its own rows, and its direct gradients, value, weight and aux are those of every other one, so only the first
    rank's cross the boundary. Its cost is the whole loss on each rank, and it must be the same everywhere: it draws no random
    numbers. A loss with a parameter ``rows`` is of this rank's rows against all, sees this rank's own batch, and returns a
    `Mean`, which adds up over ranks as any other; cotangents of the other ranks' rows go back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _split, _sums, _tree
from gradacc._options import Options
from gradacc._sums import Sums
from gradacc._sync import Gather
from gradacc._sync.gather import Union
from gradacc._through.encoders import Encoded


class Whole(NamedTuple):
    """What the loss sees."""

    keys: list[str | None]
    trees: list[tuple[_tree.TreeDef, list[Any]]]
    """Of each encoder, the structure and its leaves, None where there is a tensor."""
    places: list[tuple[int, int]]
    """Of the tensors: which encoder, which leaf."""
    tensors: list[Tensor]
    """Those that are differentiated first."""
    pulled: int
    """How many are."""
    args: tuple[Any, ...]
    """Of the call, with the batch that the loss sees."""
    size: int
    """The number of examples that the loss is of."""
    rows: slice | None
    """Where the loss is of these rows."""
    own: slice
    """This rank's."""
    replicated: bool
    """Whether every rank evaluates the loss of all."""

    def outputs(self, tensors: Sequence[Tensor]) -> Any:
        """The tree of these, in the order of `tensors`."""
        found = [list(leaves) for _, leaves in self.trees]
        for (encoder, leaf), tensor in zip(self.places, tensors, strict=True):
            found[encoder][leaf] = tensor
        trees = [_tree.unflatten(treedef, leaves) for (treedef, _), leaves in zip(self.trees, found, strict=True)]
        return trees[0] if self.keys == [None] else dict(zip(self.keys, trees, strict=True))


def of(
    options: Options, args: tuple[Any, ...], dims: Sequence[Any], encoded: Sequence[Encoded], gather: Gather | None
) -> Whole | None:
    """What the loss sees; None where there is no example on any rank."""
    known = _known(encoded)
    tensors = _tensors(encoded)
    size = next((tensor.size(0) for tensor in tensors.values()), 0)
    replicated = gather is not None and not options.rows
    batch, rebuild = _batch(options, args, dims) if replicated else ({}, lambda _: args)
    if gather is None:
        found = Union(list(tensors.values()), list(tensors), known, slice(0, size))
    else:
        # A rank without rows has nothing that the others could not tell.
        own, known = ({**tensors, **batch}, known) if size else ({}, None)
        found = gather.gather(own, size, 0 if known is None else known[2], known)
    if found.known is None:
        return None
    examples, places, pulled = found.known
    # Of its own accord a tree tells a rank its structure, which pickled by itself would not know of its classes.
    trees = [_emptied(tree) for tree in examples]
    outputs, rest = found.tensors[: len(places)], found.tensors[len(places) :]
    if list(batch) != found.paths[len(places) :]:
        raise ValueError(
            f"{options.name}: the batch of this rank has {list(batch)}, and that of others {found.paths[len(places) :]}. Every "
            "rank's has the same structure, also where it has no examples"
        )
    keys = [one.encoder.key for one in encoded]
    rows = found.own if options.rows else None
    if replicated:
        size = outputs[0].size(0)
    return Whole(keys, trees, places, outputs, pulled, rebuild(rest), size, rows, found.own, replicated)


def _order(encoded: Sequence[Encoded]) -> tuple[list[tuple[int, int]], int]:
    """Where tensors are: those that are differentiated first, and how many these are."""
    every = [(n, i) for n, one in enumerate(encoded) for i, leaf in enumerate(one.leaves) if isinstance(leaf, Tensor)]
    first = [(n, i) for n, i in every if i in encoded[n].differentiable]
    return first + [place for place in every if place not in set(first)], len(first)


def _known(encoded: Sequence[Encoded]) -> tuple[list[Any], list[tuple[int, int]], int] | None:
    """What a rank without examples does not know: trees with an empty tensor in the place of each, and where tensors are."""
    trees = [
        _tree.unflatten(one.treedef, [torch.empty(0) if isinstance(leaf, Tensor) else leaf for leaf in one.leaves])
        for one in encoded
        if one.treedef is not None
    ]
    return (trees, *_order(encoded)) if len(trees) == len(encoded) else None


def _emptied(tree: Any) -> tuple[_tree.TreeDef, list[Any]]:
    """Its structure, and its leaves, with None in the place of tensors."""
    leaves, treedef = _tree.flatten(tree)
    return treedef, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _tensors(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """By path; of what is not differentiated, the path says so."""
    places, pulled = _order(encoded)
    found = {}
    for at, (n, i) in enumerate(places):
        treedef = encoded[n].treedef
        assert treedef is not None
        path = _tree.paths(treedef, encoded[n].name)[i]
        found[path if at < pulled else f"{path} (without a gradient)"] = encoded[n].leaves[i]
    return found


def _batch(
    options: Options, args: tuple[Any, ...], dims: Sequence[Any]
) -> tuple[dict[str, Tensor], Callable[[Sequence[Tensor]], tuple[Any, ...]]]:
    """What is split of the arguments, rows first; and the arguments with the union's in their place."""
    flat, own, _ = _split.splittable(options.name, args[: len(dims)], dims)
    found = {
        path: leaf.movedim(dim, 0)
        for n, (leaves, treedef) in flat.items()
        for path, leaf, dim in zip(_tree.paths(treedef, f"args[{n}]"), leaves, own[n], strict=True)
        if dim is not None
    }

    def rebuild(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        left, whole = iter(tensors), list(args)
        for n, (leaves, treedef) in flat.items():
            each = [
                leaf if dim is None else next(left).movedim(0, dim) for leaf, dim in zip(leaves, own[n], strict=True)
            ]
            whole[n] = _tree.unflatten(treedef, each)
        return tuple(whole)

    return found, rebuild


class Stage(NamedTuple):
    """What the loss stage has found."""

    value: Tensor
    """0-dim: what was differentiated."""
    sums: Sums
    cotangents: list[Tensor | None]
    """Of the differentiable outputs, in the order of `Whole`."""
    keeps: Tensor | None
    """As of a `Pass`: whether the weight is not 0, where it is not read."""


def nothing(whole: Whole) -> Stage:
    """Of a rank without examples."""
    return Stage(torch.zeros(()), _sums.NOTHING, [None] * whole.pulled, None)


def own(whole: Whole, stage: Stage, grads: list[Tensor | None], gather: Gather | None) -> Stage:
    """Of this rank's rows; what is every rank's is the first one's alone. ``grads``: direct gradients, which are changed."""
    if gather is None:
        return stage
    if whole.rows is not None:
        pulled = gather.give_back(stage.cotangents, stage.sums.unit)
        sums = stage.sums if stage.sums.value is None else replace(stage.sums, unit=pulled.unit)
        return Stage(stage.value, sums, pulled.cotangents, None)
    # A copy: those of the other ranks are given up.
    cotangents = [None if each is None else each[whole.own].clone() for each in stage.cotangents]
    gather.compare(stage.value)
    if not gather.is_first:
        grads[:] = [None] * len(grads)
    return Stage(stage.value, _local(stage.sums, whole.own, gather.is_first), cotangents, stage.keeps)


def _local(sums: Sums, own: slice, counts: bool) -> Sums:
    """With this rank's own rows of what is concatenated; the rest of nothing, unless it ``counts``."""
    (found, rest, pieces), weight = _sums.numbers(sums), sums.weight
    if not counts:
        found, weight = [_zero(number) for number in found], _zero(weight)
    return _sums.with_numbers(rest, found, [[piece[own] for piece in each] for each in pieces], weight, sums.unit)


def _zero(number: Any) -> Any:
    return torch.zeros_like(number) if isinstance(number, Tensor) else type(number)(0)
