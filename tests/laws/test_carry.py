"""Law 12: a carry is threaded as the sequential loop does, bit for bit; `Mean`s and moments add up to the large batch's."""

import copy

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, some_slow

D = torch.float64


def loss_fn(params, batch, carry):
    """A recurrent loss, with counts and moments of what it has seen."""
    hidden = torch.tanh(batch @ params["w"] + carry["hidden"])
    return hidden.square().mean(), {
        "hidden": hidden.mean(0),
        "mean": gradacc.Mean(batch.sum(0), len(batch)),
        "moments": gradacc.Moments.of(batch, 0),
        "steps": carry["steps"] + 1,
    }


def beginning():
    zeros = torch.zeros(3, dtype=D)
    return {
        "hidden": zeros + 0.1,
        "mean": gradacc.Mean(zeros, 0),
        "moments": gradacc.Moments(0, zeros, zeros),
        "steps": torch.tensor(0),
    }


@pytest.fixture
def params():
    return {"w": torch.arange(9, dtype=D).view(3, 3).cos()}


@pytest.fixture
def batch():
    return torch.arange(33, dtype=D).view(11, 3).sin() + 5


def by_hand(params, batch, steps):
    """The loop that a carry replaces."""
    leaf, carry, total = params["w"].clone().requires_grad_(), beginning(), 0.0
    for part in batch.tensor_split(steps):
        loss, new = loss_fn({"w": leaf}, part, carry)
        (loss * (len(part) / len(batch))).backward()
        total = total + loss.detach() * (len(part) / len(batch))
        carry = carry | {"hidden": new["hidden"].detach(), "steps": new["steps"]}
    return {"w": leaf.grad}, total, carry


def check(found, params, batch, steps, **close):
    (grads, value), carry = found
    expected, total, threaded = by_hand(params, batch, steps)
    same = assert_trees_close if close else assert_trees_equal
    same(
        (grads, value, carry["hidden"], carry["steps"]),
        (expected, total, threaded["hidden"], threaded["steps"]),
        **close,
    )
    variance, mean = torch.var_mean(batch, 0)
    assert_trees_close((carry["mean"].value, carry["moments"].mean), (mean, mean), rtol=1e-12)
    assert_trees_close(carry["moments"].variance(1), variance, rtol=1e-12)
    assert carry["moments"].count == carry["mean"].weight == len(batch)


@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_a_carry_is_that_of_the_sequential_loop_bit_for_bit(params, batch, steps):
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps, has_carry=True)
    check(grad_fn(params, batch, carry=beginning()), params, batch, steps)


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_it_is_in_a_transform(params, batch, steps):
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps, has_carry=True)

    def batched(params, batch, carry):
        return grad_fn(params, batch, carry=carry)

    twice = {"w": torch.stack([params["w"], -params["w"]])}
    (grads, value), carry = torch.vmap(batched, (0, None, None))(twice, batch, beginning())
    for n, w in enumerate(twice["w"]):
        (one, of_one), own = grad_fn({"w": w}, batch, carry=beginning())
        assert_trees_close((grads["w"][n], value[n], carry["hidden"][n]), (one["w"], of_one, own["hidden"]), rtol=1e-10)
    assert_trees_close(carry["moments"].m2[0], own["moments"].m2, rtol=1e-10)


def test_outer_derivatives_go_through_a_carry(params, batch):
    """Within a call each micro-batch's gradient is truncated; a transform around the call sees what the call computes."""
    grad_fn = gradacc.accumulate(loss_fn, steps=3, has_carry=True)

    def last(hidden):
        _, carry = grad_fn(params, batch, carry=beginning() | {"hidden": hidden})
        return carry["hidden"].sum()

    def expected(hidden):
        for part in batch.tensor_split(3):
            hidden = torch.tanh(part @ params["w"] + hidden).mean(0)
        return hidden.sum()

    start = beginning()["hidden"]
    assert_trees_close(torch.func.grad(last)(start), torch.func.grad(expected)(start), rtol=1e-10)


@pytest.mark.parametrize("steps", some_slow([3, 11], 11))  # unrolled, and a scan
def test_it_is_compiled(params, batch, steps):
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps, has_carry=True)
    compiled = torch.compile(grad_fn, backend="aot_eager", fullgraph=True)
    check(compiled(params, batch, carry=beginning()), params, batch, steps, rtol=1e-10)


