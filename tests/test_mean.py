"""`Mean`: an element of a commutative monoid, and a pytree node."""

import copy
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradacc
from gradacc import Mean
from gradacc._mean import value_of
from gradacc.testing import check_accumulation
from tests.helpers import ENGINES, assert_trees_close

numbers = st.integers(-100, 100)
means = st.builds(
    lambda total, weight: Mean(torch.tensor(total, dtype=torch.float64), weight), numbers, st.integers(0, 100)
)


def same(a, b):
    return a.total == b.total and a.weight == b.weight


@given(means, means, means)
def test_monoid(a, b, c):
    zero = Mean(torch.tensor(0.0, dtype=torch.float64), 0)
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))  # exact: integers
    assert same(a + zero, a)
    assert same(sum([a, b, c]), a + b + c)


def test_value():
    assert Mean(torch.tensor(6.0), 4).value == 1.5
    assert Mean(torch.tensor(0.0), 0).value.isnan()
    torch.testing.assert_close(Mean(torch.ones(2), torch.tensor([1.0, 4.0])).value, torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("other", [1, 0.5, "x", None, torch.ones(())])
def test_it_adds_to_means_only(other):
    with pytest.raises(TypeError):
        Mean(torch.ones(()), 1) + other


def test_it_is_a_pytree_node_to_optree_and_to_torch():
    mean = Mean(torch.ones(2), torch.tensor(3))
    doubled = optree.tree_map(lambda x: 2 * x, mean, namespace="gradacc")
    assert doubled.weight == 6
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, {"m": mean})["m"]
    assert isinstance(doubled, Mean)
    assert doubled.weight == 6
    batched = torch.func.vmap(lambda x: gradacc.Mean(x.sum(), x[0]))(torch.arange(6.0).view(3, 2))
    assert batched.total.shape == (3,)
    assert optree.tree_accessors(mean, namespace="gradacc")[0].codify("m") == "m.total"


def test_it_is_immutable():
    with pytest.raises(AttributeError):
        Mean(torch.ones(()), 1).weight = 2


# --- several means: NOTE [one sum, two meanings]

D = torch.float64


FACTORS = {
    "number * mean": (lambda mean: 5.0 * mean, 5.0),
    "mean * number": (lambda mean: mean * 5, 5),
    "tensor * mean": (lambda mean: torch.tensor(2.0) * mean, 2.0),
    "mean * tensor": (lambda mean: mean * torch.tensor(2.0), 2.0),
    "NumPy * mean": (lambda mean: np.float64(5.0) * mean, 5.0),
    "mean * NumPy": (lambda mean: mean * np.float32(5.0), 5.0),
    "NumPy's int": (lambda mean: np.int64(3) * mean, 3),
    "Fraction": (lambda mean: Fraction(1, 4) * mean, 0.25),
    "Decimal": (lambda mean: mean * Decimal("0.5"), 0.5),
    "mean / number": (lambda mean: mean / 2, 0.5),
    "mean / tensor": (lambda mean: mean / torch.tensor(4.0), 0.25),
    "-mean": (lambda mean: -mean, -1.0),
    "0": (lambda mean: 0 * mean, 0.0),
}


@pytest.mark.parametrize(("scaled", "factor"), FACTORS.values(), ids=FACTORS)
def test_a_factor_scales_the_value_and_not_the_weight(scaled, factor):
    mean = Mean(torch.tensor(6.0), 4)
    result = scaled(mean)
    assert type(result) is Mean
    assert (result.value.item(), result.weight) == (1.5 * factor, 4)
    assert result.total.dtype == torch.float32
    assert (mean.total.item(), mean.weight) == (6.0, 4)
    # A sum of two is one with a factor, too.
    assert scaled(mean + mean)._pooled
    assert not result._pooled


def test_arithmetic_of_values_is_refused_and_names_what_works():
    mean = Mean(torch.tensor(6.0), 4)
    t = torch.tensor(2.0)
    cases = {
        r"Write it with a number or a 0-dim tensor": [
            lambda: mean * mean,
            lambda: mean / mean,
            lambda: mean * "2",
            lambda: mean * torch.ones(2),
            lambda: np.ones(2) * mean,
            lambda: mean * 1j,
            lambda: None * mean,
        ],
        r"Mean\(mean.total \+ mean.weight \* term, mean.weight\)": [
            lambda: mean + 1.0,
            lambda: 1.0 + mean,
            lambda: 1 + mean,
            lambda: mean + t,
            lambda: t + mean,
            lambda: mean - t,
            lambda: t - mean,
            lambda: mean - mean,
            lambda: sum([mean], start=1.0),
        ],
    }
    for message, operations in cases.items():
        for operation in operations:
            with pytest.raises(
                TypeError, match=rf"^gradacc\.Mean: .*{message}.*a tuple, list or dict: \(a, 5.0 \* b\)"
            ):
                operation()


