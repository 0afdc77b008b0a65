"""from_torch: torch's own trajectories to the last bit, through saved states; and what it cannot take."""

import io
import math
from unittest import mock

import optree
import pytest
import torch

from gradacc import optim
from gradacc.optim import _from_torch
from tests.helpers import assert_trees_equal, fingerprint
from tests.optim.cases import (
    NAMESPACE,
    TORCH,
    assert_same,
    gradients,
    imperative,
    leaves_of,
    parameters,
    torch_case,
    trajectory,
)


def _saved(state):
    """Through a file, flat."""
    leaves, treedef = optree.tree_flatten(state, namespace=NAMESPACE)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    return optree.tree_unflatten(treedef, torch.load(file))


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", TORCH)
def test_trajectories_are_the_originals_to_the_last_bit(name, donate):
    cls, options, params = torch_case(name)
    many = [gradients(params) for _ in range(6)]
    optimizer = optim.from_torch(cls, **options)
    begin = optimizer.init(params)

    def step(params, grads, state):
        before = fingerprint((params, grads, state))
        moved, new = optimizer.step(params, grads, _saved(state) if donate else state, donate=donate)
        assert all(leaf.grad is None and not leaf.requires_grad for leaf in leaves_of((moved, new)))
        if not donate:
            assert fingerprint((params, grads, state)) == before
            old = {leaf.data_ptr() for leaf in leaves_of((params, grads, state)) if leaf.numel()}
            assert not old & {leaf.data_ptr() for leaf in leaves_of((moved, new)) if leaf.numel()}
        return moved, new

    out, state = trajectory(step, params, many, begin, copied=True)
    assert_same(out, imperative(cls, params, many, **options))
    assert optree.tree_structure(state, namespace=NAMESPACE) == optree.tree_structure(begin, namespace=NAMESPACE)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves_of(state))


@pytest.mark.parametrize("name", [name for name in TORCH if "foreach" in name])
def test_a_foreach_step_in_parts_is_the_whole_to_the_last_bit(name):
    """A part holds one or two of these parameters; torch's own step takes all at once."""
    cls, options, params = torch_case(name)
    many = [gradients(params) for _ in range(4)]
    optimizer = optim.from_torch(cls, **options)
    with mock.patch.object(_from_torch, "_PART", 8):
        out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(cls, params, many, **options))


@pytest.mark.parametrize("name", ["SGD momentum", "Adam foreach", "AdamW fused", "RMSprop"])
def test_a_donated_step_is_made_in_the_memory_given(name):
    cls, options, params = torch_case(name)
    optimizer = optim.from_torch(cls, **options)
    params, state = optimizer.step(params, gradients(params), optimizer.init(params))
    held = [leaf.data_ptr() for leaf in leaves_of((params, state.slots))]
    params, state = optimizer.step(params, gradients(params), state, donate=True)
    assert [leaf.data_ptr() for leaf in leaves_of((params, state.slots))] == held


def test_lr_may_be_a_function_of_the_step():
    params = parameters()
    many = [gradients(params) for _ in range(4)]
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    theirs = torch.optim.AdamW(leaves, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, gamma=0.5)
    optimizer = optim.from_torch(
        torch.optim.AdamW, lr=optim.schedule(torch.optim.lr_scheduler.ExponentialLR, 0.1, gamma=0.5)
    )
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    for mine, grads in zip(out, many, strict=True):
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad
        theirs.step()
        schedule.step()
        assert_same([mine], [leaves])


class Odd(torch.optim.Optimizer):
    """Keeps numbers, None, and whatever else it is told to."""

    def __init__(self, params, lr=0.1, extra=None):
        super().__init__(params, {"lr": lr, "extra": extra})

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(count=0, decay=1.0, odd=False, nothing=None, extra=self.param_groups[0]["extra"])
            assert [type(state[key]) for key in ("count", "decay", "odd")] == [int, float, bool]
            assert state["nothing"] is None
            state.update(count=state["count"] + 1, decay=state["decay"] * math.pi / 3, odd=not state["odd"])
            with torch.no_grad():
                param.sub_(param.grad, alpha=state["decay"] * state["count"] * (1 + state["odd"]))


