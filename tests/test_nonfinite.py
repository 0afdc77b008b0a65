"""`nonfinite="drop"`: the large batch without the micro-batches that have a NaN or an inf in them."""

import math

import pytest
import torch

import gradacc
from gradacc import Kept, Mean
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint, some_slow

D = torch.float64
PARAMS = {"w": torch.tensor([1.5, -0.5], dtype=D), "b": torch.tensor(0.25, dtype=D)}
X = torch.arange(1.0, 15.0, dtype=D).view(7, 2).sin()


def batch(*bad):
    """Seven examples; the root of a negative number, whose gradient is NaN, or of 0, whose gradient is inf, in the bad ones."""
    under = torch.ones(7, dtype=D)
    for place, number in bad:
        under[place] = number
    return {"x": X.clone(), "under": under}


def each(p, b):
    return (b["x"] @ p["w"] + p["b"]).square() + (p["b"] * 4 * b["under"]).sqrt()


def mean(p, b):
    return each(p, b).mean()


def counted(p, b):
    return Mean((each(p, b) * (1 + torch.arange(len(b["x"]), device=b["x"].device))).sum(), len(b["x"]) * 2.0)


def several(p, b):
    return [Mean(each(p, b).sum(), len(b["x"])), 0.5 * Mean((b["x"] @ p["w"]).square().sum(), (b["x"] > 0).sum())]


def total(p, b):
    return each(p, b).sum()


LOSSES = {"mean": (mean, {}), "Mean": (counted, {}), "several": (several, {}), "sum": (total, {"reduction": "sum"})}
BAD = {"none": (), "NaN": ((3, -1.0),), "inf": ((0, 0.0),), "two": ((1, -1.0), (6, 0.0)), "the last": ((6, -1.0),)}
SIZES = ((0, 2), (2, 4), (4, 6), (6, 7))


def kept_of(b, bad):
    """The micro-batches of two that have none of the bad examples."""
    places = {place for place, _ in bad}
    return [{k: v[low:high] for k, v in b.items()} for low, high in SIZES if not places & set(range(low, high))]


