"""Carries: what is an error, and what happens at the edges. The law is in ``tests/laws/test_carry.py``."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint
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
            r"that lacks carry\['h'\] and adds carry\['g'\], compared with what it was given",
        ),
        (
            {"h": X, "g": X},
            {"h": X},
            ValueError,
            r"lacks carry\['g'\], compared with what it was given; return every leaf",
        ),
        ({"h": X}, {"h": X, "g": [X, X]}, ValueError, r"that adds carry\['g'\]\[0\], compared"),
        ([X, X], (X, X), ValueError, r"of the structure .*\(\*, \*\).*, compared with what it was given: .*\[\*, \*\]"),
        ({"h": X}, None, ValueError, r"lacks carry\['h'\]"),
        ({"h": (X, X)}, {"h": X}, ValueError, r"lacks carry\['h'\]\[0\]"),
        ({"h": X}, {"h": X[:2]}, ValueError, r"carry\['h'\] as a torch.float32 tensor of shape \(2, 3\)"),
        ({"h": X}, {"h": X.double()}, TypeError, "torch.float64"),
        ({"h": X}, {"h": 1.0}, TypeError, r"1.0 \(float\)"),
        ({"h": X}, {"h": gradacc.Mean(X, 1)}, TypeError, "a Mean of"),
        (X, X[:, :2], ValueError, r"carry as a torch.float32 tensor of shape \(4, 2\).*, and was given .*\(4, 3\)"),
        (X, X.to_sparse(), TypeError, "layout torch.sparse_coo"),
        (X, X.int(), TypeError, "a carry keeps its kinds, shapes, dtypes and devices: return it like what was given"),
        (torch.zeros((), dtype=torch.int64), torch.zeros(()), TypeError, "torch.int64"),
        ({"h": [X, "text"]}, None, TypeError, r"carry\['h'\]\[1\] is"),
        (gradacc.Mean(X, 0), gradacc.Mean(X[0], 0), ValueError, "shape"),
        (gradacc.Mean(X, torch.tensor(0)), gradacc.Mean(X, torch.tensor(0.5)), TypeError, "float32"),
        (gradacc.Moments(0, X, X), gradacc.Moments(0, X[0], X[0]), ValueError, "Moments"),
        (3, 3, TypeError, r"torch.tensor\(number\)"),
        ({"m": gradacc.Moments(0, X, X[0])}, None, TypeError, "Moments"),
    ],
)
@pytest.mark.parametrize("way", ["call", "under vmap", "streaming form"])
def test_a_carry_that_changes_is_an_error_and_nothing_is_changed(given, returned, error, says, way):
    loss_fn = returning(returned)
    before = fingerprint((W, X, given))
    grad_fn = gradacc.accumulate(loss_fn, steps=2, has_carry=True)

    def run():
        if way == "call":
            grad_fn(W, X, carry=given)
        elif way == "under vmap":
            torch.vmap(lambda w: grad_fn({"w": w}, X, carry=given))(W["w"][None])
        else:
            acc = gradacc.accumulator(loss_fn, has_carry=True)
            acc.update(acc.init(W, carry=given), W, X)

    with pytest.raises(error, match=says):
        run()
    assert fingerprint((W, X, given)) == before


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"g": X}, r"lacks carry\['h'\]"),
        ({"h": X[:2]}, r"carry\['h'\] as a torch.float32"),
        ({"h": X.double()}, "float64"),
    ],
)
def test_a_carry_that_changes_is_an_error_compiled(returned, says):
    grad_fn = gradacc.accumulate(returning(returned), steps=2, has_carry=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=says):
        torch.compile(grad_fn, backend="eager", fullgraph=True)(W, X, carry={"h": X})


def test_a_sparse_carry_is_an_error():
    with pytest.raises(
        TypeError, match="carry is a torch.float32 tensor .* layout torch.sparse_coo; the leaves of a carry"
    ):
        call(returning(X), X.to_sparse())


def test_a_state_is_as_it_was_after_an_update_that_returns_a_bad_carry():
    acc = gradacc.accumulator(
        lambda p, x, carry: ((x @ p["w"]).mean(), carry if len(x) == 2 else carry[:1]), has_carry=True
    )
    state = acc.update(acc.init(W, carry=X), W, X[:2])
    before = fingerprint(state)
    with pytest.raises(ValueError, match="carry as a torch.float32 tensor"):
        acc.update(state, W, X)
    assert fingerprint(state) == before
    assert_trees_equal(acc.finalize(acc.update(state, W, X[2:]))[1], X)


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


def test_what_a_call_returns_is_no_part_of_the_batch_or_of_the_parameters():
    def loss_fn(params, batch, carry):
        return (batch @ params["w"]).mean(), {"last": batch[-1], "w": params["w"].detach(), "same": carry["same"]}

    params, batch = {"w": torch.ones(3)}, X.clone()
    carry = {"last": torch.zeros(3), "w": torch.zeros(3), "same": torch.zeros(3)}
    acc = gradacc.accumulator(loss_fn, has_carry=True)
    begun = acc.init(params, carry=carry)
    state = acc.update(begun, params, batch)
    _, new = gradacc.accumulate(loss_fn, steps=2, has_carry=True)(params, batch, carry=carry)
    for tensor in (batch, params["w"], *carry.values()):
        tensor.fill_(7.0)
    expected = {"last": X[-1], "w": torch.ones(3), "same": torch.zeros(3)}
    for found in (new, acc.finalize(state)[1]):
        assert_trees_equal(found, expected)
    assert_trees_equal(begun.carry["same"], torch.zeros(3))


class Checkpointed(nn.Module):
    """BatchNorm in an activation checkpoint."""

    def __init__(self, checkpoints):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.checkpoints = checkpoints

    def inside(self, x):
        return self.norm(self.first(x)).relu()

    def forward(self, x):
        if not self.checkpoints:
            return self.last(self.inside(x))
        return self.last(torch.utils.checkpoint.checkpoint(self.inside, x, use_reentrant=False))


@pytest.mark.parametrize("streams", [False, True])
def test_statistics_of_a_checkpointed_layer_move_once_a_micro_batch(streams):
    """And not once more when the backward pass runs it again, as in a hand-written loop."""
    module, hand = Checkpointed(True).double(), Checkpointed(False).double()
    hand.load_state_dict(module.state_dict())
    apply, params, buffers = gradacc.functional(module)

    def loss_fn(params, batch, carry):
        output, new = apply(params, batch, buffers=carry)
        return output.square().mean(), new

    batch = torch.randn(12, 3, dtype=torch.float64)
    if streams:
        acc = gradacc.accumulator(loss_fn, has_carry=True)
        state = acc.init(params, carry=buffers)
        for part in batch.split(4):
            state = acc.update(state, params, part)
        _, new = acc.finalize(state)
    else:
        _, new = gradacc.accumulate(loss_fn, steps=3, has_carry=True)(params, batch, carry=buffers)
    for part in batch.split(4):
        hand(part)
    assert_trees_equal(new, dict(hand.named_buffers()))


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


class Operations(TorchDispatchMode):
    """What torch runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def operations(**named):
    """Of a call of three micro-batches."""

    def loss_fn(params, batch, **named):
        loss = (batch @ params["w"]).square().mean()
        return (loss, named["carry"]) if named else loss

    with Operations() as counter:
        gradacc.accumulate(loss_fn, steps=3, has_carry=bool(named))(W, X, **named)
    return list(map(str, counter.seen))


