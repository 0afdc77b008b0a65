"""What a loss closes over: constants stay constants, and what would lose a gradient is an error that names it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradacc
from tests.helpers import assert_trees_close

D = torch.float64
X = torch.arange(12, dtype=D).view(4, 3).sin()


def made(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2, dtype=D)


def moved(params):
    """Other tensors, as an optimizer returns them."""
    return {name: param + 0.1 for name, param in params.items()}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("change", [dict, moved])
@pytest.mark.parametrize(
    "extra",
    [
        lambda m, x: sum(p.square().sum() for p in m.parameters()),
        lambda m, x: m(x).square().mean(),
        lambda m, x: sum((p * 2).sum() for p in m.state_dict(keep_vars=True).values()),
    ],
    ids=["penalty", "another pass", "keep_vars"],
)
def test_the_modules_own_parameters_beside_apply(extra, change, steps):
    module = made()
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().mean() + extra(module, x), steps=steps)
    with pytest.raises(
        ValueError, match=r"the module's own '(weight|bias)' \(of shape \(2.*\) and dtype .* beside apply"
    ):
        grad_fn(change(params), X)


def test_parameters_that_require_grad_are_no_way_around_it():
    module = made()
    apply, _, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().mean() + module.weight.sum(), steps=2)
    with pytest.raises(ValueError, match="the module's own 'weight'"):
        grad_fn(dict(module.named_parameters()), X)


def test_an_error_changes_nothing_and_the_next_call_is_right():
    module = made()
    apply, params, _ = gradacc.functional(module)
    slip = gradacc.accumulator(lambda p, x: apply(p, x).square().mean() + module.weight.sum())
    state = slip.init(params)
    with pytest.raises(ValueError, match="the module's own"):
        slip.update(state, params, X)
    assert all(p.grad is None for p in module.parameters())

    def loss(p, x):
        return apply(p, x).square().mean() + p["weight"].square().sum()

    assert_trees_close(gradacc.accumulate(loss, steps=2)(params, X), torch.func.grad(loss)(params, X))


def test_constants():
    """A teacher, a GAN's other network, own values without a graph: what torch.func.grad says of them."""
    module, teacher, other = made(0), made(1), nn.Linear(2, 1, dtype=D)
    apply, params, _ = gradacc.functional(module)
    judge, _, _ = gradacc.functional(other)
    held = {name: param.detach() + 1 for name, param in other.named_parameters()}
    losses = [
        lambda p, x: (apply(p, x) - teacher(x)).square().mean(),
        lambda p, x: other(apply(p, x)).mean(),
        lambda p, x: judge(held, apply(p, x)).mean() + other(apply(p, x)).mean(),
        lambda p, x: (
            sum((p[name] - own.detach()).square().sum() for name, own in module.named_parameters()) + apply(p, x).mean()
        ),
        lambda p, x: apply({"weight": p["weight"]}, x).mean() + module.bias.sum(),
        lambda p, x: apply({"weight": p["weight"], "bias": module.bias}, x).mean(),
    ]
    for loss in losses:
        given = moved(params)
        assert_trees_close(gradacc.accumulate(loss, steps=2)(given, X), torch.func.grad(loss)(given, X))


def test_an_argument_is_a_constant():
    module = made()
    apply, params, _ = gradacc.functional(module)

    def loss(p, x, center):
        return apply(p, x).mean() + sum((p[name] - center[name]).square().sum() for name in p)

    center, given = dict(module.named_parameters()), moved(params)
    expected = torch.func.grad(loss)(given, X, center)
    assert_trees_close(gradacc.accumulate(loss, steps=2)(given, X, center), expected)
    with torch.no_grad():
        assert_trees_close(gradacc.accumulate(loss, steps=2)(given, X, center), expected)


def test_a_proximal_term_starts_at_what_it_closes_over():
    start = torch.arange(3.0, dtype=D, requires_grad=True)

    def loss(w, x):
        return (x @ w).square().mean() + (w - start).square().sum()

    ours = gradacc.accumulate(loss, steps=2)(start, X)
    assert_trees_close(ours, torch.func.grad(loss)(start, X))
    assert ours.requires_grad


def test_the_callers_own_tensors_under_another_name():
    w = torch.ones(3, dtype=D, requires_grad=True)
    own = nn.Parameter(torch.ones(6, dtype=D))
    for given, closed, match in [
        (w.detach(), w, "made of params before this micro-batch"),
        (own.detach()[:3], own, r"an nn.Parameter \(of shape \(6,\) .* in the memory of .* leaf 0 of params"),
    ]:
        grad_fn = gradacc.accumulate(lambda p, x, c=closed: (x @ p).mean() + c.sum(), steps=2)
        with pytest.raises(ValueError, match=match):
            grad_fn(given, X)


