"""Micro-batches in another order than the batch's: what a split of one's own says, and every way to say it wrongly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradacc
from gradacc.data import Reordered
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal

D = torch.float64
X = torch.arange(15, dtype=D).view(5, 3).sin()
ORDER = [[3], [], [4, 0, 1], [2]]


def by(order, parts=None):
    """A split that takes these examples."""
    return lambda x: Reordered(
        [x[torch.as_tensor(some, dtype=torch.int64)] for some in order] if parts is None else parts(x), order
    )


def loss_fn(w, x):
    own = (x * w).sin().sum(1)
    return own.mean(), {"own": own, "rows": x * w, "sum": gradacc.Mean(own.sum(), len(x)), "mean": own.mean()}


def func(w, x):
    return (x * w).sin().cumsum(1)


@st.composite
def orders(draw):
    """Of 1 to 6 examples, empty micro-batches among them."""
    places = draw(st.integers(1, 6).flatmap(lambda number: st.permutations(range(number))))
    ends = sorted(draw(st.lists(st.integers(0, len(places)), max_size=4)))
    return [places[low:high] for low, high in zip([0, *ends], [*ends, len(places)], strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
@given(order=orders())
def test_any_order_is_the_large_batch(engine, order):
    x, w = torch.arange(3.0 * sum(map(len, order)), dtype=D).view(-1, 3).cos(), torch.tensor([1.0, -2.0, 0.5], dtype=D)
    expected = torch.func.grad(lambda w: loss_fn(w, x)[0])(w), loss_fn(w, x)[1]
    found = ENGINES[engine](lambda: gradacc.accumulate(loss_fn, split=by(order), has_aux=True)(w, x))
    assert_trees_close(found[0], expected[0])
    sums = found[1].pop("sum"), expected[1].pop("sum")
    assert_trees_close(sums[0].value, sums[1].value)
    assert_trees_close(found[1], expected[1])


@given(order=orders())
def test_any_order_is_the_function_with_derivatives(order):
    x = torch.arange(3.0 * sum(map(len, order)), dtype=D).view(-1, 3).cos().requires_grad_()
    w = torch.tensor([1.0, -2.0, 0.5], dtype=D, requires_grad=True)
    weights = torch.arange(x.numel(), dtype=D).view(x.shape).sin()

    def derivatives(func):
        output = func(w, x)
        first = torch.autograd.grad((output.square() * weights).sum(), (w, x), create_graph=True)
        return output, first, torch.autograd.grad(sum(grad.sin().sum() for grad in first), (w, x))

    pieces = gradacc.microbatch(func, split=by(order), in_dims=(None, 0))
    assert_trees_close(derivatives(pieces), derivatives(func))
    grad = torch.func.grad(lambda func, w, x: (func(w, x).square() * weights).sum(), argnums=(1, 2))
    assert_trees_close(grad(pieces, w.detach(), x.detach()), grad(func, w.detach(), x.detach()))


def test_compiled_it_is_the_large_batch():
    """Where the order itself is no value of the batch."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    expected = gradacc.accumulate(loss_fn, split=by(ORDER), has_aux=True)(w, X)
    parts = [X[some] for some in ORDER]

    def grads(w, *parts):
        split = by(ORDER, lambda x: list(parts))
        return gradacc.accumulate(loss_fn, split=split, has_aux=True)(w, X)

    found = torch.compile(grads, fullgraph=True, backend="eager")(w, *parts)
    assert_trees_close(found, expected)


def test_order_may_be_tensors():
    order = torch.tensor([3, 1, 4, 0, 2]).split(2)
    parts = by(order)(X)
    assert parts.order == ((3, 1), (4, 0), (2,))
    assert_trees_equal(gradacc.microbatch(lambda x: x, split=by(order))(X), X)


def test_what_has_no_order_is_as_it_comes():
    order = [[3, 1], [4, 0, 2]]
    found = gradacc.microbatch(lambda x: x.sum(0), out="stack", split=by(order))(X)
    assert_trees_close(found, torch.stack([X[some].sum(0) for some in order]))
    assert_trees_close(gradacc.microbatch(lambda x: x.sum(0), out="sum", split=by(order))(X), X.sum(0))
    assert gradacc.microbatch(lambda x: 3, split=by(order))(X) == 3


