"""Hypothesis strategies: they reach every corner, keep their limits, and shrink."""

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradacc
from gradacc import testing
from gradacc.testing import microbatch_sizes
from tests.testing.cases import F64


class Tree(NamedTuple):
    """Facts about a parameter tree."""

    params: Any

    @property
    def leaves(self) -> list[Tensor]:
        return optree.tree_leaves(self.params)

    @property
    def types(self) -> set[type]:
        found = set()
        optree.tree_map_(lambda _: None, self.params)
        stack = [self.params]
        while stack:
            node = stack.pop()
            found.add(type(node))
            stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ())
        return found


SEARCH = hypothesis.settings(
    database=None,
    derandomize=True,
    max_examples=300,
    deadline=None,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)


@pytest.mark.parametrize(
    ("strategy", "found"),
    {
        "0-dim": ({}, lambda tree: tree.leaves[0].ndim == 0),
        "empty dimension": ({}, lambda tree: tree.leaves[0].numel() == 0),
        "dict": ({}, lambda tree: dict in tree.types),
        "list in a tuple": ({}, lambda tree: {list, tuple} <= tree.types),
        "None": ({}, lambda tree: type(None) in tree.types),
        "NamedTuple": ({}, lambda tree: any(hasattr(node, "_fields") for node in tree.types)),
        "mixed dtypes": ({}, lambda tree: len({leaf.dtype for leaf in tree.leaves}) == 2),
        "several leaves": ({}, lambda tree: len(tree.leaves) == 4),
        "tied": ({"tied": True}, lambda tree: len({id(leaf) for leaf in tree.leaves}) < len(tree.leaves)),
        "complex": (
            {"dtypes": (torch.bfloat16, torch.complex64)},
            lambda tree: tree.leaves[-1].is_complex() and tree.leaves[-1].imag.any(),
        ),
    }.values(),
)
def test_parameter_trees_reach_every_corner(strategy: Any, found: Callable[[Tree], bool]) -> None:
    hypothesis.find(testing.parameter_trees(**strategy), lambda params: found(Tree(params)), settings=SEARCH)


@given(testing.parameter_trees(max_leaves=3, max_dims=2, max_side=2, dtypes=(torch.bfloat16, F64)))
def test_parameter_trees_keep_their_limits(params: Any) -> None:
    leaves = Tree(params).leaves
    assert 1 <= len(leaves) <= 3
    for leaf in leaves:
        assert leaf.dtype in (torch.bfloat16, F64)
        assert leaf.ndim <= 2
        assert max(leaf.shape, default=0) <= 2
        assert torch.equal(leaf.double() * 4, (leaf.double() * 4).round())
        assert (leaf.abs() <= 2).all()


LIKE = {"x": torch.zeros(2), "label": torch.tensor(9), "mask": torch.zeros(3, dtype=torch.bool), "none": None}


@given(testing.batches(LIKE, min_size=1, max_size=3))
def test_batches_are_like(batch: Any) -> None:
    size = len(batch["label"])
    assert 1 <= size <= 3
    assert {k: (v.shape, v.dtype) for k, v in batch.items() if v is not None} == {
        k: ((size, *v.shape), v.dtype) for k, v in LIKE.items() if v is not None
    }
    assert batch["none"] is None
    assert ((batch["label"] >= 0) & (batch["label"] <= 9)).all()


@given(testing.batches())
def test_batches_of_any_structure_have_one_size(batch: Any) -> None:
    assert len({len(leaf) for leaf in Tree(batch).leaves}) == 1


@given(st.data(), st.integers(0, 6))
def test_splits_cover_the_batch_in_order(data: Any, size: int) -> None:
    batch = {"x": torch.arange(size, dtype=F64)}
    split = data.draw(testing.splits(size))
    ((way, value),) = split.items()
    assert way in ("steps", "microbatch_size", "split")
    seen: list[Tensor] = []

    def loss(w: Tensor, b: Any) -> Tensor:
        seen.append(b["x"])
        return (w * b["x"]).sum()

    gradacc.accumulate(loss, reduction="sum", **split)(torch.ones((), dtype=F64), batch)
    assert torch.equal(torch.cat(seen), batch["x"])
    if way == "split":
        assert [len(part["x"]) for part in value(batch)] == value.sizes
        assert sum(value.sizes) == size


@pytest.mark.parametrize(
    ("strategy", "found", "minimal"),
    [
        (testing.splits(5), lambda split: True, {"steps": 1}),
        (testing.splits(5), lambda split: split.get("steps", 0) > 5, {"steps": 6}),
        (testing.splits(5), lambda split: "microbatch_size" in split, {"microbatch_size": 1}),
        (microbatch_sizes(5), lambda sizes: True, [5]),
        (microbatch_sizes(5), lambda sizes: 0 in sizes and 1 in sizes, [0, 1, 4]),
        (microbatch_sizes(7), lambda sizes: sizes == [1] * 7, [1] * 7),
        (microbatch_sizes(0), lambda sizes: True, [0]),
        (testing.batches(), lambda batch: True, torch.zeros(0, dtype=F64)),
        (testing.batches({"x": torch.zeros(2)}), lambda b: len(b["x"]) == 2, {"x": torch.zeros(2, 2)}),
        (testing.batches(torch.tensor(9)), lambda b: (b == 9).any(), torch.tensor([9])),
        (testing.parameter_trees(), lambda params: True, torch.zeros(())),
        (testing.parameter_trees(), lambda params: isinstance(params, list), [torch.zeros(())]),
        (
            testing.parameter_trees(),
            lambda params: any((p < 0).any() for p in Tree(params).leaves),
            torch.tensor(-0.25),
        ),
    ],
)
def test_strategies_shrink(strategy: Any, found: Callable[[Any], bool], minimal: Any) -> None:
    smallest = hypothesis.find(strategy, found, settings=SEARCH)
    assert optree.tree_structure(smallest) == optree.tree_structure(minimal)
    for a, b in zip(optree.tree_leaves(smallest), optree.tree_leaves(minimal), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: testing.parameter_trees(dtypes=()), ValueError),
        (lambda: testing.parameter_trees(dtypes=(torch.int64,)), ValueError),
        (lambda: testing.parameter_trees(max_leaves=0), ValueError),
        (lambda: testing.batches(min_size=3, max_size=2), ValueError),
        (lambda: testing.batches({}), ValueError),
        (lambda: testing.batches({"x": 3}), TypeError),
        (lambda: testing.splits(-1), ValueError),
        (lambda: microbatch_sizes(-1), ValueError),
        (lambda: testing.nonsense, AttributeError),
    ],
)
def test_strategies_refuse_nonsense(call: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"parameter_trees|batches|microbatch_sizes|splits|nonsense"):
        call()
