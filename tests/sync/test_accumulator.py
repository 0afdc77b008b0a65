"""States across ranks: `finalize` is of the union, in one collective, with the same bits everywhere."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.workers import Failed

D = torch.float64


def squares(params, x):
    return (x @ params["w"] + params["b"]).square().mean()


def summed(params, x):
    return (x @ params["w"] + params["b"]).square().sum()


def tokens(params, x):
    """A Mean over the rows that begin with something positive, with leaves of every kind of aux."""
    y = x @ params["w"] + params["b"]
    real = x[:, 0] > 0
    total = (y.square() * real).sum()
    aux = {"hits": gradacc.Mean((y > 0).sum(), len(y)), "average": (y * real).sum() / real.sum(), "each": y}
    return gradacc.Mean(total, real.sum()), aux


LOSSES: dict[str, Any] = {
    "mean": (squares, {}),
    "sum": (summed, {"reduction": "sum"}),
    "Mean and aux": (tokens, {"has_aux": True}),
}


def make(sizes):
    g = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(3, generator=g, dtype=D), "b": torch.randn((), generator=g, dtype=D)}
    return params, torch.randn(sum(sizes), 3, generator=g, dtype=D)


def stream(acc, params, window):
    state = acc.init(params)
    for x in window:
        state = acc.update(state, params, x)
    return state


def of_a_rank(group, name, params, window, sync_options):
    """Two windows (at the first one, ranks agree), the second one counted."""
    loss, options = LOSSES[name]
    acc = gradacc.accumulator(loss, sync=gradacc.all_reduce(group, **sync_options), **options)
    results, counts = [], []
    for _ in range(2):
        with CommDebugMode() as counter:
            state = stream(acc, params, window)
            before = counter.get_total_counts()
            results += [acc.finalize(state)]
        counts.append((before, {str(op): n for op, n in counter.get_comm_counts().items()}))
    results.append(acc.finalize(acc.merge(acc.init(params), state)))  # nothing was taken out of it
    return results, counts


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", [[[3, 1], [2]], [[1, 2, 3], []], [[0], [4, 1]], [[5], [0, 1, 0], []]])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_equal_one_process_with_the_union(pool, name, layout, overlap):
    params, x = make([size for window in layout for size in window])
    left = iter(x.split([size for window in layout for size in window]))
    shares = [[next(left) for _ in window] for window in layout]
    loss, options = LOSSES[name]
    expected = gradacc.accumulate_and_value(loss, steps=1, **options)(params, x)
    answers = pool.run_each(len(layout), of_a_rank, [(name, params, share, {"overlap": overlap}) for share in shares])
    each = []
    for results, counts in answers:
        assert counts[0][0] == counts[1][0] == 0  # update says nothing to anyone
        assert counts[1][1] == {"c10d.allreduce_": 1}
        for result in results:
            each.append(result[1][1].pop("each") if options.get("has_aux") else None)
            assert_trees_close(common(result, options), common(expected, options))
        assert_trees_equal(results[1:], results[:1] * 2)
        assert_trees_equal(results, answers[0][0])
    if options.get("has_aux"):
        assert_trees_close(torch.cat(each[::3]), expected[1][1]["each"])


def common(result, options):
    """What every rank has."""
    grads, rest = result
    if not options.get("has_aux"):
        return grads, rest
    return grads, rest[0], {key: leaf for key, leaf in rest[1].items() if key != "each"}


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_nothing_on_any_rank(pool, name):
    params, x = make((2,))
    for windows in ([[], []], [[x[:0]], []], [[x[:0]], [x[:0]]]):
        answers = pool.run_each(2, of_a_rank, [(name, params, window, {}) for window in windows])
        for results, _ in answers:
            for grads, value in results:
                assert not any(leaf.any() for leaf in grads.values())
                assert value.isnan() if name == "mean" else value == 0


def test_nothing_on_any_rank_with_aux(pool):
    params, x = make((2,))
    with pytest.raises(Failed, match="accumulator: no micro-batch arrived, so nothing says what aux is"):
        pool.run(2, of_a_rank, "Mean and aux", params, [], {})
    (results, _), _ = pool.run(2, of_a_rank, "Mean and aux", params, [x[:0]], {})
    for _, (value, aux) in results:
        assert value.weight == 0
        assert aux["each"].shape == (0,)


def of_many_parameters(group, overlap):
    acc = gradacc.accumulator(
        lambda p, x: sum(w.sum() for w in p) * x.mean(), sync=gradacc.all_reduce(group, overlap=overlap)
    )
    params = [torch.ones(1 << 18) for _ in range(3)]  # a bucket each, if they were sent as they come
    results, counts = [], []
    for _ in range(2):
        state = stream(acc, params, [torch.ones(1 + torch.distributed.get_rank(group))])
        with CommDebugMode() as counter:
            results.append(acc.finalize(state))
        counts.append(counter.get_comm_counts()[torch.ops.c10d.allreduce_])
    return results, counts[1:]


def test_overlap_changes_nothing(pool):
    plain, overlapping = (pool.run(2, of_many_parameters, overlap) for overlap in (False, True))
    assert [counts for _, counts in plain] == [counts for _, counts in overlapping] == [[1]] * 2
    assert_trees_equal([results for results, _ in overlapping], [results for results, _ in plain])


def of_another_kind_without_examples(params, x):
    return gradacc.Mean(summed(params, x), 0) if not len(x) else squares(params, x)


def forgotten(group, params, window):
    acc = gradacc.accumulator(of_another_kind_without_examples, sync=gradacc.all_reduce(group))
    return [acc.finalize(stream(acc, params, window)) for _ in range(2)]


def test_what_an_empty_micro_batch_says_is_forgotten(pool):
    params, x = make((3,))
    expected = torch.func.grad_and_value(squares)(params, x)
    for answer in pool.run_each(2, forgotten, [(params, [x[:0]]), (params, [x])]):
        for result in answer:
            assert_trees_close(result, expected)


def after_an_error(group, params, x, fails):
    def loss(params, x):
        if len(x) == fails:
            raise RuntimeError("of the loss")
        return squares(params, x)

    acc = gradacc.accumulator(loss, sync=gradacc.all_reduce(group))
    results = []
    for _ in range(2):
        state = acc.init(params)
        for part in x:
            try:
                state = acc.update(state, params, part)
            except RuntimeError:
                continue
        results.append(acc.finalize(state))
    return results


def test_a_rank_whose_update_raised_takes_part(pool):
    params, x = make((2, 3, 1))
    parts = x.split([2, 3, 1])
    expected = torch.func.grad_and_value(squares)(params, torch.cat([parts[0], parts[2]]))
    for answer in pool.run_each(2, after_an_error, [(params, parts[:2], 3), (params, parts[2:], 3)]):
        for result in answer:
            assert_trees_close(result, expected)


def what_is_no_state(group, params, x):
    acc = gradacc.accumulator(squares, sync=gradacc.all_reduce(group))
    first = acc.finalize if torch.distributed.get_rank(group) else lambda _: acc.finalize(params)
    try:
        first(stream(acc, params, [x]))
    except (TypeError, RuntimeError) as error:
        return str(error)


def test_what_is_no_state_is_told_at_first_use(pool):
    params, x = make((2,))
    here, there = pool.run(2, what_is_no_state, params, x)
    assert here.startswith("accumulator: state must be a state that init, update or merge returned, got a dict")
    assert "no gradient on rank 1, because the call raised on rank 0" in there


def of_ranks_that_differ(group, params):
    acc = gradacc.accumulator(squares, sync=gradacc.all_reduce(group))
    own = {**params, "w": torch.ones(3 + torch.distributed.get_rank(group), dtype=D)}
    acc.finalize(acc.init(own))


def test_ranks_that_differ(pool):
    message = r"accumulator: ranks 0 and 1 differ: params\['w'\] is torch.float64 of shape \(3,\) on rank 0"
    with pytest.raises(Failed, match=message):
        pool.run(2, of_ranks_that_differ, make((1,))[0])


def compiled(group, params, window):
    acc = gradacc.accumulator(tokens, has_aux=True, sync=gradacc.all_reduce(group))
    state = stream(acc, params, window)
    return acc.finalize(state), torch.compile(acc.finalize, fullgraph=True, backend="aot_eager")(state)


@pytest.mark.slow
def test_compiled(pool):
    params, x = make((3, 2, 2))
    a, b, c = x.split([3, 2, 2])
    for plain, traced in pool.run_each(2, compiled, [(params, [a, b]), (params, [c])]):
        assert_trees_close(traced[0], plain[0])
        assert_trees_close(traced[1][0].value, plain[1][0].value)
        assert_trees_close(traced[1][1]["hits"].value, plain[1][1]["hits"].value, rtol=1e-6)
        assert_trees_close(
            (traced[1][1]["average"], traced[1][1]["each"]), (plain[1][1]["average"], plain[1][1]["each"])
        )


def state_of_a_rank(group, name, params, window):
    """No rank talks to another: the state itself is sent, pickled, as the return value."""
    loss, options = LOSSES[name]
    return stream(gradacc.accumulator(loss, **options), params, window)


@pytest.mark.parametrize("sizes", [[(3, 1), (2,)], [(5,), (0, 1), ()], [(), (4, 2)]], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_states_from_other_processes_are_merged_here(pool, name, sizes):
    loss, options = LOSSES[name]
    params, x = make([n for share in sizes for n in share])
    left = iter(x.split([n for share in sizes for n in share]))
    shares = [[next(left) for _ in share] for share in sizes]
    states = pool.run_each(len(sizes), state_of_a_rank, [(name, params, share) for share in shares])
    acc = gradacc.accumulator(loss, **options)
    expected = gradacc.accumulate_and_value(loss, steps=1, **options)(params, x)
    for ordered in (states, states[1:] + states[:1]):  # another order is another order of what is concatenated
        result = acc.finalize(functools.reduce(acc.merge, ordered))
        assert_trees_close(common(result, options), common(expected, options))
    if options.get("has_aux"):
        each = acc.finalize(functools.reduce(acc.merge, states))[1][1]["each"]
        assert_trees_close(each, loss(params, x)[1]["each"])


def dropping(group, how):
    """In window 2 of 5 an update raises on rank 0; ``how`` it goes on."""
    rank, current = dist.get_rank(group), [0]

    def loss(w, x):
        if how != "fine" and rank == 0 and current[0] == 2 and (x < 0).any():
            raise ValueError("of this rank")
        return (w * x).mean()

    acc = gradacc.accumulator(loss, sync=gradacc.all_reduce(group))
    w, answers = torch.ones(1), []
    for window in range(5):
        current[0] = window
        x = torch.full((2, 1), float(window + 1))
        state = acc.init(w)
        try:
            state = acc.update(state, w, x)
            state = acc.update(state, w, x if how == "fine" else -x)
        except ValueError:
            if how == "dropped":
                continue
            if how == "begun again":
                state = acc.update(acc.init(w), w, x)
        if how == "dropped by all" and window == 2:
            continue
        try:
            answers.append(acc.finalize(state)[0].item())
        except RuntimeError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize("how", ["fine", "state before", "dropped", "begun again", "dropped by all"])
def test_a_window_that_one_rank_drops_is_never_mixed_with_another(pool, how):
    answers = pool.run(2, dropping, how)
    if how in ("fine", "state before", "dropped by all"):
        right = {
            "fine": [1.0, 2.0, 3.0, 4.0, 5.0],
            "state before": [0.0, 0.0, 1.0, 0.0, 0.0],
            "dropped by all": [0.0] * 4,
        }[how]
        assert answers == [pytest.approx(right)] * 2
        return
    for found in answers:
        assert found[:2] == [0.0, 0.0]
        assert "on rank 0 of process group" in found[2]
        assert "an update raised and another state was begun" in found[2]
        for later in found[3:]:
            assert "are in different windows" in later
