"""from_torchopt: anything with init and update; TorchOpt itself where it is installed."""

from typing import NamedTuple

import optree
import pytest
import torch
import torchopt

from gradacc import optim
from tests.helpers import assert_trees_close, fingerprint
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


TRANSFORMATIONS = {
    "sgd": lambda: torchopt.sgd(lr=0.1, momentum=0.9),
    "nesterov": lambda: torchopt.sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: torchopt.adam(1e-2),
    "adamw": lambda: torchopt.adamw(0.1),
    "rmsprop": lambda: torchopt.rmsprop(lr=0.1, centered=True),
    "adagrad": lambda: torchopt.adagrad(lr=0.1),
    "radam": lambda: torchopt.radam(lr=0.1),
    "adadelta": lambda: torchopt.adadelta(lr=0.1),
    "adamax": lambda: torchopt.adamax(lr=0.1),
    "chain": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.adam(1e-2)),
    "scheduled": lambda: torchopt.sgd(lr=torchopt.schedule.linear_schedule(0.1, 0.01, 3, 1)),
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_torchopt_is_its_own_loop(make, donate):
    """To the last bit where nothing is donated; where it is, TorchOpt's kernels in place round otherwise."""
    params = {"w": torch.randn(3, 4), "deep": [torch.randn(4), torch.randn(2, 2)]}
    many = [gradients(params) for _ in range(5)]
    optimizer = optim.from_torchopt(make())
    out, state = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )
    transformation = make()
    expected, own = [], transformation.init(params)
    for grads in many:
        grads = optree.tree_map(torch.clone, grads)
        updates, own = transformation.update(grads, own, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        expected.append(leaves_of(params))
    rtol, atol = (1e-5, 1e-6) if donate else (0.0, 0.0)
    assert_same(out, expected, rtol=rtol, atol=atol)
    assert_trees_close(state, own, rtol=rtol, atol=atol)


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


class Anchored(Momentum):
    """Keeps the parameters themselves, as one may where tensors cannot change."""

    def init(self, params):
        return dict(params)

    def update(self, updates, state, *, params=None, inplace=True):
        return {path: 0.1 * (state[path] - leaf) - updates[path] for path, leaf in params.items()}, dict(state)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_state_that_is_the_parameters_stays_what_it_was(donate):
    optimizer = optim.from_torchopt(Anchored())
    begun = {"w": torch.ones(2)}
    assert optimizer.init(begun)["w"].data_ptr() != begun["w"].data_ptr()
    for given in (optimizer.init, dict):  # a state of the transformation's own making too
        params = {"w": torch.ones(2)}
        params, state = optimizer.step(params, {"w": torch.ones(2)}, given(params), donate=donate)
        assert_trees_close((params, state), ({"w": torch.zeros(2)}, {"w": torch.ones(2)}))
        assert params["w"].data_ptr() != state["w"].data_ptr()


KEPT = {
    "itself": lambda leaf: leaf,
    "detached": torch.Tensor.detach,
    "in another shape": lambda leaf: leaf.view(2, 1),
    "a part": lambda leaf: leaf[1:],
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_state_that_is_what_was_given_gets_memory_of_its_own(kept, donate):
    """The last parameters (as one may look ahead from), the last gradients, the last state."""

    class Last(Momentum):
        def init(self, params):
            return [kept(params["w"])] * 3

        def update(self, updates, state, *, params=None, inplace=True):
            return {"w": -1 * updates["w"]}, [kept(params["w"]), kept(updates["w"]), state[2].view_as(state[2])]

    optimizer = optim.from_torchopt(Last())
    params, grads = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 7.0])}
    state = optimizer.init(params)
    given = leaves_of((params, grads, state))
    new, moved = optimizer.step(params, grads, state, donate=donate)
    assert new["w"].tolist() == [-4, -5]
    expected = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0]), torch.tensor([1.0, 2.0])]
    assert_same([moved], [list(map(kept, expected))])
    places = {leaf.untyped_storage().data_ptr() for leaf in leaves_of((new, *([] if donate else given)))}
    assert not places & {leaf.untyped_storage().data_ptr() for leaf in moved}


