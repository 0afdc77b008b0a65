"""Laws 1 to 4, 6 and 7 of a loss that is several means: the sum of their values, each over its own weight.

The oracle is `torch.func.grad_and_value` of that sum, of the whole batch; the losses are a detector's (boxes in few images),
those of two tasks (one of them missing in many examples) and a distillation (two terms with masks of their own).
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import gradacc
from gradacc import Mean
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint, some_slow
from tests.laws.test_ranks import Collectives

D = torch.float64


def data(examples=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(*shape, dtype=D, generator=generator)  # noqa: E731
    return {
        "x": random(examples, 4) - 0.5,
        "label": torch.arange(examples) % 3 - 1,  # -1: none
        "box": random(examples, 2),
        "has_box": torch.arange(examples) % 4 == 2,
        "teacher": random(examples, 3),
        "mask": torch.arange(examples) % 2 == 1,
    }


def params(seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"trunk": (4, 4), "label": (4, 3), "box": (4, 2), "scale": ()}
    return {name: torch.randn(shape, dtype=D, generator=generator) for name, shape in shapes.items()}


def hidden(p, b):
    """What all terms share."""
    return (b["x"] @ p["trunk"]).tanh()


def classes(p, b, h=None):
    logits = (hidden(p, b) if h is None else h) @ p["label"]
    total = F.cross_entropy(logits, b["label"], reduction="sum", ignore_index=-1)
    return Mean(total, (b["label"] != -1).sum())


def boxes(p, b, h):
    offsets = F.l1_loss(h @ p["box"], b["box"], reduction="none").sum(1) * b["has_box"]
    return Mean(offsets.sum(), b["has_box"].sum())


def detection(p, b):
    h = hidden(p, b)
    return {"class": classes(p, b, h), "box": 5.0 * boxes(p, b, h)}


def two_tasks(p, b):
    """The second one is missing where there is no box; its factor is learned."""
    h = hidden(p, b)
    return [classes(p, b, h) / 2, p["scale"].exp() * boxes(p, b, h), Mean(p["scale"].square() * len(h), len(h))]


def distillation(p, b):
    h = hidden(p, b)
    logits = h @ p["label"]
    divergence = F.kl_div(logits.log_softmax(1), b["teacher"].log_softmax(1), reduction="none", log_target=True).sum(1)
    return classes(p, b, h), 0.25 * Mean((divergence * b["mask"]).sum(), b["mask"].sum())


def count(loss):
    """What `weights=` counts: from the batch alone, in the loss's structure."""
    labels, number = (lambda b: (b["label"] != -1).sum()), (lambda b: b["has_box"].sum())
    return {
        detection: lambda b: {"class": labels(b), "box": number(b)},
        two_tasks: lambda b: [labels(b), number(b), len(b["x"])],
        distillation: lambda b: (labels(b), b["mask"].sum()),
    }[loss]


LOSSES = {"detection": detection, "two tasks": two_tasks, "distillation": distillation}
PARAMS = params()


def means_of(value):
    return list(value.values()) if isinstance(value, dict) else list(value)


def number(value):
    """The sum of the values of those that have a weight."""
    return sum(mean.value for mean in means_of(value) if mean.weight)


def expected(loss, b, p=PARAMS):
    """Of the whole batch; and the terms' values, as it has them."""
    grads, total = torch.func.grad_and_value(lambda p: number(loss(p, b)))(p)
    return grads, total, [mean.value for mean in means_of(loss(p, b))]


def assert_is_the_large_batch(result, loss, b, rtol=1e-10):
    grads, total, values = expected(loss, b)
    assert_trees_close(result[0], grads, rtol=rtol)
    assert type(result[1]) is type(loss(PARAMS, b))
    assert_trees_close([mean.value for mean in means_of(result[1])], values, rtol=rtol)
    assert_trees_close(number(result[1]), total, rtol=rtol)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_any_split_is_the_large_batch(loss, counted, steps, engine):
    weights = count(loss) if counted else None
    p, b = params(), data()
    before = fingerprint([p, b])
    grad_fn = gradacc.accumulate_and_value(loss, steps=steps, weights=weights)
    for _ in range(2):
        assert_is_the_large_batch(ENGINES[engine](lambda: grad_fn(p, b)), loss, b)
    assert_trees_equal(gradacc.accumulate(loss, steps=steps, weights=weights)(p, b), grad_fn(p, b)[0])
    assert fingerprint([p, b]) == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("counted", [False, True])
