"""Law 4: any layout over ranks equals one process with the union. Law 7: exactly one collective a call.

And after any failed call, on any ranks, at any place, the next one is exact, and has the same bits on all ranks.
"""

from typing import Any

import optree
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, value_of
from tests.laws.losses import CASES
from tests.sync import fuzz

few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Collectives(TorchDispatchMode):
    """Collectives, as CommDebugMode sees them, without its hooks on modules (which fail on replicas of modules)."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(func)
            self.elements.append(
                sum(leaf.numel() for leaf in optree.tree_leaves(args) if isinstance(leaf, torch.Tensor))
            )
        return func(*args, **(kwargs or {}))


def of_a_rank(group, name: str, batch: Any, split: dict[str, Any], overlap: bool) -> Any:
    """Two calls (the first one agrees), the second one counted."""
    case = CASES[name]()
    grad_fn = gradacc.accumulate_and_value(
        case.loss, has_aux=True, sync=gradacc.all_reduce(group, overlap=overlap), **case.options, **split
    )
    first = grad_fn(case.params, batch)
    with Collectives() as counter:
        second = grad_fn(case.params, batch)
    return first, second, len(counter.seen)


@st.composite
def layouts(draw):
    """For every rank, the sizes of its micro-batches, none and empty ones among them."""
    world = draw(st.integers(1, 4))
    return draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=world, max_size=world))


def cut(batch, sizes):
    leaves, treedef = optree.tree_flatten(batch)
    return [
        optree.tree_unflatten(treedef, list(parts))
        for parts in zip(*(leaf.split(sizes) for leaf in leaves), strict=True)
    ]


@few
@given(
    layout=layouts(),
    name=st.sampled_from(sorted(CASES)),
    seed=st.integers(0, 2**16),
    steps=st.booleans(),
    overlap=st.booleans(),
)
def test_any_layout_is_one_process_with_the_union(pool, layout, name, seed, steps, overlap):
    case = CASES[name]()
    total = sum(map(sum, layout))
    batch = case.batch(total, seed)
    per_rank = cut(batch, [sum(sizes) for sizes in layout])
    if steps:
        args = [(name, part, {"steps": 2}, overlap) for part in per_rank]
    else:
        args = [
            (name, cut(part, sizes) if sizes else [], {"split": iter}, overlap)
            for part, sizes in zip(per_rank, layout, strict=True)
        ]
    if not total:
        return  # nothing anywhere: tests.sync
    expected, (value, aux) = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=1, **case.options)(
        case.params, batch
    )
    answers = pool.run_each(len(layout), of_a_rank, args)
    for first, second, count in answers:
        assert_trees_equal(first, second)
        assert_trees_equal(_common(second), _common(answers[0][1]))
        assert count == (len(layout) > 1)
        assert_trees_close(second[0], expected, rtol=1e-9)
        assert_trees_close(value_of(second[1][0]), value_of(value), rtol=1e-9)
        if not _weightless(value):
            assert_trees_close(second[1][1]["rest"], aux["rest"], rtol=1e-9)
    each = torch.cat([second[1][1]["each"] for _, second, _ in answers])
    assert_trees_close(each, aux["each"])


def _common(result: Any) -> Any:
    """What every rank has."""
    grads, (value, aux) = result
    return grads, value, aux["rest"]


def _weightless(value: Any) -> bool:
    return isinstance(value, gradacc.Mean) and not value.weight


@st.composite
def failures(draw):
    """Three calls of one function, and one of another, of which the second fails on some ranks, at one place."""
    world = draw(st.integers(1, 4))
    accumulate = draw(st.booleans())
    way = draw(st.sampled_from(("summed", "ordered", "parts")))
    mode = fuzz.Mode(
        "accumulate" if accumulate else "accumulator",
        draw(st.sampled_from(("mean", "sum", "Mean"))),
        draw(st.sampled_from((torch.float32, torch.float64))),
        True,
        draw(st.sampled_from((None, torch.bfloat16, torch.bfloat16 if way == "parts" else torch.float16))),
        draw(st.booleans()),
        way,
    )
    places = (*fuzz.CALLS, *fuzz.AUX) if accumulate else (*fuzz.OURS, "state")
    place = draw(st.sampled_from((*places, fuzz.AFTER)))
    failing = draw(st.sets(st.integers(0, world - 1), min_size=1))
    seeds = st.integers(0, 2**16)

    def call(which: int, rank: int, weight: float, fault: str | None) -> fuzz.Call:
        sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1 if fault or not rank else 0, max_size=2)))
        return fuzz.Call(which, sizes, weight, draw(seeds), fault)

    weights = draw(st.lists(st.sampled_from((1.0, 1e3, 1e30, 1e-30)), min_size=5, max_size=5))
    return fuzz.Program(
        (mode, mode),
        tuple(
            tuple(
                call(int(n == 3), rank, weight, place if n == 1 and rank in failing else None)
                for n, weight in enumerate(weights)
            )
            for rank in range(world)
        ),
    )


@few
@given(program=failures())
def test_after_any_failed_call_the_next_one_is_exact(pool, program):
    answers = pool.run(len(program.calls), fuzz.play, [program])
    assert fuzz.check(str(program), program, [answer for (answer,) in answers]) == []