@pytest.mark.parametrize("change", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_keep_their_dtype(own, change):
    """Updates of another one are added in the wider one, donated or not."""

    class Constant(Momentum):
        def update(self, updates, state, *, params=None, inplace=True):
            return {"w": torch.tensor([0.1, -3.7]).to(change), "n": torch.tensor(1.3).to(change)}, state

    optimizer = optim.from_torchopt(Constant())
    results = []
    for donate in (False, True):
        params = {"w": torch.tensor([1.01, 2.7]).to(own), "n": torch.ones((), dtype=own)}
        grads = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        results.append(leaves_of(optimizer.step(params, grads, optimizer.init(params), donate=donate)[0]))
    wide = {"w": torch.tensor([1.01, 2.7]).to(own), "n": torch.ones((), dtype=own)}
    updates, _ = Constant().update(None, None)
    expected = [(wide[name].double() + updates[name].double()).to(own) for name in ("n", "w")]
    assert_same(results[:1], results[1:])
    assert_same(results[:1], [expected], rtol=1e-6 if own != torch.bfloat16 else 2.0**-7)


class Reading(Momentum):
    """Its state depends on a value."""

    def init(self, params):
        return [torch.zeros(int(params["w"].sum()))]

    def update(self, updates, state, *, params=None, inplace=True):
        return updates, state


class ByNumpy(Reading):
    def init(self, params):
        return [torch.from_numpy(params["w"].numpy().copy())]


class Demanding(Reading):
    def init(self, params):
        if params["w"].device.type != "cpu":
            raise ValueError("on a CPU only")
        return [torch.zeros(3)]


@pytest.mark.parametrize("transformation", [Reading(), ByNumpy(), Demanding()], ids=lambda t: type(t).__name__)
def test_a_state_that_depends_on_values_is_not_looked_at(transformation):
    optimizer = optim.from_torchopt(transformation)
    params = {"w": torch.ones(2)}
    new, _ = optimizer.step(params, params, optimizer.init({"w": torch.ones(5)}))
    assert new["w"].tolist() == [2, 2]


STATES = {
    "another transformation": (lambda own, params: torchopt.sgd(0.1).init(params), "state is a tuple of structure"),
    "another kind": (lambda own, params: optim.sgd(0.1).init(params), "state is a .*SgdState"),
    "other parameters": (lambda own, params: own.init(params | {"c": torch.ones(1)}), "state is a tuple of structure"),
    "other shapes": (
        lambda own, params: own.init(params | {"b": torch.ones(7)}),
        r"state\[1\]\[1\].mu\[0\] is a .*\(7,\).*, where this transformation keeps a torch.float32 tensor of shape \(3,\)",
    ),
    "other dtypes": (
        lambda own, params: own.init(params | {"b": torch.ones(3).double()}),
        r"state\[1\]\[1\].mu\[0\] is a .*of torch.float64",
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("other", "message"), STATES.values(), ids=STATES)
def test_another_state_is_refused_before_anything_changes(other, message, donate):
    """Clipping comes first in this chain, in the memory of the gradients."""
    params = {"w": torch.ones(2, 2), "b": torch.ones(3)}
    transformation = torchopt.chain(torchopt.clip.clip_grad_norm(0.1), torchopt.adam(0.1, weight_decay=0.1))
    optimizer = optim.from_torchopt(transformation)
    grads, state = gradients(params), other(transformation, params)
    before = fingerprint((params, grads, state))
    with pytest.raises(ValueError, match=f"from_torchopt: {message}"):
        optimizer.step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before
    optimizer.step(params, grads, optimizer.init(params), donate=donate)


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"must have init\(params\) and update\(.*got a torch.optim.sgd.SGD"):
        optim.from_torchopt(torch.optim.SGD([torch.zeros(1)], lr=0.1))

    class Wrong(Momentum):
        def update(self, updates, state, *, params=None, inplace=True):
            return {"w": torch.ones(7)}, state

    class Complex(Momentum):
        def update(self, updates, state, *, params=None, inplace=True):
            return {"w": torch.ones(2, dtype=torch.complex64)}, state

    optimizer = optim.from_torchopt(Complex())
    for donate in (False, True):
        params = {"w": torch.ones(2)}
        with pytest.raises(ValueError, match=r"updates\['w'\] is a .* of torch.complex64, for a .* torch.float32; "):
            optimizer.step(params, {"w": torch.ones(2)}, optimizer.init(params), donate=donate)

    optimizer = optim.from_torchopt(Wrong())
    with pytest.raises(
        ValueError, match=r"updates\['w'\] is a tensor of shape \(7,\) of .*, for a parameter of shape \(2,\)"
    ):
        optimizer.step({"w": torch.ones(2)}, {"w": torch.ones(2)}, optimizer.init({"w": torch.ones(2)}))
