"""Replicas that serve several micro-batches: as if every pass had its own, NOTE [replicas of a whole call]."""

import dataclasses
import weakref
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


class Scales(nn.Module):
    """A weight that is trained, and a factor from what earlier passes of this replica did, which is 1 where there were none."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=D))
        self.frozen = nn.Parameter(torch.ones((), dtype=D), requires_grad=False)
        self.number = 1

    def forward(self, x):
        return x * self.w * self.factor(x)

    def factor(self, x):
        return self.number


class FrozenData(Scales):
    def factor(self, x):
        self.frozen.data = self.frozen.data * 2
        return self.frozen / 2


class FrozenAttribute(Scales):
    def factor(self, x):
        self.frozen.number = getattr(self.frozen, "number", 0) + 1
        return self.frozen.number


class InBackward(Scales):
    def forward(self, x):
        return Notes.apply(x * self.w * self.number, self)


class Notes(torch.autograd.Function):
    """Its backward pass writes on a module."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.module.number += 1
        return grad, None


class Recomputed(Scales):
    def forward(self, x):
        return checkpoint(self.counted, x * self.w, use_reentrant=False) * self.number

    def counted(self, y):
        if torch._C._current_graph_task_id() != -1:
            self.number += 1
        return y.sin()


class Unpacked(Scales):
    def forward(self, x):
        number = self.number

        def unpack(saved):
            self.number += 1
            return saved

        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            return (x * self.w).sin() * number


class Log(list):
    number = 0


class OfAnotherList(Scales):
    def __init__(self):
        super().__init__()
        self.log = Log()

    def factor(self, x):
        self.log.number += 1
        return self.log.number


class Base:
    pass


@dataclasses.dataclass(slots=True)
class Slotted(Base):
    number: int = 0


class OfSlots(Scales):
    def __init__(self):
        super().__init__()
        self.slotted = Slotted()

    def factor(self, x):
        self.slotted.number += 1
        return self.slotted.number


class OfAnotherClass(Scales):
    def forward(self, x):
        self.__class__ = Doubles
        return x * self.w


class Doubles(Scales):
    def forward(self, x):
        return x * self.w * 2


HIDDEN = [
    *(Scales, FrozenData, FrozenAttribute, InBackward, Recomputed, Unpacked, OfAnotherList, OfSlots, OfAnotherClass),
]  # fmt: skip


@pytest.mark.parametrize("cls", HIDDEN)
def test_what_is_written_where_one_does_not_look_first(cls):
    """On frozen parameters, in the backward pass, in a checkpoint's second run, in slots and subclasses, on the class."""
    apply, params, _ = gradacc.functional(cls())
    grad_fn = gradacc.accumulate_and_value(lambda p, x: apply(p, x).sum() / len(x), steps=6)
    actual, count = made(lambda: grad_fn(params, X))
    assert_trees_equal(actual, anew(lambda: grad_fn(params, X)))
    # What is put back anyway serves all the same.
    assert count == (2 if cls in (Scales, FrozenData, FrozenAttribute) else 6)


@pytest.mark.parametrize("change", ["class", "frozen data", "buffer where there was none"])
def test_other_changes_between_micro_batches(change):
    def run():
        module = Scales()
        module.register_buffer("none", None)
        apply, params, _ = gradacc.functional(module)

        def microbatches():
            for n, part in enumerate(X.split(2)):
                yield part
                if n == 2 and change == "class":
                    module.__class__ = Doubles
                elif change == "frozen data":
                    module.frozen.data = module.frozen.data * 3
                elif n == 2 and change == "buffer where there was none":
                    module.none = torch.ones(1)

        def loss(p, x):
            return (apply(p, x) * apply(p, torch.ones((), dtype=D)).detach().mean() * 1).sum() / len(x)

        if change == "frozen data":
            module.factor = lambda x: module.frozen
        return gradacc.accumulate_and_value(loss)(params, microbatches())

    if change.startswith("buffer"):
        with pytest.raises(ValueError, match="has got other submodules, parameters or buffers"):
            run()
    else:
        assert_trees_equal(run(), anew(run))


def test_hooks_of_a_micro_batch_are_not_the_next_one_s():
    """After a micro-batch of weight 0, without a graph, and where they are registered in the backward pass."""

    def hooked(w, x, how, seen):
        seen.append(1)
        last = len(seen) == 3
        if last and how == "post":
            w.register_post_accumulate_grad_hook(lambda leaf: leaf.grad.zero_())
        if last and how == "node":
            seen.append(torch.autograd.graph.get_gradient_edge(w).node)
            seen[-1].register_prehook(lambda grads: tuple(grad * 0 for grad in grads))
        y = (x @ w).square().sum()
        if how == "in backward":
            y.register_hook(lambda grad: w.register_hook(lambda grad: grad * 2) and None)
        return gradacc.Mean(
            y * (not (last and how in ("post", "node"))), 0 if last and how in ("post", "node") else len(x)
        )

    w = torch.ones(3, dtype=D)
    plain = torch.func.grad(lambda w, x: (x @ w).square().sum() / len(x))
    for how in ("post", "node"):
        expected = plain(w, torch.cat([X[:4], X[6:]]))
        assert_trees_close(gradacc.accumulate(hooked, steps=6)(w, X, how, []), expected)
    # In a loop of `.backward()` too, a hook that is registered by then is not run in that pass; the next leaf has none.
    assert_trees_close(gradacc.accumulate(hooked, steps=6)(w, X, "in backward", []), 2 * plain(w, X))


@pytest.mark.parametrize("what", ["module", "params", "buffer"])
def test_nothing_lives_on(what):
    """A module made in the loss, parameters that are computed, a graph in a buffer."""
    alive = []
    apply, params, _ = gradacc.functional(KeepsLast(alive if what == "buffer" else []))

    def loss(p, x):
        assert not any(ref() is not None for ref in alive)
        if what == "module":
            own = nn.Linear(3, 1, dtype=D)
            alive.append(weakref.ref(own))
            inner, weights, _ = gradacc.functional(own)
            return inner({"weight": weights["weight"] * p["weight"]}, x).square().mean()
        if what == "params":
            p = {name: value * 1.5 for name, value in p.items()}
            alive.append(weakref.ref(p["weight"]))
        return apply(p, x).square().mean()

    gradacc.accumulate(loss, steps=6)(params, X)
    assert len(alive) == 6


class KeepsLast(nn.Module):
    def __init__(self, alive):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=D))
        self.note = Box(alive)
        self.register_buffer("last", None)

    def forward(self, x):
        self.last = x * self.weight
        self.note.alive.append(weakref.ref(self.last))
        return self.last * 1


class Box:
    def __init__(self, alive):
        self.alive = alive


def test_another_error_stays_what_it_is():
    """A constant with a graph, older than the micro-batch, is no memo whose graph is gone."""
    older = (torch.ones(3, dtype=D, requires_grad=True) * 2).sum()

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, error):
            ctx.error = error
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ctx.error

    for error in (RuntimeError("my own"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error), match=str(error)):
            gradacc.accumulate(lambda w, x, error=error: Raises.apply((x @ w).sum() * older, error), steps=2)(
                torch.ones(3, dtype=D), X
            )
