"""What an `Optimizer` says of itself: the fields that wrappers and `train_step` go by, of one of the caller's own too."""

from types import SimpleNamespace

import pytest
import torch

import gradacc
from gradacc import optim
from tests.helpers import assert_trees_equal, fingerprint


def _shrinking(**fields):
    """``params - grads``, in place where it is given them."""

    def step(params, grads, state, *, donate=False):
        return {name: leaf.sub_(grads[name]) if donate else leaf - grads[name] for name, leaf in params.items()}, state

    return optim.Optimizer(lambda params: {"kept": torch.ones(2)}, step, **fields)


def _given():
    return {"w": torch.ones(3)}, {"w": torch.full((3,), 30.0)}


class Refusal(Exception):
    """Of the caller's own check."""


def _refuse(params, state):
    raise Refusal


WRAPPERS = {
    "clip": lambda own: optim.clip_by_global_norm(own, 1.0),
    "by_path": optim.by_path,
    "skip of clip": lambda own: optim.skip_nonfinite(optim.clip_by_global_norm(own, 1.0)),
    "spikes of clip": lambda own: optim.skip_spikes(optim.clip_by_global_norm(own, 1.0)),
    "clip of clip": lambda own: optim.clip_by_global_norm(optim.clip_by_global_norm(own, 1.0), 1.0),
    "clip of skip": lambda own: optim.clip_by_global_norm(optim.skip_nonfinite(own), 1.0),
    "clip of by_path": lambda own: optim.clip_by_global_norm(optim.by_path(own), 1.0),
    "scale of spikes": lambda own: optim.dynamic_loss_scale(optim.skip_spikes(own), init_scale=4.0),
    "scale": lambda own: optim.dynamic_loss_scale(own, init_scale=4.0),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("asked", [True, False])
def test_only_what_can_be_asked_updates_in_the_memory_that_is_given_away(wrap, asked):
    optimizer = wrap(_shrinking(check=lambda params, state: None) if asked else _shrinking())
    params, grads = _given()
    there = params["w"].data_ptr(), grads["w"].detach()
    kept = fingerprint(there[1])
    new, _ = optimizer.step(params, grads, optimizer.init(params), donate=True)
    expected, _ = optimizer.step(*_given(), optimizer.init(_given()[0]))
    assert_trees_equal(new, expected)
    scales = wrap is not WRAPPERS["by_path"]
    assert (fingerprint(there[1]) != kept) == (asked and scales)
    if not scales:
        assert (new["w"].data_ptr() == there[0]) == asked


@pytest.mark.parametrize("value", [30.0, torch.inf], ids=["taken", "not finite"])  # NaN equals nothing
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_check_that_raises_does_so_before_anything_is_changed(wrap, value):
    """For an update that is skipped, too."""
    optimizer = wrap(_shrinking(check=_refuse))
    params, grads = _given()
    grads["w"][0] = value
    state = optimizer.init(params)
    before = fingerprint((params, grads, state))
    with pytest.raises(Refusal):
        optimizer.step(params, grads, state, donate=True)
    assert fingerprint((params, grads, state)) == before


def _grad_fn(params, batch, loss_scale=1.0):
    return {"w": torch.full((3,), 2.0) * loss_scale}, torch.tensor(5.0) * loss_scale


def _metrics(optimizer):
    state = gradacc.TrainState({"w": torch.ones(3)}, optimizer.init({"w": torch.ones(3)}))
    return gradacc.train_step(_grad_fn, optimizer)(state, None)[1]


def test_what_one_of_the_callers_own_reports_becomes_metrics():
    report = SimpleNamespace(rate=lambda state: 0.25, updates=lambda state: 7, skipped=lambda state: 2)
    for optimizer in (_shrinking(report=report), optim.clip_by_global_norm(_shrinking(report=report), 1e6)):
        metrics = _metrics(optimizer)
        assert (metrics["lr"].item(), metrics["updates"].item(), metrics["skipped"].item()) == (0.25, 7, 2)
    assert _metrics(_shrinking()).keys() == {"loss", "grad_norm"}


def test_one_of_the_callers_own_with_a_loss_scale():
    """The loss is multiplied by it, what is reported is not, and no wrapper takes it."""
    optimizer = _shrinking(loss_scale=lambda state: state["kept"][0] * 8)
    metrics = _metrics(optimizer)
    assert (metrics["loss_scale"].item(), metrics["loss"].item()) == (8.0, 5.0)
    assert_trees_equal(metrics["grad_norm"], torch.full((3,), 2.0).norm())
    with pytest.raises(
        TypeError, match="train_step: the optimizer is a dynamic_loss_scale.*grad_fn takes no loss_scale"
    ):
        gradacc.train_step(lambda params, batch: _grad_fn(params, batch), optimizer)
    with pytest.raises(ValueError, match="clip_by_global_norm: the optimizer is a dynamic_loss_scale"):
        optim.clip_by_global_norm(optimizer, 1.0)


def test_a_state_that_is_none_of_a_loss_scales():
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1))
    state = gradacc.TrainState({"w": torch.ones(3)}, optim.sgd(0.1).init({"w": torch.ones(3)}))
    with pytest.raises(TypeError, match="dynamic_loss_scale: state is .*SgdState.*is a LossScaleState"):
        gradacc.train_step(_grad_fn, optimizer)(state, None)


def test_another_step_has_none_of_it_unless_it_is_kept():
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1))
    bare = optim.Optimizer(optimizer.init, optimizer.step)
    assert (bare.check, bare.loss_scale, *bare.report, bare.takes_loss) == (*(None,) * 5, False)
    assert optimizer._replace(step=lambda *args, **kwargs: None).loss_scale is optimizer.loss_scale
