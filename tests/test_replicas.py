"""What a forward pass may write belongs to the replica, and what leads to the module's parameters leads to the given ones."""

import dataclasses
import functools
import gc
import threading
import types
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint

D = torch.float64
X = torch.arange(12, dtype=D).view(4, 3).sin()


@dataclasses.dataclass
class Record:
    values: list
    count: int = 0


@dataclasses.dataclass(slots=True)
class Slotted:
    values: list


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=D)


class NestedLists(Base):
    def __init__(self):
        super().__init__()
        self.seen = {"a": [[]], "b": (deque(), {1})}
        self.same = self.seen["a"]

    def forward(self, x):
        self.seen["a"][0].append(2.0)
        self.seen["b"][0].append(3.0)
        self.seen["b"][1].add(len(self.seen["b"][1]) + 1)
        assert self.same is self.seen["a"]
        return self.linear(x) * len(self.same[0]) * len(self.seen["b"][0]) * len(self.seen["b"][1])


class TensorsInContainers(Base):
    def __init__(self):
        super().__init__()
        self.sums = OrderedDict(total=torch.zeros(3), more=[torch.ones(())])

    def forward(self, x):
        x = self.linear(x)
        self.sums["total"] += x.detach().sum(0)
        self.sums["more"][0].mul_(2)
        return x * self.sums["total"] * self.sums["more"][0]


class Records(Base):
    def __init__(self):
        super().__init__()
        self.record = Record([])
        self.slotted = Slotted([])
        self.space = types.SimpleNamespace(inner=defaultdict(list))

    def forward(self, x):
        self.record.count += 1
        self.record.values.append(1)
        self.slotted.values.append(1)
        self.space.inner["x"].append(1)
        self.space.more = 1
        n = self.record.count + len(self.record.values) + len(self.slotted.values) + len(self.space.inner["x"])
        return self.linear(x) * n


class ParameterAttributes(Base):
    """A library marked the parameter; the forward pass reads the mark and writes to it."""

    def __init__(self):
        super().__init__()
        self.linear.weight.scale = 3.0
        self.linear.weight.calls = []
        self.linear.register_buffer("shift", torch.ones(3, dtype=D))
        self.linear.shift.factor = -1.0

    def forward(self, x):
        weight = self.linear.weight
        weight.calls.append(1)
        weight.scale += 1
        return (self.linear(x) + self.linear.shift * self.linear.shift.factor) * weight.scale * len(weight.calls)


class LazyHooks(Base):
    """As transformers does: hooks at the first forward pass, and an attribute that says so."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=D)

    def forward(self, x):
        if not getattr(self, "_installed", False):
            self.linear.register_forward_hook(lambda module, args, output: output * 2)
            self.linear.register_forward_pre_hook(
                lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
            )
            self.linear.register_forward_hook(lambda module, args, output: None, always_call=True)
            self.linear.register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
            self.linear.register_full_backward_pre_hook(lambda module, out: (out[0] * 5,))
            self.linear.register_state_dict_pre_hook(lambda *args: None)
            self.linear.register_load_state_dict_post_hook(lambda *args: None)
            self._installed = True
        return self.linear(self.first(x))


class LazyParts(Base):
    """Registries: buffers, also non-persistent ones, and submodules made by the first forward pass."""

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.full((3,), 2.0, dtype=x.dtype), persistent=False)
            self.act = nn.Tanh()
        self.scale.add_(1)
        return self.act(self.linear(x)) * self.scale


class RemovesItsHook(Base):
    def __init__(self):
        super().__init__()
        self.handle = self.linear.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x):
        x = self.linear(x)
        self.handle.remove()
        return self.linear(x)


class KeyedByModule(Base):
    def __init__(self):
        super().__init__()
        self.scales, self.order = {self.linear: 2.0}, {self.linear}

    def forward(self, x):
        for module in self.order:
            x = module(x) * self.scales[module]
        return x


WRITERS = [
    NestedLists, TensorsInContainers, Records, ParameterAttributes, LazyHooks, LazyParts, RemovesItsHook, KeyedByModule,
]  # fmt: skip


def plain(value, depth=0):
    """A value as data that two moments can be compared by."""
    if isinstance(value, torch.Tensor):
        marks = {key: plain(item) for key, item in vars(value).items() if not key.startswith("_dynamo_")}
        return fingerprint(value.detach()), marks
    if isinstance(value, nn.Module):
        return type(value), {key: plain(item) for key, item in vars(value).items()} if depth == 0 else id(value)
    if isinstance(value, dict):
        return type(value), [(plain(key, 1), plain(item, 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque, set)):
        return type(value), [plain(item, 1) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return type(value), [plain(item) for item in vars(value).values()] if isinstance(
        value, types.SimpleNamespace
    ) else value


def everything(module):
    return {name: plain(part) for name, part in module.named_modules()}


def anew(make):
    """A module that has not run before."""
    torch.manual_seed(0)
    return make()


def by_hand(make, x, parts):
    """The large batch's gradient: each micro-batch by a module that has not run before."""
    grads = []
    for part in x.tensor_split(parts):
        fresh = anew(make)
        fresh(part).square().sum().backward()
        grads.append({name: param.grad for name, param in fresh.named_parameters()})
    return {name: sum(grad[name] for grad in grads) for name in grads[0]}