def test_one_memory_for_several_networks():
    flat = torch.arange(9, dtype=D)
    closed = flat[3:6].requires_grad_()

    def loss(w, x):
        return ((x @ w) * (x @ closed)).mean()

    assert_trees_close(gradacc.accumulate(loss, steps=2)(flat[:3], X), torch.func.grad(loss)(flat[:3], X))


class Memo(nn.Module):
    held: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3, dtype=D))

    def forward(self, x):
        return x @ self.held.setdefault("transposed", self.weight.t())


def test_a_memo_that_outlives_its_micro_batch():
    """All micro-batches of a call have the same leaves: the gradient that flows through the memo is right."""
    apply, params, _ = gradacc.functional(Memo())
    memo = {}

    losses = [
        lambda p, x: apply(p, x).square().mean(),
        lambda p, x: (x @ memo.setdefault("w", p["weight"].t())).square().mean(),
        lambda p, x: (x @ memo.setdefault("itself", p["weight"].t().t()).t()).square().mean(),
    ]
    plain = torch.func.grad(lambda p, x: (x @ p["weight"].t()).square().mean())(params, X)
    for loss in losses:
        Memo.held.clear()
        memo.clear()
        for steps in (1, 2, 4):
            Memo.held.clear()
            memo.clear()
            assert_trees_close(gradacc.accumulate(loss, steps=steps)(params, X), plain)
        # Of another call it is a mistake.
        with pytest.raises(ValueError, match=r"what was made of params before this micro-batch \(of shape \(3, 3\)"):
            gradacc.accumulate(loss, steps=2)(params, X)


def test_a_memo_whose_graph_is_gone():
    memo = {}

    def loss(p, x):
        return (x @ memo.setdefault("w", p["weight"] @ p["weight"].t())).square().mean()

    with pytest.raises(ValueError, match=r"made of params before this micro-batch \(by MmBackward0\), and the graph"):
        gradacc.accumulate(loss, steps=2)({"weight": torch.ones(3, 3, dtype=D)}, X)
    with pytest.raises(RuntimeError, match="a mistake of its own"):
        gradacc.accumulate(lambda w, x: Raises.apply(x @ w).sum(), steps=2)(torch.ones(3, dtype=D), X)


class Raises(torch.autograd.Function):
    """A backward pass with an error."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("a mistake of its own")


def test_a_memo_from_an_earlier_call_with_other_parameters():
    memo = {}
    grad_fn = gradacc.accumulate(lambda w, x: (x @ memo.setdefault("w", w * 2)).square().mean() + w.sum(), steps=1)
    w = torch.ones(3, dtype=D)
    w = w - grad_fn(w, X)
    with pytest.raises(ValueError, match="before this micro-batch"):
        grad_fn(w, X)


def test_a_copy_that_the_loss_makes_is_a_constant():
    def loss(w, x):
        other = copy.deepcopy(w)
        return (x @ w).mean() + (x @ other).square().mean()

    w = torch.ones(3, dtype=D)
    expected = torch.func.grad(lambda w, x: (x @ w).mean())(w, X)
    assert_trees_close(gradacc.accumulate(loss, steps=2)(w, X), expected)


class Box:
    pass


class Reaches(nn.Module):
    """In ways that no look at its tensors' uses sees."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=D)
        self.box = Box()
        self.box.linear, self.box.view = self.linear, self.linear.weight.t()

    def forward(self, x):
        return F.linear(x, self.way(), self.linear.bias)


class ByThread(Reaches):
    def way(self):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(lambda: self.box.linear.weight * 1).result()


class ByView(Reaches):
    def way(self):
        return self.box.view.t()


class ByAnotherClass(Reaches):
    def way(self):
        return self.box.linear.weight.as_subclass(torch.Tensor) * 1


class WithoutDispatch(Reaches):
    def way(self):
        with torch._C.DisableTorchFunctionSubclass():
            return self.box.linear.weight * 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.detach() * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class ByFunction(Reaches):
    def way(self):
        return Doubled.apply(self.box.linear.weight)


@pytest.mark.parametrize("cls", [ByThread, ByView, ByAnotherClass, WithoutDispatch, ByFunction])
def test_forward_passes_that_reach_the_modules_own_parameters(cls):
    apply, params, _ = gradacc.functional(cls())
    with pytest.raises(ValueError, match=r"own (parameter or buffer )?'linear\.weight'"):
        gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=2)(moved(params), X)