def test_the_value_of_several_is_the_sum_of_those_that_have_a_weight():
    one, nothing = Mean(torch.tensor(6.0), 4), Mean(torch.tensor(0.0), 0)
    assert value_of((one, nothing, 2 * one)) == 4.5
    assert value_of({"a": one, "b": Mean(torch.tensor(0.0), torch.tensor(0))}) == 1.5
    assert value_of([nothing]) == 0
    assert value_of(one) == value_of(torch.tensor(1.5)) == 1.5
    assert value_of(nothing).isnan()
    w = torch.tensor(3.0, requires_grad=True)
    value_of([Mean(w * 2, 4), Mean(w * 0, torch.tensor(0))]).backward()
    assert w.grad == 0.5


QUOTIENTS = {
    "5.0 / mean": lambda mean: 5.0 / mean,
    "tensor / mean": lambda mean: torch.tensor(2.0) / mean,
    "a power": lambda mean: mean**2,
    "to a power": lambda mean: 2**mean,
    "tensor to a power": lambda mean: torch.tensor(2.0) ** mean,
    "modulo": lambda mean: mean % 2,
    "floor": lambda mean: mean // 2,
    "matmul": lambda mean: torch.ones(2) @ mean,
    "abs": abs,
    "less": lambda mean: mean < 3,
    "at least": lambda mean: mean >= torch.tensor(3.0),
    "tensor less": lambda mean: torch.tensor(3.0) < mean,
    "max": lambda mean: max(mean, mean),
    "float": float,
    "int": int,
    "complex": complex,
    "round": lambda mean: round(mean, 2),
    "format": lambda mean: f"{mean:.3f}",
}


@pytest.mark.parametrize("operation", QUOTIENTS.values(), ids=QUOTIENTS)
def test_what_is_done_to_a_quotient_names_value(operation):
    with pytest.raises(TypeError, match=r"^gradacc\.Mean: .*Write mean\.value, if the quotient is meant"):
        operation(Mean(torch.tensor(6.0), 4))


def test_so_do_a_tensors_methods():
    mean = Mean(torch.tensor(6.0), 4)
    for name in ("item", "backward", "detach", "shape"):
        with pytest.raises(AttributeError, match=rf"has no '{name}'; its quotient, mean\.value, is a tensor"):
            getattr(mean, name)
    with pytest.raises(AttributeError, match="'Mean' object has no attribute 'totl'"):
        mean.totl  # noqa: B018
    assert f"{mean}" == str(mean) == repr(mean)
    again = pickle.loads(pickle.dumps(copy.deepcopy(mean)))
    assert again.value == mean.value


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize(("weight", "number"), [(1e308, "float64 holds"), (torch.tensor(2**62), "int64 holds")])
def test_weights_that_overflow_together(weight, number, engine):
    """Each is fine; divided by infinity every gradient would be 0."""

    def loss(w, x):
        return Mean((x @ w).sum(), weight)

    w, x = torch.ones(3, dtype=D), torch.ones(6, 3, dtype=D)
    with pytest.raises(ValueError, match=f"^accumulate: the weights of all micro-batches.*{number}"):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=3)(w, x))
    init, update, merge, finalize = gradacc.accumulator(loss)
    state = merge(update(init(w), w, x), update(update(init(w), w, x), w, x))
    with pytest.raises(ValueError, match=f"^accumulator: the weights of all micro-batches.*{number}"):
        finalize(state)
    gradacc.accumulate(loss, steps=1)(w, x)


def test_a_factor_and_a_penalty_as_the_error_says():
    x = torch.arange(7, dtype=D).sin()

    def loss(w, x):
        mean, penalty = 5.0 * Mean((w * x).square().sum(), len(x)), w.square()
        return Mean(mean.total + mean.weight * penalty, mean.weight)

    w = torch.tensor(2.0, dtype=D)
    actual = gradacc.accumulate(loss, steps=3)(w, x)
    torch.testing.assert_close(actual, torch.func.grad(lambda w: 5 * (w * x).square().mean() + w.square())(w))


def detection(params, batch):
    """A mean over tokens and a mean over boxes."""
    ce = (batch["ce"] * batch["tokens"] * params).sum()
    box = (batch["box"] * batch["boxes"] * params.square()).sum()
    return Mean(ce, batch["tokens"].sum()), Mean(box, batch["boxes"].sum())