def test_what_has_no_weight_anywhere_has_no_gradient(counted, engine):
    """A batch without boxes: the mean of nothing is NaN, its gradient zero, and the rest as without it."""
    b = data() | {"has_box": torch.zeros(7, dtype=torch.bool)}
    grad_fn = gradacc.accumulate_and_value(detection, steps=3, weights=count(detection) if counted else None)
    grads, value = ENGINES[engine](lambda: grad_fn(PARAMS, b))
    assert value["box"].value.isnan()
    assert not value["box"].weight
    assert_trees_close(grads, torch.func.grad(lambda p: classes(p, b).value)(PARAMS))
    # And where nothing has a weight, nothing has a gradient.
    nothing = b | {"label": torch.full((7,), -1)}
    grads, value = ENGINES[engine](lambda: grad_fn(PARAMS, nothing))
    assert all(mean.value.isnan() for mean in value.values())
    assert_trees_equal(grads, {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()})


@pytest.mark.parametrize("counted", [False, True])
def test_a_term_of_weight_0_contributes_nothing_be_it_nan(counted):
    def loss(p, b):
        return [classes(p, b), Mean((p["scale"] / b["n"].sum()) * 0.0 + p["scale"], b["n"].sum())]

    b = data() | {"n": torch.tensor([0, 0, 0, 0, 0, 1, 1])}
    weights = (lambda b: [(b["label"] != -1).sum(), b["n"].sum()]) if counted else None
    grads = gradacc.accumulate(loss, microbatch_size=1, weights=weights)(PARAMS, b)
    assert grads["scale"] == 1.0
    assert_trees_close(grads["label"], torch.func.grad(lambda p: classes(p, b).value)(PARAMS)["label"])


def test_where_weights_are_not_read_one_of_0_contributes_nothing():
    """Under a transform, of a gradient that overflows."""

    def loss(w, b):
        return [Mean((w * b["x"]).sum(), len(b["x"])), Mean((w * 1e300 * b["big"]).sum(), b["m"].sum())]

    columns = {"x": [1.0, 2.0, 3.0], "big": [1e300, 1.0, 1.0], "m": [0.0, 1.0, 1.0]}
    b = {name: torch.tensor(column, dtype=D) for name, column in columns.items()}
    grad = ENGINES["functional"](lambda: gradacc.accumulate(loss, steps=3)(torch.ones((), dtype=D), b))
    assert_trees_close(grad, torch.tensor(2.0 + 1e300, dtype=D))


def test_streamed_merged_and_given_away():
    b = data(9)
    parts = [{name: leaf[low:high] for name, leaf in b.items()} for low, high in ((0, 1), (1, 6), (6, 6), (6, 9))]
    for loss in LOSSES.values():
        for donate in (False, True):
            init, update, merge, finalize = gradacc.accumulator(loss, donate=donate)
            state = init(PARAMS)
            for part in parts:
                state = update(state, PARAMS, part)
            assert_is_the_large_batch(finalize(state), loss, b)
            one = update(update(init(PARAMS), PARAMS, parts[3]), PARAMS, parts[0])
            other = update(init(PARAMS), PARAMS, parts[1])
            assert_is_the_large_batch(finalize(merge(merge(init(PARAMS), one), merge(other, init(PARAMS)))), loss, b)
    # The bits of the call in one.
    streamed = gradacc.accumulator(detection)
    state = streamed.init(PARAMS)
    for part in parts:
        state = streamed.update(state, PARAMS, part)
    assert_trees_equal(streamed.finalize(state), gradacc.accumulate_and_value(detection)(PARAMS, parts))


def test_states_of_other_terms_do_not_merge():
    b = data()
    for one, other, message in (
        (detection, distillation, "several means as .* and as"),
        (detection, two_tasks, "several means as .* and as"),
        (detection, classes, "several Means for one micro-batch and a Mean for another"),
    ):
        states = [
            gradacc.accumulator(loss).update(gradacc.accumulator(loss).init(PARAMS), PARAMS, b) for loss in (one, other)
        ]
        before = [fingerprint(state) for state in states]
        with pytest.raises((TypeError, ValueError), match=f"^accumulator: .*{message}"):
            gradacc.accumulator(one).merge(*states)
        with pytest.raises((TypeError, ValueError), match=f"^accumulator: .*{message}"):
            gradacc.accumulator(other).update(states[0], PARAMS, b)
        assert [fingerprint(state) for state in states] == before


