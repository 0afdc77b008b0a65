"""Bad input: errors that name what arrived, before anything has changed, donated or not."""

import functools
import math

import optree
import pytest
import torch

from gradacc import optim
from tests.helpers import NAMESPACE, assert_trees_equal, fingerprint
from tests.optim.test_from_torchopt import Momentum

MAKERS = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "adam": lambda: optim.adam(0.1),
    "adamw": lambda: optim.adamw(0.1),
    "from_torch": lambda: optim.from_torch(torch.optim.Adam),
    "from_torchopt": lambda: optim.from_torchopt(Momentum()),
    "clip_by_global_norm": lambda: optim.clip_by_global_norm(optim.adam(0.1), 1.0),
    "skip_nonfinite": lambda: optim.skip_nonfinite(optim.adam(0.1)),
    "skip_spikes": lambda: optim.skip_spikes(optim.adam(0.1)),
    "by_path": lambda: optim.by_path(optim.adam(0.1)),
    "from_torch foreach": lambda: optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "clip_by_global_norm by_path": lambda: optim.clip_by_global_norm(_groups(optim.adam(0.1), optim.sgd(0.1)), 1.0),
    "skip_nonfinite clip": lambda: optim.skip_nonfinite(optim.clip_by_global_norm(optim.adamw(0.1), 1.0)),
    "by_path from_torch": lambda: _groups(optim.adam(0.1), optim.from_torch(torch.optim.RMSprop)),
}


def _groups(default, rest):
    return optim.by_path(default, (lambda path, leaf: leaf.ndim < 2, rest))


def _params():
    return {"w": torch.ones(2, 3), "b": [torch.ones(3)]}


def _with(**leaves):
    return _params() | leaves


