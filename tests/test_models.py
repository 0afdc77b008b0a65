"""Models of transformers that capture outputs: their values, and what is left on them."""

import gc

import pytest
import torch

import gradacc
from tests import models
from tests.helpers import assert_trees_close, assert_trees_equal

MODELS = {"GPT-2": models.gpt2, "Llama": models.llama, "BERT": models.bert, "Mixtral": models.mixtral}
IDS = torch.arange(24).view(4, 6) * 7 % 47 + 3


def hidden(model, ids):
    return model(input_ids=ids, output_hidden_states=True).hidden_states[1].square().sum()


def attentions(model, ids):
    return sum(attention.square().sum() for attention in model(input_ids=ids, output_attentions=True).attentions)


def routers(model, ids):
    return sum(logits.square().sum() for logits in model(input_ids=ids, output_router_logits=True).router_logits)


CASES = [(name, loss) for name in MODELS for loss in (hidden, attentions)] + [("Mixtral", routers)]


@pytest.mark.parametrize(("name", "loss"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_captured_outputs(name, loss):
    module = models.double(MODELS[name])
    before = models.state(module)
    batches = IDS.split(2)
    expected, total = models.by_hand(module, loss, batches)
    for _ in range(2):
        grads, value = models.ours(module, loss, batches)
        assert_trees_close(grads, expected)
        assert value.item() == pytest.approx(total, rel=1e-12)
    assert models.state(module) == before
    assert len(module(input_ids=IDS, output_hidden_states=True).hidden_states) == 3


def test_the_four_hundredth_call_is_as_the_first():
    module = models.double(models.gpt2)
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate_and_value(lambda p, ids: hidden(lambda **kwargs: apply(p, **kwargs), ids), steps=1)
    first = grad_fn(params, IDS)
    gc.collect()
    before, objects = models.state(module), len(gc.get_objects())
    for _ in range(399):
        last = grad_fn(params, IDS)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert models.state(module) == before
    assert_trees_equal(last, first)


def test_hooks_that_the_model_has_already_are_not_installed_twice():
    module = models.double(models.gpt2)
    expected = module(input_ids=IDS, output_hidden_states=True).hidden_states
    before = models.state(module)
    apply, params, _ = gradacc.functional(module)
    for _ in range(2):
        assert_trees_equal(apply(params, input_ids=IDS, output_hidden_states=True).hidden_states, expected)
    assert models.state(module) == before
