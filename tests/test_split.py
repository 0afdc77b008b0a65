"""How a batch becomes micro-batches: every way to split, by views, and what passes through whole."""

import pytest
import torch

import gradacc
from tests.helpers import ENGINES, assert_trees_close, halves, squares

D = torch.float64
WAYS = {
    "steps": (dict(steps=3), lambda batch: batch),
    "more steps than examples": (dict(steps=50), lambda batch: batch),
    "microbatch_size": (dict(microbatch_size=2), lambda batch: batch),
    "one micro-batch": (dict(microbatch_size=100), lambda batch: batch),
    "split": (dict(split=halves), lambda batch: batch),
    "generator": ({}, halves),
    "list": ({}, lambda batch: list(halves(batch))),
    "tuple with empty ones": ({}, lambda batch: (*halves(batch), {"x": batch["x"][:0], "y": batch["y"][:0]})),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_split_is_the_large_batch(way, engine, params, batch):
    options, divide = WAYS[way]
    expected, value = torch.func.grad_and_value(squares)(params, batch)
    run = ENGINES[engine]
    assert_trees_close(run(lambda: gradacc.accumulate(squares, **options)(params, divide(batch))), expected)
    both = run(lambda: gradacc.accumulate_and_value(squares, **options)(params, divide(batch)))
    assert_trees_close(both, (expected, value))


def test_iterables_are_consumed_lazily_and_one_at_a_time(params, batch):
    seen = []

    def loader():
        for i, part in enumerate(halves(batch)):
            seen.append(f"load {i}")
            yield part

    def loss(params, part):
        seen.append("loss")
        return squares(params, part)

    gradacc.accumulate(loss)(params, loader())
    assert seen == ["load 0", "loss", "load 1", "loss", "load 2", "loss"]


def test_the_callers_iterator_runs_in_the_callers_modes(params, batch):
    modes = []

    def loader():
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        yield batch

    with torch.no_grad():
        gradacc.accumulate(squares)(params, loader())
    with torch.inference_mode():
        gradacc.accumulate(squares)(params, loader())
    assert modes == [(False, False), (False, True)]


def test_micro_batches_are_views_not_copies(params, batch):
    pointers = []

    def loss(params, part):
        pointers.append(part["x"].data_ptr())
        return squares(params, part)

    gradacc.accumulate(loss, steps=3)(params, batch)
    assert pointers == [batch["x"][i].data_ptr() for i in (0, 3, 5)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("in_dims", "args"),
    [
        ((None, 0, 0), lambda x, y: (x, y)),
        ((None, 1, 0), lambda x, y: (x.T.contiguous(), y)),
        ((None, -1, 0), lambda x, y: (x.T, y)),
        ((None, {"x": 1, "rest": None}, 0), lambda x, y: ({"x": x.T, "rest": [torch.ones(2), 3]}, y)),
        ((None, (0, None), 0), lambda x, y: ((x, {"mask": torch.ones(3)}), y)),
    ],
)
def test_in_dims(in_dims, args, engine):
    x, y = torch.arange(10, dtype=D).view(5, 2).sin(), torch.arange(5, dtype=D)

    def loss(w, a, y):
        if isinstance(a, dict):
            assert a["rest"][0].shape == (2,)
            assert a["rest"][1] == 3
            a = a["x"]
        if isinstance(a, tuple):
            a, rest = a
            assert rest["mask"].shape == (3,)
        if in_dims[1] != 0 and not isinstance(in_dims[1], tuple):
            a = a.T
        return (a @ w - y).square().mean()

    w = torch.ones(2, dtype=D)
    expected = torch.func.grad_and_value(loss)(w, *args(x, y))
    run = ENGINES[engine]
    actual = run(lambda: gradacc.accumulate_and_value(loss, steps=3, in_dims=in_dims)(w, *args(x, y)))
    assert_trees_close(actual, expected)


def test_what_is_not_split_is_passed_whole(params, batch):
    table = torch.ones(4, dtype=D)

    def loss(params, batch, table, note):
        assert table.shape == (4,)
        assert note == "note"
        return squares(params, batch) * table.sum()

    expected = torch.func.grad(loss)(params, batch, table, "note")
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, batch, table, "note"), expected)


def test_numbers_and_none_pass_through_the_split(params, batch):
    def loss(params, batch):
        assert batch["power"] == 2
        assert batch["flag"] is True
        assert batch["nothing"] is None
        return squares(params, batch)

    more = batch | {"power": 2, "flag": True, "nothing": None}
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, more), torch.func.grad(loss)(params, more))