def test_what_a_carry_costs():
    """Nothing without a leaf; a copy at the beginning and one a micro-batch for each tensor."""
    assert operations(carry=()) == operations()
    copies = ["aten.clone.default"] * 4
    more = operations(carry={"h": X})
    for operation in (*operations(), *copies):
        more.remove(operation)
    assert {*more} <= {"aten.detach.default"}


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


def counting(params, batch, carry):
    return (batch @ params["w"]).square().mean(), {
        "moments": gradacc.Moments.of(batch, 0),
        "mean": gradacc.Mean(batch.sum(0), len(batch)),
    }


def counts():
    return {"moments": gradacc.Moments(0, torch.zeros(3), torch.zeros(3)), "mean": gradacc.Mean(torch.ones(3), 4)}


def test_states_with_means_and_moments_are_a_monoid():
    acc = gradacc.accumulator(counting, has_carry=True)
    zero = acc.init(W, carry=counts())
    a, b, c = (acc.update(zero, W, part) for part in X.split((1, 2, 1)))
    left, right = acc.merge(acc.merge(a, b), c), acc.merge(a, acc.merge(b, c))
    expected = gradacc.accumulate_and_value(counting, steps=1, has_carry=True)(W, X, carry=counts())
    for whole in (left, right, acc.merge(c, acc.merge(b, a)), acc.merge(acc.merge(zero, left), zero)):
        assert_trees_close(acc.finalize(whole), expected, rtol=1e-6)
    assert_trees_equal(acc.finalize(acc.merge(a, zero)), acc.finalize(a))
    assert_trees_equal(acc.finalize(acc.merge(zero, a)), acc.finalize(a))


