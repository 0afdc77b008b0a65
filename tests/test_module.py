"""`functional`: equal to the module, never changing it, also where it is run again during the backward pass."""

import copy
import functools
from collections import OrderedDict, defaultdict, deque
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint

D = torch.float64


class Checkpointed(nn.Module):
    def __init__(self, recompute=True):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)
        self.recompute = recompute

    def block(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


class Held(nn.Module):
    """Reaches its parts through a list, a dict, a bound method and a plain attribute too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.order = [self.b, self.a]
        self.named = {"weights": (self.a.weight, self.b.bias)}
        self.act = self.activate
        self.gate = nn.Parameter(torch.ones(3))

    def activate(self, x):
        return torch.tanh(x * self.gate)

    def forward(self, x):
        for layer in self.order:
            x = self.act(layer(x))
        weight, bias = self.named["weights"]
        return x @ weight + bias


class Ordered(nn.Module):
    """And through other containers, partials, hooks and patched methods."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.by_name = OrderedDict(first=self.a)
        self.rest = defaultdict(list, {"more": [self.b]})
        self.queue = deque([self.a])
        self.pair = Pair(self.b, self.a)
        self.act = functools.partial(self.scaled, factor=2.0)
        self.gate = nn.Parameter(torch.ones(3))
        self.seen = None
        self.a.register_forward_hook(self.save)
        self.b.register_forward_pre_hook(functools.partial(Ordered.shift, self))

    def scaled(self, x, factor):
        return torch.tanh(x * self.gate * factor)

    def save(self, module, args, output):
        self.seen = output

    def shift(self, module, args):
        return (args[0] + self.gate,)

    def forward(self, x):
        x = self.act(self.by_name["first"](x))
        x = self.rest["more"][0](x) + self.seen
        return self.pair.first(self.queue[0](x)) + self.pair.second(x)


class Pair(NamedTuple):
    first: nn.Module
    second: nn.Module


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.same = nn.ModuleList([nn.Linear(4, 4)] * 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.same:
            x = layer(x)
        return self.head(x)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("missing", None)
        self.register_buffer("absent", None)
        self.nothing = None
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        assert self.missing is None
        assert self.absent is None
        return self.linear(x)


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))


X = torch.arange(12, dtype=D).view(4, 3).sin()
MODULES = {
    "linear": (lambda: nn.Linear(3, 2), X),
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), X),
    "checkpointed": (Checkpointed, X),
    "held": (Held, X),
    "ordered": (Ordered, X),
    "tied": (Tied, torch.tensor([[0, 1, 6], [2, 2, 3], [4, 5, 0], [1, 1, 1]])),
    "unused": (Unused, X),
    "parametrized": (parametrized, X),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), X),
    "LSTM": (lambda: nn.LSTM(3, 2, num_layers=2, batch_first=True), X[:, None]),
    "attention": (lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True), X[:, None]),
    "parameter list": (lambda: WithLists(), X),
    "graph module": (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh())), X),
}


class WithLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 3)])
        self.by_name = nn.ParameterDict({"out": torch.randn(3, 1)})

    def forward(self, x):
        for w in self.ws:
            x = torch.tanh(x @ w)
        return x @ self.by_name["out"]


def build(name):
    torch.manual_seed(0)
    make, x = MODULES[name]
    return make().double(), x


def summed(output):
    return (output[0] if isinstance(output, tuple) else output).square().sum()


@pytest.mark.parametrize("name", MODULES)
def test_apply_is_the_module_with_these_parameters(name):
    module, x = build(name)
    apply, params, _buffers = gradacc.functional(module)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(params.values(), module.parameters(), strict=True))
    assert not any(p.requires_grad for p in params.values())
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5).add_(0.1)
    state = fingerprint(dict(module.state_dict()))
    scaled = {name: p.detach() * 1.5 + 0.1 for name, p in params.items()}
    output = apply(scaled, x)
    assert fingerprint(dict(module.state_dict())) == state
    expected = other(x)  # after, since this one updates its buffers
    assert_trees_equal(summed(output), summed(expected))


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_the_modules_own(name):
    module, x = build(name)
    apply, params, _ = gradacc.functional(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    scaled = {name: p * 1.5 for name, p in params.items()}
    steps = 1 if name == "batch norm" else 3
    grads = gradacc.accumulate(lambda p, x: summed(apply(p, x)), steps=steps, reduction="sum")(scaled, x)
    summed(other(x)).backward()
    assert_trees_close(grads, {name: p.grad for name, p in other.named_parameters()})
    assert all(p.grad is None for p in module.parameters())


def test_recomputation_sees_the_given_parameters_where_functional_call_does_not():
    torch.manual_seed(0)
    module = Checkpointed().double()
    apply, params, _ = gradacc.functional(module)
    doubled = {name: 2 * p for name, p in params.items()}
    plain, _, _ = gradacc.functional(Checkpointed(recompute=False).double())
    expected = torch.func.grad(lambda p: plain(p, X).square().sum())(doubled)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=2, reduction="sum")(doubled, X)
    assert_trees_close(grads, expected)
    # Why there are replicas: torch's functional_call is silently wrong here. If this fails, torch has changed.
    leaves = {name: p.detach().requires_grad_() for name, p in doubled.items()}
    torch.func.functional_call(module, leaves, (X,)).square().sum().backward()
    assert not torch.allclose(leaves["first.weight"].grad, expected["first.weight"])


