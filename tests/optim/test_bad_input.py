"""Bad input: errors that name what arrived, before anything has changed, donated or not."""

import math

import pytest
import torch

from gradacc import optim
from tests.helpers import fingerprint
from tests.optim.test_from_torchopt import Momentum

MAKERS = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "adam": lambda: optim.adam(0.1),
    "adamw": lambda: optim.adamw(0.1),
    "from_torch": lambda: optim.from_torch(torch.optim.Adam),
    "from_torchopt": lambda: optim.from_torchopt(Momentum()),
    "clip_by_global_norm": lambda: optim.clip_by_global_norm(optim.adam(0.1), 1.0),
    "skip_nonfinite": lambda: optim.skip_nonfinite(optim.adam(0.1)),
    "by_path": lambda: optim.by_path(optim.adam(0.1)),
}


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
    with pytest.raises(error, match=f"{name}: .*{message}"):
        optimizer.step(params, grads, state, donate=donate)
    assert fingerprint((params, state)) == before


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
    inner = "(adam|by_path)" if name in ("clip_by_global_norm", "skip_nonfinite", "by_path") else name
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