BATCH = {
    "ce": torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], dtype=D),
    "tokens": torch.tensor([10, 1, 7, 3, 0]),
    "box": torch.tensor([30.0, 40.0, 50.0, 20.0, 70.0], dtype=D),
    "boxes": torch.tensor([1, 0, 0, 2, 0]),
}
P = torch.tensor(1.5, dtype=D)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_what_the_errors_name_is_the_large_batch(steps, engine):
    def loss(params, batch, tokens, boxes):
        ce, box = detection(params, batch)
        return ce.total / tokens + box.total / boxes

    def large(params):
        ce, box = detection(params, BATCH)
        return ce.value + box.value

    counts = BATCH["tokens"].sum(), BATCH["boxes"].sum()
    grad_fn = gradacc.accumulate_and_value(loss, steps=steps, reduction="sum")
    actual = ENGINES[engine](lambda: grad_fn(P, BATCH, *counts))
    assert_trees_close(actual, torch.func.grad_and_value(large)(P))
    pooled = detection(P, BATCH)[0] + detection(P, BATCH)[1]
    assert abs(pooled.value - actual[1]) > 0.5 * actual[1]  # what a + b would have been taken for


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "make", [lambda means: means[0] + means[1], sum, lambda means: Mean(0, 0) + means[0] + means[1]]
)
def test_pooled_it_is_refused_as_a_loss_until_it_is_said(make, engine):
    def summed(params, batch):
        return make(detection(params, batch))

    def said(params, batch):
        pooled = summed(params, batch)
        return Mean(pooled.total, pooled.weight)

    def large(params):
        ce, box = detection(params, BATCH)
        return (ce.total + box.total) / (ce.weight + box.weight)

    with pytest.raises(ValueError, match="^accumulate: loss_fn returned a sum of Means"):
        ENGINES[engine](lambda: gradacc.accumulate(summed, steps=2)(P, BATCH))
    with pytest.raises(ValueError, match="^accumulate: loss_fn returned a sum of Means"):
        ENGINES[engine](lambda: gradacc.accumulate(lambda *a: (summed(*a), {}), steps=2, has_aux=True)(P, BATCH))
    init, update, *_ = gradacc.accumulator(summed)
    with pytest.raises(ValueError, match="^accumulator: loss_fn returned a sum of Means"):
        ENGINES[engine](lambda: update(init(P), P, BATCH))
    with pytest.raises(ValueError, match="^scaled_loss: loss_fn returned a sum of Means"):
        ENGINES[engine](lambda: gradacc.optim.scaled_loss(summed)(P, BATCH, loss_scale=2.0))
    with pytest.raises(ValueError, match="^check_accumulation: loss_fn returned a sum of Means"):
        check_accumulation(summed, P, BATCH)
    actual = ENGINES[engine](lambda: gradacc.accumulate(said, steps=2)(P, BATCH))
    torch.testing.assert_close(actual, torch.func.grad(large)(P))


@pytest.mark.parametrize(
    "through",
    [
        lambda mean: torch.utils._pytree.tree_map(lambda t: t * 1.0, mean),
        lambda mean: torch.utils._pytree.tree_map_with_path(lambda _, t: t * 1.0, mean),
        lambda mean: torch.utils._pytree.tree_map(
            torch.sum, torch.vmap(lambda one: Mean(mean.total * one, one) + Mean(mean.total * one, one))(torch.ones(3))
        ),
    ],
    ids=["tree_map", "tree_map_with_path", "vmap"],
)
def test_a_sum_of_means_is_one_behind_a_map(through):
    def loss(params, batch):
        first, second = (Mean(mean.total, mean.weight * 1.0) for mean in detection(params, batch))
        return through(first + second)

    with pytest.raises(ValueError, match="returned a sum of Means"):
        gradacc.accumulate(loss, steps=1)(P, BATCH)


def test_one_mean_is_no_sum():
    loss = lambda params, batch: sum([detection(params, batch)[0]])  # noqa: E731
    expected = torch.func.grad(lambda p: detection(p, BATCH)[0].value)(P)
    torch.testing.assert_close(gradacc.accumulate(loss, steps=2)(P, BATCH), expected)


def test_what_comes_out_may_be_added_and_goes_in_again():
    """Pooling outside of a loss, of values and of aux, is what ``+`` is for."""
    loss = lambda params, batch: (detection(params, batch)[0], detection(params, batch)[0])  # noqa: E731
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, has_aux=True)
    _, (value, aux) = grad_fn(P, BATCH)
    _, (more, _) = grad_fn(P, BATCH)
    both = value + more
    assert both.value == value.value == aux.value
    assert repr(both) == repr(Mean(both.total, both.weight))
    assert optree.tree_structure(both, namespace="gradacc") == optree.tree_structure(value, namespace="gradacc")
    # an aux that is pooled is what the large batch's would be
    pooled = gradacc.accumulate(lambda p, b: (detection(p, b)[0], sum(detection(p, b))), steps=2, has_aux=True)
    assert pooled(P, BATCH)[1].weight == 24
    # and what came out of a fold is no sum that somebody wrote
    again = gradacc.accumulate(lambda w, x: Mean(w * value.total, value.weight), steps=2)
    assert again(torch.ones((), dtype=D), torch.ones(2)) == value.value
    assert not value._pooled
    assert not aux._pooled


