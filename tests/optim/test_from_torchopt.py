"""from_torchopt: anything with init and update; TorchOpt itself where it is installed."""

from typing import NamedTuple

import optree
import pytest
import torch

from gradacc import optim
from tests.helpers import fingerprint
from tests.optim.cases import assert_same, gradients, imperative, leaves_of, parameters, trajectory


class Trace(NamedTuple):
    trace: dict


class Momentum:
    """TorchOpt's interface, by hand: state in a NamedTuple, ``inplace`` in the memory of what is given."""

    def init(self, params):
        return Trace(optree.tree_map(torch.zeros_like, params))

    def update(self, updates, state, *, params=None, inplace=True):
        assert params is not None
        if inplace:
            trace = optree.tree_map(lambda t, g: t.mul_(0.9).add_(g), state.trace, updates)
            return optree.tree_map(lambda g, t: g.copy_(t).mul_(-0.1), updates, trace), Trace(trace)
        trace = optree.tree_map(lambda t, g: t * 0.9 + g, state.trace, updates)
        return optree.tree_map(lambda t: -0.1 * t, trace), Trace(trace)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_momentum_by_hand_is_torchs(donate):
    params = parameters()
    many = [gradients(params) for _ in range(5)]
    optimizer = optim.from_torchopt(Momentum())
    out, _ = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )
    expected = imperative(torch.optim.SGD, params, many, lr=0.1, momentum=0.9)
    assert_same(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "chain"])
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_torchopt_is_torchs(name, donate):
    torchopt = pytest.importorskip("torchopt")
    transformation, cls, options = {
        "sgd": (lambda: torchopt.sgd(lr=0.1, momentum=0.9), torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
        "adam": (lambda: torchopt.adam(lr=0.1), torch.optim.Adam, dict(lr=0.1)),
        "adamw": (lambda: torchopt.adamw(lr=0.1), torch.optim.AdamW, dict(lr=0.1)),
        "rmsprop": (lambda: torchopt.rmsprop(lr=0.1), torch.optim.RMSprop, dict(lr=0.1)),
        "chain": (
            lambda: torchopt.chain(torchopt.clip.clip_grad_norm(1e9), torchopt.sgd(lr=0.1)),
            torch.optim.SGD,
            dict(lr=0.1),
        ),
    }[name]
    params = {key: leaf.double() for key, leaf in {"w": torch.randn(3, 4), "b": torch.randn(4)}.items()}
    many = [gradients(params) for _ in range(5)]
    optimizer = optim.from_torchopt(transformation())
    out, _ = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )
    assert_same(out, imperative(cls, params, many, **options), rtol=1e-5, atol=1e-5)  # its bias corrections are float32


def test_a_step_changes_nothing_and_shares_nothing():
    class Identity(Momentum):
        def update(self, updates, state, *, params=None, inplace=True):
            return updates, state

    for transformation in (Momentum(), Identity()):
        params = parameters()
        grads = gradients(params)
        optimizer = optim.from_torchopt(transformation)
        state = optimizer.init(params)
        before = fingerprint((params, grads, state))
        new = optimizer.step(params, grads, state)
        assert fingerprint((params, grads, state)) == before
        old = {leaf.data_ptr() for leaf in leaves_of((params, grads, state)) if leaf.numel()}
        assert not old & {leaf.data_ptr() for leaf in leaves_of(new) if leaf.numel()}


def test_no_update_is_none():
    class Freeze:
        def init(self, params):
            return ()

        def update(self, updates, state, *, params=None, inplace=True):
            return {"a": None, "b": -updates["b"]}, state

    params = {"a": torch.ones(2), "b": torch.ones(2)}
    for donate in (False, True):
        new, _ = optim.from_torchopt(Freeze()).step(params, params, (), donate=donate)
        assert [leaf.tolist() for leaf in leaves_of(new)] == [[1, 1], [0, 0]]
        params = {"a": torch.ones(2), "b": torch.ones(2)}


def test_under_vmap_and_grad():
    optimizer = optim.from_torchopt(Momentum())

    def step(w):
        return optimizer.step({"w": w}, {"w": 2 * w}, optimizer.init({"w": w}))[0]["w"]

    w = torch.randn(3, 2)
    assert_same([[torch.vmap(step)(w)]], [[0.8 * w]], rtol=1e-6)
    assert_same([[torch.func.grad(lambda w: step(w).sum())(w)]], [[torch.full_like(w, 0.8)]], rtol=1e-6)


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"must have init\(params\) and update\(.*got a torch.optim.sgd.SGD"):
        optim.from_torchopt(torch.optim.SGD([torch.zeros(1)], lr=0.1))

    class Wrong(Momentum):
        def update(self, updates, state, *, params=None, inplace=True):
            return {"w": torch.ones(7)}, state

    optimizer = optim.from_torchopt(Wrong())
    with pytest.raises(
        ValueError, match=r"updates\['w'\] is a tensor of shape \(7,\), for a parameter of shape \(2,\)"
    ):
        optimizer.step({"w": torch.ones(2)}, {"w": torch.ones(2)}, optimizer.init({"w": torch.ones(2)}))