def test_a_state_is_saved_and_goes_on(tmp_path):
    b = data()
    first, rest = ({name: leaf[part] for name, leaf in b.items()} for part in (slice(0, 3), slice(3, 7)))
    init, update, _, finalize = gradacc.accumulator(two_tasks)
    gradacc.checkpoint.save(tmp_path / "open", update(init(PARAMS), PARAMS, first))
    state = gradacc.checkpoint.load(tmp_path / "open", init(PARAMS))
    assert len(state.grads) == 3
    assert_is_the_large_batch(finalize(update(state, PARAMS, rest)), two_tasks, b)
    again = gradacc.checkpoint.load(tmp_path / "open", update(init(PARAMS), PARAMS, rest))
    assert_trees_equal(again, state)


@pytest.mark.parametrize("counted", [False, True])
def test_an_ensemble(counted):
    several = {name: torch.stack([leaf, leaf + 0.1]) for name, leaf in PARAMS.items()}
    grad_fn = gradacc.accumulate_and_value(distillation, steps=3, weights=count(distillation) if counted else None)
    grads, value = torch.vmap(grad_fn, in_dims=(0, None))(several, data())
    for member in range(2):
        p = {name: leaf[member] for name, leaf in several.items()}
        own, _, values = expected(distillation, data(), p)
        assert_trees_close({name: leaf[member] for name, leaf in grads.items()}, own)
        assert_trees_close([(mean.total / mean.weight)[member] for mean in value], values)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor imports it
@pytest.mark.parametrize("backend", some_slow(["eager", "aot_eager", "inductor"], "eager"))
@pytest.mark.parametrize(("size", "counted"), some_slow([(3, False), (3, True), (1, False), (1, True)], (3, False)))
def test_compiled_unrolled_and_as_a_loop(size, counted, backend):
    torch._dynamo.reset()
    weights = count(detection) if counted else None
    grad_fn = gradacc.accumulate_and_value(detection, microbatch_size=size, weights=weights)
    compiled = torch.compile(grad_fn, fullgraph=True, backend=backend)
    for seed in (0, 1):
        assert_is_the_large_batch(compiled(PARAMS, data(seed=seed)), detection, data(seed=seed))


def test_the_passes_are_one_a_term_or_one():
    """The price: a backward pass a term, unless the weights are counted first."""
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad)
            return grad

    def loss(p, b):
        return detection({**p, "trunk": Noted.apply(p["trunk"])}, b)

    b = data() | {"has_box": torch.ones(7, dtype=torch.bool), "label": torch.ones(7, dtype=torch.long)}
    gradacc.accumulate(loss, steps=3)(PARAMS, b)
    assert len(seen) == 2 * 3
    seen.clear()
    gradacc.accumulate(loss, steps=3, weights=count(detection))(PARAMS, b)
    assert len(seen) == 3


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_module_with_checkpointing_and_frozen_parts(engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    module[0].bias.requires_grad_(False)
    apply, trained, _ = gradacc.functional(module)

    def loss(p, b):
        out = recompute(lambda x: apply(p, x), b["x"], use_reentrant=False)
        labels = F.cross_entropy(out[:, :3], b["label"], reduction="sum", ignore_index=-1)
        offsets = ((out[:, 3:] - b["box"]).abs().sum(1) * b["has_box"]).sum()
        return Mean(labels, (b["label"] != -1).sum()), Mean(offsets, b["has_box"].sum())

    b = data(12)
    number(loss(dict(module.named_parameters()) and trained, b))
    one, other = loss({name: leaf.requires_grad_() for name, leaf in trained.items()}, b)
    grads = torch.autograd.grad(one.value + other.value, list(trained.values()))
    trained = {name: leaf.detach() for name, leaf in trained.items()}
    for weights in (None, lambda b: ((b["label"] != -1).sum(), b["has_box"].sum())):
        actual = ENGINES[engine](lambda w=weights: gradacc.accumulate(loss, steps=5, weights=w)(trained, b))
        assert_trees_close(list(actual.values()), list(grads))


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_of_many_tokens(engine):
    """A sum over a hundred thousand tokens would overflow float16 as a loss's own gradient does."""
    w = torch.tensor([0.5, -0.25], dtype=torch.float16)
    x = torch.ones(8, 2, dtype=torch.float16)

    def loss(w, x):
        per_token = (x.float() @ w.float()).sum()
        return [Mean(per_token * 4e4, 4e4 * len(x)), Mean(-2.0 * per_token, len(x))]

    grads = ENGINES[engine](lambda: gradacc.accumulate(loss, steps=4)(w, x))
    assert_trees_close(grads, torch.tensor([-1.0, -1.0], dtype=torch.float16))


@pytest.mark.parametrize(("weight", "message"), [(torch.tensor(2**61), "integers and add up"), (1e308, "1.8e308")])
def test_weights_that_add_up_to_too_much(weight, message):
    """As of one `Mean`, there is an error: an integer would begin again below 0."""
    loss = lambda p, b: [Mean((p * b).sum(), weight), Mean((p * b).sum(), len(b))]  # noqa: E731
    with pytest.raises(ValueError, match=f"^accumulate: the weights.*{message}"):
        gradacc.accumulate(loss, steps=4)(torch.ones((), dtype=D), torch.ones(8, dtype=D))


def test_aux_is_averaged_over_examples():
    def loss(p, b):
        return detection(p, b), {"mean": b["x"].mean(), "each": b["x"], "tokens": Mean(b["x"].sum(), 3)}

    b = data()
    for weights in (None, count(detection)):
        _, (value, aux) = gradacc.accumulate_and_value(loss, steps=3, has_aux=True, weights=weights)(PARAMS, b)
        assert set(value) == {"class", "box"}
        assert_trees_close(aux["mean"], b["x"].mean())
        assert_trees_close(aux["each"], b["x"])
        assert aux["tokens"].weight == 9


def test_connected_results_are_differentiable():
    p = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    for weights in (None, count(detection)):
        grads, _ = gradacc.accumulate_and_value(detection, steps=3, weights=weights)(p, data())
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads.values()), p["trunk"])[0]
        large = torch.func.grad(lambda p: number(detection(p, data())))
        expected = torch.func.grad(lambda p, large=large: sum(grad.square().sum() for grad in large(p).values()))
        assert_trees_close(second, expected(PARAMS)["trunk"], rtol=1e-9)