def test_the_streaming_form_is_the_loop(params, batch):
    init, update, _, finalize = gradacc.accumulator(loss_fn, has_carry=True)
    state = init(params, carry=beginning())
    for part in batch.tensor_split(3):
        state = update(state, params, part)
    parts = list(batch.tensor_split(3))
    expected = gradacc.accumulate_and_value(loss_fn, split=iter, has_carry=True)(params, parts, carry=beginning())
    assert_trees_equal(finalize(state), expected)


def norm_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def test_batch_norm_statistics_are_those_of_the_sequential_loop_bit_for_bit():
    """Through `train_step`, several steps; then the module evaluates with them."""
    module = norm_net()
    hand = copy.deepcopy(module)
    apply, params, buffers = gradacc.functional(module)

    def loss(params, batch, carry):
        out, new = apply(params, batch, buffers=carry)
        return out.square().mean(), new

    step = gradacc.train_step(
        gradacc.accumulate_and_value(loss, steps=4, has_carry=True), optimizer := gradacc.optim.sgd(lr=0.1)
    )
    state = gradacc.TrainState(params, optimizer.init(params), carry=buffers)
    reference = torch.optim.SGD(hand.parameters(), lr=0.1)
    for n in range(5):
        batch = torch.arange(36.0).view(12, 3).add(n).sin()
        state, _ = step(state, batch)
        reference.zero_grad()
        for part in batch.tensor_split(4):
            (hand(part).square().mean() / 4).backward()
        reference.step()
    assert_trees_close(state.params, dict(hand.named_parameters()), rtol=1e-5, atol=1e-7)
    one = norm_net()
    apply, params, buffers = gradacc.functional(one)
    (_, _), new = gradacc.accumulate_and_value(loss, steps=4, has_carry=True)(params, batch, carry=buffers)
    for part in batch.tensor_split(4):
        one(part)
    assert_trees_equal(new, dict(one.named_buffers()))
    module.load_state_dict({**state.params, **state.carry})
    module.eval(), hand.eval()
    assert_trees_close(module(batch), hand(batch), rtol=1e-5, atol=1e-6)


def of_a_rank(group, params, batch, steps, hidden):
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps, has_carry=True, sync=gradacc.all_reduce(group))
    first = grad_fn(params, batch, carry=beginning() | {"hidden": hidden})
    return first, grad_fn(params, batch, carry=beginning() | {"hidden": hidden})


@pytest.mark.parametrize("shares", [(11,), (4, 7), (0, 3, 8)])
def test_over_ranks_means_and_moments_are_the_unions(pool, params, batch, shares):
    hidden = beginning()["hidden"]
    args = [(params, part, 2, hidden) for part in batch.split(shares)]
    variance, mean = torch.var_mean(batch, 0)
    answers = pool.run_each(len(shares), of_a_rank, args)
    for share, (first, second) in zip(batch.split(shares), answers, strict=True):
        assert_trees_equal(first, second)
        carry = second[1]
        assert_trees_close((carry["mean"].value, carry["moments"].mean), (mean, mean), rtol=1e-12)
        assert_trees_close(carry["moments"].variance(1), variance, rtol=1e-12)
        assert carry["steps"] == min(2, len(share))
        alone = gradacc.accumulate_and_value(loss_fn, steps=2, has_carry=True)(params, share, carry=beginning())[1]
        assert_trees_equal(carry["hidden"], alone["hidden"])


def test_moments_keep_digits_that_sums_of_squares_lose(pool):
    batch = torch.arange(24, dtype=torch.float32).view(8, 3).sin() + 4096
    args = [({"w": torch.ones(3, 3)}, part) for part in batch.split((3, 5))]
    for (found,) in pool.run_each(2, moments_of_a_rank, args):
        # Numbers near 4096 are 5e-4 apart in float32, of a variance of 0.5.
        assert_trees_close(found.variance(1), batch.double().var(0).float(), rtol=1e-3)


def moments_of_a_rank(group, params, batch):
    def loss(params, batch, carry):
        return (batch @ params["w"]).mean(), gradacc.Moments.of(batch, 0)

    grad_fn = gradacc.accumulate(loss, steps=2, has_carry=True, sync=gradacc.all_reduce(group))
    zeros = torch.zeros(3)
    return (grad_fn(params, batch, carry=gradacc.Moments(0, zeros, zeros))[1],)
