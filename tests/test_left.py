"""What a forward pass leaves on a replica cannot be read on the module by the loss: no term is lost without a word."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradacc
from tests.helpers import assert_trees_close

D = torch.float64
X = torch.arange(12, dtype=D).view(4, 3).sin()


class Experts(nn.Module):
    """Leaves what a loss may be made of: an attribute, lists, a dict in a list."""

    kept = "nothing"

    def __init__(self, how="attribute"):
        super().__init__()
        self.w = nn.Parameter(torch.eye(3, dtype=D))
        self.how, self.losses, self.nested, self.none = how, [], [{}], None

    def forward(self, x):
        y = F.linear(x, self.w)
        extra = y.square().mean()
        if self.how == "attribute":
            self.l_aux = extra
        elif self.how == "none before":
            self.none = extra
        elif self.how == "list":
            self.losses.append(extra)
        elif self.how == "nested":
            self.nested[0]["aux"] = extra, 1
        elif self.how == "no graph":
            self.l_aux = extra.detach()
        return y


class Slotted(Experts):
    __slots__ = ("more",)


READS = {
    "attribute": lambda m: m.l_aux if hasattr(m, "l_aux") else 0.0,
    "none before": lambda m: 0.0 if m.none is None else m.none,
    "list": lambda m: sum(m.losses),
    "nested": lambda m: m.nested[0].get("aux", (0.0,))[0],
}


def around(cls, how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3, dtype=D), cls(how))


@pytest.mark.parametrize("cls", [Experts, Slotted])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("how", READS)
def test_a_term_that_is_left_on_the_module(how, stale, cls):
    module = around(cls, how)
    if stale:
        module(X)
    before = dict(module[1].__dict__)
    apply, params, _ = gradacc.functional(module)

    def loss(params, x):
        return apply(params, x).mean() + READS[how](module[1])

    name = {"attribute": "l_aux", "none before": "none", "list": "losses"}.get(how, how)
    grad_fn = gradacc.accumulate_and_value(loss, steps=2)
    calls = (
        lambda: grad_fn(params, X),
        lambda: torch.func.vmap(grad_fn, (None, 0))(params, X.expand(2, 4, 3)),
        lambda: torch.func.grad(lambda p: grad_fn(p, X)[1])(params),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"reads '{name}' of a {cls.__name__}, where the forward pass"):
            call()
    # Nothing of it stays: neither class nor attributes.
    assert type(module[1]) is cls
    assert module[1].__dict__.keys() == before.keys()
    assert all(module[1].__dict__[key] is value for key, value in before.items())


def test_what_is_returned_or_read_before_is_no_mistake():
    module = around(Experts, "list")
    apply, params, _ = gradacc.functional(module)
    large = torch.func.grad(lambda p: torch.func.functional_call(module, p, (X,)).square().mean())(params)
    module[1].losses.clear()

    def loss(params, x):
        module[1].losses.clear()
        out = apply(params, x)
        # Other attributes, and other parts of the module, are as ever.
        assert module[1].how == "list"
        assert module[0].in_features == 3
        assert isinstance(module[1], Experts)
        return out.square().mean()

    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, X), large)


@pytest.mark.parametrize("how", ["no graph", "nothing"])
def test_without_a_graph_what_the_module_has_is_read(how):
    module = around(Experts, how)
    apply, params, _ = gradacc.functional(module)

    def loss(params, x):
        out = apply(params, x).mean()
        assert not hasattr(module[1], "l_aux")
        return out

    gradacc.accumulate(loss, steps=2)(params, X)


def test_an_attribute_that_requires_grad_and_is_not_written_is_a_constant():
    module = around(Experts, "nothing")
    module[1].scale = torch.full((), 2.0, dtype=D, requires_grad=True)
    module[1].scales = [module[1].scale * 2]
    apply, params, _ = gradacc.functional(module)
    grads = gradacc.accumulate(lambda p, x: apply(p, x).mean() * module[1].scale * module[1].scales[0], steps=2)(
        params, X
    )
    plain = gradacc.accumulate(lambda p, x: apply(p, x).mean(), steps=2)(params, X)
    assert_trees_close(grads, {name: 8 * grad for name, grad in plain.items()})


def test_a_loss_within_a_loss():
    """The inner one's is unreadable within it, the outer one's in both, and all is well afterwards."""
    modules = [around(Experts, "attribute") for _ in range(2)]
    (outer, params, _), (inner, others, _) = map(gradacc.functional, modules)
    told = []

    def read(which):
        try:
            told.append(hasattr(modules[which][1], "l_aux"))
        except ValueError:
            told.append("error")

    def inner_loss(others, x):
        out = inner(others, x).square().mean()
        read(0), read(1)
        return out

    def loss(params, x):
        out = outer(params, x).mean()
        grads = gradacc.accumulate(inner_loss, steps=1)(others, x)
        read(0), read(1)
        return out + sum(grad.sum() for grad in grads.values())

    gradacc.accumulate(loss, steps=1)(params, X)
    read(0), read(1)
    assert told == ["error", "error", "error", False, False, False]


def test_other_threads_and_copies_see_the_module():
    module = around(Experts, "attribute")
    module(X)
    apply, params, _ = gradacc.functional(module)
    seen = []

    def loss(params, x):
        out = apply(params, x).mean()
        thread = threading.Thread(target=lambda: seen.append(module[1].l_aux))
        thread.start()
        thread.join()
        del module[1].__dict__["l_aux"]
        seen.extend((type(copy.deepcopy(module)[1]), type(pickle.loads(pickle.dumps(module))[1])))
        return out

    gradacc.accumulate(loss, steps=1)(params, X)
    assert isinstance(seen[0], torch.Tensor)
    assert seen[1:] == [Experts, Experts]


def test_an_error_of_the_loss_leaves_the_module_as_it_was():
    module = around(Experts, "attribute")
    apply, params, _ = gradacc.functional(module)

    def loss(params, x):
        apply(params, x)
        assert type(module[1]) is not Experts
        raise KeyError("of the loss")

    for _ in range(2):
        with pytest.raises(KeyError):
            gradacc.accumulate(loss, steps=2)(params, X)
        assert type(module[1]) is Experts


def test_two_losses_in_two_threads_at_once():
    """The class goes back when the last of them ends."""
    module = around(Experts, "attribute")
    apply, params, _ = gradacc.functional(module)
    gate, classes = threading.Barrier(2, timeout=30), []

    def loss(params, x):
        out = apply(params, x).mean()
        gate.wait()
        return out

    def call(delay):
        gradacc.accumulate(loss, steps=1)(params, X)
        classes.append(delay)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(classes) == [0, 1]
    assert type(module[1]) is Experts


def test_a_container_of_a_hooks_that_holds_the_module_too():
    module, box = nn.Linear(3, 2, dtype=D), {}
    box["model"] = module
    module.register_forward_hook(lambda module, inputs, out: box.update(out=out))
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).mean() + box.get("out", torch.zeros(1)).mean(), steps=2)
    with pytest.raises(ValueError, match="a container .* that holds the module too"):
        grad_fn(params, X)
    del box["model"]
    both = gradacc.accumulate(lambda p, x: 2 * apply(p, x).mean(), steps=2)
    assert_trees_close(grad_fn(params, X), both(params, X))


def test_the_container_may_hold_what_has_no_graph():
    module, box = nn.Linear(3, 2, dtype=D), {}
    box["model"] = module
    module.register_forward_hook(lambda module, inputs, out: box.update(out=out.detach()))
    apply, params, _ = gradacc.functional(module)
    gradacc.accumulate(lambda p, x: apply(p, x).mean(), steps=2)(params, X)