def test_running_statistics_are_dropped_unless_asked_for():
    module, x = build("batch norm")
    apply, params, buffers = gradacc.functional(module)
    before = fingerprint((buffers, dict(module.state_dict())))
    apply(params, x)
    _output, updated = apply(params, x, buffers=buffers)
    assert fingerprint((buffers, dict(module.state_dict()))) == before
    _again, twice = apply(params, x, buffers=updated)
    reference = copy.deepcopy(module)
    reference(x)
    assert_trees_equal(updated, dict(reference.named_buffers()))
    reference(x)
    assert_trees_equal(twice, dict(reference.named_buffers()))
    module.eval()  # the mode at the time of the call
    assert_trees_close(apply(params, x, buffers=updated)[0], F.batch_norm(
        F.linear(x, params["0.weight"], params["0.bias"]), updated["1.running_mean"], updated["1.running_var"],
        params["1.weight"], params["1.bias"]))  # fmt: skip


def test_left_out_parameters_are_the_modules_as_constants():
    module, x = build("sequential")
    apply, params, _ = gradacc.functional(module)
    trainable = {"2.weight": params["2.weight"]}
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=2)(trainable, x)
    expected = torch.func.grad(lambda p: apply(p, x).square().mean())(params)
    assert_trees_close(grads, {"2.weight": expected["2.weight"]})
    with torch.no_grad():
        module[0].weight.mul_(2)  # as they are at the time of the call
    assert_trees_equal(apply(trainable, x), module(x))


def test_vmap_over_an_ensemble():
    module, x = build("sequential")
    apply, params, _ = gradacc.functional(module)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    outputs = torch.func.vmap(apply, (0, None))(stacked, x)
    assert_trees_close(outputs[0], module(x))


def test_traced_by_dynamo():
    module, x = build("batch norm")
    apply, params, buffers = gradacc.functional(module)
    state = fingerprint(dict(module.state_dict()))
    compiled = torch.compile(lambda p, b, x: apply(p, x, buffers=b), backend="eager", fullgraph=True)
    actual, expected = compiled(params, buffers, x), apply(params, x, buffers=buffers)
    assert_trees_close(actual[0], expected[0])
    assert_trees_close(actual[1], expected[1])
    assert fingerprint(dict(module.state_dict())) == state


def test_bad_input():
    with pytest.raises(TypeError, match="expected an nn.Module, got function"):
        gradacc.functional(lambda x: x)
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    with pytest.raises(TypeError, match="the module is compiled.*compile a function that calls apply"):
        gradacc.functional(compiled)
    inside = nn.Sequential(nn.Linear(1, 1))
    inside[0].compile(backend="eager")
    with pytest.raises(TypeError, match="module '0' is compiled"):
        gradacc.functional(inside)
    apply, params, _buffers = gradacc.functional(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"params has \['wieght'\], which the module does not have.*'weight', 'bias'"):
        apply({"wieght": params["weight"]}, torch.ones(1, 1))
    many, _, _ = gradacc.functional(nn.Sequential(*(nn.Linear(1, 1) for _ in range(9))))
    with pytest.raises(ValueError, match=r"does not have; it has \['0.weight', .*'3.bias'\] and 10 more$"):
        many({"w": torch.ones(1)}, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"buffers has \['mean'\]"):
        apply(params, torch.ones(1, 1), buffers={"mean": torch.ones(1)})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # what it is tested with
