"""Law 3: states are a commutative monoid, and ``finalize . merge`` is the large batch."""

import functools
from typing import Any

import optree
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc.testing import microbatch_sizes
from tests.helpers import ENGINES, NAMESPACE, assert_trees_close, assert_trees_equal, value_of

few = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes, seeds = st.integers(0, 7), st.integers(0, 2**16)


@st.composite
def foldings(draw, size):
    """Micro-batches of ``size`` examples (index lists, in any order), in groups, and the pairs of states to merge."""
    parts, offset = [], 0
    for length in draw(microbatch_sizes(size)):
        parts.append(list(range(offset, offset + length)))
        offset += length
    parts = draw(st.permutations(parts))
    cuts = sorted(draw(st.lists(st.integers(0, len(parts)), max_size=3)))
    groups = [parts[low:high] for low, high in zip([0, *cuts], [*cuts, len(parts)], strict=True)]  # some are empty
    pairs = []
    for left in range(len(groups), 1, -1):
        i = draw(st.integers(0, left - 1))
        pairs.append((i, draw(st.integers(0, left - 2))))
    return groups, pairs


def take(batch: Any, rows: list[int]) -> Any:
    return optree.tree_map(lambda leaf: leaf[torch.tensor(rows, dtype=torch.int64)], batch, namespace=NAMESPACE)


def accumulator(case, **options):
    return gradacc.accumulator(case.loss, has_aux=True, **case.options, **options)


def folded(acc, case, batch, group):
    return functools.reduce(
        lambda state, rows: acc.update(state, case.params, take(batch, rows)), group, acc.init(case.params)
    )


def weightless(value: Any) -> bool:
    return isinstance(value, gradacc.Mean) and not value.weight


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=sizes, seed=seeds, donate=st.booleans())
def test_any_folding_is_the_large_batch(case, engine, data, size, seed, donate):
    batch = case.batch(size, seed)
    groups, pairs = data.draw(foldings(size))
    acc = accumulator(case, donate=donate)

    def run():
        states = [(folded(acc, case, batch, group), [row for rows in group for row in rows]) for group in groups]
        for i, j in pairs:
            (a, rows), (b, others) = states.pop(i), states.pop(j)
            states.append((acc.merge(a, b), rows + others))
        ((state, rows),) = states
        order.append(rows)
        return acc.finalize(state)

    order = []
    if not any(groups):  # not even an empty micro-batch: nothing says what aux is
        with pytest.raises(ValueError, match="no micro-batch arrived"):
            ENGINES[engine](run)
        return
    grads, (value, aux) = ENGINES[engine](run)
    expected, (large, whole) = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=1, **case.options)(
        case.params, batch
    )
    assert_trees_close(grads, expected)
    assert_trees_close(value_of(value), value_of(large))
    assert_trees_close(aux["each"], whole["each"][torch.tensor(order[0], dtype=torch.int64)])
    total, other = aux["rest"][0], whole["rest"][0]
    assert_trees_close((total.total, float(total.weight)), (other.total, float(other.weight)))
    assert aux["rest"][1] is None
    if not weightless(large):
        assert_trees_close(aux["rest"][2], whole["rest"][2])


def in_groups(data, case, engine, size, seed, number):
    """States of disjoint parts of a batch, some of them empty."""
    batch = case.batch(size, seed)
    lengths = [data.draw(microbatch_sizes(part)) for part in data.draw(microbatch_sizes(size, max_cuts=number - 1))]
    rows = iter(range(size))
    groups = [[[next(rows) for _ in range(length)] for length in part] for part in lengths]
    groups += [[] for _ in range(number - len(groups))]
    acc = accumulator(case)
    return acc, [ENGINES[engine](lambda group=group: folded(acc, case, batch, group)) for group in groups[:number]]


def without_order(state: Any) -> Any:
    """Everything but what is concatenated."""
    paths, leaves, _ = optree.tree_flatten_with_path(state, namespace=NAMESPACE)
    return [leaf for path, leaf in zip(paths, leaves, strict=True) if "each" not in path]


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=sizes, seed=seeds)
def test_merge_is_commutative_bit_for_bit(case, engine, data, size, seed):
    acc, (a, b) = in_groups(data, case, engine, size, seed, 2)
    one, other = ENGINES[engine](lambda: (acc.merge(a, b), acc.merge(b, a)))
    assert_trees_equal(without_order(one), without_order(other))
    assert one.facts == other.facts


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=sizes, seed=seeds)
def test_merge_is_associative(case, engine, data, size, seed):
    acc, (a, b, c) = in_groups(data, case, engine, size, seed, 3)
    left, right = ENGINES[engine](lambda: (acc.merge(acc.merge(a, b), c), acc.merge(a, acc.merge(b, c))))
    assert_trees_close(left, right)


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=sizes, seed=seeds)
def test_init_is_the_identity_bit_for_bit(case, engine, data, size, seed):
    acc, (a,) = in_groups(data, case, engine, size, seed, 1)
    one, other = ENGINES[engine](lambda: (acc.merge(acc.init(case.params), a), acc.merge(a, acc.init(case.params))))
    assert_trees_equal(one, a)
    assert_trees_equal(other, a)
