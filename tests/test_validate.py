"""Bad input: a clear error that names what arrived and the fix, and nothing changed."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import gradacc
from gradacc import _call, _loss, _options
from tests.helpers import ENGINES, fingerprint


def loss_fn(params, batch):
    return (params["w"] * batch["x"]).square().mean()


PARAMS = {"w": torch.tensor(2.0)}
BATCH = {"x": torch.arange(4.0)}


class Unregistered:
    pass


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
    "sync": (dict(sync=object()), TypeError, r"sync must be gradacc.all_reduce\(...\), got"),
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


CALL = {
    # name: (options, positional arguments, error, message)
    "sizes differ": (
        dict(steps=2),
        (PARAMS, {"x": torch.ones(4), "y": [torch.ones(3)]}),
        ValueError,
        r"split dimensions differ: args\[1\]\['x'\] has 4, args\[1\]\['y'\]\[0\] has 3",
    ),
    "sizes differ between arguments": (
        dict(steps=2, in_dims=(None, 0, 1)),
        (PARAMS, torch.ones(4), torch.ones(4, 3)),
        ValueError,
        r"args\[1\] has 4, args\[2\] has 3\. Give .* argument of loss_fn$",
    ),
    "sizes differ in a record": (
        dict(steps=2),
        (PARAMS, {0: torch.ones(4), "y": torch.ones(3)}),
        ValueError,
        r"has 4, args\[1\]\['y'\] has 3\. Give .* argument of loss_fn$",
    ),
    "micro-batches and steps": (
        dict(steps=2),
        (PARAMS, [{"x": torch.ones(n)} for n in (7, 5)]),
        ValueError,
        r"args\[1\]\[0\]\['x'\] has 7, args\[1\]\[1\]\['x'\] has 5\. Give .*\. "
        r"If args\[1\] is a list of ragged examples, pad them.*micro-batches is passed without steps or microbatch_size$",
    ),
    "ragged examples": (
        dict(microbatch_size=2),
        (PARAMS, {"x": [torch.ones(n) for n in (7, 7, 5, 7, 6, 7, 7)]}),
        ValueError,
        r"differ: args\[1\]\['x'\]\[0\] has 7, args\[1\]\['x'\]\[2\] has 5 \(2 of 7 tensors differ from the first\)\. "
        r"Give .*\. If args\[1\]\['x'\] is a list of ragged examples, pad them into one tensor$",
    ),
    "six sizes are listed": (
        dict(steps=2),
        (PARAMS, [torch.ones(n) for n in (7, 5, 7, 7, 7, 7)]),
        ValueError,
        r"\[0\] has 7, args\[1\]\[1\] has 5, args.*, args\[1\]\[5\] has 7\. Give",
    ),
    "generator and steps": (
        dict(steps=2),
        (PARAMS, iter([BATCH])),
        TypeError,
        r"args\[1\] is a list_iterator, which .* An iterable of micro-batches is passed without steps",
    ),
    "0-dim": (
        dict(steps=2),
        (PARAMS, {"x": torch.tensor(1.0)}),
        ValueError,
        r"args\[1\]\['x'\] is a 0-dim tensor.*in_dims",
    ),
    "numpy": (
        dict(steps=2),
        (PARAMS, {"x": np.ones(4)}),
        TypeError,
        r"args\[1\]\['x'\] is a numpy.ndarray.*torch.as_tensor",
    ),
    "string": (
        dict(steps=2),
        (PARAMS, {"x": ["a", "b"], "y": torch.ones(4)}),
        TypeError,
        r"args\[1\]\['x'\] is a list of 2 items \(strings\), which cannot be split",
    ),
    "nothing but strings": (
        dict(steps=2),
        (PARAMS, {"x": ["a", "b"]}),
        TypeError,
        "no tensor to split in the batch.* lists .* are converted first",
    ),
    "class": (dict(steps=2), (PARAMS, Unregistered()), TypeError, r"args\[1\] is a .*Unregistered.*register its class"),
    "no tensor": (dict(steps=2), (PARAMS, {"x": 3, "y": None}), TypeError, "no tensor to split"),
    "nothing": (dict(steps=2), (PARAMS, None), TypeError, "no tensor to split"),
    "no batch": (
        dict(steps=2),
        (PARAMS,),
        ValueError,
        r"no batch among the 1 positional arguments.*grad_fn\(params, batch\).*keyword arguments are never split",
    ),
    "no arguments": (dict(steps=2), (), ValueError, "argnums=0 does not fit a call with 0 positional arguments"),
    "argnums too large": (
        dict(steps=2, argnums=2),
        (PARAMS, BATCH),
        ValueError,
        "argnums=2 does not fit a call with 2",
    ),
    "argnums twice": (
        dict(steps=2, argnums=(0, -2)),
        (PARAMS, BATCH),
        ValueError,
        "names an argument of the call twice; name each once",
    ),
    "in_dims length": (dict(steps=2, in_dims=(None,)), (PARAMS, BATCH), ValueError, r"has 1 entries for a call with 2"),
    "in_dims params": (
        dict(steps=2, in_dims=(0, 0)),
        (PARAMS, BATCH),
        ValueError,
        r"in_dims\[0\]=0 splits an argument that is diff",
    ),
    "in_dims range": (
        dict(steps=2, in_dims=(None, 1)),
        (PARAMS, BATCH),
        ValueError,
        r"in_dims has 1 for args\[1\]\['x'\].*\(4,\)",
    ),
    "in_dims float": (
        dict(steps=2, in_dims=(None, 0.0)),
        (PARAMS, BATCH),
        TypeError,
        r"in_dims has 0.0 \(float\) for args\[1\]\['x'\]",
    ),
    "in_dims prefix": (
        dict(steps=2, in_dims=(None, {"y": 0})),
        (PARAMS, BATCH),
        ValueError,
        r"in_dims\[1\]=\{'y': 0\} is not a pytree pre",
    ),
    "in_dims window": (
        dict(in_dims=(None, 0, 0)),
        (PARAMS, [BATCH], BATCH),
        ValueError,
        r"in_dims\[2\]=0.*passed whole",
    ),
    "window in_dims text": (
        dict(in_dims=(None, "zz")),
        (PARAMS, [BATCH]),
        TypeError,
        r"in_dims has a str for args\[1\]\['x'\]",
    ),
    "window in_dims range": (
        dict(in_dims=(None, 5)),
        (PARAMS, [BATCH]),
        ValueError,
        r"in_dims has 5 for args\[1\]\['x'\]",
    ),
    "window tensor": (
        {},
        (PARAMS, torch.ones(4)),
        TypeError,
        "must be an iterable of micro-batches, got a tensor.*Pass steps=",
    ),
    "window dict": ({}, (PARAMS, BATCH), TypeError, "must be an iterable of micro-batches, got a dict"),
    "window string": ({}, (PARAMS, "abc"), TypeError, "must be an iterable of micro-batches, got a str"),
    "window number": ({}, (PARAMS, 3), TypeError, r"must be an iterable of micro-batches, got 3 \(int\)"),
    "split returns the batch": (
        dict(split=lambda batch: batch["x"]),
        (PARAMS, BATCH),
        TypeError,
        "split returned a tensor of shape .*; it must yield",
    ),
    "sparse parameters": (
        dict(steps=2),
        (torch.eye(2).to_sparse(), BATCH),
        TypeError,
        "params is a sparse or nested tensor",
    ),
    "split returns": (dict(split=lambda batch: None), (PARAMS, BATCH), TypeError, "split returned None; it must yield"),
    "module": (
        dict(steps=2),
        (nn.Linear(1, 1), BATCH),
        TypeError,
        r"params is an nn.Module \(Linear\).*gradacc.functional",
    ),
    "module inside": (dict(steps=2), ([nn.Linear(1, 1)], BATCH), TypeError, r"params\[0\] is an nn.Module"),
    "integers": (
        dict(steps=2),
        ({"w": torch.tensor(2)}, BATCH),
        TypeError,
        r"params\['w'\] is a tensor of dtype torch.int64",
    ),
    "bools": (
        dict(steps=2),
        ({"w": torch.tensor(True)}, BATCH),
        TypeError,
        r"params\['w'\] is a tensor of dtype torch.bool",
    ),
    "number": (dict(steps=2), ({"w": 2.0}, BATCH), TypeError, r"params\['w'\] is 2.0 \(float\)"),
    "numpy params": (dict(steps=2), ({"w": np.ones(1)}, BATCH), TypeError, r"params\['w'\] is a numpy.ndarray"),
    "generator": (
        dict(steps=2),
        (nn.Linear(1, 1).parameters(), BATCH),
        TypeError,
        r"dict\(module.named_parameters\(\)\)",
    ),
    "no parameters": (
        dict(steps=2),
        ({}, BATCH),
        ValueError,
        "params holds no tensor: there is nothing to differentiate",
    ),
    "None parameters": (dict(steps=2), (None, BATCH), ValueError, "params holds no tensor"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CALL)
def test_bad_calls_fail_before_the_loss_runs(case, engine):
    options, args, error, message = CALL[case]
    before = fingerprint((PARAMS, BATCH))

    def never(*args):
        raise AssertionError("the loss ran")

    with pytest.raises(error, match=f"(?s)^accumulate: .*{message}"):
        ENGINES[engine](lambda: gradacc.accumulate(never, **options)(*args))
    assert fingerprint((PARAMS, BATCH)) == before


def mean(total, weight):
    return lambda p, b: gradacc.Mean(total(p, b), weight(p, b))


def linear(p, b):
    return (p["w"] * b["x"]).sum()


LOSSES = {
    "vector": (
        lambda p, b: p["w"] * b["x"],
        ValueError,
        r"returned a tensor of shape \(2,\); it must be 0-dim.*gradacc.Mean",
    ),
    "one element": (lambda p, b: linear(p, b)[None], ValueError, r"shape \(1,\)"),
    "integer": (lambda p, b: linear(p, b).long(), TypeError, "a tensor of dtype torch.int64; it must be floating"),
    "complex": (lambda p, b: linear(p, b) * 1j, TypeError, "a tensor of dtype torch.complex64; it must be floating"),
    "independent": (lambda p, b: b["x"].sum(), ValueError, "does not depend on any parameter"),
    "detached": (lambda p, b: linear(p, b).detach(), ValueError, "does not depend on any parameter"),
    "other parameter": (
        lambda p, b, w=torch.ones((), requires_grad=True): (w * b["x"]).sum(),
        ValueError,
        "does not depend on any parameter",
    ),
    "tuple": (lambda p, b: (linear(p, b), b), TypeError, "returned a tuple of 2; pass has_aux=True"),
    "None": (lambda p, b: None, TypeError, "returned None; is a return statement missing"),
    "number": (lambda p, b: 1.0, TypeError, r"returned 1.0 \(float\).*\.item\(\)"),
    "dict": (
        lambda p, b: {"loss": linear(p, b)},
        TypeError,
        "returned a dict of 1; it must return a 0-dim floating tensor",
    ),
    "negative weight": (
        mean(linear, lambda p, b: torch.tensor(-1)),
        ValueError,
        "a Mean whose weight is -1; it must be finite and",
    ),
    "negative number": (mean(linear, lambda p, b: -0.5), ValueError, "weight is -0.5"),
    "NaN weight": (mean(linear, lambda p, b: torch.tensor(float("nan"))), ValueError, "weight is nan"),
    "infinite weight": (mean(linear, lambda p, b: float("inf")), ValueError, "weight is inf"),
    "vector weight": (
        mean(linear, lambda p, b: torch.ones(2)),
        ValueError,
        r"weight is a torch.float32 tensor of shape \(2,\)",
    ),
    "complex weight": (mean(linear, lambda p, b: torch.tensor(1j)), ValueError, "weight is a torch.complex64 tensor"),
    "weight of params": (mean(linear, lambda p, b: p["w"]), ValueError, "weight depends on the parameters.*detach"),
    "weight None": (mean(linear, lambda p, b: None), TypeError, "weight is None; it must be a number or"),
    "weight str": (mean(linear, lambda p, b: "3"), TypeError, "weight is a str"),
    "Mean of a vector": (
        mean(lambda p, b: p["w"] * b["x"], lambda p, b: 2),
        ValueError,
        r"Mean whose total is a tensor of shape \(2,\)",
    ),
    "Mean of None": (mean(lambda p, b: None, lambda p, b: 2), TypeError, "Mean whose total is None"),
    "Mean of integers": (
        mean(lambda p, b: b["x"].sum().long(), lambda p, b: 2),
        TypeError,
        "total is a tensor of dtype torch.int64",
    ),
    "sum of Means": (
        lambda p, b: gradacc.Mean(linear(p, b), 2) + gradacc.Mean(linear(p, b), 3),
        ValueError,
        r"a sum of Means.*not a.value \+ b.value.*Mean\(pooled.total, pooled.weight\).*reduction='sum'",
    ),
    "sum() of Means": (
        lambda p, b: sum(gradacc.Mean(linear(p, b), n) for n in (1, 2, 3)),
        ValueError,
        r"a sum of Means.*not a.value \+ b.value",
    ),
    "tuple of Means": (
        lambda p, b: (gradacc.Mean(linear(p, b), 2), gradacc.Mean(linear(p, b), 3)),
        TypeError,
        r"a tuple of 2 Means; pass has_aux=True for .* the loss alone is differentiated\. .*reduction='sum'",
    ),
    "tuple of three Means": (
        lambda p, b: (gradacc.Mean(linear(p, b), 2),) * 3,
        TypeError,
        r"a tuple of 3 Means.*reduction='sum'",
    ),
    "list of Means": (
        lambda p, b: [gradacc.Mean(linear(p, b), 2)] * 2,
        TypeError,
        r"a list of 2 Means; it must return.*reduction='sum'",
    ),
    "dict of Means": (
        lambda p, b: {"ce": gradacc.Mean(linear(p, b), 2), "box": gradacc.Mean(linear(p, b), 3)},
        TypeError,
        r"a dict of 2 Means; it must return.*reduction='sum'",
    ),
    "tuple of losses": (
        lambda p, b: (linear(p, b), linear(p, b)),
        TypeError,
        "a tuple of 2; pass has_aux=True .* the loss alone is differentiated. Or are they several losses. Return their sum",
    ),
    "two kinds": (
        lambda p, b: gradacc.Mean(linear(p, b), 1) if b["x"][0] == 0 else linear(p, b),
        TypeError,
        "a Mean for one micro-batch and a tensor for another",
    ),
}

READS_VALUES = {"NaN weight"}
"""Floating tensors whose values cannot be read while a transform is active: there, these are not errors."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", LOSSES)
def test_bad_losses(case, engine):
    loss, error, message = LOSSES[case]
    if engine == "functional" and case in READS_VALUES:
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(PARAMS, BATCH))
        return
    before = fingerprint((PARAMS, BATCH))
    with pytest.raises(error, match=f"(?s)^accumulate: .*{message}"):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(PARAMS, BATCH))
    assert fingerprint((PARAMS, BATCH)) == before


