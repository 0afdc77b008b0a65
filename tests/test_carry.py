"""Carries: what is an error, and what happens at the edges. The law is in ``tests/laws/test_carry.py``."""

import copy

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.vision import find, has

W = {"w": torch.ones(3)}
X = torch.arange(12.0).view(4, 3)


def returning(carry):
    """A loss that returns this carry."""

    def loss_fn(params, batch, carry_given=None, *, carry):
        return (batch @ params["w"]).mean(), made(carry)

    made = carry if callable(carry) else lambda _: carry
    return loss_fn


def call(loss_fn, carry, **options):
    return gradacc.accumulate(loss_fn, steps=2, has_carry=True, **options)(W, X, carry=carry)


@pytest.mark.parametrize(
    ("given", "returned", "error", "says"),
    [
        (
            {"h": X},
            {"g": X},
            ValueError,
            r"without carry\['h'\], which it was given and with carry\['g'\], which it was not",
        ),
        ({"h": X, "g": X}, {"h": X}, ValueError, r"without carry\['g'\], which it was given; return every leaf"),
        ({"h": X}, {"h": X, "g": [X, X]}, ValueError, r"a carry with carry\['g'\]\[0\], which it was not given"),
        ([X, X], (X, X), ValueError, r"of the structure .*\(\*, \*\).*, and was given one of .*\[\*, \*\]"),
        ({"h": X}, None, ValueError, r"without carry\['h'\]"),
        ({"h": (X, X)}, {"h": X}, ValueError, r"without carry\['h'\]\[0\]"),
        ({"h": X}, {"h": X[:2]}, ValueError, r"carry\['h'\] as a torch.float32 tensor of shape \(2, 3\)"),
        ({"h": X}, {"h": X.double()}, TypeError, "torch.float64"),
        ({"h": X}, {"h": 1.0}, TypeError, r"1.0 \(float\)"),
        ({"h": X}, {"h": gradacc.Mean(X, 1)}, TypeError, "a Mean of"),
        (gradacc.Mean(X, 0), gradacc.Mean(X[0], 0), ValueError, "shape"),
        (gradacc.Mean(X, torch.tensor(0)), gradacc.Mean(X, torch.tensor(0.5)), TypeError, "float32"),
        (gradacc.Moments(0, X, X), gradacc.Moments(0, X[0], X[0]), ValueError, "Moments"),
        (3, 3, TypeError, r"torch.tensor\(number\)"),
        ({"m": gradacc.Moments(0, X, X[0])}, None, TypeError, "Moments"),
    ],
)
def test_a_carry_that_changes_is_an_error(given, returned, error, says):
    with pytest.raises(error, match=says):
        call(returning(returned), given)


def test_what_is_no_pair_and_what_is_missing_is_an_error():
    with pytest.raises(TypeError, match=r"must return \(usual, carry\)"):
        call(lambda params, batch, carry: (batch @ params["w"]).mean(), X)
    with pytest.raises(TypeError, match="needs the carry to begin with"):
        gradacc.accumulate(returning(X), steps=2, has_carry=True)(W, X)
    with pytest.raises(TypeError, match="has_carry must be True or False"):
        gradacc.accumulate(returning(X), steps=2, has_carry=1)
    with pytest.raises(TypeError, match="init got carry"):
        gradacc.accumulator(returning(X)).init(W, carry=X)
    acc = gradacc.accumulator(returning(X), has_carry=True)
    with pytest.raises(TypeError, match="update got carry"):
        acc.update(acc.init(W, carry=X), W, X, carry=X)


def test_with_aux():
    def loss_fn(params, batch, carry):
        loss = (batch @ params["w"]).mean()
        return (loss, {"loss": loss.detach()}), carry + 1

    (grads, (value, aux)), carry = gradacc.accumulate_and_value(loss_fn, steps=2, has_aux=True, has_carry=True)(
        W, X, carry=torch.tensor(0)
    )
    assert_trees_equal(value, aux["loss"])
    (again, only), _ = gradacc.accumulate(loss_fn, steps=2, has_aux=True, has_carry=True)(W, X, carry=torch.tensor(0))
    assert_trees_equal((again, only, carry), (grads, aux, torch.tensor(2)))