@pytest.mark.parametrize("make", WRITERS)
def test_what_a_forward_pass_writes_is_the_replicas(make):
    module = anew(make)
    before = everything(module)
    apply, params, _ = gradacc.functional(module)
    expected = by_hand(make, X, 4)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=4, reduction="sum")
    for _ in range(3):
        assert_trees_close(grad_fn(params, X), expected)
    assert everything(module) == before
    with torch.no_grad():
        assert_trees_equal(apply(params, X), anew(make)(X))
    assert everything(module) == before
    assert not any(vars(param) for param in params.values())


@pytest.mark.parametrize("make", [make for make in WRITERS if make is not LazyParts])
def test_a_replica_begins_with_what_the_module_has_written(make):
    module, reference = anew(make), anew(make)
    apply, params, _ = gradacc.functional(module)
    with torch.no_grad():
        assert_trees_equal(module(X), reference(X))
        actual = apply(params, X, buffers={})[0]
        assert_trees_equal(actual, reference(X))


def test_containers_and_hooks_that_come_later_are_seen():
    module = Base()
    module.forward = types.MethodType(lambda self, x: self.linear(x) * (1 + len(getattr(self, "late", []))), module)
    apply, params, _ = gradacc.functional(module)
    module.late = [1.0]
    handle = module.linear.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(apply(params, X), module(X))
    handle.remove()
    torch.testing.assert_close(apply(params, X), module(X))


def test_parts_that_come_later_are_an_error():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    apply, params, _ = gradacc.functional(module)
    module[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=D))  # the same part anew: seen
    torch.testing.assert_close(apply({}, X), module(X))
    lazy = anew(LazyParts)
    late, values, _ = gradacc.functional(lazy)
    lazy(X)
    with pytest.raises(ValueError, match="a LazyParts of the module has got other submodules.*call it again"):
        late(values, X)
    module[1] = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="a Sequential of the module has got other submodules.*call it again"):
        apply(params, X)


def test_hundreds_of_calls_leave_nothing():
    module = LazyHooks()
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=4)

    def objects():
        gc.collect()
        return len(gc.get_objects())

    first = grad_fn(params, X)
    before = objects()
    for _ in range(100):
        last = grad_fn(params, X)
    assert objects() - before < 100
    assert_trees_equal(first, last)
    assert not any(hooks for hooks in vars(module.linear).values() if isinstance(hooks, OrderedDict))


def test_what_a_hook_holds_of_the_callers_is_the_callers():
    module = Base()
    module.forward = types.MethodType(lambda self, x: self.linear(x), module)
    seen, calls = {}, []
    module.linear.register_forward_hook(lambda module, args, output: seen.update(x=output))
    module.linear.register_forward_hook(
        functools.partial(lambda store, module, args, output: store.append(output), calls)
    )
    apply, params, _ = gradacc.functional(module)
    output = apply(params, X)
    assert seen["x"] is output
    assert calls == [output]


class Wrapped(nn.Module):
    """Ways through callables: a wrapped forward, closures of hooks, defaults, a function in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        inner, first, weights = self.forward, self.a, [self.b.weight]
        self.calls = 0

        def forward(x):
            return inner(x) * 2

        self.forward = forward
        self.steps = [lambda x, layer=self.b: layer(x), functools.partial(torch.add, self.a.bias)]
        self.b.register_forward_pre_hook(lambda _, args: (first(args[0]) @ weights[0],))
        self.a.register_forward_hook(lambda module, args, output, *, gate=self.b.bias: output * gate)

    def forward(self, x):
        self.calls += 1
        for step in self.steps:
            x = step(x)
        return x * self.calls


def test_callables_lead_to_the_given_parameters():
    module = Wrapped().double()
    apply, params, _ = gradacc.functional(module)
    leaves = list(module.parameters())
    expected = torch.autograd.grad(module(X).square().sum(), leaves)
    module.calls = 0
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
            leaf.requires_grad_(False)
    given = dict(zip(params, (leaf.detach().clone() for leaf in leaves), strict=True))
    torch.manual_seed(0)
    given = {name: torch.randn_like(leaf) for name, leaf in given.items()}
    other = Wrapped().double()
    other.load_state_dict(given)
    expected = torch.autograd.grad(other(X).square().sum(), list(other.parameters()))
    for steps in (1, 3):
        grads = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=steps, reduction="sum")(given, X)
        assert_trees_close(grads, dict(zip(params, expected, strict=True)))
    assert_trees_close(torch.func.vmap(apply, (None, 0))(given, X), other(X) / 2)
    assert module.calls == 0


def test_threads_have_replicas_of_their_own():
    module = NestedLists()
    apply, params, _ = gradacc.functional(module)
    expected = apply(params, X)
    results = []
    threads = [threading.Thread(target=lambda: results.extend(apply(params, X) for _ in range(50))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 150
    assert all(torch.equal(result, expected) for result in results)
    assert module.same == [[]]


def test_slots():
    class Slotted(nn.Module):
        __slots__ = ("empty", "factor", "seen")

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            object.__setattr__(self, "factor", 3.0)
            object.__setattr__(self, "seen", [])

        def forward(self, x):
            self.seen.append(1)
            return self.linear(x) * self.factor

    module = Slotted()
    apply, params, _ = gradacc.functional(module)
    x = torch.ones(2, 3)
    output = apply(params, x)
    assert module.seen == []
    assert torch.equal(output, module(x))


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # of torch, about itself, in export
def test_an_exported_module():
    """Its replica is made by a method of its own, which copies submodules."""
    torch.manual_seed(0)
    inner, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=D)
    module = torch.export.export(inner, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    apply, params, _ = gradacc.functional(module)
    expected = torch.func.grad(lambda p: torch.func.functional_call(inner, p, (x,)).square().mean())(params)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=2)(params, x)
    assert_trees_close(grads, expected)