def test_a_step_reports_every_term():
    grad_fn = gradacc.accumulate_and_value(detection, steps=3)
    optimizer = gradacc.optim.sgd(0.1)
    step = gradacc.train_step(grad_fn, optimizer)
    state, metrics = step(gradacc.TrainState(PARAMS, optimizer.init(PARAMS)), data())
    _, total, (one, other) = expected(detection, data())
    assert_trees_close(metrics["loss"], total)
    assert_trees_close([metrics["terms"]["class"], metrics["terms"]["box"]], [one, other])
    assert {name: int(weight) for name, weight in metrics["weight"].items()} == {"class": 4, "box": 2}
    # Without boxes, the rest is what is minimised.
    _, metrics = step(state, data() | {"has_box": torch.zeros(7, dtype=torch.bool)})
    assert metrics["terms"]["box"].isnan()
    assert_trees_close(metrics["loss"], metrics["terms"]["class"])
    # A tuple of two may be a loss and its aux.
    with pytest.raises(TypeError, match=r"two Means behind the gradients.*dict or list"):
        gradacc.train_step(gradacc.accumulate_and_value(distillation, steps=2), optimizer)(state, data())
    scaled = gradacc.optim.dynamic_loss_scale(optimizer, init_scale=8.0)
    step = gradacc.train_step(gradacc.accumulate_and_value(gradacc.optim.scaled_loss(detection), steps=3), scaled)
    _, metrics = step(gradacc.TrainState(PARAMS, scaled.init(PARAMS)), data())
    assert_trees_close(metrics["loss"], total)
    assert_trees_close(metrics["terms"]["box"], other)


def test_check_accumulation_finds_it_exact():
    for loss in LOSSES.values():
        for weights in (None, count(loss)):
            report = gradacc.testing.check_accumulation(loss, PARAMS, data(8), weights=weights)
            assert report.exact, report


def test_check_accumulation_names_a_total_that_is_a_mean():
    def loss(p, b):
        return {"label": classes(p, b), "mean": Mean(hidden(p, b).square().mean(), 1)}

    report = gradacc.testing.check_accumulation(loss, PARAMS, data(9))
    assert report.cause == "weights"
    assert "the Mean at place 1 of those that the loss returns has a total that is itself a mean" in report.why
    # As is one alone.
    assert gradacc.testing.check_accumulation(lambda p, b: loss(p, b)["mean"], PARAMS, data(9)).cause == "weights"


# --- ranks