def test_a_scaled_loss_keeps_its_carry():
    def loss_fn(params, batch, carry):
        return (batch @ params["w"]).mean(), carry + 1

    plain = gradacc.accumulate(loss_fn, steps=2, has_carry=True)(W, X, carry=torch.tensor(0))
    scaled = gradacc.optim.scaled_loss(loss_fn, has_carry=True)
    grads, carry = gradacc.accumulate(scaled, steps=2, has_carry=True)(W, X, carry=torch.tensor(0), loss_scale=4.0)
    assert_trees_close((grads["w"], carry), (4 * plain[0]["w"], plain[1]))


def test_nothing_passed_in_is_changed_and_results_are_new():
    given = {"h": torch.ones(3), "same": torch.ones(2)}
    before = copy.deepcopy(given)

    def loss_fn(params, batch, carry):
        carry["h"].add_(1)
        return (batch @ params["w"]).mean(), carry

    _, new = call(loss_fn, given)
    assert_trees_equal(given, before)
    assert_trees_equal(new, {"h": torch.full((3,), 3.0), "same": torch.ones(2)})
    assert new["same"].data_ptr() != given["same"].data_ptr()
    acc = gradacc.accumulator(loss_fn, has_carry=True)
    state = acc.update(acc.init(W, carry=given), W, X)
    acc.update(state, W, X)
    assert_trees_equal(given, before)
    assert_trees_equal(acc.finalize(state)[1]["h"], torch.full((3,), 2.0))


def test_a_carry_has_no_graph():
    params = {"w": torch.ones(3, requires_grad=True)}
    grad_fn = gradacc.accumulate(
        lambda p, x, carry: ((x @ p["w"]).square().mean(), p["w"] * carry), steps=2, has_carry=True
    )
    grads, carry = grad_fn(params, X, carry=torch.ones(3))
    assert grads["w"].requires_grad
    assert not carry.requires_grad


@pytest.mark.parametrize("batched", [False, True])
def test_a_dropped_micro_batch_hands_on_what_it_got(batched):
    def loss_fn(params, batch, carry):
        seen = {"h": batch.mean(0), "m": gradacc.Moments.of(batch, 0), "n": gradacc.Mean(batch.sum(0), len(batch))}
        return (batch * params["w"]).sum(1).mean(), seen

    zeros = torch.zeros(3)
    carry = {"h": zeros, "m": gradacc.Moments(0, zeros, zeros), "n": gradacc.Mean(zeros, 0)}
    batch = torch.cat([X, torch.full((2, 3), float("nan"))])
    grad_fn = gradacc.accumulate(loss_fn, steps=3, has_carry=True, nonfinite="drop")
    if batched:
        _, new = torch.vmap(lambda w: grad_fn({"w": w}, batch, carry=carry))(torch.ones(1, 3))
        new = torch.utils._pytree.tree_map(lambda leaf: leaf[0], new)
    else:
        _, new = grad_fn(W, batch, carry=carry)
    assert_trees_close(new["h"], X[2:].mean(0))
    assert_trees_close((new["m"].variance(1), new["m"].mean), torch.var_mean(X, 0), rtol=1e-6)
    assert_trees_close(new["n"].value, X.mean(0), rtol=1e-6)


def test_without_a_micro_batch_a_carry_is_what_was_given():
    carry = {"h": torch.ones(2), "n": gradacc.Mean(torch.ones(2), 3)}
    _, new = gradacc.accumulate(returning(carry), has_carry=True)(W, [], carry=carry)
    assert_trees_equal(new["h"], carry["h"])
    assert_trees_equal(new["n"].total, torch.zeros(2))


