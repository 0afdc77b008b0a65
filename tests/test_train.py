"""`train_step`: the loop that it replaces, its metrics, its errors."""

import functools
import math
from typing import Any

import optree
import pytest
import torch

import gradacc
from gradacc import Mean, TrainState, train_step
from gradacc.data import windows
from tests.data.test_windows import Broken
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint

D = torch.float64
OPTIMIZER = gradacc.optim.adamw(1e-2)


def loss(params, batch):
    return (torch.tanh(batch @ params["w"]) - 1).square().mean()


def weighted(params, batch):
    real = batch[:, 0] > 0
    return Mean(((torch.tanh(batch @ params["w"]) - 1).square() * real).sum(), real.sum()), {"rows": batch.sum(1)}


@pytest.fixture
def state():
    params = {"w": torch.randn(3, dtype=D)}
    return TrainState(params, OPTIMIZER.init(params))


def batches():
    """Of each, `weighted` counts some rows and others not."""
    many = [torch.randn(7, 3, dtype=D) for _ in range(4)]
    for batch in many:
        batch[:, 0] = batch[:, 0].abs() * torch.tensor([1, -1, 1, 1, -1, -1, 1])
    return many


@pytest.mark.parametrize("donate", [False, True])
def test_it_is_the_loop(state, donate):
    step = train_step(gradacc.accumulate_and_value(loss, steps=3), OPTIMIZER, donate=donate)
    params, opt_state = {name: param.clone() for name, param in state.params.items()}, OPTIMIZER.init(state.params)
    for number, batch in enumerate(batches()):
        grads, value = torch.func.grad_and_value(loss)(params, batch)
        params, opt_state = OPTIMIZER.step(params, grads, opt_state)
        before = None if donate else fingerprint((state, batch))
        new, metrics = step(state, batch)
        assert donate or fingerprint((state, batch)) == before
        state = new
        assert state.step == number + 1
        assert_trees_close(state.params, params, rtol=1e-8)
        expected = {"loss": value, "grad_norm": grads["w"].norm(), "lr": torch.tensor(1e-2, dtype=D)}
        assert_trees_close(metrics, expected, rtol=1e-8)
        assert not any(value.requires_grad for value in metrics.values())


def test_metrics_of_a_mean_with_aux(state):
    (batch, *_) = batches()
    step = train_step(gradacc.accumulate_and_value(weighted, steps=3, has_aux=True), OPTIMIZER)
    _, metrics = step(state, batch)
    assert list(metrics) == ["loss", "grad_norm", "weight", "aux", "lr"]
    assert metrics["weight"] == (batch[:, 0] > 0).sum() == 4
    assert_trees_close(metrics["loss"], weighted(state.params, batch)[0].value)
    assert_trees_equal(metrics["aux"]["rows"], batch.sum(1))


@pytest.mark.parametrize("has_aux", [False, True])
def test_metrics_are_detached(has_aux):
    """Of a grad_fn of torch.func too, whose value has the graph of parameters that require a gradient."""

    def with_graph(params, batch):
        value = loss(params, batch)
        return (value, {"twice": 2 * value}) if has_aux else value

    params = {"w": torch.randn(3, dtype=D, requires_grad=True)}
    optimizer = gradacc.optim.sgd(0.1)
    (batch, *_) = batches()
    step = train_step(torch.func.grad_and_value(with_graph, has_aux=has_aux), optimizer)
    _, metrics = step(TrainState(params, optimizer.init(params)), batch)
    assert_trees_equal(metrics["loss"], loss(params, batch).detach())
    found = [metrics["loss"], metrics["grad_norm"], *([metrics["aux"]["twice"]] if has_aux else [])]
    assert not any(metric.requires_grad for metric in found)


def test_the_norm_of_half_precision_does_not_overflow():
    grads = {"a": torch.full((100,), 6e4, dtype=torch.float16), "b": torch.ones(3, dtype=torch.complex64)}
    optimizer = gradacc.optim.sgd(0.0)
    params = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    _, metrics = train_step(lambda params, batch: (grads, torch.zeros(())), optimizer)(
        TrainState(params, optimizer.init(params)), None
    )
    exact = (100 * grads["a"][0].item() ** 2 + 3) ** 0.5
    assert_trees_close(metrics["grad_norm"], torch.tensor(exact), rtol=1e-6)