X = torch.ones(6, 2)
NOTES = {
    # name: (options, arguments after params, what a loss's own error says more)
    "a target": (
        dict(steps=2),
        (X, X[:, 0]),
        [r"args\[2\] has the batch's .* size, 6, but .* in_dims=\(None, 0, 0\)\?"],
    ),
    "two of three": (
        dict(microbatch_size=2),
        (X, {"y": X, "z": X[:, 0]}, torch.ones(2), X),
        [r"args\[2\] and args\[4\] have .* are passed whole; did you mean in_dims=\(None, 0, 0, None, 0\)\?"],
    ),
    "another size": (dict(steps=2), (X, X.T), []),
    "a scalar": (dict(steps=2), (X, torch.tensor(2.0), 6), []),
    "two sizes": (dict(steps=2), (X, {"y": X, "z": torch.ones(2)}), []),
    "one example": (dict(steps=2), (X[:1], X[:1]), []),
    "said so": (dict(steps=2, in_dims=(None, 0, None)), (X, X), []),
    "micro-batches": ({}, ([{"x": X}], torch.ones(1)), []),
    "parts": ({}, ([X],), [r"the batch is a list of 1 \(float32\[6, 2\]\), read as 1 micro-batch; .* pass steps="]),
    "parts, said so": (dict(split=iter), ([X],), []),
    "micro-batches, split": (dict(steps=2), ([{"x": X}, {"x": X}],), [r"args\[1\] is a list, .* passed without steps"]),
    "a pair": (dict(steps=2), ((X, X),), []),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_losss_own_error_tells_what_was_not_split(case):
    given, args, notes = NOTES[case]
    error = RuntimeError("shapes differ")
    options = _options.options("accumulate", loss_fn, _options.Given(**given))
    _call.note_unsplit(error, options, (PARAMS, *args))
    found = getattr(error, "__notes__", [])
    assert len(found) == len(notes)
    assert all(re.match(f"accumulate: {note}", text) for note, text in zip(notes, found, strict=True)), found


def test_it_tells_what_was_given_by_keyword():
    with pytest.raises(RuntimeError) as caught:
        gradacc.accumulate(lambda w, x, y: (x @ w - y).square().mean(), steps=2)(torch.ones(2), X, y=X[:, 0])
    (note,) = caught.value.__notes__
    assert "the keyword argument 'y' has the batch's leading size, 6" in note
    assert "in_dims=(None, 0, 0)? (keyword arguments are never split" in note


def pairs(w, x, y):
    return (x @ w - y).square().mean()


@pytest.mark.parametrize("cut", [dict(steps=6), dict(steps=9), dict(microbatch_size=1)])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_one_example_would_be_broadcast_with_is_said(engine, cut):
    """The mean of all pairs, without an error."""
    grad_fn = gradacc.accumulate(pairs, **cut)
    message = (
        r"accumulate: args\[2\] has the batch's leading size, 6, .*in_dims=\(None, 0, 0\)\? Micro-batches have one"
    )
    with pytest.warns(UserWarning, match=message):
        ENGINES[engine](lambda: grad_fn(torch.ones(2), X, X[:, 0]))
    with pytest.warns(UserWarning, match="the keyword argument 'y'"):
        ENGINES[engine](lambda: grad_fn(torch.ones(2), X, y=X[:, 0]))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (dict(steps=6, in_dims=(None, 0, None)), 6),
        (dict(steps=6, in_dims=(None, 0, 0)), 6),
        (dict(steps=6), 1),
        (dict(steps=1), 6),
    ],
)
def test_what_is_said_or_cannot_be_broadcast_is_nothing_to_speak_of(options, rows):
    gradacc.accumulate(pairs, **options)(torch.ones(2), X, X[:rows, 0])