class InGroups(torch.optim.SGD):
    """Keeps a number in its group."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


def test_numbers_in_a_state_are_tensors_and_get_their_types_back():
    params = parameters()
    many = [gradients(params) for _ in range(5)]
    optimizer = optim.from_torch(Odd)
    out, state = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(Odd, params, many))
    assert {key: leaf.dtype for key, leaf in state.slots["w"].items() if isinstance(leaf, torch.Tensor)} == {
        "count:int": torch.int64,
        "decay:float": torch.float64,
        "odd:bool": torch.bool,
    }


REFUSED = {
    "LBFGS": (torch.optim.LBFGS, {}, TypeError, "LBFGS evaluates the loss several times a step"),
    "SparseAdam": (torch.optim.SparseAdam, {}, TypeError, "SparseAdam takes sparse gradients only"),
    "no class": (torch.optim.Adam([torch.zeros(1)]), {}, TypeError, "pass torch.optim.Adam and its options"),
    "module": (torch.nn.Linear, {}, TypeError, "cls must be a class of torch.optim"),
    "differentiable": (torch.optim.Adam, {"differentiable": True}, ValueError, "differentiable=True"),
    "params": (torch.optim.Adam, {"params": []}, TypeError, "leave params= out"),
    "negative lr": (torch.optim.Adam, {"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    "NaN": (torch.optim.Adam, {"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
}


@pytest.mark.parametrize(("cls", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_functional_is_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        optim.from_torch(cls, **options)


REFUSED_IN_INIT = {
    "its own words": (torch.optim.Adam, {"betas": (2.0, 0.9)}, ValueError, "Invalid beta parameter"),
    "unknown option": (torch.optim.Adam, {"beta": 1}, TypeError, "beta"),
    "vectors for Muon": (torch.optim.Muon, {}, ValueError, "2D"),
    "state in groups": (InGroups, {"lr": 0.1}, TypeError, r"InGroups keeps state in its param_groups \(k\)"),
    "a string": (Odd, {"extra": "x"}, TypeError, "Odd keeps 'extra' for a parameter, a str"),
}


@pytest.mark.parametrize(("cls", "options", "error", "message"), REFUSED_IN_INIT.values(), ids=REFUSED_IN_INIT)
def test_what_only_shows_in_a_step_is_refused_in_init(cls, options, error, message):
    with pytest.raises(error, match=message):
        optim.from_torch(cls, **options).init(parameters())


def test_no_transform():
    optimizer = optim.from_torch(torch.optim.SGD, lr=0.1)
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="SGD reads values and writes in place"):
        torch.vmap(lambda w: optimizer.step(w, w, optimizer.init(w))[0])(w)


OTHERS = {
    "another optimizer": lambda params: optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9).init(params),
    "other options": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1, amsgrad=True).init(params),
    "fewer parameters": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init({"w": params["w"]}),
    "other shapes": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(params | {"w": torch.ones(2, 5)}),
    "other dtypes": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(parameters(torch.float64)),
    "the same shapes under other names": lambda params: optim.from_torch(torch.optim.Adam, lr=0.1).init(
        {f"other {name}": leaf for name, leaf in params.items()}
    ),
    "another kind": lambda params: optim.adam(0.1).init(params),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_state_is_refused_before_anything_changes(other, donate):
    params = parameters()
    grads = gradients(params)
    state = other(params)
    state = state._replace(step=torch.tensor(3))
    before = fingerprint((params, grads, state))
    with pytest.raises((TypeError, ValueError), match="from_torch: state.*(another|other)"):
        optim.from_torch(torch.optim.Adam, lr=0.1).step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before


def test_init_changes_nothing():
    params = parameters()
    before = fingerprint(params)
    state = optim.from_torch(torch.optim.Rprop).init(params)
    assert fingerprint(params) == before
    assert_trees_equal(state, optree.tree_map(torch.zeros_like, state, namespace=NAMESPACE))
