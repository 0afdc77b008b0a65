"""Carries between ranks: `Mean`s and `Moments` cross in the call's all-reduce; one that is bad on one rank fails on all."""

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint, some_slow
from tests.laws.test_ranks import Collectives

D = torch.float64
PARAMS = {"w": torch.arange(3, dtype=D).cos()}
X = torch.arange(33, dtype=D).view(11, 3).sin() + 5
ZEROS = torch.zeros(3, dtype=D)
CARRY = {"hidden": ZEROS, "mean": gradacc.Mean(ZEROS, 0), "moments": gradacc.Moments(0, ZEROS, ZEROS)}


def loss_fn(params, batch, carry):
    return (batch @ params["w"]).square().mean(), {
        "hidden": carry["hidden"] + batch.sum(0),
        "mean": gradacc.Mean(batch.sum(0), len(batch)),
        "moments": gradacc.Moments.of(batch, 0),
    }


def structure(carry):
    return {name: leaf for name, leaf in carry.items() if name != "hidden"}


def shape(carry):
    return carry | {"hidden": carry["hidden"][:1]}


def dtype(carry):
    return carry | {"hidden": carry["hidden"].float()}


def kind(carry):
    return carry | {"hidden": gradacc.Mean(carry["hidden"], 1)}


def raised(call):
    """What it raises, as words."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def wrong(group, bad, options, where):
    """Rank 1 has a bad carry, then has not: what each call raised, and what the last one returned."""
    own = group.rank() == 1

    def loss(params, batch, carry):
        usual, new = loss_fn(params, batch, carry)
        # With the second micro-batch, when the first one's gradients are there.
        return usual, bad(new) if own and len(batch) == 2 and where == "returned" and wanted else new

    grad_fn = gradacc.accumulate_and_value(
        loss, microbatch_size=3, has_carry=True, sync=gradacc.all_reduce(group, **options)
    )
    share = X[:6] if group.rank() == 0 else X[6:]
    given = bad(CARRY) if own and where == "given" else CARRY
    before = fingerprint((PARAMS, share, given))
    wanted = True
    first = raised(lambda: grad_fn(PARAMS, share, carry=given))
    same = fingerprint((PARAMS, share, given)) == before
    wanted = False
    return first, same, grad_fn(PARAMS, share, carry=CARRY)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("bad", "kind_of_error", "says"),
    [
        (structure, "ValueError", "a carry that lacks carry['hidden'], compared with what it was given"),
        (shape, "ValueError", r"carry['hidden'] as a torch.float64 tensor of shape (1,)"),
        (dtype, "TypeError", r"carry['hidden'] as a torch.float32 tensor"),
        (kind, "TypeError", r"carry['hidden'] as a Mean of"),
    ],
)
def test_a_carry_that_is_bad_on_one_rank_fails_on_all_and_the_next_call_is_right(
    pool, bad, kind_of_error, says, overlap
):
    (here, same_here, after_here), (there, same_there, after_there) = pool.run(
        2, wrong, bad, {"overlap": overlap}, "returned"
    )
    assert there.startswith(kind_of_error)
    assert says in there
    assert "raised on rank 1" in here
    assert same_here
    assert same_there
    for (grads, value), carry in (after_here, after_there):
        expected = gradacc.accumulate_and_value(loss_fn, steps=1, has_carry=True)(PARAMS, X, carry=CARRY)
        assert_trees_close((grads, value), expected[0])
        assert_trees_close(carry["moments"], expected[1]["moments"])
        assert_trees_close(carry["mean"].value, X.mean(0))


def number(carry):
    return carry | {"hidden": 0.0}


def test_a_carry_that_is_no_carry_on_one_rank_fails_on_all(pool):
    (here, _, _), (there, same, _) = pool.run(2, wrong, number, {}, "given")
    assert there.startswith("TypeError: accumulate_and_value: carry['hidden'] is 0.0 (float)")
    assert "raised on rank 1" in here
    assert same


def other_leaves(group):
    """Carries that are each fine, and of which one has `Moments` where the other one has a tensor, or of another shape."""
    found = []
    for given in ({"m": ZEROS}, {"m": gradacc.Moments(0, ZEROS[:2], ZEROS[:2])}):
        own = {"m": gradacc.Moments(0, ZEROS, ZEROS)} if group.rank() == 0 else given

        def loss(params, batch, carry):
            return (batch @ params["w"]).mean(), carry

        grad_fn = gradacc.accumulate(loss, steps=2, has_carry=True, sync=gradacc.all_reduce(group))
        found.append(raised(lambda grad_fn=grad_fn, own=own: grad_fn(PARAMS, X, carry=own)))
    return found


def test_carries_that_differ_between_ranks_are_an_error_on_all(pool):
    for kinds, shapes in pool.run(2, other_leaves):
        assert kinds.startswith("ValueError"), kinds
        assert "carry" in kinds
        assert "carry['m'] is" in shapes, shapes


def traced(group, params, batch):
    """A call that is compiled, and one that is not."""
    grad_fn = gradacc.accumulate_and_value(loss_fn, microbatch_size=1, has_carry=True, sync=gradacc.all_reduce(group))
    compiled = torch.compile(grad_fn, backend="aot_eager", fullgraph=True)
    return compiled(params, batch, carry=CARRY), grad_fn(params, batch, carry=CARRY)


@pytest.mark.slow
@pytest.mark.parametrize("part", [2, 6])  # an unrolled loop, and a scan
def test_compiled_moments_cross(pool, part):
    variance, mean = torch.var_mean(X, 0)
    for found, plain in pool.run_each(2, traced, [(PARAMS, share) for share in (X[:part], X[part:])]):
        assert_trees_close(found[0], plain[0])
        assert_trees_close(found[1]["hidden"], plain[1]["hidden"])
        for carry in (found[1], plain[1]):
            moments = carry["moments"]
            assert_trees_close((moments.variance(1), moments.mean, carry["mean"].value), (variance, mean, mean))
            assert moments.count == carry["mean"].weight == len(X)


def collectives(group, has_carry):
    """How many a call makes, after the first one."""
    loss = loss_fn if has_carry else lambda params, batch: loss_fn(params, batch, CARRY)[0]
    grad_fn = gradacc.accumulate(loss, steps=2, has_carry=has_carry, sync=gradacc.all_reduce(group))
    named = {"carry": CARRY} if has_carry else {}
    grad_fn(PARAMS, X, **named)
    with Collectives() as counter:
        grad_fn(PARAMS, X, **named)
    return len(counter.seen)


def test_a_carry_crosses_in_the_call_s_one_all_reduce(pool):
    assert {*pool.run(2, collectives, True), *pool.run(2, collectives, False)} == {1}


def net(momentum=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1)
    ).double()


def statistics(group, batch, compiles):
    """Two calls of a module with BatchNorm, moved after each."""
    apply, params, carry, move = gradacc.batch_norm(net(0.2 if compiles else None))

    def loss(params, batch, carry):
        output, new = apply(params, batch, carry=carry)
        return output.square().mean(), new

    grad_fn = gradacc.accumulate(loss, microbatch_size=3, has_carry=True, sync=gradacc.all_reduce(group))
    if compiles:
        grad_fn = torch.compile(grad_fn, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        _, carry = grad_fn(params, batch, carry=carry)
        carry = move(carry)
    return carry


@pytest.mark.parametrize("compiles", some_slow([False, True], False))
def test_batch_norm_over_ranks_has_the_statistics_of_the_union(pool, compiles):
    """Of the first layer, whose input is the batch; deeper ones have the union of what their micro-batches were."""
    batch = torch.cat([X, X[:1] * 2])
    here, there = pool.run_each(2, statistics, [(batch[:3], compiles), (batch[3:], compiles)])
    assert_trees_equal(here, there)
    whole = net()
    for _ in range(2):
        whole[0](batch)
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert_trees_close(
        {name: here["buffers"][f"0.{name}"] for name in names}, dict(whole[0].named_buffers()), rtol=1e-10
    )
    deeper = net(0.2 if compiles else None)
    seen = torch.cat([deeper[1](deeper[0](part)) for part in batch.split(3)])
    deeper[2](seen), deeper[2](seen)
    assert_trees_close({name: here["buffers"][f"2.{name}"] for name in names}, dict(deeper[2].named_buffers()))


def streamed(group, share, compiles):
    """A micro-batch for each row, and the end of it."""
    init, update, _, finalize = gradacc.accumulator(loss_fn, has_carry=True, sync=gradacc.all_reduce(group))
    state = init(PARAMS, carry=CARRY)
    for part in share.split(1) if len(share) else ():
        state = update(state, PARAMS, part)
    return (torch.compile(finalize, backend="aot_eager", fullgraph=True) if compiles else finalize)(state)


@pytest.mark.parametrize(
    ("shares", "compiles"), [((4, 7), False), ((0, 11), False), pytest.param((4, 7), True, marks=pytest.mark.slow)]
)
def test_states_of_ranks_end_as_one(pool, shares, compiles):
    variance, mean = torch.var_mean(X, 0)
    expected = gradacc.accumulate_and_value(loss_fn, steps=1, has_carry=True)(PARAMS, X, carry=CARRY)[0]
    answers = pool.run_each(2, streamed, [(part, compiles) for part in X.split(shares)])
    for share, (usual, carry) in zip(X.split(shares), answers, strict=True):
        assert_trees_close(usual, expected)
        assert_trees_close(carry["hidden"], share.sum(0))
        moments = carry["moments"]
        assert_trees_close((moments.variance(1), moments.mean, carry["mean"].value), (variance, mean, mean))