def test_dropped_micro_batches_keep_their_rows():
    x = X.clone()
    x[4] = float("nan")
    grad_fn = gradacc.accumulate(lambda w, x: ((x * w).mean(), x), split=by(ORDER), has_aux=True, nonfinite="drop")
    grads, aux = grad_fn(torch.ones((), dtype=D), x)
    assert_trees_equal(aux, x)
    assert_trees_close(grads, x[[3, 2]].mean())


WRONG = {
    "one twice": ([[0, 1], [1, 2]], ValueError, "must be 0 to 3, each once; it has 1 twice"),
    "one left out": ([[0, 1], [3]], ValueError, "must be 0 to 2, each once; it has 3, and not 2"),
    "negative": ([[-1, 0], [1]], ValueError, "it has -1, and not 0"),
    "flat": ([3, 1, 0, 2], TypeError, "order must be a sequence with a sequence of ints for each micro-batch"),
    "floats": ([[0.0, 1.0]], TypeError, "order must be a sequence with a sequence of ints"),
    "nothing": (None, TypeError, "got None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_order_that_is_none(case):
    order, error, message = WRONG[case]
    with pytest.raises(error, match=f"Reordered: .*{message}"):
        Reordered([X], order)


@pytest.mark.parametrize("parts", [X, 3, None])
def test_micro_batches_that_are_none(parts):
    with pytest.raises(TypeError, match="Reordered: microbatches must be an iterable of them"):
        Reordered(parts, [[0]])


def both(split):
    """Calls of either transform, with the name that its message begins with."""
    w = torch.ones((), dtype=D)
    yield "accumulate", lambda: gradacc.accumulate(lambda w, x: ((x * w).mean(), x), split=split, has_aux=True)(w, X)
    yield "microbatch", lambda: gradacc.microbatch(lambda x: x.sum(1), split=split)(X)
    with torch.no_grad():
        yield "microbatch", lambda: gradacc.microbatch(lambda x: x.sum(1), split=split)(X)


def test_as_many_micro_batches_as_the_order_has():
    for parts, number in ((lambda x: [x[:2]], 1), (lambda x: x.split(1), 5), (lambda x: iter(()), 0)):
        for name, call in both(by([[3, 4], [0, 1, 2]] if number < 5 else [[3], [4], [0, 1, 2]], parts)):
            with pytest.raises(
                ValueError, match=f"{name}: .*(has {number} micro-batches, and an order of|split put 3)"
            ):
                call()


def test_as_many_examples_as_the_order_has():
    for name, call in both(by([[3, 4], [0, 1, 2]], lambda x: x.split([3, 2]))):
        with pytest.raises(
            ValueError, match=f"{name}: split put 2 examples into a micro-batch whose tensors have size 3"
        ):
            call()


def test_as_many_rows_as_the_order_has():
    def split(x):
        order = [[3, 4], [0, 1, 2]]
        return Reordered([{"x": x[some], "twice": x[some].repeat(2, 1)} for some in order], order)

    def loss(w, batch):
        return gradacc.Mean((w * batch["x"]).sum(), len(batch["x"])), batch["twice"]

    w = torch.ones((), dtype=D)
    with pytest.raises(
        ValueError, match=r"accumulate: aux has 4 rows of a micro-batch of 2 examples, .* Return one row"
    ):
        gradacc.accumulate(loss, split=split, has_aux=True)(w, X)
    with pytest.raises(ValueError, match=r"microbatch: output\['twice'\] has 4 rows of a micro-batch of 2 examples"):
        gradacc.microbatch(lambda batch: batch, split=split)(X)
    with pytest.raises(ValueError, match=r"output\['twice'\] has 4 rows"):
        torch.func.grad(lambda x: gradacc.microbatch(lambda batch: batch, split=split)(x)["twice"].sum())(X)
    grads = gradacc.accumulate(lambda w, batch: loss(w, batch)[0], split=split)(w, X)
    assert_trees_close(grads, X.sum() / 5)


def test_it_holds_what_it_was_given() -> None:
    parts: list[Tensor] = [X[3:], X[:3]]
    given = Reordered(iter(parts), [[3, 4], [0, 1, 2]])
    assert all(part is own for part, own in zip(given, parts, strict=True))
