"""Replicas that serve several micro-batches: as if every pass had its own, NOTE [replicas of a whole call]."""

from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import _replicas, _reuse
from tests.helpers import assert_trees_close, assert_trees_equal

D = torch.float64
X = torch.arange(36, dtype=D).view(12, 3).sin()


def made(run):
    """What ``run()`` returns, and how often replicas of a whole module tree were made."""
    with mock.patch.object(_replicas, "replicate", side_effect=_replicas.replicate) as replicate:
        return run(), replicate.call_count


def anew(run):
    """The same, where every pass has replicas of its own."""
    with mock.patch.object(_reuse._left, "passes", return_value=None):
        return run()


def test_the_third_micro_batch_has_the_replicas_of_the_second():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 1)).double()
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate_and_value(lambda p, x: apply(p, x).square().mean(), steps=6)
    actual, count = made(lambda: grad_fn(params, X))
    assert count == 2
    assert_trees_equal(actual, anew(lambda: grad_fn(params, X)))


def test_frozen_parameters_and_buffers_of_ones_own():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    module[0].requires_grad_(False)
    apply, params, buffers = gradacc.functional(module)
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def loss(p, x, b):
        y, new = apply(p, x, buffers=b)
        return y.square().mean(), {"mean": gradacc.Mean(new["1.running_mean"], 1)}

    grad_fn = gradacc.accumulate_and_value(loss, steps=6, has_aux=True)
    actual, count = made(lambda: grad_fn(params, X, buffers))
    assert count == 2
    assert_trees_equal(actual, anew(lambda: grad_fn(params, X, buffers)))
    assert_trees_equal(dict(module.named_buffers()), before)


class Writes(nn.Module):
    """Does one thing to itself in every pass, or in a later one, and tells what it found."""

    def __init__(self, how, after=0):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=D)
        self.norm = nn.BatchNorm1d(2, dtype=D)
        self.how, self.after, self.passes, self.none = how, after, 0, None
        self.items, self.table, self.nested = [], {}, {"a": [0]}
        self.register_buffer("lazy", None)

    def found(self):
        lazy = 0 if self.lazy is None else self.lazy.item()
        own = self.none or 0
        return self.passes + len(self.items) + len(self.table) + len(self.nested["a"]) + own + lazy + self.linear.scale

    def forward(self, x):
        number = self.found()
        y = self.norm(self.linear(x))
        if x[0, 0] >= self.after:
            self.write()
        return y, number

    def write(self):
        match self.how:
            case "attribute":
                self.passes += 1
            case "list":
                self.items.append(1)
            case "another list":
                self.items = []
                self.items.append(1)
            case "dict":
                self.table[len(self.table)] = True
            case "nested":
                self.nested["a"].append(0)
            case "None":
                self.none = 5
            case "buffer":
                self.lazy = torch.ones((), dtype=D)
            case "part":
                self.linear.scale += 1
            case "parameter":
                self.linear.weight = nn.Parameter(self.linear.weight.detach() * 2)
            case "hook":
                self.linear.register_forward_hook(lambda module, args, output: output * 2)
            case "method":
                self.found = lambda: 100
            case "train":
                self.eval()
            case "submodule":
                self.linear = Scaled()


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(3, 2, dtype=D)
        self.scale = 1


def writes(how, after):
    torch.manual_seed(0)
    module = Writes(how, after)
    module.linear = Scaled()
    return module


HOW = [
    *("nothing", "attribute", "list", "another list", "dict", "nested", "None", "buffer", "part", "parameter", "hook"),
    *("method", "train", "submodule"),
]  # fmt: skip


@pytest.mark.parametrize("after", [-9, -0.6, 9])
@pytest.mark.parametrize("how", HOW)
def test_no_pass_sees_what_another_one_wrote(how, after):
    """In every micro-batch, in some, in none."""
    apply, params, _ = gradacc.functional(writes(how, after))

    def loss(p, x):
        y, number = apply(p, x)
        return y.square().mean(), {"found": torch.full((len(x),), float(number))}

    grad_fn = gradacc.accumulate_and_value(loss, steps=6, has_aux=True)
    actual, count = made(lambda: grad_fn(params, X))
    assert_trees_equal(actual, anew(lambda: grad_fn(params, X)))
    assert set(actual[1][1]["found"].tolist()) == {2.0}
    # A buffer is put back.
    assert (count == 2) == (how in ("nothing", "buffer") or after == 9)


