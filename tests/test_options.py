"""What a factory is told: bad options fail there, and name the fix."""

import pytest
import torch
from torch import nn

import gradacc


def loss_fn(params, batch):
    return (params["w"] * batch["x"]).square().mean()


FACTORY = {
    "steps 0": (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    "steps negative": (dict(steps=-3), ValueError, "steps must be at least 1, got -3"),
    "steps bool": (dict(steps=True), TypeError, r"steps must be an int, got True \(bool\)"),
    "steps float": (dict(steps=2.0), TypeError, r"steps must be an int, got 2.0 \(float\)"),
    "steps str": (dict(steps="2"), TypeError, "steps must be an int, got a str"),
    "microbatch_size 0": (dict(microbatch_size=0), ValueError, "microbatch_size must be at least 1, got 0"),
    "microbatch_size bool": (dict(microbatch_size=False), TypeError, "microbatch_size must be an int, got False"),
    "two ways": (dict(steps=2, microbatch_size=2), ValueError, "got steps and microbatch_size; give one"),
    "two other ways": (dict(microbatch_size=2, split=iter), ValueError, "got microbatch_size and split; give one"),
    "three ways": (dict(steps=1, microbatch_size=2, split=iter), ValueError, "steps and microbatch_size and split"),
    "split no function": (dict(split=3), TypeError, r"split must be a function.*got 3 \(int\)"),
    "in_dims int": (dict(steps=2, in_dims=0), TypeError, r"in_dims must be a tuple.*\(None, 0, 0\).*got 0"),
    "in_dims list": (dict(steps=2, in_dims=[None, 0]), TypeError, "in_dims must be a tuple.*got a list"),
    "argnums float": (dict(argnums=0.0), TypeError, "argnums must be an int or a non-empty tuple of ints, got 0.0"),
    "argnums bool": (dict(argnums=True), TypeError, "argnums must be"),
    "argnums none": (dict(argnums=()), TypeError, "argnums must be"),
    "has_aux": (dict(has_aux=1), TypeError, r"has_aux must be True or False, got 1 \(int\)"),
    "reduction": (dict(reduction="max"), ValueError, "reduction must be 'mean' or 'sum', got 'max'"),
    "dtype int": (dict(dtype=torch.int32), TypeError, "dtype must be a floating.*torch.int32"),
    "dtype complex": (dict(dtype=torch.complex64), TypeError, "dtype must be a floating.*torch.complex64"),
    "dtype str": (dict(dtype="float32"), TypeError, "dtype must be a floating.*'float32'"),
    "sync": (
        dict(sync=object()),
        TypeError,
        r"sync must be gradacc.all_reduce\(...\) or gradacc.reduce_scatter\(...\), got",
    ),
    "sync False": (dict(sync=False), TypeError, "sync must be gradacc.all_reduce.* got"),
    "sync uncalled": (dict(sync=gradacc.all_reduce), TypeError, "sync must be gradacc.all_reduce.* got a function"),
}


@pytest.mark.parametrize("transform", [gradacc.accumulate, gradacc.accumulate_and_value])
@pytest.mark.parametrize("case", FACTORY)
def test_bad_options_fail_in_the_factory(case, transform):
    options, error, message = FACTORY[case]
    with pytest.raises(error, match=f"(?s)^{transform.__name__}: {message}|^{transform.__name__}: .*{message}"):
        transform(loss_fn, **options)


SPLITTING = {"steps", "microbatch_size", "split"}


@pytest.mark.parametrize("case", [case for case, (options, _, _) in FACTORY.items() if not SPLITTING & set(options)])
def test_the_streaming_form_has_the_same_options(case):
    options, error, message = FACTORY[case]
    with pytest.raises(error, match=f"(?s)^accumulator: .*{message}"):
        gradacc.accumulator(loss_fn, **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (4, r"got 4 \(int\); options are keyword-only"),
        (nn.Linear(1, 1), r"nn.Module \(Linear\).*gradacc.functional"),
        ("loss", "must be a function"),
    ],
)
def test_bad_loss_functions_fail_in_the_factory(bad, message):
    with pytest.raises(TypeError, match=f"(?s)^accumulate: .*{message}"):
        gradacc.accumulate(bad, steps=2)
