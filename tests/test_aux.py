"""Aux leaf by leaf, and what an empty or rowless micro-batch counts for."""

import gc
import weakref

import numpy as np
import pytest
import torch

import gradacc
from gradacc import Mean
from tests.helpers import ENGINES, assert_trees_close, fingerprint, squares

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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "Mean"])
def test_aux_is_what_the_large_batch_would_have_returned(reduction, engine, params, batch):
    def loss(params, batch):
        residual = batch["x"] @ params["w"] - batch["y"]
        weight = (batch["y"] > 0).sum() if reduction == "Mean" else torch.tensor(float(len(residual)), dtype=D)
        total = (residual.square() * (batch["y"] > 0 if reduction == "Mean" else 1)).sum()
        average = (residual * (batch["y"] > 0 if reduction == "Mean" else 1)).sum() / weight
        aux = {
            "residual": residual,
            "nested": (
                gradacc.Mean(residual.abs().sum(), len(residual)),
                [gradacc.Mean(batch["x"].sum(0), torch.ones(3))],
            ),
            "average": average,
            "labels": batch["y"] > 0,
            "nothing": None,
        }
        return {"mean": total / weight, "sum": total, "Mean": gradacc.Mean(total, weight)}[reduction], aux

    value, expected = loss(params, batch)
    options = dict(reduction="sum") if reduction == "sum" else {}
    run = ENGINES[engine]
    # The weight of a column sum is a number of micro-batches: Means add, whatever they count.
    actual = run(lambda: gradacc.accumulate_and_value(loss, steps=3, has_aux=True, **options)(params, batch))[1]
    expected["nested"][1][0] = gradacc.Mean(batch["x"].sum(0), torch.full((3,), 3.0))
    assert_trees_close(actual, (value, expected))
    assert (
        run(lambda: gradacc.accumulate(loss, steps=3, has_aux=True, **options)(params, batch))[1].keys()
        == expected.keys()
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        (lambda x: torch.tensor(3), r"aux\['leaf'\] is a torch.int64 tensor of shape \(\)"),
        (lambda x: torch.ones(5), r"shape \(5,\)"),
        (lambda x: 1.5, r"1.5 \(float\)"),
        (lambda x: "text", "a str"),
    ],
)
def test_aux_that_cannot_be_put_together_is_an_error(leaf, named, engine):
    def loss(w, x):
        return (w * x).mean(), {"leaf": leaf(x)}

    with pytest.raises(TypeError, match=f"(?s){named}.*gradacc.Mean.*micro-batch's size is 2"):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2, has_aux=True)(torch.ones(()), torch.ones(4)))


@pytest.mark.parametrize(("total", "weight"), [(1.0, 2), (torch.ones(()), "2"), (torch.ones(()), None)])
def test_a_mean_in_aux_is_of_a_tensor_and_a_number(total, weight):
    with pytest.raises(TypeError, match=r"aux\['m'\] is a Mean of .*; its total must be a tensor"):
        gradacc.accumulate(lambda w, x: ((w * x).mean(), {"m": gradacc.Mean(total, weight)}), steps=2, has_aux=True)(
            torch.ones(()), torch.ones(4)
        )


def test_aux_of_another_structure_or_kind_is_an_error():
    def structure(w, x):
        return (w * x).mean(), {str(len(x)): w}

    def kind(w, x):
        return (w * x).mean(), x if len(x) == 2 else x.sum()

    with pytest.raises(ValueError, match="another structure"):
        gradacc.accumulate(structure, steps=2, has_aux=True)(torch.ones(()), torch.ones(3))
    with pytest.raises(TypeError, match="same kind"):
        gradacc.accumulate(kind, steps=2, has_aux=True)(torch.ones(()), torch.ones(3))


def test_aux_keeps_no_graph_and_does_not_alias_the_batch(params, batch):
    def loss(params, batch):
        return squares(params, batch), (batch["x"], params["b"] * 1, gradacc.Mean(params["b"], 1))

    grads, (value, (x, b, mean)) = gradacc.accumulate_and_value(loss, steps=1, has_aux=True)(params, batch)
    for leaf in (x, b, mean.total, value, *grads.values()):
        assert leaf.grad_fn is None
        assert not leaf.requires_grad
    before = fingerprint((params, batch))
    for leaf in (x, b, mean.total, value, *grads.values()):
        leaf.zero_()
    assert fingerprint((params, batch)) == before


def test_an_aux_vector_of_the_batchs_size_is_taken_for_a_batch_dimension():
    """Documented: two classes, micro-batches of two. Mean says what is meant."""

    def per_class(w, x, meant):
        counts = torch.stack([(x > 0).sum(), (x <= 0).sum()])
        return (w * x).mean(), gradacc.Mean(counts, 1) if meant else counts

    x = torch.tensor([1.0, -1.0, 1.0, 1.0])
    wrong = gradacc.accumulate(lambda w, x: per_class(w, x, False), steps=2, has_aux=True)(torch.ones(()), x)[1]
    right = gradacc.accumulate(lambda w, x: per_class(w, x, True), steps=2, has_aux=True)(torch.ones(()), x)[1]
    assert wrong.tolist() == [1, 1, 2, 0]
    assert right.total.tolist() == [3, 1]


def test_a_loader_may_refill_its_buffer():
    buffer = torch.zeros(2)

    def loader():
        for i in range(3):
            yield buffer.fill_(i)

    aux = gradacc.accumulate(lambda w, x: ((w * x).mean(), x), has_aux=True)(torch.ones(()), loader())[1]
    assert aux.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_aux_of_different_shapes_is_named(engine):
    def loss(w, x):
        return (w * x).mean(), {"each": x}

    batch = [torch.ones(2, 3), torch.ones(2, 4)]
    with pytest.raises(
        ValueError, match=r"aux\['each'\] has shape \(2, 3\) in one micro-batch and \(2, 4\) in another"
    ):
        ENGINES[engine](lambda: gradacc.accumulate(loss, split=iter, has_aux=True)(torch.ones(()), batch))