def test_compiled_a_sum_of_means_is_refused():
    torch._dynamo.reset()
    compiled = torch.compile(
        gradacc.accumulate(lambda *a: sum(detection(*a)), steps=2), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="a sum of Means"):
        compiled(P, BATCH)
    right = torch.compile(gradacc.accumulate(lambda *a: detection(*a)[0], steps=2), fullgraph=True, backend="eager")
    torch.testing.assert_close(right(P, BATCH), torch.func.grad(lambda p: detection(p, BATCH)[0].value)(P))


# --- weights of every kind of number


WEIGHTS = {
    # name: (a weight, what it is in float64)
    "bool": (True, 1.0),
    "int": (100, 100.0),
    "a large int": (10**30, 1e30),
    "Fraction": (Fraction(1, 3), 1 / 3),
    "Decimal": (Decimal("0.25"), 0.25),
    "NumPy bool": (np.bool_(True), 1.0),
    "NumPy int8": (np.int8(100), 100.0),
    "NumPy uint64": (np.uint64(2**63), 2.0**63),
    "NumPy float16": (np.float16(60000.0), float(np.float16(60000.0))),
    "NumPy float64": (np.float64(0.25), 0.25),
    "NumPy array": (np.array(3), 3.0),
    "tensor": (torch.tensor(3), 3.0),
    "bool tensor": (torch.tensor(True), 1.0),
    "uint8 tensor": (torch.tensor(200, dtype=torch.uint8), 200.0),
    "float16 tensor": (torch.tensor(60000.0, dtype=torch.float16), float(np.float16(60000.0))),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_is_any_number(kind, engine):
    """In three micro-batches, of the loss and of aux; in one call, and streamed."""
    weight, number = WEIGHTS[kind]
    x = torch.arange(3, dtype=D)

    def loss(w, x):
        return Mean((w * x).sum(), weight), {"m": Mean(x.sum(), weight), "v": Mean(torch.stack([x.sum(), w]), weight)}

    def streamed(w, x):
        init, update, merge, finalize = gradacc.accumulator(loss, has_aux=True)
        return finalize(merge(update(update(init(w), w, x[:1]), w, x[1:2]), update(init(w), w, x[2:])))

    w = torch.tensor(2.0, dtype=D)
    for run in (gradacc.accumulate_and_value(loss, steps=3, has_aux=True), streamed):
        grads, (value, aux) = ENGINES[engine](lambda run=run: run(w, x))
        torch.testing.assert_close(grads, torch.tensor(3.0 / (3 * number), dtype=D))
        for mean in (value, aux["m"], aux["v"]):
            assert float(mean.weight) == pytest.approx(3 * number, rel=1e-12)
        torch.testing.assert_close(aux["v"].total, torch.tensor([3.0, 6.0], dtype=D))


BAD_WEIGHTS = {
    "too large": (10**400, "inf"),
    "infinite": (float("inf"), "inf"),
    "NaN": (float("nan"), "nan"),
    "NumPy NaN": (np.float64("nan"), "nan"),
    "complex": (1j, "complex"),
    "NumPy complex": (np.complex128(1), "complex128"),
    "string": ("3", "str"),
    "None": (None, "None"),
    "NumPy vector": (np.ones(2), "numpy.ndarray"),
    "list": ([1], "list"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_what_is_no_weight_is_refused_where_it_comes_from(kind, engine):
    weight, named = BAD_WEIGHTS[kind]
    as_loss = gradacc.accumulate(lambda w, x: Mean((w * x).sum(), weight), steps=2)
    with pytest.raises(
        (TypeError, ValueError), match=f"^accumulate: loss_fn returned a Mean whose weight is .*{named}"
    ):
        ENGINES[engine](lambda: as_loss(torch.ones(()), torch.ones(2)))
    as_aux = gradacc.accumulate(lambda w, x: ((w * x).mean(), {"m": Mean(x.sum(), weight)}), steps=2, has_aux=True)
    with pytest.raises(TypeError, match=r"^accumulate: aux\['m'\] is a Mean of a tensor.*its weight a finite number"):
        ENGINES[engine](lambda: as_aux(torch.ones(()), torch.ones(2)))
