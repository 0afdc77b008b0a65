"""Aux leaf by leaf, and what an empty or rowless micro-batch counts for."""

import gc
import weakref

import numpy as np
import pytest
import torch

import gradacc
from gradacc import Mean
from tests.helpers import ENGINES, assert_trees_close

D = torch.float64
W = torch.tensor(2.0, dtype=D)
X = torch.arange(6, dtype=D)


# --- NOTE [copies of aux]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("engine", ["eager", "fused"])  # torch.func refuses to write into captured memory
@pytest.mark.parametrize("graph", [False, True])
def test_a_buffer_that_is_used_again_shows_each_content(graph, engine, streamed):
    """A loss that writes into memory of its own, once with a graph (an in-place copy has one), once without."""
    memory = torch.zeros(2, dtype=D)

    def loss(w, x):
        out = w * x
        if graph:
            buffer = memory.detach()
            buffer.copy_(out)
            assert buffer.grad_fn is not None
        else:
            buffer = memory.copy_(x * 2)
        return out.sum(), {"out": buffer, "slice": buffer[:, None]}

    def one_by_one(w, x):
        init, update, _, finalize = gradacc.accumulator(loss, has_aux=True, reduction="sum")
        state = init(w)
        for part in x.split(2):
            state = update(state, w, part)
        return finalize(state)[0], finalize(state)[1][1]

    run = one_by_one if streamed else gradacc.accumulate(loss, steps=3, has_aux=True, reduction="sum")
    grads, aux = ENGINES[engine](lambda: run(W, X))
    assert grads == X.sum()
    assert_trees_close(aux, {"out": 2 * X, "slice": 2 * X[:, None]})


def test_a_slice_does_not_keep_what_it_was_cut_from():
    """Of 1000 numbers an example the last one is returned: an earlier micro-batch's others are gone in the next one."""
    alive: list[int] = []
    made: list[weakref.ref[np.ndarray]] = []

    def loss(w, x):
        gc.collect()
        alive.append(sum(memory() is not None for memory in made))
        memory = np.empty((len(x), 1000))
        made.append(weakref.ref(memory))
        many = torch.from_numpy(memory).copy_((w * x)[:, None].expand(len(x), 1000))
        return many.mean(), many[:, -1]

    _, last = gradacc.accumulate(loss, steps=3, has_aux=True)(W, X)
    assert_trees_close(last, W * X)
    assert alive == [0, 0, 0]


# --- Means of other shapes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("total", "weight"),
    [
        ((), (3,)),
        ((1,), (3,)),
        ((3,), ()),
        ((3,), (3,)),
        ((3,), (1,)),
        ((2, 1), (3,)),
        ((2, 1), (2, 3)),
        ((3,), (2, 3)),
        ((1, 3), (2, 1)),
    ],
)
def test_a_mean_of_any_two_shapes_is_the_large_batchs(total, weight, steps, engine):
    def loss(w, x):
        counts = (x[:, None] + 1 + torch.arange(torch.Size(weight).numel())).sum(0).reshape(weight)
        sums = x.sum() * torch.arange(1, torch.Size(total).numel() + 1, dtype=D).reshape(total)
        return (w * x).mean(), {"m": Mean(sums, counts)}

    expected = loss(W, X)[1]["m"]
    _, aux = ENGINES[engine](lambda: gradacc.accumulate(loss, steps=steps, has_aux=True)(W, X))
    assert aux["m"].total.shape == total
    assert aux["m"].weight.shape == weight
    assert_trees_close(aux["m"], expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_total_whose_weights_are_all_0_is_exactly_0(engine):
    def loss(w, x):
        keep = (x > 2).sum()
        bad = torch.where(keep == 0, float("nan"), x.sum())
        vector = torch.stack([keep, keep * 0])
        return (w * x).mean(), (
            Mean(bad, vector),
            Mean(torch.stack([bad, bad]), vector),
            Mean(bad[None], vector[:, None]),
        )

    _, aux = ENGINES[engine](lambda: gradacc.accumulate(loss, steps=3, has_aux=True)(W, X))
    scalar, vector, column = aux
    assert scalar.total == 5 + 9
    assert vector.total.tolist() == [14, 0]
    assert column.total.tolist() == [14]
    assert scalar.weight.tolist() == [3, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mean_does_not_change_its_shape(engine):
    """Totals of each example would be broadcast against another micro-batch's, where one has a single example."""

    def per_example(w, x):
        return (w * x).mean(), {"m": Mean(x, 1)}

    def weights(w, x):
        return (w * x).mean(), {"m": Mean(x.sum(), torch.ones(len(x)))}

    for loss in (per_example, weights):
        with pytest.raises(
            ValueError, match=r"accumulate: aux\['m'\] is a Mean of shapes .* in one micro-batch and .*\(1,\)"
        ):
            ENGINES[engine](lambda loss=loss: gradacc.accumulate(loss, microbatch_size=5, has_aux=True)(W, X))
    init, update, merge, _ = gradacc.accumulator(per_example, has_aux=True)
    a, b = (ENGINES[engine](lambda x=x: update(init(W), W, x)) for x in (X[:5], X[5:]))
    with pytest.raises(ValueError, match=r"accumulator: aux\['m'\] is a Mean of shapes"):
        merge(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_shapes_that_do_not_go_together_are_named(engine):
    loss = lambda w, x: ((w * x).mean(), {"m": Mean(torch.ones(3), torch.ones(2))})  # noqa: E731
    with pytest.raises(
        TypeError, match=r"accumulate: aux\['m'\] is a Mean of .*\(3,\) and .*\(2,\).* a shape that goes with"
    ):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2, has_aux=True)(W, X))


# --- micro-batches without rows


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_sum_what_has_no_rows_but_a_number_counts_in_gradient_and_value(engine):
    """As with one that has rows: what the loss returns is added, and the value is the one whose gradient is returned."""
    parts = [{"x": X[:4], "n": 1}, {"x": X[:0], "n": 5}, {"x": X[4:], "n": 0}]

    def loss(w, part):
        return (w * part["x"]).sum() + w.square() * part["n"]

    def streamed(w, parts):
        init, update, merge, finalize = gradacc.accumulator(loss, reduction="sum")
        return finalize(merge(update(init(w), w, parts[0]), update(update(init(w), w, parts[1]), w, parts[2])))

    expected = torch.func.grad_and_value(lambda w: (w * X).sum() + w.square() * 6)(W)
    for run in (gradacc.accumulate_and_value(loss, reduction="sum"), streamed):
        assert_trees_close(ENGINES[engine](lambda run=run: run(W, parts)), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "Mean"])
def test_what_is_empty_counts_in_neither(reduction, engine):
    """A loss that is not 0 without examples: nothing of it is in the gradient, nor in the value."""

    def loss(w, x):
        total = (w * x).sum() + w.square()
        return Mean(total, len(x) + 3) if reduction == "Mean" else total

    options = {} if reduction == "Mean" else {"reduction": reduction}
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, **options)
    grads, value = ENGINES[engine](lambda: grad_fn(W, X[:0]))
    init, update, _, finalize = gradacc.accumulator(loss, **options)
    streamed, other = ENGINES[engine](lambda: finalize(update(init(W), W, X[:0])))
    assert grads == streamed == 0
    for result in (value, other):
        if reduction == "Mean":
            assert result.total == 0
            assert result.weight == 0
        elif reduction == "sum":
            assert result == 0
        else:
            assert result.isnan()
