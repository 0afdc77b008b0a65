"""`weights=`: what is counted first is what the loss counts, or there is an error."""

import pytest
import torch

import gradacc
from gradacc import Mean

D = torch.float64
X = torch.arange(1.0, 8.0, dtype=D)
W = torch.tensor(2.0, dtype=D)


def loss(w, x):
    return {"a": Mean((w * x).sum(), len(x)), "b": Mean((w * x).square().sum(), (x > 3).sum())}


def right(x):
    return {"a": len(x), "b": (x > 3).sum()}


def accumulated(weights, batch=X, **options):
    if not isinstance(batch, torch.Tensor):
        return gradacc.accumulate_and_value(loss, weights=weights, **options)(W, batch)
    return gradacc.accumulate_and_value(loss, steps=3, weights=weights, **options)(W, batch)


BAD = {
    "a number": (lambda x: 7, TypeError, "weights returned 7 .int.; return a tuple, list or dict like the loss's"),
    "None": (lambda x: None, TypeError, "weights returned None"),
    "nothing": (lambda x: {}, TypeError, "weights returned"),
    "a string": (lambda x: {"a": "7", "b": 4}, TypeError, "weights returned a str"),
    "a vector": (lambda x: {"a": x, "b": 4}, ValueError, r"weights returned a torch.float64 tensor of shape \(7,\)"),
    "negative": (lambda x: {"a": -7, "b": 4}, ValueError, "weights returned -7"),
    "NaN": (lambda x: {"a": float("nan"), "b": 4}, ValueError, "weights returned nan"),
    "other names": (lambda x: {"a": 7, "c": 4}, ValueError, "loss_fn returned .*'b'.* and weights returned .*'c'"),
    "too few": (lambda x: {"a": 7}, ValueError, "return a weight for each Mean"),
    "too many counted": (
        lambda x: {"a": 7, "b": 5},
        ValueError,
        r"weights= counted 5 for loss\['b'\], and the Means that loss_fn returned for it weigh 4 together",
    ),
    "one of a million": (lambda x: {"a": 7 + 1e-4, "b": 4}, ValueError, r"weights= counted 7.0001 for loss\['a'\]"),
    "zero": (lambda x: {"a": 7, "b": 0}, ValueError, r"weights= counted 0 for loss\['b'\]"),
}


@pytest.mark.parametrize(("weights", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_an_error(weights, error, message):
    with pytest.raises(error, match=f"^accumulate_and_value: .*{message}"):
        accumulated(weights)


def test_options_that_do_not_go_together():
    with pytest.raises(TypeError, match="weights must be a function of the batch"):
        gradacc.accumulate(loss, steps=3, weights={"a": 7})
    with pytest.raises(ValueError, match="reduction='sum'.*leave one of them out"):
        gradacc.accumulate(loss, steps=3, weights=right, reduction="sum")
    with pytest.raises(TypeError, match="weights"):
        gradacc.accumulator(loss, weights=right)


@pytest.mark.parametrize(
    "other", [lambda w, x: (w * x).mean(), lambda w, x: Mean((w * x).sum(), len(x)), lambda w, x: [(w * x).mean()]]
)
def test_a_loss_that_is_not_several_means(other):
    with pytest.raises(TypeError, match="weights= counts what several means are divided by"):
        gradacc.accumulate(other, steps=3, weights=right)(W, X)


def test_it_sees_the_batch_alone():
    seen = []

    def noted(*args):
        seen.append(args)
        return right(args[0])

    def of_two(w, x, y, scale):
        return {"a": Mean((w * x * y).sum() * scale, len(x)), "b": Mean((w * x).square().sum(), (x > 3).sum())}

    gradacc.accumulate(of_two, steps=3, in_dims=(None, 0, 0, None), weights=noted)(W, X, X, 2.0)
    ((x, y),) = seen
    assert x is X
    assert y is X


def test_micro_batches_are_counted_one_after_the_other():
    parts = list(X.split(3))
    expected = accumulated(None, X)
    for batch, options in ((parts, {"split": iter}), (tuple(parts), {"split": None}), (X, {})):
        weights = (lambda parts: right(torch.cat(parts))) if options.get("split") else right
        torch.testing.assert_close(accumulated(weights, batch, **options)[0], expected[0])
    with pytest.raises(TypeError, match="gives them once. Pass them as a list, or leave weights= out"):
        accumulated(right, iter(parts))


def test_fractions_are_compared_by_rounding():
    """Weights of float32, summed over micro-batches in another order."""
    x = torch.rand(1001, generator=torch.Generator().manual_seed(0))

    def fractional(w, x):
        return [Mean((w * x).sum(), x.sum()), Mean((w * x).square().sum(), (3 * x).sum())]

    weights = lambda x: [x.sum(), (3 * x).sum()]  # noqa: E731
    grad = gradacc.accumulate(fractional, microbatch_size=1, weights=weights)(torch.ones(()), x)
    torch.testing.assert_close(grad, 1 + 2 * x.square().sum() / (3 * x).sum())


def test_what_cannot_be_read_and_is_wrong_is_nan():
    wrong = lambda x: {"a": torch.tensor(len(x)), "b": (x > 2).sum()}  # noqa: E731
    tensors = lambda w, x: loss(w, x) | {"a": Mean((w * x).sum(), torch.tensor(len(x)))}  # noqa: E731
    for weights, is_right in ((lambda x: {"a": torch.tensor(len(x)), "b": (x > 3).sum()}, True), (wrong, False)):
        grad_fn = gradacc.accumulate(tensors, steps=3, weights=weights)
        grads = torch.vmap(grad_fn, in_dims=(0, None))(torch.stack([W, W]), X)
        assert bool(grads.isfinite().all()) == is_right
        assert bool(grads.isnan().all()) != is_right


def test_the_caller_keeps_its_containers():
    def popped(b):
        return {"a": len(b.pop("x")), "b": b.pop("n").sum()}

    def of_dict(w, b):
        return {"a": Mean((w * b["x"]).sum(), len(b["x"])), "b": Mean((w * b["x"]).sum(), b["n"].sum())}

    batch = {"x": X, "n": torch.ones(7)}
    gradacc.accumulate(of_dict, steps=3, weights=popped)(W, batch)
    assert set(batch) == {"x", "n"}


def test_nothing_anywhere():
    grads, value = gradacc.accumulate_and_value(loss, weights=right)(W, [])
    assert grads == 0
    assert value.isnan()
    grads, value = gradacc.accumulate_and_value(loss, steps=2, weights=right)(W, X[:0])
    assert grads == 0
    assert [mean.weight for mean in value.values()] == [0, 0]