def test_an_error_of_ours_gets_no_note():
    options = _options.options("accumulate", loss_fn, _options.Given(steps=2))
    with pytest.raises(TypeError) as caught:
        _loss.target_of(options, None)
    _call.note_unsplit(caught.value, options, (PARAMS, X, X))
    assert not hasattr(caught.value, "__notes__")


def test_a_mean_is_not_a_sum():
    with pytest.raises(ValueError, match="leave reduction='sum' out"):
        gradacc.accumulate(mean(linear, lambda p, b: 2), steps=2, reduction="sum")(PARAMS, BATCH)


@pytest.mark.parametrize(
    "out", [lambda p, b: linear(p, b), lambda p, b: (linear(p, b), 1, 2), lambda p, b: [linear(p, b), 1]]
)
def test_has_aux_needs_a_pair(out):
    with pytest.raises(TypeError, match=r"with has_aux=True loss_fn must return \(loss, aux\), got"):
        gradacc.accumulate(out, steps=2, has_aux=True)(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("out", "kind"),
    [
        (lambda m: (m, m, m), "must return .* a tuple of 3 Means"),
        (lambda m: [m, m], "must return .* a list of 2 Means"),
        (lambda m: ({"a": m, "b": m}, 1), "returned a dict of 2 Means"),
        (lambda m: ((m, m), 1), "returned a tuple of 2 Means"),
    ],
)
def test_several_means_and_aux_name_what_works(out, kind):
    with pytest.raises(TypeError, match=rf"{kind}.*count what each is a mean of.*reduction='sum'"):
        gradacc.accumulate(lambda p, b: out(gradacc.Mean(linear(p, b), 2)), steps=2, has_aux=True)(PARAMS, BATCH)


def test_sharded_parameters_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = {"w": distribute_tensor(torch.ones(2), mesh, [Replicate()])}
        with pytest.raises(
            TypeError, match=r"params\['w'\] is a DTensor of shape \(2,\).*not supported yet.*full_tensor"
        ):
            gradacc.accumulate(lambda p, b: (p["w"] * b).mean(), steps=2)(params, torch.ones(4, 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_that_is_passed_whole_is_named(engine):
    def loss(p, x, y):
        return (p["w"] * x - y).square().mean()

    x = torch.arange(6.0)
    with pytest.raises(RuntimeError) as caught:
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(PARAMS, x, x))
    assert "did you mean in_dims=(None, 0, 0)?" in caught.value.__notes__[0]