def test_a_tensor_is_merged_with_a_state_that_has_seen_nothing():
    acc = gradacc.accumulator(lambda p, x, carry: ((x @ p["w"]).mean(), carry + 1), has_carry=True)
    state = acc.update(acc.init(W, carry=torch.tensor(5)), W, X)
    for merged in (
        acc.merge(state, acc.init(W, carry=torch.tensor(7))),
        acc.merge(acc.init(W, carry=state.carry), state),
    ):
        assert acc.finalize(merged)[1] == 6
        assert acc.finalize(acc.update(merged, W, X))[1] == 7


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"g": X}, r"b began with a carry that lacks carry\['h'\] and adds carry\['g'\], compared with that of a"),
        ({"h": X[:2]}, r"b began with carry\['h'\] as a torch.float32 tensor of shape \(2, 3\).*, and a with"),
        ({"h": X.double()}, r"carry\['h'\] as a torch.float64"),
        ({"h": gradacc.Mean(X, 1)}, r"carry\['h'\] as a Mean of"),
    ],
)
@pytest.mark.parametrize("seen", [False, True])
def test_states_that_began_with_other_carries_are_not_merged(other, says, seen):
    acc = gradacc.accumulator(lambda p, x, carry: ((x @ p["w"]).mean(), carry), has_carry=True)
    a, b = acc.init(W, carry={"h": X}), acc.init(W, carry=other)
    if seen:
        b = acc.update(b, W, X)
    with pytest.raises(ValueError, match=says):
        acc.merge(a, b)


def test_a_checkpoint_of_another_carry_is_an_error(tmp_path):
    acc = gradacc.accumulator(lambda p, x, carry: ((x @ p["w"]).mean(), carry), has_carry=True)
    gradacc.checkpoint.save(tmp_path / "window", acc.update(acc.init(W, carry={"h": X}), W, X))
    for other, says in (
        ({"h": X[:2]}, r"carry\['h'\] float32 \(2, 3\), but float32 \(4, 3\) was saved"),
        ({}, "carry.*none"),
    ):
        with pytest.raises(ValueError, match=says):
            gradacc.checkpoint.load(tmp_path / "window", acc.init(W, carry=other))
    with pytest.raises(ValueError, match="has_carry"):
        gradacc.checkpoint.load(tmp_path / "window", gradacc.accumulator(lambda p, x: (x @ p["w"]).mean()).init(W))


def test_checkpoints_hold_it(tmp_path):
    acc = gradacc.accumulator(lambda p, x, carry: ((x @ p["w"]).mean(), carry + x.mean(0)), has_carry=True)
    state = acc.update(acc.init(W, carry=torch.zeros(3)), W, X[:2])
    gradacc.checkpoint.save(tmp_path / "window", state)
    loaded = gradacc.checkpoint.load(tmp_path / "window", acc.init(W, carry=torch.zeros(3)))
    assert_trees_equal(acc.finalize(acc.update(loaded, W, X[2:])), acc.finalize(acc.update(state, W, X[2:])))
    train = gradacc.TrainState(W, (), carry={"h": X})
    gradacc.checkpoint.save(tmp_path / "train", train)
    assert_trees_equal(gradacc.checkpoint.load(tmp_path / "train", train._replace(carry={"h": X * 0})), train)


def test_a_train_state_without_a_carry_is_the_tree_that_it_was(tmp_path):
    """Why its default is not None: to torch that is a leaf, which `torch.vmap` refuses."""
    optimizer = gradacc.optim.sgd(lr=0.1, momentum=0.9)
    state = gradacc.TrainState(W, optimizer.init(W))
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    assert len(leaves) == len(torch.utils._pytree.tree_leaves((W, state.opt_state, 0)))
    step = gradacc.train_step(
        gradacc.accumulate_and_value(lambda p, x: (x @ p["w"]).square().mean(), steps=2), optimizer
    )
    for none in (state, state._replace(carry=None)):
        new, _ = step(none, X)
        assert new.carry is none.carry
        gradacc.checkpoint.save(tmp_path, new)
        assert_trees_equal(gradacc.checkpoint.load(tmp_path, none), new)
    two = gradacc.TrainState(
        {"w": torch.ones(2, 3)}, torch.vmap(optimizer.init)({"w": torch.ones(2, 3)}), torch.zeros(2)
    )
    new, _ = torch.vmap(step, in_dims=(0, None))(two, X)
    assert_trees_close(new.params["w"][0], step(state, X)[0].params["w"], rtol=1e-6)
    new, _ = torch.vmap(step, in_dims=(gradacc.TrainState(0, 0, 0), None))(two, X)
    with pytest.raises((TypeError, ValueError)):
        torch.vmap(step, in_dims=(0, None))(two._replace(carry=None), X)