def test_scripted_modules_are_refused():
    with pytest.raises(TypeError, match="scripted"):
        gradacc.functional(torch.jit.script(nn.Linear(1, 1)))


class Habits(nn.Module):
    """What forward passes leave behind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.losses, self.cache = [], {}
        self.count = torch.zeros(())
        self.register_buffer("previous", torch.zeros(3))
        self.register_buffer("spare", torch.zeros(3))

    def forward(self, x):
        x = self.linear(x)
        self.losses.append(x.sum())
        self.cache["x"] = x
        self.count += 1
        self.spare = None
        self.previous = x.detach().mean(0)
        return x + sum(self.losses)


def test_what_a_forward_pass_leaves_behind_stays_off_the_module():
    module = Habits().double()
    apply, params, buffers = gradacc.functional(module)
    for _ in range(2):
        output, after = apply(params, X, buffers=buffers)
    assert (module.losses, module.cache, module.count.item()) == ([], {}, 0)
    assert module.previous.tolist() == [0, 0, 0]
    assert list(after) == ["previous"]
    torch.testing.assert_close(after["previous"], module.linear(X).mean(0).detach())
    torch.testing.assert_close(output, module.linear(X) + module.linear(X).sum())


def test_an_embedding_that_renormalises_itself_changes_a_copy():
    module = nn.Embedding(4, 2, max_norm=0.1).double()
    apply, params, _ = gradacc.functional(module)
    before = fingerprint(params)
    output = apply(params, torch.tensor([0, 3]))
    assert fingerprint(params) == before
    assert (output.norm(dim=1) <= 0.1 + 1e-6).all()


def test_gradients_with_respect_to_buffers():
    apply, params, buffers = gradacc.functional(Shifted())
    grads = torch.func.grad(lambda shift: apply(params, X, buffers=buffers | {"shift": shift})[0].sum())(X[0])
    torch.testing.assert_close(grads, torch.full((3,), 4.0, dtype=D))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(3, dtype=D))

    def forward(self, x):
        return x + self.shift


def partly_frozen():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    module[0].requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return module


def test_frozen_parameters_are_not_parameters():
    module = partly_frozen()
    apply, params, buffers = gradacc.functional(module)
    assert list(params) == ["1.weight", "1.bias", "2.weight"]
    assert len(buffers) == 3
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=1, reduction="sum")(params, X)
    reference = copy.deepcopy(module)
    reference(X).square().sum().backward()
    assert_trees_close(grads, {name: p.grad for name, p in reference.named_parameters() if p.requires_grad})
    with torch.no_grad():
        module[0].weight.mul_(2)  # as it is at the time of the call
    reference = copy.deepcopy(module)
    assert_trees_equal(apply(params, X), reference(X))
    assert_trees_equal(apply({}, X), copy.deepcopy(module)(X))
    doubled = {"0.weight": 2 * module[0].weight.detach()}  # a frozen one may be given
    with torch.no_grad():
        reference[0].weight.mul_(2)
    assert_trees_equal(apply(doubled, X), reference(X))


def test_tied_parameters_are_frozen_together():
    module = Tied()
    module.head.weight.requires_grad_(False)
    assert "embed.weight" not in gradacc.functional(module)[1]
    module.embed.weight.requires_grad_(True)
    assert "embed.weight" in gradacc.functional(module)[1]


def test_integer_parameters_are_constants():
    module = nn.Sequential(nn.Linear(3, 2), nn.Module()).double()
    module[1].register_parameter("codes", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    module[1].forward = lambda x: x * module[1].codes
    apply, params, _ = gradacc.functional(module)
    assert list(params) == ["0.weight", "0.bias"]
    torch.testing.assert_close(apply(params, X), module(X))


def test_a_module_that_is_frozen_as_a_whole():
    module = partly_frozen().requires_grad_(False).eval()
    apply, params, _ = gradacc.functional(module)
    assert params == {}
    assert_trees_equal(apply(params, X), module(X))
    with pytest.raises(ValueError, match="params holds no tensor: there is nothing to differentiate.*frozen"):
        gradacc.accumulate(lambda p, x: apply(p, x).sum(), steps=2)(params, X)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_an_error(register):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    apply, params, _ = gradacc.functional(module)
    handle = getattr(module[1].weight, register)(lambda grad: None)
    with pytest.raises(ValueError, match="functional: '1.weight' of the module: hooks on parameters.*do not run.*mask"):
        gradacc.functional(module)
    with pytest.raises(ValueError, match="apply: '1.weight' of the module: hooks"):  # registered since
        apply(params, X)
    module[1].weight.requires_grad_(False)  # it gets no gradient, so there is nothing that the hook would do
    gradacc.functional(module)
    module[1].weight.requires_grad_(True)
    handle.remove()
    gradacc.functional(module)
    apply(params, X)


def test_what_a_hook_on_a_parameter_did_is_done_to_the_gradients_or_in_the_forward_pass():
    module = nn.Linear(3, 2).double()
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=D)
    reference = copy.deepcopy(module)
    reference.weight.register_hook(lambda grad: grad * mask)
    reference(X).square().sum().backward()
    apply, params, _ = gradacc.functional(module)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=2, reduction="sum")(params, X)
    grads["weight"] *= mask
    assert_trees_close(grads, {"weight": reference.weight.grad, "bias": reference.bias.grad})


def test_hooks_of_modules_run_with_the_gradients():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    module[1].register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    reference = copy.deepcopy(module)
    reference(X).square().sum().backward()
    apply, params, _ = gradacc.functional(module)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=2, reduction="sum")(params, X)
    assert_trees_close(grads, {name: param.grad for name, param in reference.named_parameters()})


def test_apply_without_a_dict_of_parameters():
    module = nn.Linear(3, 2)
    apply, params, _ = gradacc.functional(module)
    for arguments in ((list(module.parameters()), torch.ones(1, 3)), (torch.ones(1, 3),)):
        with pytest.raises(
            TypeError, match="params must be a dict from names to tensors, as functional returns it, got"
        ):
            apply(*arguments)
    with pytest.raises(TypeError, match="buffers must be a dict"):
        apply(params, torch.ones(1, 3), buffers=[])


def test_under_a_cache_of_parametrizations():
    """It goes by ``id``, and outlives a micro-batch's replica."""

    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).mT

    module, x = nn.Linear(3, 3, dtype=torch.float64), torch.arange(12, dtype=torch.float64).view(4, 3).sin()
    nn.utils.parametrize.register_parametrization(module, "weight", Symmetric())
    apply, params, _ = gradacc.functional(module)
    params = {name: param + 0.1 for name, param in params.items()}

    def loss(p, x):
        return apply(p, x).square().mean() + apply(p, 2 * x).square().mean()

    expected = gradacc.accumulate(loss, steps=2)(params, x)
    with nn.utils.parametrize.cached():
        assert_trees_close(gradacc.accumulate(loss, steps=2)(params, x), expected)
        module(x)
        assert_trees_close(gradacc.accumulate(loss, steps=2)(params, x), expected)