def test_an_ensemble(state):
    """The whole step under vmap."""
    step = train_step(gradacc.accumulate_and_value(loss, steps=3), OPTIMIZER)
    (batch, *_) = batches()
    params = [{"w": torch.randn(3, dtype=D)} for _ in range(2)]
    states = [TrainState(p, OPTIMIZER.init(p), torch.zeros((), dtype=torch.int64)) for p in params]
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    together, metrics = torch.func.vmap(step, in_dims=(0, None))(stacked, batch)
    for n, alone in enumerate(states):
        after, own = step(alone, batch)
        assert_trees_close(together.params["w"][n], after.params["w"])
        assert_trees_close(metrics["grad_norm"][n], own["grad_norm"])
    assert together.step.tolist() == [1, 1]


def test_one_graph(state):
    torch.compiler.reset()
    step = train_step(gradacc.accumulate_and_value(loss, steps=3), OPTIMIZER)
    (batch, *_) = batches()
    state = state._replace(step=torch.zeros((), dtype=torch.int64))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = step(state, batch), compiled(state, batch)
    assert_trees_close(actual[0].params, expected[0].params)
    assert_trees_close(actual[1], expected[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(actual[0], batch)[0].step == 2


def micro_batches(number):
    """Of unequal sizes, and `weighted` counts another number of rows in each."""
    many = [torch.randn(2 + n % 3, 3, dtype=D) for n in range(number)]
    for n, batch in enumerate(many):
        batch[:, 0] = batch[:, 0].abs() * torch.tensor([1.0, 1 - 2 * (n % 2), -1.0, 1.0])[: len(batch)]
    return many


RATES = [0.3, 0.2, 0.1]


def imperative(params, many, steps):
    """Torch's loop: a window's rows as one batch, divided by their own number; `LambdaLR` after each update."""
    w = params["w"].clone().requires_grad_()
    theirs = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, [*RATES, 0.0].__getitem__)
    for begin in range(0, len(many), steps):
        theirs.zero_grad()
        weighted({"w": w}, torch.cat(many[begin : begin + steps]))[0].value.backward()
        theirs.step()
        scheduler.step()
        yield {"w": w.detach().clone()}, w.grad.norm()


@pytest.mark.parametrize("donate", [False, True])
def test_an_epoch_of_windows(donate):
    """10 micro-batches, 4 a step: 3 updates, the last of 2, by its own count; evaluation over the same loader inside."""
    params, many = {"w": torch.randn(3, dtype=D)}, micro_batches(10)
    asked = []

    def rate(step):
        asked.append(int(step))
        return RATES[step]

    optimizer = gradacc.optim.sgd(rate, momentum=0.9)
    step = train_step(gradacc.accumulate_and_value(weighted, has_aux=True), optimizer, donate=donate)
    expected = list(imperative(params, many, 4))
    state = TrainState({"w": params["w"].clone()}, optimizer.init(params))
    loader = windows(many, 4)
    evaluate = gradacc.accumulator(weighted, has_aux=True)
    sizes, epoch = [], torch.cat(many)
    for window, (after, norm) in zip(loader, expected, strict=True):
        state, metrics = step(state, window)
        assert_trees_close(state.params, after)
        assert_trees_close(metrics["grad_norm"], norm)
        assert metrics["lr"] == RATES[state.step - 1]
        assert metrics["weight"] == sum((part[:, 0] > 0).sum() for part in window)
        sizes.append(len(window))
        before = fingerprint(state)
        sums = evaluate.init(state.params)
        for held_out in loader:
            for part in held_out:
                sums = evaluate.update(sums, state.params, part)
        assert_trees_close(evaluate.finalize(sums)[1][0].value, weighted(state.params, epoch)[0].value)
        assert fingerprint(state) == before
    assert sizes == [4, 4, 2]
    assert (state.step, state.opt_state.step, sorted(set(asked))) == (3, 3, [0, 1, 2])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("read", [4, 5, 7], ids=lambda n: f"{n} read")
def test_a_state_goes_on_after_a_loader_that_raised(read, donate):
    """In the second window or just before it: from the first one's state, and the micro-batches after it."""
    params, many = {"w": torch.randn(3, dtype=D)}, micro_batches(10)
    optimizer = gradacc.optim.sgd(RATES.__getitem__, momentum=0.9)
    step = train_step(gradacc.accumulate_and_value(weighted, has_aux=True), optimizer, donate=donate)
    expected = [after for after, _ in imperative(params, many, 4)]
    state = TrainState({"w": params["w"].clone()}, optimizer.init(params))
    loop = iter(windows(Broken(many[:read]), 4))
    state, _ = step(state, next(loop))
    with pytest.raises(OSError, match="the disk is gone"):
        next(loop)
    assert_trees_close(state.params, expected[0])
    for window in windows(many[4 * state.step :], 4):
        state, _ = step(state, window)
    assert_trees_close(state.params, expected[-1])
    assert (state.step, state.opt_state.step) == (3, 3)


SCALED = gradacc.optim.dynamic_loss_scale(OPTIMIZER, init_scale=3.0, growth_interval=1)


def test_metrics_are_without_the_loss_scale(state):
    """The same steps as without one; then one that overflows."""
    (batch, *_) = batches()
    plain = train_step(gradacc.accumulate_and_value(weighted, steps=3, has_aux=True), OPTIMIZER)
    loss_fn = gradacc.optim.scaled_loss(weighted, has_aux=True)
    step = train_step(gradacc.accumulate_and_value(loss_fn, steps=3, has_aux=True), SCALED)
    scaled = TrainState(state.params, SCALED.init(state.params))
    for number in range(3):
        state, expected = plain(state, batch)
        before = fingerprint(scaled)
        new, metrics = step(scaled, batch)
        assert fingerprint(scaled) == before
        assert list(metrics) == ["loss", "grad_norm", "weight", "aux", "lr", "loss_scale", "skipped", "updates"]
        counts = [metrics.pop(name).item() for name in ("loss_scale", "skipped", "updates")]
        assert counts == [3 * 2**number, 0, number + 1]
        assert_trees_close(metrics, expected, rtol=1e-6)  # the reciprocal of the scale is in float32
        assert_trees_close(new.params, state.params, rtol=1e-6)
        scaled = new
    new, metrics = step(scaled, torch.full_like(batch, torch.inf))
    assert (metrics["loss_scale"], metrics["skipped"], new.opt_state.scale) == (24, 1, 12)
    assert (new.step, metrics["updates"], new.opt_state.inner.step) == (4, 3, 3)
    assert not metrics["grad_norm"].isfinite()
    assert_trees_equal(new.params, scaled.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_norm_is_finite_where_only_the_scaled_one_overflows(dtype):
    """2**120 is a number in these dtypes, its square is none."""
    grads = {"a": torch.tensor([3.0, 4.0]).to(dtype), "b": torch.tensor(12.0).to(dtype)}
    params = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    optimizer = gradacc.optim.dynamic_loss_scale(gradacc.optim.sgd(1.0), init_scale=2.0**120)

    def grad_fn(params, batch, loss_scale):
        return {name: grad * loss_scale.item() for name, grad in grads.items()}, 7 * loss_scale

    new, metrics = train_step(grad_fn, optimizer)(TrainState(params, optimizer.init(params)), None)
    assert_trees_equal((metrics["grad_norm"], metrics["loss"]), (torch.tensor(13.0), torch.tensor(7.0)))
    assert_trees_equal(new.params, {name: -grad for name, grad in grads.items()})


def test_metrics_are_not_the_states_memory(state):
    step = train_step(gradacc.accumulate_and_value(gradacc.optim.scaled_loss(loss), steps=3), SCALED, donate=True)
    state = TrainState(state.params, SCALED.init(state.params))
    new, metrics = step(state, batches()[0])
    metrics["loss_scale"].zero_()
    metrics["skipped"].zero_().add_(7)
    assert (new.opt_state.scale, new.opt_state.skipped) == (6, 0)


def test_an_ensemble_of_loss_scales(state):
    step = train_step(gradacc.accumulate_and_value(gradacc.optim.scaled_loss(loss), steps=3), SCALED)
    (batch, *_) = batches()
    params = [{"w": torch.randn(3, dtype=D)} for _ in range(2)]
    params[1]["w"][0] = torch.nan
    states = [TrainState(p, SCALED.init(p), torch.zeros((), dtype=torch.int64)) for p in params]
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    together, metrics = torch.func.vmap(step, in_dims=(0, None))(stacked, batch)
    assert (together.opt_state.scale.tolist(), metrics["skipped"].tolist()) == ([6.0, 1.5], [0, 1])
    after, own = step(states[0], batch)
    assert_trees_close(together.params["w"][0], after.params["w"])
    assert_trees_close({name: metric[0] for name, metric in metrics.items()}, own)


@pytest.mark.slow
def test_one_graph_with_a_loss_scale(state):
    torch.compiler.reset()
    step = train_step(gradacc.accumulate_and_value(gradacc.optim.scaled_loss(loss), steps=3), SCALED)
    (batch, *_) = batches()
    state = TrainState(state.params, SCALED.init(state.params), torch.zeros((), dtype=torch.int64))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = step(state, batch), compiled(state, batch)
    assert_trees_close(tuple(actual[0]), tuple(expected[0]))
    assert_trees_close(actual[1], expected[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(actual[0], batch)[0].opt_state.scale == 12


def test_a_loss_that_takes_no_scale(state):
    """Nothing is unscaled that was not scaled."""
    with pytest.raises(TypeError, match=UNSCALED):
        train_step(gradacc.accumulate_and_value(loss, steps=3), SCALED)


UNSCALED = r"train_step: the optimizer is a dynamic_loss_scale.*grad_fn takes no loss_scale.*scaled_loss\(loss_fn\)"


def with_anything(params, batch, **ignored):
    """Of which a scale that is passed is not seen."""
    return loss(params, batch)


SCALED_LOSS = gradacc.optim.scaled_loss(with_anything)


def by_hand(params, batch, loss_scale):
    return loss(params, batch) * loss_scale


UNSCALED_GRAD_FNS = {
    "accumulate": lambda: gradacc.accumulate_and_value(with_anything, steps=3),
    "torch.func": lambda: torch.func.grad_and_value(with_anything),
    "compiled": lambda: torch.compile(gradacc.accumulate_and_value(with_anything, steps=3), backend="eager"),
    "partial": lambda: functools.partial(gradacc.accumulate_and_value(with_anything, steps=3), other=1),
    "a loss that is a partial": lambda: gradacc.accumulate_and_value(
        functools.partial(with_anything, other=1), steps=3
    ),
    "scaled out of sight": lambda: lambda *args, **kwargs: torch.func.grad_and_value(SCALED_LOSS)(*args, **kwargs),
    "no signature": lambda: min,
}
SCALED_GRAD_FNS = {
    "accumulate": lambda: gradacc.accumulate_and_value(SCALED_LOSS, steps=3),
    "torch.func": lambda: torch.func.grad_and_value(SCALED_LOSS),
    "compiled": lambda: torch.compile(gradacc.accumulate_and_value(SCALED_LOSS, steps=3), backend="eager"),
    "partial": lambda: functools.partial(gradacc.accumulate_and_value(SCALED_LOSS, steps=3), other=1),
    "a loss that is a partial": lambda: gradacc.accumulate_and_value(functools.partial(SCALED_LOSS, other=1), steps=3),
    "scaled, and says so": lambda: (
        lambda params, batch, loss_scale: torch.func.grad_and_value(SCALED_LOSS)(params, batch, loss_scale=loss_scale)
    ),
    "by hand": lambda: gradacc.accumulate_and_value(by_hand, steps=3),
}


@pytest.mark.parametrize("make", UNSCALED_GRAD_FNS.values(), ids=UNSCALED_GRAD_FNS)
def test_a_loss_that_is_not_scaled_is_refused(make):
    """Its steps would be 65536 times too small. Before the first step; of a state of it too."""
    with pytest.raises(TypeError, match=UNSCALED):
        train_step(make(), SCALED)
    around = gradacc.optim.Optimizer(SCALED.init, lambda *args, donate=False: SCALED.step(*args, donate=donate))
    params = {"w": torch.ones(3, dtype=D)}
    begun = TrainState(params, around.init(params))
    before = fingerprint(begun)
    with pytest.raises(TypeError, match=UNSCALED):
        train_step(make(), around)(begun, batches()[0])
    assert fingerprint(begun) == before


@pytest.mark.parametrize("make", SCALED_GRAD_FNS.values(), ids=SCALED_GRAD_FNS)
def test_a_loss_that_is_scaled_steps_as_without_a_scale(make, state):
    (batch, *_) = batches()
    expected, _ = train_step(torch.func.grad_and_value(loss), OPTIMIZER)(state, batch)
    new, metrics = train_step(make(), SCALED)(TrainState(state.params, SCALED.init(state.params)), batch)
    assert_trees_close(new.params, expected.params, rtol=1e-6)
    assert_trees_close(metrics["loss"], loss(state.params, batch), rtol=1e-6)


def test_a_scaled_loss_without_a_scale(state):
    """Of an optimizer that has none; called by hand; and one that is given twice."""
    grad_fn = gradacc.accumulate_and_value(SCALED_LOSS, steps=3)
    (batch, *_) = batches()
    message = "scaled_loss: no loss_scale was given.*dynamic_loss_scale, outermost.*loss_scale=state.scale"
    with pytest.raises(TypeError, match=message):
        train_step(grad_fn, OPTIMIZER)(state, batch)
    with pytest.raises(TypeError, match=message):
        grad_fn(state.params, batch)
    scaled = TrainState(state.params, SCALED.init(state.params))
    with pytest.raises(TypeError, match="train_step: loss_scale was passed to the step.*leave it out"):
        train_step(grad_fn, SCALED)(scaled, batch, loss_scale=2.0)


@optree.dataclasses.dataclass(namespace="gradacc")
class Around:
    inner: Any


class Holder:
    def __init__(self, inner):
        self.inner = inner


INSIDE = {
    "a dataclass": Around,
    "an object": Holder,
    "an object in a dataclass": lambda inner: Around(Holder(inner)),
    "named": lambda inner: {"inner": inner, "average": {str(n): torch.ones(()) for n in range(99)}},
    "a tuple": lambda inner: (torch.ones(()), inner),
    "deeper": lambda inner: [({"all": inner},)],
}


@pytest.mark.parametrize("wrap", INSIDE.values(), ids=INSIDE)
def test_a_loss_scale_that_is_not_outermost(state, wrap):
    """In a wrapper of one's own: found in its state; a scale that is passed by hand is the caller's."""
    inside = SCALED.init(state.params)

    def step(params, grads, _, *, donate=False):
        params, new = SCALED.step(params, grads, inside, donate=donate)
        return params, wrap(new)

    optimizer = gradacc.optim.Optimizer(lambda params: wrap(SCALED.init(params)), step)
    begun = TrainState(state.params, optimizer.init(state.params))
    (batch, *_) = batches()
    for loss_fn in (loss, with_anything):
        with pytest.raises(ValueError, match="has that of a dynamic_loss_scale inside.*Put it outermost"):
            train_step(gradacc.accumulate_and_value(loss_fn, steps=3), optimizer)(begun, batch)
    grad_fn = gradacc.accumulate_and_value(SCALED_LOSS, steps=3)
    new, _ = train_step(grad_fn, optimizer)(begun, batch, loss_scale=inside.scale)
    expected, _ = train_step(torch.func.grad_and_value(loss), OPTIMIZER)(state, batch)
    assert_trees_close(new.params, expected.params, rtol=1e-6)


HALVING = [0.4, 0.2, 0.1, 0.05]
REPORTING = {
    "a number": (lambda: gradacc.optim.sgd(0.1), [0.1] * 4, None, None),
    "a tensor": (lambda: gradacc.optim.adam(torch.tensor(0.5)), [0.5] * 4, None, None),
    "a function": (lambda: gradacc.optim.sgd(HALVING.__getitem__), HALVING, None, None),
    "a schedule": (
        lambda: gradacc.optim.adamw(
            gradacc.optim.schedule(torch.optim.lr_scheduler.StepLR, 0.4, step_size=1, gamma=0.5)
        ),
        HALVING,
        None,
        None,
    ),
    "torch": (lambda: gradacc.optim.from_torch(torch.optim.RMSprop, lr=HALVING.__getitem__), HALVING, None, None),
    "torch's usual": (lambda: gradacc.optim.from_torch(torch.optim.Adamax), [2e-3] * 4, None, None),
    "clipped": (
        lambda: gradacc.optim.clip_by_global_norm(gradacc.optim.sgd(HALVING.__getitem__), 1.0),
        HALVING,
        None,
        None,
    ),
    "skipping": (
        lambda: gradacc.optim.skip_nonfinite(gradacc.optim.sgd(HALVING.__getitem__)),
        [0.4, 0.2, 0.2, 0.1],
        [0, 1, 1, 1],
        [1, 1, 2, 3],
    ),
    "skipping spikes": (
        lambda: gradacc.optim.skip_spikes(gradacc.optim.sgd(HALVING.__getitem__)),
        [0.4, 0.2, 0.2, 0.1],
        [0, 1, 1, 1],
        [1, 1, 2, 3],
    ),
    "scaled": (
        lambda: gradacc.optim.dynamic_loss_scale(gradacc.optim.from_torch(torch.optim.SGD, lr=HALVING.__getitem__)),
        [0.4, 0.2, 0.2, 0.1],
        [0, 1, 1, 1],
        [1, 1, 2, 3],
    ),
    "scaled, skipping, clipped": (
        lambda: gradacc.optim.dynamic_loss_scale(
            gradacc.optim.skip_nonfinite(gradacc.optim.clip_by_global_norm(gradacc.optim.adamw(0.1), 1.0))
        ),
        [0.1] * 4,
        [0, 1, 1, 1],
        [1, 1, 2, 3],
    ),
    "groups": (
        lambda: gradacc.optim.by_path(
            gradacc.optim.sgd(0.1), (lambda path, leaf: "'b'" in path, gradacc.optim.adam(HALVING.__getitem__))
        ),
        [(0.1, rate) for rate in HALVING],
        None,
        None,
    ),
    "groups, skipped together": (
        lambda: gradacc.optim.skip_nonfinite(
            gradacc.optim.by_path(
                gradacc.optim.sgd(0.1), (lambda path, leaf: "'b'" in path, gradacc.optim.adam(HALVING.__getitem__))
            )
        ),
        [(0.1, rate) for rate in [0.4, 0.2, 0.2, 0.1]],
        [0, 1, 1, 1],
        [(1, 1), (1, 1), (2, 2), (3, 3)],
    ),
    "groups that skip on their own": (
        lambda: gradacc.optim.by_path(
            gradacc.optim.skip_nonfinite(gradacc.optim.sgd(HALVING.__getitem__)),
            (lambda path, leaf: "'b'" in path, gradacc.optim.adam(HALVING.__getitem__)),
        ),
        [(0.4, 0.4), (0.2, 0.2), (0.2, 0.1), (0.1, 0.05)],
        [(0, 0), (1, 0), (1, 0), (1, 0)],
        [(1, 1), (1, 2), (2, 3), (3, 4)],
    ),
    "a group of one's own, and one without parameters": (
        lambda: gradacc.optim.by_path(
            gradacc.optim.sgd(0.1),
            (lambda path, leaf: "'b'" in path, gradacc.optim.sgd(0.2)),
            (
                lambda path, leaf: True,
                gradacc.optim.Optimizer(lambda params: (), lambda p, g, s, *, donate=False: (p, s)),
            ),
        ),
        [(math.nan, 0.2, math.nan)] * 4,
        None,
        None,
    ),
    "one's own": (
        lambda: gradacc.optim.Optimizer(lambda params: (), lambda p, g, s, *, donate=False: (p, s)),
        None,
        None,
        None,
    ),
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize(("make", "rates", "skipped", "updates"), REPORTING.values(), ids=REPORTING)
def test_metrics_say_the_learning_rate_and_what_was_skipped(make, rates, skipped, updates, donate):
    """Of four steps, the second of which has a NaN in the gradient of ``w``; a step that is skipped counts for the state."""
    optimizer = make()

    def grad_fn(params, batch, loss_scale=torch.ones(())):
        grads = {name: torch.ones(2) * loss_scale for name in ("w", "b")}
        return grads | {"w": grads["w"] * batch}, torch.zeros(())

    step = train_step(grad_fn, optimizer, donate=donate)
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    state = TrainState(params, optimizer.init(params))
    for number in range(4):
        state, metrics = step(state, torch.tensor(torch.nan if number == 1 else 1.0))
        assert state.step == number + 1
        for name, dtype, expected in (
            ("lr", D, rates),
            ("skipped", torch.int64, skipped),
            ("updates", torch.int64, updates),
        ):
            assert (name in metrics) == (expected is not None)
            if expected is not None:
                wanted = torch.utils._pytree.tree_map(
                    lambda value, dtype=dtype: torch.tensor(value, dtype=dtype), expected[number]
                )
                found = torch.utils._pytree.tree_map(lambda value, dtype=dtype: value.to(dtype), metrics[name])
                assert_trees_equal(found, wanted)


def test_metrics_of_a_learning_rate_are_its_members_and_not_its_memory():
    """Under vmap of each member; and a tensor that the caller changes later is another one."""
    rate = torch.tensor(0.5)
    optimizer = gradacc.optim.sgd(rate)
    grad_fn = torch.func.grad_and_value(lambda params, batch: (params * batch).sum())
    _, metrics = train_step(grad_fn, optimizer)(TrainState(torch.ones(2), optimizer.init(torch.ones(2))), torch.ones(2))
    rate.zero_()
    assert metrics["lr"] == 0.5

    def one(rate):
        optimizer = gradacc.optim.by_path(
            gradacc.optim.sgd(rate), (lambda path, leaf: "'b'" in path, gradacc.optim.sgd(0.1))
        )
        params = {"a": torch.ones(2), "b": torch.ones(2)}
        grad_fn = torch.func.grad_and_value(lambda params, batch: params["a"].sum() + params["b"].sum())
        return train_step(grad_fn, optimizer)(TrainState(params, optimizer.init(params)), torch.ones(2))[1]["lr"]

    found = torch.vmap(one)(torch.tensor([1.0, 2.0]))
    assert [each.tolist() for each in found] == [[1.0, 2.0], [0.1, 0.1]]


@pytest.mark.parametrize("opt_state", [(), {}, None, 3], ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_a_state_of_another_optimizer_is_the_optimizers_own_error(state, opt_state, donate):
    for optimizer, name in (
        (OPTIMIZER, "adamw"),
        (gradacc.optim.skip_nonfinite(OPTIMIZER), "skip_nonfinite"),
        (gradacc.optim.skip_spikes(OPTIMIZER), "skip_spikes"),
        (gradacc.optim.by_path(OPTIMIZER), "by_path"),
        (gradacc.optim.from_torch(torch.optim.SGD), "from_torch"),
    ):
        step = train_step(gradacc.accumulate_and_value(loss, steps=3), optimizer, donate=donate)
        with pytest.raises(TypeError, match=f"{name}: state is .*, where this optimizer's is a"):
            step(TrainState(state.params, opt_state), batches()[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: train_step(None, OPTIMIZER), "grad_fn must be a function that returns"),
        (lambda s: train_step(loss, torch.optim.SGD), "optimizer must be a gradacc.optim.Optimizer.*from_torch"),
        (
            lambda s: train_step(gradacc.accumulate(loss, steps=2), OPTIMIZER)(s, torch.ones(4, 3, dtype=D)),
            "must return .grads, value.*accumulate_and_value",
        ),
        (
            lambda s: train_step(gradacc.accumulate_and_value(loss, steps=2), OPTIMIZER)(s.params, torch.ones(4, 3)),
            r"must be a TrainState.*TrainState\(params, optimizer.init\(params\)\)",
        ),
        (
            lambda s: train_step(lambda p, b: (p, 1.0), OPTIMIZER)(s, None),
            "as its value; it must be a tensor, a Mean or several",
        ),
    ],
)
def test_bad_input(state, call, message):
    with pytest.raises(TypeError, match=message):
        call(state)
