"""Hypothesis strategies for what a transform of losses is tested on: parameter trees, batches, and ways to split them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from gradacc import _tree

FLOATS = (torch.float32, torch.float64)


class Pair(NamedTuple):
    """A ``NamedTuple`` among the containers of `parameter_trees`."""

    first: Any
    second: Any


class BySizes(NamedTuple):
    """For ``split=``: micro-batches of these sizes, along dim 0; an empty one where a size is 0."""

    sizes: list[int]

    def __call__(self, batch: Any) -> Iterator[Any]:
        """Yield the micro-batches, as views."""
        for low, size in zip(itertools.accumulate(self.sizes, initial=0), self.sizes, strict=False):
            yield _tree.map_tensors(lambda leaf, low=low, size=size: leaf.narrow(0, low, size), batch)  # type: ignore[misc]


def parameter_trees(
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    max_leaves: int = 4,
    max_dims: int = 2,
    max_side: int = 3,
    tied: bool = False,
) -> st.SearchStrategy[Any]:
    """Pytrees of parameters: a bare tensor, or nested dicts, lists, tuples and ``NamedTuple``s, with ``None`` here and there.

    Arguments:
        dtypes: of the leaves, floating or complex; the first is the simplest.
        max_leaves: at most this many tensors; there is always one.
        max_dims: shapes have 0 to this many dimensions,
        max_side: each of 0 to this size: 0-dim and empty tensors are drawn too.
        tied: sometimes one tensor object is two leaves.

    Returns:
        A strategy. Entries are multiples of 1/4 from -2 to 2, which every floating dtype holds exactly: sums and products
        of few of them are exact too. It shrinks to a bare 0-dim zero of the first dtype.

    Raises:
        ValueError: no dtypes, a dtype that is not floating or complex, a limit that allows nothing.

    Example:
        >>> import hypothesis, torch, gradacc
        >>> from gradacc.testing import parameter_trees
        >>> @hypothesis.settings(max_examples=10, database=None, derandomize=True, deadline=None)
        ... @hypothesis.given(parameter_trees())
        ... def test_gradient_of_nothing_is_zero(params):
        ...     def loss_fn(params, x):
        ...         return sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(params) if leaf is not None) * x.sum()
        ...     grads = gradacc.accumulate(loss_fn, steps=2)(params, torch.zeros(0))
        ...     assert all(not g.any() for g in torch.utils._pytree.tree_leaves(grads) if g is not None)
        >>> test_gradient_of_nothing_is_zero()
    """
    if not dtypes or not all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
        raise ValueError(f"parameter_trees: dtypes must name floating or complex dtypes, got {dtypes}")
    if max_leaves < 1 or max_dims < 0 or max_side < 0:
        raise ValueError("parameter_trees: max_leaves must be at least 1, max_dims and max_side at least 0")
    trees = _skeletons(tuple(dtypes), max_leaves, max_dims, max_side)
    filled = _filled(trees, None)
    return filled.flatmap(_tied) if tied else filled


def batches(like: Any = None, *, min_size: int = 0, max_size: int = 6) -> st.SearchStrategy[Any]:
    """Batches of a ragged number of examples, down to none at all.

    Arguments:
        like: one example: a pytree of tensors, of whose shapes and dtypes each example is. Every leaf gets a leading
            dimension, of the same size in all. Left out, the structure is drawn as well: a tree of float64 tensors.
        min_size, max_size: how many examples.

    Returns:
        A strategy. Floating leaves hold multiples of 1/4 from -2 to 2, boolean ones False and True, integer ones 0 to the
        largest entry in ``like``, inclusive (``torch.tensor(9)``: labels of ten classes). It shrinks to zeros, and to
        ``min_size`` examples.

    Raises:
        TypeError: a leaf of ``like`` is not a tensor. ValueError: ``like`` has none, or ``min_size > max_size``.

    Example:
        >>> import hypothesis, torch, gradacc
        >>> from gradacc.testing import batches, splits
        >>> like = {"x": torch.zeros(2), "y": torch.zeros(()), "label": torch.tensor(9), "mask": torch.zeros(5).bool()}
        >>> @hypothesis.settings(max_examples=10, database=None, derandomize=True, deadline=None)
        ... @hypothesis.given(hypothesis.strategies.data(), batches(like, min_size=1))
        ... def test_any_split_is_exact(data, batch):
        ...     def loss_fn(w, batch):
        ...         return (batch["x"] @ w - batch["y"]).square().mean()
        ...     split = data.draw(splits(len(batch["y"])))
        ...     grads = gradacc.accumulate(loss_fn, **split)(torch.ones(2), batch)
        ...     torch.testing.assert_close(grads, torch.func.grad(loss_fn)(torch.ones(2), batch))
        >>> test_any_split_is_exact()
    """
    if not 0 <= min_size <= max_size:
        raise ValueError(f"batches: need 0 <= min_size <= max_size, got {min_size} and {max_size}")
    sizes = st.integers(min_size, max_size)
    if like is None:
        return _filled(_skeletons((torch.float64,), 3, 2, 3), sizes)
    leaves, treedef = _tree.flatten(like)
    if not leaves:
        raise ValueError("batches: like holds no tensor")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"batches: like must be a pytree of tensors, got a {type(leaf).__qualname__}")
    return _filled(st.just(_tree.unflatten(treedef, map(_slot, leaves))), sizes)


def splits(size: int) -> st.SearchStrategy[dict[str, Any]]:
    """Ways to split a batch of ``size`` examples: options for `gradacc.accumulate`.

    Arguments:
        size: how many examples there are; more steps, and larger micro-batches, than that are drawn too.

    Returns:
        A strategy of ``{"steps": k}``, ``{"microbatch_size": m}`` and ``{"split": f}``, where ``f(batch)`` yields
        micro-batches of the sizes ``f.sizes`` (see `microbatch_sizes`) along dim 0. It shrinks to ``{"steps": 1}``.

    Raises:
        ValueError: ``size`` is negative.

    Example: `batches` shows one.
    """
    counts = st.integers(1, size + 2)
    return st.one_of(
        st.builds(lambda k: {"steps": k}, counts),
        st.builds(lambda m: {"microbatch_size": m}, counts),
        st.builds(lambda sizes: {"split": BySizes(sizes)}, microbatch_sizes(size)),
    )


def microbatch_sizes(size: int, *, max_cuts: int = 4) -> st.SearchStrategy[list[int]]:
    """Lists of sizes that add up to ``size``, with ones and zeros (empty micro-batches) among them.

    Arguments:
        size: how many examples there are.
        max_cuts: lists are at most one longer than this, but for all ones.

    Returns:
        A strategy of non-empty lists of ints; it shrinks to ``[size]``.

    Raises:
        ValueError: ``size`` or ``max_cuts`` is negative.

    Example:
        >>> import hypothesis
        >>> from gradacc.testing import microbatch_sizes
        >>> quiet = hypothesis.settings(database=None, derandomize=True)
        >>> hypothesis.find(microbatch_sizes(5), lambda sizes: 0 in sizes and 1 in sizes, settings=quiet)
        [0, 1, 4]
    """
    if size < 0 or max_cuts < 0:
        raise ValueError(f"microbatch_sizes: need size >= 0 and max_cuts >= 0, got {size} and {max_cuts}")
    cuts = st.lists(st.integers(0, size), max_size=max_cuts).map(sorted)
    ones = st.sampled_from([False, False, False, size > 0])  # drawn beside the cuts, so that [size] is simpler

    def sizes(inner: list[int], ones: bool) -> list[int]:
        return [1] * size if ones else [high - low for low, high in itertools.pairwise([0, *inner, size])]

    return st.builds(sizes, cuts, ones)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor is to be."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    largest: int = 0
    """Of integers."""


def _slot(leaf: Tensor) -> _Slot:
    counts = not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
    return _Slot(tuple(leaf.shape), leaf.dtype, int(leaf.max()) if counts and leaf.numel() else 0)


@functools.cache  # building and validating a strategy costs more than drawing from it
def _skeletons(
    dtypes: tuple[torch.dtype, ...], max_leaves: int, max_dims: int, max_side: int
) -> st.SearchStrategy[Any]:
    """Trees of slots, at least one."""
    shapes = st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple)
    slots = st.builds(_Slot, shapes, st.sampled_from(dtypes))
    trees = st.recursive(slots, _containers, max_leaves=max_leaves)
    return trees.filter(lambda tree: bool(_tree.flatten(tree)[0]))


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    children = st.one_of(children, st.none())
    return st.one_of(
        st.lists(children, min_size=1, max_size=3),
        st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3),
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.builds(Pair, children, children),
    )


@st.composite
def _filled(draw: st.DrawFn, trees: st.SearchStrategy[Any], sizes: st.SearchStrategy[int] | None) -> Any:
    """A tree of slots with tensors in them, with a leading dimension of one size where ``sizes`` are given."""
    slots, treedef = _tree.flatten(draw(trees))
    batch = () if sizes is None else (draw(sizes),)
    return _tree.unflatten(treedef, [_tensor(draw, slot, batch) for slot in slots])


def _tensor(draw: st.DrawFn, slot: _Slot, batch: tuple[int, ...]) -> Tensor:
    shape = batch + slot.shape
    entries = draw(_entries(slot.dtype, slot.largest, torch.Size(shape).numel()))
    return torch.tensor(entries, dtype=slot.dtype).reshape(shape)


@functools.cache
def _entries(dtype: torch.dtype, largest: int, count: int) -> st.SearchStrategy[list[Any]]:
    """Entries are drawn one by one, so that they shrink one by one."""
    quarters = st.integers(-8, 8).map(lambda n: n / 4)
    entry: st.SearchStrategy[Any]
    if dtype == torch.bool:
        entry = st.booleans()
    elif dtype.is_complex:
        entry = st.builds(complex, quarters, quarters)
    else:
        entry = quarters if dtype.is_floating_point else st.integers(0, largest)
    return st.lists(entry, min_size=count, max_size=count)


def _tied(tree: Any) -> st.SearchStrategy[Any]:
    """The same tree, or a pair of it and one of its leaves once more."""
    leaves = _tree.flatten(tree)[0]
    return st.one_of(st.just(tree), st.sampled_from(range(len(leaves))).map(lambda n: Pair(tree, leaves[n])))