class Steps(nn.Module):
    """A module as Lightning's are: the loss is a method beside forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x))

    def training_step(self, batch, *, scale=1.0):
        return (self(batch["x"]) - batch["y"]).square().mean() * scale


@pytest.mark.parametrize("compiled", [False, True])
def test_another_method_than_forward(compiled):
    module = Steps().eval()
    batch = {"x": torch.randn(6, 3), "y": torch.randn(6, 2)}
    apply, params, buffers = gradacc.functional(module, method="training_step")
    grad_fn = gradacc.accumulate(lambda p, b: apply(p, b, scale=2.0), steps=3)
    if compiled:
        grad_fn = torch.compile(grad_fn, backend="aot_eager", fullgraph=True)
    grads = grad_fn(params, batch)
    module.training_step(batch, scale=2.0).backward()
    assert_trees_close(grads, {name: param.grad for name, param in module.named_parameters()}, rtol=1e-5, atol=1e-6)
    module.train()
    _, updated = apply(params, batch, buffers=buffers)
    assert updated["norm.num_batches_tracked"] == 1
    assert module.norm.num_batches_tracked == 0


def test_hooks_run_around_forward_inside_of_another_method():
    module, seen = Steps(), []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.linear.register_forward_hook(lambda *_: seen.append("linear"))
    apply, params, _ = gradacc.functional(module, method="training_step")
    apply(params, {"x": torch.ones(2, 3), "y": torch.ones(2, 2)})
    assert seen == ["linear", "forward"]


@pytest.mark.parametrize("method", ["trainingstep", "norm2", None, 3, "training"], ids=str)
def test_no_such_method(method):
    with pytest.raises(
        TypeError, match=f"functional: method must be the name of a method of the Steps, got {method!r}"
    ):
        gradacc.functional(Steps(), method=method)