GRADS = {
    "missing": (
        {"w": torch.ones(2, 3)},
        ValueError,
        r"grads has another structure than params: it misses grads\['b'\]\[0\]",
    ),
    "extra": (_with(c=torch.ones(1)), ValueError, r"it has grads\['c'\], which params has not"),
    "None": (_with(b=[None]), ValueError, r"it misses grads\['b'\]\[0\]"),
    "tuple": (_with(b=(torch.ones(3),)), ValueError, "grads has another structure than params"),
    "shape": (
        _with(w=torch.ones(3, 2)),
        ValueError,
        r"grads\['w'\] has shape \(3, 2\), but params\['w'\] has shape \(2, 3\)",
    ),
    "dtype": (
        _with(w=torch.ones(2, 3).double()),
        TypeError,
        r"grads\['w'\] has dtype torch.float64, but.*\.to\(torch.float32\)",
    ),
    "number": (_with(w=1.0), TypeError, r"grads\['w'\] is 1.0 \(float\)"),
    "sparse": (_with(w=torch.ones(2, 3).to_sparse()), TypeError, r"grads\['w'\] is a tensor of layout.*to_dense"),
    "device": (
        _with(w=torch.ones(2, 3, device="meta")),
        ValueError,
        r"grads\['w'\] is on meta, but params\['w'\] is on cpu",
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("grads", "error", "message"), GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_that_do_not_fit(name, grads, error, message, donate):
    optimizer = MAKERS[name]()
    params = _params()
    state = optimizer.init(params)
    before = fingerprint((params, state))
    with pytest.raises(error, match=f"{name.split()[0]}: .*{message}"):
        optimizer.step(params, grads, state, donate=donate)
    assert fingerprint((params, state)) == before
    _works(MAKERS[name](), optimizer, params, state)


PARAMS = {
    "integers": (
        {"w": torch.ones(2), "n": torch.arange(3)},
        TypeError,
        r"params\['n'\] is a tensor of dtype torch.int64 and shape \(3,\)",
    ),
    "eight bits": ({"w": torch.ones(2).to(torch.float8_e5m2)}, TypeError, "of 16 bits or more"),
    "number": ({"w": 1.0}, TypeError, r"params\['w'\] is 1.0 \(float\)"),
    "module": (torch.nn.Linear(1, 1), TypeError, "is an nn.Module.*gradacc.functional"),
    "sparse": ({"w": torch.ones(2).to_sparse()}, TypeError, "layout torch.sparse_coo; pass it as to_dense"),
    "nothing": ({}, ValueError, "params holds no tensor"),
}


@pytest.mark.parametrize(("params", "error", "message"), PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("name", MAKERS)
def test_parameters_that_cannot_be_updated(name, params, error, message):
    optimizer = MAKERS[name]()
    name = name.split()[0]
    inner = name if name.startswith(("sgd", "adam", "from_torch")) else "(adam|adamw|by_path)"
    with pytest.raises(error, match=f"{inner}: .*{message}"):
        optimizer.init(params)
    with pytest.raises(error, match=f"{name}: .*{message}"):
        optimizer.step(params, params, optimizer.init(_params()))


STATES = {
    "another rule": (
        optim.sgd(0.1).init(_params()),
        TypeError,
        "state is a .*SgdState, where this optimizer's is a AdamState",
    ),
    "nothing": ((), TypeError, "state is a tuple, where"),
    "amsgrad": (optim.adam(amsgrad=True).init(_params()), ValueError, "state.max_exp_avg_sq has another structure"),
    "other parameters": (
        optim.adam().init({"w": torch.ones(2, 3)}),
        ValueError,
        r"it misses state.exp_avg\['b'\]\[0\]",
    ),
    "other shapes": (
        optim.adam().init(_with(w=torch.ones(1))),
        ValueError,
        r"state.exp_avg\['w'\] is a torch.float32 tensor of shape \(1,\)",
    ),
    "other dtypes": (
        optim.adam().init(_with(w=torch.ones(2, 3).double())),
        ValueError,
        r"state.exp_avg\['w'\] is a torch.float64",
    ),
    "a number": (
        optim.adam().init(_params())._replace(step=3),
        TypeError,
        r"state.step must be a 0-dim tensor.*got 3 \(int\)",
    ),
    "a float": (
        optim.adam().init(_params())._replace(step=torch.tensor(3.0)),
        TypeError,
        "state.step must be.*int64, got torch.float32",
    ),
    "batched": (optim.adam().init(_params())._replace(step=torch.arange(2)), TypeError, "torch.vmap the step"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("state", "error", "message"), STATES.values(), ids=STATES)
def test_a_state_of_another_optimizer(state, error, message, donate):
    params = _params()
    before = fingerprint((params, state))
    with pytest.raises(error, match=f"adam: .*{message}"):
        optim.adam().step(params, params, state, donate=donate)
    assert fingerprint((params, state)) == before


@pytest.mark.parametrize("name", ["skip_nonfinite", "by_path", "from_torch"])
def test_a_wrappers_state_is_its_own(name):
    with pytest.raises(TypeError, match=f"{name}: state is a .*AdamState, where"):
        MAKERS[name]().step(_params(), _params(), optim.adam().init(_params()))


def _works(fresh, optimizer, params, state):
    """After an error: a step is what it is of an optimizer, parameters and a state that saw none."""
    grads = _with(w=torch.full((2, 3), 3.0))
    other = optree.tree_map(torch.clone, (params, grads, state), namespace=NAMESPACE)
    assert_trees_equal(optimizer.step(params, grads, state), fresh.step(*other))


def _large():
    """Gradients that are clipped."""
    return _with(w=torch.full((2, 3), 30.0))


def _running(name):
    """In the middle of a run."""
    optimizer = MAKERS[name]()
    return optimizer, *optimizer.step(_params(), _large(), optimizer.init(_params()))


def _shape(state):
    leaves, treedef = optree.tree_flatten(state, namespace=NAMESPACE)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_of_any_other_optimizer(name, donate):
    """Every pair of optimizers whose states are not alike; with gradients that a clip would scale."""
    optimizer, params, own = _running(name)
    refused = 0
    for other in MAKERS:
        *_, state = _running(other)
        if _shape(state) == _shape(own):
            continue
        grads = _large()
        before = fingerprint((params, grads, state))
        with pytest.raises((TypeError, ValueError), match="state"):
            optimizer.step(params, grads, state, donate=donate)
        assert fingerprint((params, grads, state)) == before
        refused += 1
    assert refused >= 7
    _works(MAKERS[name](), optimizer, params, own)


SCHEDULED = {
    "sgd": lambda lr: optim.sgd(lr, momentum=0.9),
    "adam": optim.adam,
    "adamw": optim.adamw,
    "from_torch": lambda lr: optim.from_torch(torch.optim.Adam, lr=lr),
    "clip": lambda lr: optim.clip_by_global_norm(optim.adam(lr), 1.0),
    "skip": lambda lr: optim.skip_nonfinite(optim.adam(lr)),
    "skip of clip": lambda lr: optim.skip_nonfinite(optim.clip_by_global_norm(optim.sgd(lr), 1.0)),
    "clip of skip": lambda lr: optim.clip_by_global_norm(optim.skip_nonfinite(optim.sgd(lr)), 1.0),
    "by_path, default": lambda lr: _groups(optim.adam(lr), optim.sgd(0.1)),
    "by_path, last": lambda lr: _groups(optim.adam(0.1), optim.from_torch(torch.optim.SGD, lr=lr)),
    "clip of by_path": lambda lr: optim.clip_by_global_norm(_groups(optim.adam(0.1), optim.sgd(lr)), 1.0),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bad", [-0.1, math.nan])
@pytest.mark.parametrize("make", SCHEDULED.values(), ids=SCHEDULED)
def test_a_schedule_that_turns_bad_in_the_middle_of_a_run(make, bad, donate):
    optimizer = make(torch.tensor([0.1, 0.1, bad]).__getitem__)
    params, state = _params(), optimizer.init(_params())
    for _ in range(2):
        params, state = optimizer.step(params, _large(), state, donate=donate)
    grads = _large()
    before = fingerprint((params, grads, state))
    with pytest.raises(ValueError, match=rf"lr\(2\) must be finite and not negative, got {bad:.1g}"):
        optimizer.step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before
    _works(make(0.1), make(lambda step: 0.1), params, state)


class Refusal(Exception):
    """Of the caller's own optimizer."""


def _refusing():
    def step(params, grads, state, *, donate=False):
        raise Refusal

    return optim.Optimizer(lambda params: (), step)


REFUSING = {
    "clip": lambda: optim.clip_by_global_norm(_refusing(), 1.0),
    "first": lambda: _groups(_refusing(), optim.sgd(0.1)),
    "last": lambda: _groups(optim.sgd(0.1), _refusing()),
    "clip of last": lambda: optim.clip_by_global_norm(_groups(optim.sgd(0.1), _refusing()), 1.0),
    "last of three": lambda: optim.by_path(
        _decaying(),
        (lambda path, leaf: leaf.ndim == 2, optim.sgd(0.1)),
        (lambda path, leaf: leaf.ndim == 1, _refusing()),
    ),
    "copied attributes": lambda: optim.clip_by_global_norm(_copied(), 1.0),
}


def _decaying():
    """The caller's own, which uses what it is given away."""

    def step(params, grads, state, *, donate=False):
        change = torch.Tensor.mul_ if donate else torch.mul
        return {path: change(leaf, 0.5) for path, leaf in params.items()}, state

    return optim.Optimizer(lambda params: (), step)


def _copied():
    """A step with the attributes of one that can be asked."""
    return _refusing()._replace(step=functools.wraps(optim.sgd(0.1).step)(_refusing().step))


@pytest.mark.parametrize("make", REFUSING.values(), ids=REFUSING)
def test_an_optimizer_of_ones_own_that_raises_in_a_donated_step(make):
    optimizer = make()
    params = _params() | {"n": torch.ones(())} if make is REFUSING["last of three"] else _params()
    state = (optim.sgd(0.1) if make is REFUSING["copied attributes"] else optimizer).init(params)
    grads = optree.tree_map(lambda leaf: 30 * leaf, params, namespace=NAMESPACE)
    before = fingerprint((params, grads, state))
    with pytest.raises(Refusal):
        optimizer.step(params, grads, state, donate=True)
    assert fingerprint((params, grads, state)) == before


OPTIONS = {
    "momentum": (
        lambda: optim.sgd(0.1, momentum=-1),
        ValueError,
        "sgd: momentum must be finite and not negative, got -1",
    ),
    "dampening": (lambda: optim.sgd(0.1, dampening=math.nan), ValueError, "sgd: dampening must be"),
    "decay": (lambda: optim.sgd(0.1, weight_decay=-0.1), ValueError, "sgd: weight_decay must be"),
    "nesterov": (lambda: optim.sgd(0.1, nesterov=True), ValueError, "nesterov=True needs a momentum and no dampening"),
    "flag": (lambda: optim.sgd(0.1, 0.9, nesterov=1), TypeError, r"nesterov must be True or False, got 1 \(int\)"),
    "beta": (
        lambda: optim.adam(betas=(0.9, 1.0)),
        ValueError,
        r"adam: betas\[1\] must be at least 0 and less than 1, got 1.0",
    ),
    "betas": (lambda: optim.adamw(betas=0.9), TypeError, "adamw: betas must be a pair of numbers, got 0.9"),
    "eps": (lambda: optim.adam(eps=-1e-8), ValueError, "adam: eps must be"),
    "adam decay": (lambda: optim.adamw(weight_decay=None), TypeError, "weight_decay must be a number, got None"),
    "amsgrad": (lambda: optim.adam(amsgrad=None), TypeError, "amsgrad must be True or False"),
}


@pytest.mark.parametrize(("call", "error", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_out_of_range(call, error, message):
    with pytest.raises(error, match=message):
        call()
