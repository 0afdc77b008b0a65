"""The module's own tensors where others were given: the right result or an error, in every call and under every transform."""

import copy
import threading
import types

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, fingerprint

D = torch.float64
X = torch.arange(12, dtype=D).view(4, 3).sin()
HERE = {}
"""A way to a module that nobody can list."""


class Reaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=D)
        HERE["module"] = self

    def forward(self, x):
        return self.linear(x) + self.way(x)


class ByGlobal(Reaches):
    def way(self, x):
        return HERE["module"].linear.weight.sum()


class ByGlobalModule(Reaches):
    def way(self, x):
        return HERE["module"].linear(x)


class ByClassAttribute(Reaches):
    held = None

    def __init__(self):
        super().__init__()
        ByClassAttribute.held = (self.linear.bias,)

    def way(self, x):
        return torch.cat([x[0], self.held[0]]).sum()


class ByObject(Reaches):
    class Helper:
        pass

    def __init__(self):
        super().__init__()
        self.helper = self.Helper()
        self.helper.layer = self.linear

    def way(self, x):
        return self.helper.layer.weight[0]


class ByHookObject(Reaches):
    class Hook:
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, module, args, output):
            return output * self.layer.bias

    def __init__(self):
        super().__init__()
        self.linear.register_forward_hook(self.Hook(self.linear))

    def way(self, x):
        return 0


class ByOwnView(Reaches):
    """A part of a parameter, taken in ``__init__``."""

    def __init__(self):
        super().__init__()
        self.half = self.linear.weight[:2]

    def way(self, x):
        return self.half.sum()


class ByDetachedView(Reaches):
    def __init__(self):
        super().__init__()
        self.parts = {"half": self.linear.weight.detach()[:2]}

    def way(self, x):
        return self.parts["half"].sum()


class ByBuffer(Reaches):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(3))

    def way(self, x):
        return HERE["module"].shift


WAYS = [ByGlobal, ByGlobalModule, ByClassAttribute, ByObject, ByHookObject, ByOwnView, ByDetachedView]


def made(make):
    torch.manual_seed(0)
    return make()


def other(module):
    return {name: param.detach() * 2 for name, param in module.named_parameters()}


CALLS = {
    "accumulate": lambda apply, p: gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=2)(p, X),
    "no grad": lambda apply, p: torch.no_grad()(apply)(p, X),
    "vmap": lambda apply, p: torch.func.vmap(apply, (None, 0))(p, X),
    "ensemble": lambda apply, p: torch.func.vmap(apply, (0, None))({n: torch.stack([t, t]) for n, t in p.items()}, X),
    "grad": lambda apply, p: torch.func.grad(lambda p: apply(p, X).sum())(p),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("make", WAYS)
def test_an_own_parameter_is_an_error(make, frozen, call):
    module = made(make)
    module.requires_grad_(not frozen)
    classes = [type(param) for param in module.parameters()]
    state = fingerprint(dict(module.state_dict()))
    apply, _, _ = gradacc.functional(module)
    with pytest.raises(
        ValueError, match="apply: the module used, in .*own parameter or buffer 'linear.(weight|bias)'.*given"
    ):
        CALLS[call](apply, other(module))
    assert [type(param) for param in module.parameters()] == classes
    assert fingerprint(dict(module.state_dict())) == state


def test_a_buffer_that_was_given_too():
    module = made(ByBuffer)
    apply, params, buffers = gradacc.functional(module)
    apply(params, X)  # its own
    with pytest.raises(ValueError, match="own parameter or buffer 'shift'"):
        apply(params, X, buffers={"shift": torch.zeros(3)})
    assert list(buffers) == ["shift"]


def test_a_way_that_is_first_taken_in_a_later_call():
    class Late(ByGlobal):
        def way(self, x):
            return super().way(x) if x.sum() > 10 else 0

    module = made(Late)
    apply, params, _ = gradacc.functional(module)
    for x in (X, X):
        apply(params, x)
    with pytest.raises(ValueError, match="own parameter"):
        apply(params, X + 10)
    apply(params, X)