CHANGES = {
    "mode": lambda module: module.train(not module.training),
    "part's mode": lambda module: module.norm.train(not module.norm.training),
    "attribute": lambda module: setattr(module, "passes", module.passes + 1),
    "container": lambda module: module.items.append(1),
    "nested": lambda module: module.nested["a"].append(1),
    "another container": lambda module: setattr(module, "items", [1]),
    "buffer": lambda module: module.norm.running_mean.add_(1),
    "another buffer": lambda module: setattr(module.norm, "running_mean", module.norm.running_mean + 1),
    "no buffer any more": lambda module: setattr(module.norm, "num_batches_tracked", None),
    "hook": lambda module: module.linear.register_forward_hook(lambda module, args, output: output * 2),
    "frozen": lambda module: module.norm.weight.data.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_module_that_changes_between_micro_batches(change, at):
    """`apply` is the module as it is then."""

    def run():
        module = writes("nothing", 0)
        module.norm.requires_grad_(False)
        module.eval()
        apply, params, _ = gradacc.functional(module)

        def loss(p, x):
            y, number = apply(p, x)
            return y.square().mean(), {"found": torch.full((len(x),), float(number))}

        def microbatches():
            for n, part in enumerate(X.split(2)):
                if n == at:
                    CHANGES[change](module)
                yield part

        return gradacc.accumulate_and_value(loss, has_aux=True)(params, microbatches())

    assert_trees_equal(run(), anew(run))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_two_passes_in_a_micro_batch_that_are_run_again():
    """A checkpoint runs the first pass once more after the second, with the buffers of the first."""
    module = Checkpointed(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double().eval())
    apply, params, buffers = gradacc.functional(module)
    others = {name: buffer + 1 for name, buffer in buffers.items()}

    def loss(p, x):
        first, second = (apply(p, x, buffers=own)[0] for own in (buffers, others))
        return (first * second).square().mean()

    grad_fn = gradacc.accumulate_and_value(loss, steps=6)
    actual, count = made(lambda: grad_fn(params, X))
    # The second pass of the first micro-batch is given the same as the first, so its replicas may serve again.
    assert count == 3
    assert_trees_equal(actual, anew(lambda: grad_fn(params, X)))


def test_a_loss_that_marks_its_parameters():
    """A hook, an attribute, other data on what it was given: of one micro-batch, not of the next."""
    w = torch.ones(3, dtype=D)
    seen = []

    def loss(w, x, how):
        seen.append(hasattr(w, "mark"))
        y = (x @ w).square().mean()
        if how == "attribute":
            w.mark = True
        elif how == "hook":
            w.register_hook(lambda grad: grad * 2)
        elif how == "hook in a micro-batch of weight 0":
            if len(seen) == 3:
                w.register_hook(lambda grad: grad * 2)
                return gradacc.Mean(y * 0, 0)
            return gradacc.Mean(y * len(x), len(x))
        elif how == "data":
            w.data = w.data * 2
        return y

    plain = torch.func.grad(lambda w, x: (x @ w).square().mean())
    for how, expected in [
        ("nothing", plain(w, X)),
        ("attribute", plain(w, X)),
        ("data", plain(w, X)),
        ("hook", 2 * plain(w, X)),
        ("hook in a micro-batch of weight 0", plain(w, torch.cat([X[:4], X[6:]]))),
    ]:
        seen.clear()
        assert_trees_close(gradacc.accumulate(loss, steps=6)(w, X, how), expected)
        assert not any(seen)
    assert not hasattr(w, "mark")


@hypothesis.given(
    st.lists(st.sampled_from(HOW), min_size=6, max_size=6),
    st.lists(st.sampled_from([*CHANGES, None]), min_size=6, max_size=6),
)
@hypothesis.settings(max_examples=40)
def test_any_sequence_of_writes_and_changes(hows, changes):
    def run():
        module = writes("nothing", -9)
        module.norm.requires_grad_(False)
        apply, params, _ = gradacc.functional(module)

        def loss(p, x):
            y, number = apply(p, x)
            return y.square().mean(), {"found": torch.full((len(x),), float(number))}

        def microbatches():
            for how, change, part in zip(hows, changes, X.split(2), strict=True):
                if change is not None:
                    CHANGES[change](module)
                module.how = how
                yield part

        return gradacc.accumulate_and_value(loss, has_aux=True)(params, microbatches())

    assert_trees_equal(run(), anew(run))