def test_a_step_threads_the_carry_of_its_state(tmp_path):
    """Also with aux, compiled, under vmap; and from a checkpoint on."""

    def loss_fn(params, batch, carry):
        hidden = torch.tanh((batch @ params["w"]).mean() + carry["hidden"])
        return (hidden.square(), {"hidden": hidden.detach()}), {"hidden": hidden, "seen": gradacc.Moments.of(batch, 0)}

    optimizer = gradacc.optim.sgd(lr=0.1)
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2, has_aux=True, has_carry=True)
    step = gradacc.train_step(grad_fn, optimizer)
    params = {"w": torch.full((3,), 0.01)}
    zeros = torch.zeros(3)
    carry = {"hidden": torch.tensor(0.1), "seen": gradacc.Moments(torch.tensor(0), zeros, zeros)}
    before = copy.deepcopy((params, carry))
    start = gradacc.TrainState(params, optimizer.init(params), torch.tensor(0), carry)
    state, found = start, carry
    for _ in range(2):
        ((_, (value, aux)), found), (state, metrics) = grad_fn(state.params, X, carry=found), step(state, X)
        assert_trees_equal((state.carry, metrics["loss"], metrics["aux"]), (found, value, aux))
    assert_trees_equal((params, carry), before)
    gradacc.checkpoint.save(tmp_path, state)
    assert_trees_equal(step(gradacc.checkpoint.load(tmp_path, start), X), step(state, X))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_trees_close(compiled(start, X)[0].carry, step(start, X)[0].carry, rtol=1e-6)
    two = torch.utils._pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), start)
    together, _ = torch.vmap(step, in_dims=(0, None))(two, X)
    assert_trees_close(together.carry["hidden"][1], step(start, X)[0].carry["hidden"], rtol=1e-6)


def test_a_step_says_what_is_wrong_with_a_carry():
    optimizer = gradacc.optim.sgd(lr=0.1)
    plain = gradacc.accumulate_and_value(lambda p, x: (x @ p["w"]).mean(), steps=2)
    carried = gradacc.accumulate_and_value(returning(X), steps=2, has_carry=True)
    state = gradacc.TrainState(W, optimizer.init(W))
    with pytest.raises(TypeError, match=r"TrainState\(params, opt_state, carry=c\)"):
        gradacc.train_step(carried, optimizer)(state, X)
    with pytest.raises(TypeError, match="carry"):
        gradacc.train_step(plain, optimizer)(state._replace(carry=X), X)
    with pytest.raises(TypeError, match="the state has a carry, and grad_fn returned"):
        gradacc.train_step(lambda p, x, carry: plain(p, x), optimizer)(state._replace(carry=X), X)


def rows(sequence, size):
    """Pieces of a sequence, in order."""
    return list(sequence.split(size, dim=1))


def test_truncated_backpropagation_through_time_is_the_loop_by_hand():
    """A hidden state in, a detached one out: three updates along one long sequence, three pieces each."""
    torch.manual_seed(0)
    cell = nn.LSTM(4, 6, batch_first=True).double()
    hand = copy.deepcopy(cell)
    run, params, _ = gradacc.functional(cell)
    sequence = torch.randn(2, 27, 4, dtype=torch.float64)

    def loss_fn(params, piece, carry):
        output, hidden = run(params, piece, carry)
        return output.square().mean(), hidden

    optimizer = gradacc.optim.sgd(lr=0.1)
    hidden = (torch.zeros(1, 2, 6, dtype=torch.float64), torch.zeros(1, 2, 6, dtype=torch.float64))
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, has_carry=True), optimizer)
    state = gradacc.TrainState(params, optimizer.init(params), carry=hidden)
    reference = torch.optim.SGD(hand.parameters(), lr=0.1)
    for window in rows(sequence, 9):
        state, metrics = step(state, rows(window, 3))
        reference.zero_grad()
        total = 0.0
        for piece in rows(window, 3):
            output, hidden = hand(piece, hidden)
            (output.square().mean() / 3).backward()
            hidden = tuple(each.detach() for each in hidden)
            total = total + output.detach().square().mean() / 3
        reference.step()
        assert_trees_close(metrics["loss"], total)
        assert_trees_close(state.carry, hidden)
    assert not any(each.requires_grad for each in state.carry)
    assert_trees_close(state.params, dict(hand.named_parameters()))


# Slow because torchvision is installed for `make test-slow` only; it takes some seconds.
@pytest.mark.slow
@pytest.mark.skipif(not has("torchvision"), reason="needs torchvision")
def test_a_resnet_trains_as_by_hand_and_evaluates():
    find()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    module = resnet18(num_classes=4).double()
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
        batch = {"x": torch.randn(8, 3, 32, 32, dtype=torch.float64), "y": torch.randint(4, (8,))}
        state, _ = step(state, batch)
        reference.zero_grad()
        for x, y in zip(batch["x"].split(4), batch["y"].split(4), strict=True):
            (nn.functional.cross_entropy(hand(x), y) / 2).backward()
        reference.step()
    assert_trees_close({**state.params, **state.carry}, dict(hand.state_dict()), rtol=1e-9, atol=1e-11)
    module.load_state_dict({**state.params, **state.carry})
    assert_trees_close(module.eval()(batch["x"]), hand.eval()(batch["x"]), rtol=1e-8)