@pytest.mark.parametrize("make", WAYS)
def test_what_is_given_may_be_the_modules_own(make):
    module = made(make)
    apply, _, _ = gradacc.functional(module)
    output = apply(dict(module.named_parameters()), X)
    torch.testing.assert_close(output, module(X))
    torch.testing.assert_close(apply({}, X), module(X))  # left out: the module's, as constants


class Legitimate(nn.Module):
    """Own parameters used as one may."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.tied = nn.Linear(3, 3)
        self.tied.bias = self.linear.bias
        self.register_buffer("average", torch.zeros(3))
        HERE["legitimate"] = self

    def forward(self, x):
        own = HERE["legitimate"].tied.weight
        x = x.to(own.dtype).to(own) + torch.zeros_like(own)[0] + own.new_ones(own.shape[1]) * own.ndim
        assert own.requires_grad
        assert isinstance(own, nn.Parameter)
        with torch.no_grad():
            self.average.lerp_(self.tied.bias.detach(), 0.5)
        return self.tied(self.linear(x)) + self.average + (own.device == x.device) * len(own)


def test_what_does_not_depend_on_values_is_not_refused():
    module = Legitimate().double()
    apply, params, _ = gradacc.functional(module)
    reference = copy.deepcopy(module)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=1, reduction="sum")(params, X)
    reference(X).square().sum().backward()
    assert_trees_close(grads, {name: param.grad for name, param in reference.named_parameters()})


class OldState(nn.Module):
    """What the module itself computed in an earlier pass, used as a constant, or written before it is read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.previous = torch.zeros(3)
        self.weight = self.linear.weight * 2  # as the old weight_norm left it: recomputed before each use

    def forward(self, x):
        x = self.linear(x) + self.previous.detach()
        self.weight = self.linear.weight * 2
        self.previous = (x @ self.weight).mean(0)
        return x


def test_state_that_the_module_computed_is_a_constant():
    module = OldState().double()
    apply, _, _ = gradacc.functional(module)
    module(X)
    assert module.previous.requires_grad
    before = fingerprint(dict(module.state_dict()))
    given = other(module)
    expected = X @ given["linear.weight"].T + given["linear.bias"] + module.previous.detach()
    torch.testing.assert_close(apply(given, X), expected)
    assert fingerprint(dict(module.state_dict())) == before


def test_another_thread_may_run_the_module_meanwhile():
    module = made(ByBuffer)
    module.way = types.MethodType(lambda self, x: 0, module)
    entered, done = threading.Event(), threading.Event()

    def wait(module, args, output):
        if threading.current_thread() is runner:
            entered.set()
            assert done.wait(60)

    module.linear.register_forward_hook(wait)
    apply, params, _ = gradacc.functional(module)
    results = []
    runner = threading.Thread(target=lambda: results.append(apply(params, X)))
    runner.start()
    assert entered.wait(60)
    expected = module(X)
    expected.sum().backward()
    inside = apply(params, X)
    done.set()
    runner.join()
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(inside, expected)
    assert {type(param) for param in module.parameters()} == {nn.Parameter}


def test_a_copy_made_meanwhile_by_another_thread():
    """It is of the class that the tensors have else, and can be used as the module itself."""
    made = []

    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=D)

        def forward(self, x):
            thread = threading.Thread(target=lambda: made.append(copy.deepcopy(module)))
            thread.start()
            thread.join()
            return self.linear(x)

    module = Copied()
    apply, params, _ = gradacc.functional(module)
    apply(params, X)
    (other,) = made
    assert type(other.linear.weight) is nn.Parameter
    assert type(module.linear.weight) is nn.Parameter
    again, params, _ = gradacc.functional(other)
    assert_trees_close(again(params, X), module(X))
