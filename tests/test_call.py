"""A call's arguments: which are differentiated, which are split, and clear errors for what arrived instead."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import optree
import pytest
import torch
from torch import Tensor, nn

import gradacc
from gradacc import _call, _loss, _options
from tests.helpers import ENGINES, assert_trees_close, fingerprint, squares

D = torch.float64


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("argnums", "order"), [((0, 2), "wxb"), ((2, 0), "wxb"), ((1, -1), "xwb"), (1, "xwb"), (-1, "xbw"), ((0,), "wxb")]
)
def test_argnums(argnums, order, engine):
    values = {
        "x": torch.arange(6, dtype=D).view(3, 2).sin(),
        "w": torch.ones(2, dtype=D),
        "b": torch.tensor(2.0, dtype=D),
    }

    def loss(*args):
        named = dict(zip(order, args, strict=True))
        return (named["x"] @ named["w"] + named["b"]).square().mean()

    args = [values[name] for name in order]
    expected = torch.func.grad_and_value(loss, argnums=argnums)(*args)
    run = ENGINES[engine]
    assert_trees_close(run(lambda: gradacc.accumulate_and_value(loss, steps=2, argnums=argnums)(*args)), expected)


class Layer(NamedTuple):
    w: Tensor
    b: Tensor


@dataclass
class Registered:
    w: Tensor
    b: Tensor


@dataclass
class ForTorch:
    w: Tensor
    b: Tensor


optree.register_pytree_node(
    Registered, lambda node: ((node.w, node.b), None), lambda _, xs: Registered(*xs), namespace="gradacc"
)
torch.utils._pytree.register_dataclass(ForTorch)


@pytest.mark.parametrize("kind", [dict, Layer, Registered, ForTorch, "nested", "optree dataclass"])
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_are_any_pytree(kind, engine, batch):
    w, b = torch.ones(3, dtype=D), torch.ones((), dtype=D)
    if kind == "nested":
        params = [({"w": w}, None), [b]]
        get = lambda p: (p[0][0]["w"], p[1][0])  # noqa: E731
    elif kind == "optree dataclass":
        Node = optree.dataclasses.make_dataclass("Node", [("w", Tensor), ("b", Tensor)], namespace="gradacc")  # noqa: N806
        params = Node(w, b)
        get = lambda p: (p.w, p.b)  # noqa: E731
    else:
        params = kind(w=w, b=b)
        get = (lambda p: (p["w"], p["b"])) if kind is dict else (lambda p: (p.w, p.b))

    def loss(params, batch):
        w, b = get(params)
        return squares({"w": w, "b": b}, batch)

    expected = torch.func.grad(squares)({"w": w, "b": b}, batch)
    grads = ENGINES[engine](lambda: get(gradacc.accumulate(loss, steps=3)(params, batch)))
    assert_trees_close(grads, (expected["w"], expected["b"]))
    assert type(gradacc.accumulate(loss, steps=3)(params, batch)) is type(params)


@pytest.mark.parametrize("engine", ENGINES)
def test_tied_unused_and_odd_parameters(engine):
    base = torch.arange(12, dtype=D).view(3, 4).cos()
    tied = base[0].clone()
    params = {
        "tied": [tied, tied],
        "unused": torch.ones(2, 3, dtype=torch.float32),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 4, dtype=D).expand(3, 4),
        "empty": torch.ones(0, 5, dtype=D),
        "scalar": torch.tensor(2.0, dtype=D),
        "complex": torch.tensor([1 + 2j, 3j], dtype=torch.complex128),
    }
    x = torch.arange(5, dtype=D).sin()

    def loss(p, x):
        common = p["tied"][0] @ p["tied"][1] + p["transposed"].square().sum() + p["strided"].exp().sum()
        odd = (p["expanded"] * base).square().sum() + p["empty"].sum() + p["complex"].abs().square().sum()
        return (x * common * p["scalar"] + x * x * odd).mean()

    expected = torch.func.grad_and_value(loss)(params, x)
    actual = ENGINES[engine](lambda: gradacc.accumulate_and_value(loss, steps=3)(params, x))
    assert_trees_close(actual, expected)
    assert (actual[0]["unused"] == 0).all()


def test_arguments_passed_whole_are_the_callers_own_objects(params, batch):
    def loss(params, batch, log, *, more):
        log.append(len(batch["x"]))
        more["calls"] = more.get("calls", 0) + 1
        return squares(params, batch)

    log, more = [], {}
    gradacc.accumulate(loss, steps=3)(params, batch, log, more=more)
    assert log == [3, 2, 2]
    assert more == {"calls": 3}


def loss_fn(params, batch):
    return (params["w"] * batch["x"]).square().mean()


PARAMS = {"w": torch.tensor(2.0)}
BATCH = {"x": torch.arange(4.0)}


class Unregistered:
    pass


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
        r"Give .*\. If args\[1\]\['x'\] is a list of ragged examples, pad them into one tensor, or cut .* with split=$",
    ),
    "ragged examples beside a tensor": (
        dict(steps=2),
        (PARAMS, {"image": torch.ones(3, 8), "target": [{"box": torch.ones(n, 4)} for n in (2, 1, 5)]}),
        ValueError,
        r"\['image'\] has 3, args\[1\]\['target'\]\[0\]\['box'\] has 2.*"
        r"If args\[1\]\['target'\] is a list of ragged examples, pad them into one tensor, or cut the batch with split=$",
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
        "no tensor to split in the batch.* convert lists .* first",
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
    "examples": (
        {},
        ([(X, {"y": X}), (X, {"y": X})],),
        [r"the batch is a list of 2 \(a tuple, a tuple\), read as 2 micro-batches; .* pass steps= or split="],
    ),
    "micro-batches, split": (dict(steps=2), ([{"x": X}, {"x": X}],), [r"args\[1\] is a list, .* passed without steps"]),
    "a pair": (dict(steps=2), ((X, X),), []),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_losss_own_error_tells_what_was_not_split(case):
    given, args, notes = NOTES[case]
    error = RuntimeError("shapes differ")
    options = _options.options("accumulate", loss_fn, **given)
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
    options = _options.options("accumulate", loss_fn, steps=2)
    with pytest.raises(TypeError) as caught:
        _loss.target_of(options, None)
    _call.note_unsplit(caught.value, options, (PARAMS, X, X))
    assert not hasattr(caught.value, "__notes__")


def test_sharded_parameters_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = {"w": distribute_tensor(torch.ones(2), mesh, [Replicate()])}
        with pytest.raises(
            TypeError,
            match=r"params\['w'\] is a DTensor of shape \(2,\).*sync=gradacc.reduce_scatter\(mesh\).*full_tensor",
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
