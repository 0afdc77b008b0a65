"""`train_step`: the loop that it replaces, its metrics, its errors."""

import pytest
import torch

import gradacc
from gradacc import Mean, TrainState, train_step
from gradacc.data import windows
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint
from tests.test_data import Broken

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
        assert_trees_close(metrics, {"loss": value, "grad_norm": grads["w"].norm()}, rtol=1e-8)
        assert not any(value.requires_grad for value in metrics.values())


def test_metrics_of_a_mean_with_aux(state):
    (batch, *_) = batches()
    step = train_step(gradacc.accumulate_and_value(weighted, steps=3, has_aux=True), OPTIMIZER)
    _, metrics = step(state, batch)
    assert list(metrics) == ["loss", "grad_norm", "weight", "aux"]
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
    assert (state.step, state.opt_state.step, asked) == (3, 3, [0, 1, 2])


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
        assert list(metrics) == ["loss", "grad_norm", "weight", "aux", "loss_scale", "skipped"]
        assert (metrics.pop("loss_scale"), metrics.pop("skipped")) == (3 * 2**number, 0)
        assert_trees_close(metrics, expected, rtol=1e-6)  # the reciprocal of the scale is in float32
        assert_trees_close(new.params, state.params, rtol=1e-6)
        scaled = new
    new, metrics = step(scaled, torch.full_like(batch, torch.inf))
    assert (metrics["loss_scale"], metrics["skipped"], new.opt_state.scale) == (24, 1, 12)
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
    step = train_step(gradacc.accumulate_and_value(loss, steps=3), SCALED)
    with pytest.raises(TypeError, match="loss_scale"):
        step(TrainState(state.params, SCALED.init(state.params)), batches()[0])


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
            "as its value; it must be a tensor or a Mean",
        ),
    ],
)
def test_bad_input(state, call, message):
    with pytest.raises(TypeError, match=message):
        call(state)