def without(loss, options, parts):
    """The large batch of them."""
    return gradacc.accumulate_and_value(loss, **options, split=iter)(PARAMS, parts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize(("loss", "options"), LOSSES.values(), ids=LOSSES)
def test_it_is_the_large_batch_without_them(loss, options, bad, engine):
    b = batch(*bad)
    expected, value = without(loss, options, kept_of(b, bad))
    grad_fn = gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop", **options)
    before = fingerprint([PARAMS, b])
    grads, kept = ENGINES[engine](lambda: grad_fn(PARAMS, b))
    assert type(kept) is Kept
    assert kept.dropped == 4 - len(kept_of(b, bad))
    assert kept.dropped.dtype == torch.int64
    assert_trees_close(grads, expected, rtol=1e-12)
    assert_trees_close(numbers(kept.value), numbers(value), rtol=1e-12)
    assert fingerprint([PARAMS, b]) == before
    only = gradacc.accumulate(loss, microbatch_size=2, nonfinite="drop", **options)(PARAMS, b)
    assert_trees_equal(only, grad_fn(PARAMS, b)[0])


def numbers(value):
    """Totals and weights."""
    means = value if isinstance(value, list) else [value]
    return [
        torch.as_tensor(number, dtype=D)
        for mean in means
        for number in ((mean.total, mean.weight) if isinstance(mean, Mean) else (mean,))
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_all_of_them(engine):
    b = batch(*((place, -1.0) for place in range(7)))
    for loss, options in LOSSES.values():
        grad_fn = gradacc.accumulate_and_value(loss, steps=3, nonfinite="drop", **options)
        grads, kept = ENGINES[engine](lambda grad_fn=grad_fn: grad_fn(PARAMS, b))
        assert kept.dropped == 3
        assert_trees_equal(grads, {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()})
        assert all(number == 0 or number.isnan() for number in numbers(kept.value))
    grads, kept = gradacc.accumulate_and_value(mean, nonfinite="drop")(PARAMS, [])
    assert kept.value.isnan()
    assert kept.dropped == 0
    _, kept = gradacc.accumulate_and_value(mean, steps=2, nonfinite="drop")(PARAMS, {k: v[:0] for k, v in b.items()})
    assert kept.dropped == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_loss_with_a_finite_gradient(engine):
    loss = lambda p, b: mean(p, b) + b["more"].mean()  # noqa: E731
    b = batch() | {"more": torch.tensor([0, 0, math.inf, 0, 0, 0, 0], dtype=D)}
    grads, kept = ENGINES[engine](
        lambda: gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop")(PARAMS, b)
    )
    expected, value = without(mean, {}, kept_of(b, [(2, 0)]))
    assert_trees_close((grads, kept.value), (expected, value))
    # Without it, the whole window is lost.
    assert gradacc.accumulate_and_value(loss, microbatch_size=2)(PARAMS, b)[1] == math.inf


@pytest.mark.parametrize("engine", ENGINES)
def test_a_term_of_weight_0_is_no_reason(engine):
    """A NaN in the value of nothing: the mean of no boxes."""

    def loss(p, b):
        boxes = (p["b"] * b["n"]).sum() + b["nan"].sum()
        return [Mean(each(p, b).sum(), len(b["x"])), Mean(boxes, b["n"].sum())]

    b = batch() | {"n": torch.tensor([0, 0, 0, 0, 2, 0, 1], dtype=D), "nan": torch.zeros(7, dtype=D)}
    b["nan"][0] = math.nan  # where the second term weighs nothing
    whole = lambda p: each(p, b).mean() + p["b"]  # noqa: E731
    grads, kept = ENGINES[engine](
        lambda: gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop")(PARAMS, b)
    )
    assert kept.dropped == 0
    assert_trees_close(grads, torch.func.grad(whole)(PARAMS))


@pytest.mark.parametrize("engine", ENGINES)
def test_aux(engine):
    """Sums and averages are without them; what is concatenated has a row an example."""

    def loss(p, b):
        return mean(p, b), {
            "rows": each(p, b),
            "sum": Mean(b["x"].sum(), 3),
            "scalar": b["x"].mean() + 0 * mean(p, b).detach(),
        }

    b = batch((3, -1.0))
    grad_fn = gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop", has_aux=True)
    grads, (kept, aux) = ENGINES[engine](lambda: grad_fn(PARAMS, b))
    parts = kept_of(b, [(3, 0)])
    expected, (value, others) = gradacc.accumulate_and_value(loss, has_aux=True, split=iter)(PARAMS, parts)
    assert_trees_close((grads, kept.value, aux["scalar"]), (expected, value, others["scalar"]))
    assert_trees_close(aux["sum"].value, others["sum"].value)
    assert aux["sum"].weight == 9
    assert_trees_close(aux["rows"], each(PARAMS, b))
    assert aux["rows"].isnan().sum() == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_grow(engine):
    """A unit that follows them, what was dropped among them: NOTE [units]."""
    b = batch((1, -1.0), (4, 0.0)) | {"n": torch.tensor([1e-3, 1e12, 1.0, 1e9, 1e20, 1e10, 1e3], dtype=D)}
    loss = lambda p, b: Mean((each(p, b) * b["n"]).sum(), b["n"].sum())  # noqa: E731
    keep = [0, 2, 3, 5, 6]
    expected = torch.func.grad(lambda p: loss(p, {k: v[keep] for k, v in b.items()}).value)(PARAMS)
    grads, kept = ENGINES[engine](
        lambda: gradacc.accumulate_and_value(loss, microbatch_size=1, nonfinite="drop")(PARAMS, b)
    )
    assert kept.dropped == 2
    assert_trees_close(grads, expected)


def test_streamed_merged_saved(tmp_path):
    b = batch((3, -1.0), (6, 0.0))
    parts = [{k: v[low:high] for k, v in b.items()} for low, high in SIZES]
    for loss, options in LOSSES.values():
        expected, value = without(loss, options, kept_of(b, [(3, 0), (6, 0)]))
        for donate in (False, True):
            init, update, merge, finalize = gradacc.accumulator(loss, nonfinite="drop", donate=donate, **options)
            one, other = init(PARAMS), init(PARAMS)
            for part in parts[:2]:
                one = update(one, PARAMS, part)
            for part in parts[2:]:
                other = update(other, PARAMS, part)
            gradacc.checkpoint.save(tmp_path / f"{len(list(tmp_path.iterdir()))}", other)
            other = gradacc.checkpoint.load(tmp_path / f"{len(list(tmp_path.iterdir())) - 1}", init(PARAMS))
            grads, kept = finalize(merge(one, other))
            assert kept.dropped == 2
            assert_trees_close((grads, numbers(kept.value)), (expected, numbers(value)), rtol=1e-12)
    keeping = gradacc.accumulator(mean)
    with pytest.raises(ValueError, match="an accumulator with nonfinite='drop', and this one has nonfinite='keep'"):
        keeping.update(gradacc.accumulator(mean, nonfinite="drop").init(PARAMS), PARAMS, parts[0])


@pytest.mark.parametrize("size", some_slow([3, 1], 1))
def test_compiled(size):
    torch._dynamo.reset()
    grad_fn = gradacc.accumulate_and_value(counted, microbatch_size=size, nonfinite="drop")
    compiled = torch.compile(grad_fn, fullgraph=True, backend="aot_eager")
    for bad in BAD.values():
        b = batch(*bad)
        (grads, kept), (expected, value) = compiled(PARAMS, b), grad_fn(PARAMS, b)
        assert kept.dropped == value.dropped
        assert_trees_close((grads, numbers(kept.value)), (expected, numbers(value.value)))


def test_an_ensemble_drops_for_each_member():
    members = {"w": torch.stack([PARAMS["w"], PARAMS["w"]]), "b": torch.tensor([0.25, -0.25], dtype=D)}
    b = batch((3, -1.0))  # of the second member all others are the roots of negative numbers
    grad_fn = gradacc.accumulate_and_value(mean, microbatch_size=1, nonfinite="drop")
    grads, kept = torch.vmap(grad_fn, in_dims=(0, None))(members, b)
    assert kept.dropped.tolist() == [1, 6]
    expected = torch.func.grad(mean)(PARAMS, {k: torch.cat([v[:3], v[4:]]) for k, v in b.items()})
    assert_trees_close({name: grad[0] for name, grad in grads.items()}, expected)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_overflows(dtype):
    """What it is for: one micro-batch overflows, and the others count."""
    w = torch.ones(2, dtype=dtype)
    x = torch.tensor([[1.0, 2.0], [6e4 if dtype == torch.float16 else 3e38, 1.0], [0.5, 1.0]], dtype=dtype)
    loss = lambda w, x: ((w * x) * 8).sum(1).mean()  # noqa: E731
    grad, kept = gradacc.accumulate_and_value(loss, microbatch_size=1, nonfinite="drop")(w, x)
    assert kept.dropped == 1
    assert_trees_close(grad, torch.tensor([6.0, 12.0], dtype=dtype))


def test_a_step_reports_it():
    optimizer = gradacc.optim.sgd(0.1)
    b = batch((3, -1.0))
    for has_aux in (False, True):
        loss = (lambda p, b: (mean(p, b), {"n": Mean(b["x"].sum(), 1)})) if has_aux else mean
        grad_fn = gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop", has_aux=has_aux)
        state, metrics = gradacc.train_step(grad_fn, optimizer)(gradacc.TrainState(PARAMS, optimizer.init(PARAMS)), b)
        expected, value = without(mean, {}, kept_of(b, [(3, 0)]))
        assert metrics["dropped"] == 1
        assert_trees_close(metrics["loss"], value)
        assert ("aux" in metrics) == has_aux
        assert_trees_close(state.params["w"], PARAMS["w"] - 0.1 * expected["w"])


def test_bad_options():
    with pytest.raises(ValueError, match="nonfinite must be 'keep' or 'drop', got 'skip'"):
        gradacc.accumulate(mean, steps=2, nonfinite="skip")
    with pytest.raises(ValueError, match="weights, which are counted before anything is dropped"):
        gradacc.accumulate(several, steps=2, nonfinite="drop", weights=lambda b: [7, 7])


def of_a_rank(group, name, parts, overlap):
    loss, options = LOSSES[name]
    sync = gradacc.all_reduce(group, overlap=overlap)
    grad_fn = gradacc.accumulate_and_value(loss, sync=sync, nonfinite="drop", split=iter, **options)
    grad_fn(PARAMS, parts)
    return grad_fn(PARAMS, parts)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks(pool, name, overlap):
    """One rank has nothing else, one nothing at all."""
    b = batch((3, -1.0), (6, 0.0))
    parts = [{k: v[low:high] for k, v in b.items()} for low, high in SIZES]
    expected, value = without(*LOSSES[name], kept_of(b, [(3, 0), (6, 0)]))
    for shares in ([parts[:3], parts[3:]], [parts[:2], parts[3:], parts[2:3]], [parts[:1], parts[1:3], [], parts[3:]]):
        answers = pool.run_each(len(shares), of_a_rank, [(name, share, overlap) for share in shares])
        for grads, kept in answers:
            assert kept.dropped == 2
            assert_trees_close((grads, numbers(kept.value)), (expected, numbers(value)), rtol=1e-9)
            assert_trees_equal(grads, answers[0][0])