def test_merge_adds_moments_and_refuses_what_has_an_order():
    def loss_fn(params, batch, carry):
        return (batch @ params["w"]).mean(), gradacc.Moments.of(batch, 0)

    acc = gradacc.accumulator(loss_fn, has_carry=True)
    zeros = torch.zeros(3)
    start = acc.init(W, carry=gradacc.Moments(0, zeros, zeros))
    both = acc.merge(acc.update(start, W, X[:1]), acc.update(start, W, X[1:]))
    _, moments = acc.finalize(acc.merge(start, both))
    assert_trees_close((moments.variance(1), moments.mean), torch.var_mean(X, 0), rtol=1e-6)
    acc = gradacc.accumulator(returning(X), has_carry=True)
    state = acc.update(acc.init(W, carry=X), W, X)
    with pytest.raises(ValueError, match="which came first"):
        acc.merge(state, state)


def test_checkpoints_hold_it(tmp_path):
    acc = gradacc.accumulator(lambda p, x, carry: ((x @ p["w"]).mean(), carry + x.mean(0)), has_carry=True)
    state = acc.update(acc.init(W, carry=torch.zeros(3)), W, X[:2])
    gradacc.checkpoint.save(tmp_path / "window", state)
    loaded = gradacc.checkpoint.load(tmp_path / "window", acc.init(W, carry=torch.zeros(3)))
    assert_trees_equal(acc.finalize(acc.update(loaded, W, X[2:])), acc.finalize(acc.update(state, W, X[2:])))
    train = gradacc.TrainState(W, (), carry={"h": X})
    gradacc.checkpoint.save(tmp_path / "train", train)
    assert_trees_equal(gradacc.checkpoint.load(tmp_path / "train", train._replace(carry={"h": X * 0})), train)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_moves_once_a_call_to_the_large_batchs_statistics(steps, momentum):
    module = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 1))
    whole = copy.deepcopy(module)
    apply, params, carry, step = gradacc.batch_norm(module)

    def loss_fn(params, batch, carry):
        output, carry = apply(params, batch, carry=carry)
        return output.square().mean(), carry

    grad_fn = gradacc.accumulate(loss_fn, steps=steps, has_carry=True)
    for n in range(2):
        batch = torch.arange(36.0).view(12, 3).add(n).sin()
        _, carry = grad_fn(params, batch, carry=carry)
        carry = step(carry)
        whole(batch)
    assert_trees_close(carry["buffers"], dict(whole.named_buffers()), rtol=1e-5, atol=1e-7)
    assert not module[0].running_mean.any()
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        gradacc.batch_norm(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.skipif(not has("torchvision"), reason="needs torchvision")
def test_a_resnet_trains_as_by_hand_and_evaluates():
    find()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    module = resnet18(num_classes=4)
    hand = copy.deepcopy(module)
    apply, params, buffers = gradacc.functional(module)

    def loss_fn(params, batch, carry):
        out, new = apply(params, batch["x"], buffers=carry)
        return nn.functional.cross_entropy(out, batch["y"]), new

    optimizer = gradacc.optim.sgd(lr=0.01)
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, steps=2, has_carry=True), optimizer)
    state = gradacc.TrainState(params, optimizer.init(params), carry=buffers)
    reference = torch.optim.SGD(hand.parameters(), lr=0.01)
    for _ in range(20):
        batch = {"x": torch.randn(8, 3, 32, 32), "y": torch.randint(4, (8,))}
        state, _ = step(state, batch)
        reference.zero_grad()
        for x, y in zip(batch["x"].split(4), batch["y"].split(4), strict=True):
            (nn.functional.cross_entropy(hand(x), y) / 2).backward()
        reference.step()
    assert_trees_close({**state.params, **state.carry}, dict(hand.state_dict()), rtol=1e-3, atol=1e-4)
    module.load_state_dict({**state.params, **state.carry})
    assert_trees_close(module.eval()(batch["x"]), hand.eval()(batch["x"]), rtol=1e-3, atol=1e-3)