def of_a_rank(group, name, batch, counted, overlap, compress):
    """Three calls, the last one counted: NOTE [turns]."""
    loss = LOSSES[name]
    sync = gradacc.all_reduce(group, overlap=overlap, compress=compress)
    grad_fn = gradacc.accumulate_and_value(loss, sync=sync, weights=count(loss) if counted else None, split=None)
    first, _ = grad_fn(PARAMS, batch), grad_fn(PARAMS, batch)
    with Collectives() as counter:
        last = grad_fn(PARAMS, batch)
    return first, last, counter.elements


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_are_one_process_with_the_union(pool, name, counted, overlap):
    """The last rank has nothing, and learns from the others what there is; another has no boxes."""
    b = data(9)
    shares = [[(0, 2), (2, 3)], [(3, 6)], [(6, 9)], []]
    for world in (2, 3, 4):
        whole = {key: leaf[: max(high for share in shares[:world] for _, high in share)] for key, leaf in b.items()}
        batches = [
            [{key: leaf[low:high] for key, leaf in b.items()} for low, high in share] for share in shares[:world]
        ]
        args = [(name, batch, counted, overlap, None) for batch in batches]
        answers = pool.run_each(world, of_a_rank, args)
        for first, second, elements in answers:
            assert_trees_equal(first, second)
            assert_trees_equal(second, answers[0][1])
            # One for what was counted, one for everything else.
            assert len(elements) == (2 if counted else 1)
            assert_is_the_large_batch(second, LOSSES[name], whole, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_what_crosses_is_gradients_for_each_term_or_once(pool, name):
    size, terms = sum(leaf.numel() for leaf in PARAMS.values()), len(means_of(LOSSES[name](PARAMS, data())))
    of_each, counted = (pool.run(2, of_a_rank, name, [data()], counted, False, None)[0][2] for counted in (False, True))
    assert of_each[-1] - counted[-1] == (terms - 1) * size


def test_ranks_compressed(pool):
    b = data(8)
    batches = [[{key: leaf[low : low + 4] for key, leaf in b.items()}] for low in (0, 4)]
    for counted in (False, True):
        for compress in (torch.bfloat16, torch.float16):
            answers = pool.run_each(2, of_a_rank, [("detection", batch, counted, False, compress) for batch in batches])
            grads, _, _ = expected(detection, b)
            norm = math.hypot(*(float(grad.norm()) for grad in grads.values()))
            for _, (found, value), _ in answers:
                error = math.hypot(*(float((found[key] - grads[key]).norm()) for key in grads))
                assert error < 0.01 * norm
                assert_trees_close(number(value), expected(detection, b)[1])


def streaming_rank(group, batches):
    init, update, _, finalize = gradacc.accumulator(two_tasks, sync=gradacc.all_reduce(group))
    state = init(PARAMS)
    for batch in batches:
        state = update(state, PARAMS, batch)
    return finalize(state)


def test_ranks_streaming(pool):
    b = data(9)
    cut = lambda low, high: {key: leaf[low:high] for key, leaf in b.items()}  # noqa: E731
    for result in pool.run_each(3, streaming_rank, [([cut(0, 4), cut(4, 5)],), ([],), ([cut(5, 9)],)]):
        assert_is_the_large_batch(result, two_tasks, b, rtol=1e-9)


def compiled_rank(group, batch, counted):
    weights = count(detection) if counted else None
    grad_fn = gradacc.accumulate_and_value(detection, steps=2, sync=gradacc.all_reduce(group), weights=weights)
    return torch.compile(grad_fn, fullgraph=True, backend="aot_eager")(PARAMS, batch)


@pytest.mark.slow
@pytest.mark.parametrize("counted", [False, True])
def test_ranks_compiled(pool, counted):
    b = data(8)
    batches = [{key: leaf[low : low + 4] for key, leaf in b.items()} for low in (0, 4)]
    for result in pool.run_each(2, compiled_rank, [(batch, counted) for batch in batches]):
        assert_is_the_large_batch(result, detection, b, rtol=1e-9)


def differing_rank(group, kind):
    """Ranks that return other things, or count other things."""

    def loss(p, b):
        return detection(p, b) | ({"more": classes(p, b)} if kind == "other terms" else {})

    weights = (lambda b: 1 / 0) if kind == "raises" else count(detection) if kind == "counts" else None
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, sync=gradacc.all_reduce(group), weights=weights)
    try:
        grad_fn(PARAMS, data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("none", "other terms"), "loss_fn returned several Means as .* and several Means as"),
        (("counts", "raises"), "ZeroDivisionError|rank 1"),
        (("counts", "none"), "weights|different calls|accumulate_and_value"),
    ],
)
def test_ranks_that_differ_have_an_error_on_each(pool, kinds, message):
    for answer in pool.run_each(2, differing_rank, [(kind,) for kind in kinds]):
        assert answer is not None
        assert re.search(message, answer), answer
