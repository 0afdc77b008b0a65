"""A module that is compiled: the eager result, or an error; and nothing stays on the module."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchRuntimeError, Unsupported

import gradacc
from tests import models
from tests.helpers import assert_trees_close, some_slow
from tests.test_replicas import (
    Base,
    KeyedByModule,
    LazyHooks,
    LazyParts,
    NestedLists,
    Records,
    RemovesItsHook,
    TensorsInContainers,
    anew,
    everything,
)

D = torch.float64
X = torch.arange(12, dtype=D).view(4, 3).sin()


class Counts(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Keeps(Base):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        x = self.linear(x)
        self.kept.append(x)
        return x * len(self.kept)


class AddsInPlace(Base):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros((), dtype=D)

    def forward(self, x):
        self.count.add_(1)
        return self.linear(x) * self.count


class AddsToAttribute(AddsInPlace):
    def forward(self, x):
        self.count = self.count + 1
        return self.linear(x) * self.count


class HoldsItsWeight(Base):
    def __init__(self):
        super().__init__()
        self.weights = {"w": [self.linear.weight]}

    def forward(self, x):
        return self.linear(x) + self.weights["w"][0].sum()


class ByClosure(Base):
    def __init__(self):
        super().__init__()
        weight = self.linear.weight
        self.linear.register_forward_hook(lambda module, args, output: output * weight.sum())

    def forward(self, x):
        return self.linear(x)


WRONG = [
    Counts, Keeps, AddsInPlace, AddsToAttribute, HoldsItsWeight, ByClosure, NestedLists, Records, TensorsInContainers,
    LazyHooks, LazyParts, RemovesItsHook,
]  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo asks for it
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "with breaks"])
@pytest.mark.parametrize("make", WRONG)
def test_compiled_it_is_the_eager_result_or_an_error(make, fullgraph):
    torch._dynamo.reset()
    module = anew(make)
    before = everything(module)
    apply, params, _ = gradacc.functional(module)
    params = {name: 2 * param for name, param in params.items()}
    expected = apply(params, X)
    compiled = torch.compile(apply, backend="eager", fullgraph=fullgraph)
    errors = []
    for _ in range(2):
        try:
            assert_trees_close(compiled(params, X), expected)
        except (TorchRuntimeError, Unsupported) as error:
            errors.append(error)
        assert everything(module) == before
    assert errors or not fullgraph
    assert all(
        "apply: in a compiled function the module" in str(error) or type(error) is Unsupported for error in errors
    )


@pytest.mark.parametrize("make", [Counts, Keeps, HoldsItsWeight, ByClosure])
def test_compiled_in_a_gradient_too(make):
    torch._dynamo.reset()
    module = anew(make)
    before = everything(module)
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=2, reduction="sum")
    with pytest.raises(TorchRuntimeError, match="apply: in a compiled function the module (writes|uses its own)"):
        torch.compile(grad_fn, backend="eager", fullgraph=True)({name: 2 * param for name, param in params.items()}, X)
    assert everything(module) == before


class Honest(Base):
    """Reads its state, changes mode, has hooks, ties a parameter, and replaces a buffer."""

    def __init__(self):
        super().__init__()
        self.scales, self.factors = [2.0, 3.0], {"a": torch.ones(3, dtype=D)}
        self.tied = nn.Linear(3, 3, dtype=D)
        self.tied.weight = self.linear.weight
        self.register_buffer("previous", torch.zeros(3, dtype=D))
        self.linear.register_forward_hook(lambda module, args, output: output * 2)
        first = self.tied
        self.linear.register_forward_pre_hook(lambda module, args: (first(args[0]),))

    def forward(self, x):
        x = self.linear(x) * self.scales[0] * self.factors["a"] + self.previous
        self.previous = x.detach().mean(0)
        return x


@pytest.mark.parametrize("make", some_slow([Honest, KeyedByModule], Honest))
def test_what_a_compiled_module_may_do(make):
    torch._dynamo.reset()
    module = anew(make)
    before = everything(module)
    apply, params, buffers = gradacc.functional(module)
    params = {name: 2 * param for name, param in params.items()}
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().sum(), steps=2, reduction="sum")
    compiled = torch.compile(grad_fn, backend="eager", fullgraph=True)
    for x in (X, X + 1):
        assert_trees_close(compiled(params, x), grad_fn(params, x))
    own = dict(module.named_parameters())  # given itself
    assert_trees_close(compiled(own, X), grad_fn(own, X))
    some = {"linear.bias": params["linear.bias"]}  # left out: the module's own
    assert_trees_close(compiled(some, X), grad_fn(some, X))
    with_buffers = torch.compile(lambda p, b, x: apply(p, x, buffers=b), backend="eager", fullgraph=True)
    assert_trees_close(with_buffers(params, buffers, X), apply(params, X, buffers=buffers))
    assert everything(module) == before


@pytest.mark.slow
def test_outputs_that_transformers_captures():
    torch._dynamo.reset()
    ids = torch.arange(24).view(4, 6) * 7 % 47 + 3
    module = models.double(models.gpt2)
    apply, params, _ = gradacc.functional(module)

    def loss(params, ids):
        return apply(params, input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1].square().sum()

    grad_fn = gradacc.accumulate(loss, steps=2, reduction="sum")
    before = models.state(module)
    with pytest.raises((Unsupported, TorchRuntimeError)):  # it would install its hooks
        torch.compile(grad_fn, backend="eager", fullgraph=True)(params, ids)
    assert models.state(module) == before
    module(input_ids=ids, output_hidden_states=True)  # it does so here
    apply, params, _ = gradacc.functional(module)
    torch._dynamo.reset()
    assert_trees_close(torch.compile(grad_fn, backend="eager", fullgraph=True)(params, ids), grad_fn(params, ids))
