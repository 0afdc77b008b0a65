"""Law 5: inputs are bit-identical afterwards, outputs are fresh, and nothing grows over 200 calls."""

import gc

import optree
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradacc
from gradacc.testing import splits
from tests.helpers import ENGINES, assert_trees_equal, fingerprint, living_tensors, some_slow

few = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=st.integers(0, 5), seed=st.integers(0, 2**16))
def test_inputs_are_unchanged_and_outputs_fresh(case, engine, data, size, seed):
    batch = case.batch(size, seed)
    before = fingerprint((case.params, batch))
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, **case.options, **data.draw(splits(size)))
    first = ENGINES[engine](lambda: grad_fn(case.params, batch))
    assert fingerprint((case.params, batch)) == before
    tensors = [leaf for leaf in optree.tree_leaves(first, namespace="gradacc") if isinstance(leaf, Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    assert len(set(storages)) == len(storages)  # no two outputs share memory
    second = ENGINES[engine](lambda: grad_fn(case.params, batch))
    kept = optree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, second, namespace="gradacc")
    for tensor in tensors:
        tensor.zero_()
    assert_trees_equal(second, kept)
    assert fingerprint((case.params, batch)) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_the_loss_closes_over_is_unchanged(engine):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    frozen = nn.Linear(3, 3)
    apply, params, _ = gradacc.functional(module)

    def loss(params, x):
        return apply(params, frozen(x)).square().mean()

    everything = (dict(module.state_dict()), dict(frozen.state_dict()), dict(frozen.named_parameters()))
    before = fingerprint(everything)
    ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(params, torch.ones(4, 3)))
    assert fingerprint(everything) == before


@pytest.mark.parametrize("engine", some_slow(ENGINES, "eager"))
def test_nothing_grows_over_200_calls(case, engine):
    batch = case.batch(3, 0)
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=2, **case.options)

    def call(times):
        for _ in range(times):
            ENGINES[engine](lambda: grad_fn(case.params, batch))
        gc.collect()
        return len(gc.get_objects()), living_tensors()

    call(5)
    (objects, tensors), (more, more_tensors) = call(5), call(200)
    assert not more_tensors.keys() - tensors.keys()
    # A few of the interpreter's and pytest's own come and go; one a call would be 200.
    assert more - objects < 50


def test_references_die_without_the_garbage_collector(case):
    """No reference cycle keeps a call's buffers alive: memory is free when the results are dropped."""
    batch = case.batch(3, 0)
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=2, **case.options)
    grad_fn(case.params, batch)
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        for _ in range(3):
            grad_fn(case.params, batch)
        assert not living_tensors().keys() - before.keys()
    finally:
        gc.enable()
