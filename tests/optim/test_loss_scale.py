"""dynamic_loss_scale and scaled_loss, against torch.amp.GradScaler."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc import Mean, TrainState, optim
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint, some_slow
from tests.optim.cases import assert_same, compiled, gradients, leaves_of, parameters, trajectory

INF, NAN = math.inf, math.nan

INNER = {
    "sgd": (lambda: optim.sgd(0.1, momentum=0.9), torch.optim.SGD, dict(lr=0.1, momentum=0.9), None),
    "adamw": (lambda: optim.adamw(0.1), torch.optim.AdamW, dict(lr=0.1, foreach=False), None),
    "clipped": (
        lambda: optim.clip_by_global_norm(optim.adamw(0.1), 0.5),
        torch.optim.AdamW,
        dict(lr=0.1, foreach=False),
        0.5,
    ),
    "from_torch": (
        lambda: optim.from_torch(torch.optim.RMSprop, lr=0.1),
        torch.optim.RMSprop,
        dict(lr=0.1),
        None,
    ),
}


def _gradscaler(cls, options, max_norm, params, many, **scaling):
    """Torch's loop on the same gradients; the leaves, the scale and the growth tracker after each step."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(params)]
    optimizer = cls(leaves, **options)
    scaler = torch.amp.GradScaler(device="cpu", **scaling)
    scaler.scale(torch.zeros(()))  # which makes its scale
    out = []
    for grads in many:
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad.clone()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        scaler.step(optimizer)
        scaler.update()
        out.append(([leaf.detach().clone() for leaf in leaves], scaler.get_scale(), scaler._get_growth_tracker()))
    return out


def _ours(optimizer, params, many, *, donate=False):
    """The same of our own, and the number of skipped steps."""
    copy = (lambda tree: torch.utils._pytree.tree_map(torch.clone, tree)) if donate else (lambda tree: tree)
    params, out = copy(params), []
    state = optimizer.init(params)
    for grads in many:
        params, state = optimizer.step(params, copy(grads), state, donate=donate)
        assert state.scale.dtype == torch.float32
        out.append(([leaf.clone() for leaf in leaves_of(params)], state.scale.item(), state.growth_tracker.item()))
    return out, state.skipped.item()


def _broken(params, value):
    grads = gradients(params)
    if value is not None:
        grads["w"][1, 2] = value
    return grads


SCALING = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([2.0**16, 1.0, 0.3, 3e38]),
        "growth_factor": st.sampled_from([2.0, 1.3]),
        "backoff_factor": st.sampled_from([0.5, 0.3]),
        "growth_interval": st.integers(1, 3),
    }
)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("inner", INNER)
@settings(max_examples=30)
@given(values=st.lists(st.sampled_from([None, None, None, INF, -INF, NAN]), min_size=1, max_size=8), scaling=SCALING)
@example([None, None], dict(init_scale=3e38, growth_factor=2.0, backoff_factor=0.5, growth_interval=1))  # would be inf
def test_it_is_gradscaler_to_the_last_bit(inner, donate, values, scaling):
    make, cls, options, max_norm = INNER[inner]
    params = parameters()
    many = [_broken(params, value) for value in values]
    expected = _gradscaler(cls, options, max_norm, params, many, **scaling)
    out, skipped = _ours(optim.dynamic_loss_scale(make(), **scaling), params, many, donate=donate)
    for mine, theirs in zip(out, expected, strict=True):
        assert_same([mine[0]], [theirs[0]])
        assert mine[1:] == theirs[1:]
    assert skipped == sum(value is not None for value in values)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_gradscalers(dtype, donate):
    params = parameters(dtype)
    many = [_broken(params, value) for value in (None, INF, None)]
    expected = _gradscaler(torch.optim.SGD, {"lr": 0.1}, None, params, many, init_scale=0.3)
    out, _ = _ours(optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=0.3), params, many, donate=donate)
    for mine, theirs in zip(out, expected, strict=True):
        assert_same([mine[0]], [theirs[0]])


def test_complex_gradients():
    params, grads = torch.zeros(2, dtype=torch.complex64), torch.tensor([4 + 8j, 2.0])
    optimizer = optim.dynamic_loss_scale(optim.sgd(1.0), init_scale=4.0)
    new, state = optimizer.step(params, grads, optimizer.init(params))
    assert_trees_equal(new, -grads / 4)
    _, state = optimizer.step(params, torch.tensor([complex(0, NAN), 0]), state)
    assert (state.scale, state.skipped) == (2.0, 1)


def _chain(**scaling):
    return optim.dynamic_loss_scale(optim.clip_by_global_norm(optim.adamw(0.1), 0.5), **scaling)


@pytest.mark.parametrize("value", [None, INF])
def test_a_step_changes_nothing_and_returns_memory_of_its_own(value):
    params = parameters()
    optimizer = _chain(init_scale=3.0)
    state, grads = optimizer.init(params), _broken(params, value)
    before = fingerprint((params, grads, state))
    new, moved = optimizer.step(params, grads, state)
    assert fingerprint((params, grads, state)) == before
    optimizer.step(new, gradients(params), moved, donate=True)
    assert fingerprint((params, grads, state)) == before


def test_what_is_donated_is_written_to():
    params = {"w": torch.ones(3)}
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.5, momentum=0.9), init_scale=4.0)
    grads, state = {"w": torch.full((3,), 8.0)}, optimizer.init(params)
    held = [params["w"].data_ptr(), state.inner.momentum_buffer["w"].data_ptr()]
    seen = grads["w"].detach()
    new, moved = optimizer.step(params, grads, state, donate=True)
    assert [new["w"].data_ptr(), moved.inner.momentum_buffer["w"].data_ptr()] == held
    assert_trees_equal(seen, torch.full((3,), 2.0))


def test_gradients_in_the_memory_of_the_parameters():
    params = {"w": torch.full((3,), 8.0)}
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.5), init_scale=4.0)
    new, _ = optimizer.step(params, {"w": params["w"]}, optimizer.init(params), donate=True)
    assert_trees_equal(new["w"], torch.full((3,), 7.0))


OWN = {
    "ours": (lambda: optim.sgd(0.5), 2.0),
    "the caller's": (
        lambda: optim.Optimizer(optim.sgd(0.5).init, lambda *args, donate: optim.sgd(0.5).step(*args)),
        8.0,
    ),
}


@pytest.mark.parametrize(("inner", "left"), OWN.values(), ids=OWN)
@pytest.mark.parametrize("around", [lambda x: x, optim.skip_nonfinite], ids=["alone", "around skip"])
def test_gradients_are_unscaled_in_place_for_who_has_looked_at_its_state(around, inner, left):
    params, grads = {"w": torch.ones(3)}, {"w": torch.full((3,), 8.0)}
    optimizer = optim.dynamic_loss_scale(around(inner()), init_scale=4.0)
    seen = grads["w"].detach()
    new, _ = optimizer.step(params, grads, optimizer.init(params), donate=True)
    assert_trees_equal(new["w"], torch.zeros(3))
    assert_trees_equal(seen, torch.full((3,), left))


SCALED = {
    "ours": lambda: optim.dynamic_loss_scale(optim.sgd(0.1)),
    "around the caller's": lambda: optim.dynamic_loss_scale(OWN["the caller's"][0]()),
}
AROUND = {
    "clip": ("clip_by_global_norm: the optimizer", lambda scaled: optim.clip_by_global_norm(scaled, 1.0)),
    "skip": ("skip_nonfinite: the optimizer", optim.skip_nonfinite),
    "spikes": ("skip_spikes: the optimizer", optim.skip_spikes),
    "by_path": ("by_path: the optimizer", optim.by_path),
    "a rule": (r"by_path: rules\[0\]\[1\]", lambda scaled: optim.by_path(optim.sgd(1), (lambda *_: True, scaled))),
    "another": ("dynamic_loss_scale: the optimizer", optim.dynamic_loss_scale),
}


@pytest.mark.parametrize("scaled", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize(("who", "around"), AROUND.values(), ids=AROUND)
def test_it_is_outermost(who, around, scaled):
    """Around it, gradients are times the scale: a norm to clip at would be another, and `train_step` would find no scale."""
    with pytest.raises(ValueError, match=f"^{who} is a dynamic_loss_scale, .*put one around the whole"):
        around(scaled())


def test_a_step_of_ones_own_around_it_is_ones_own():
    scaled = optim.dynamic_loss_scale(optim.sgd(0.5), init_scale=4.0)

    @functools.wraps(scaled.step)
    def step(params, grads, state, *, donate=False):
        return scaled.step(params, 4 * grads, state, donate=donate)

    optimizer = optim.clip_by_global_norm(optim.Optimizer(scaled.init, step), 1.0)
    new, _ = optimizer.step(torch.zeros(1), torch.tensor([30.0]), optimizer.init(torch.zeros(1)))
    assert_trees_close(new, torch.tensor([-0.5]), rtol=1e-6)


def test_under_vmap_each_member_has_its_own_scale():
    params, grads = torch.randn(3, 4), torch.randn(3, 4)
    grads[1, 2] = NAN
    scales = torch.tensor([2.0, 4.0, 0.3])
    optimizer = _chain(growth_interval=1)

    def step(scale, p, g):
        return optimizer.step(p, g, optimizer.init(p)._replace(scale=scale))

    new, state = torch.vmap(step)(scales, params, grads)
    assert state.scale.tolist() == [4.0, 2.0, scales[2].item() * 2]
    assert state.skipped.tolist() == [0, 1, 0]
    assert state.inner.step.tolist() == [1, 0, 1]
    for member in range(3):
        assert_trees_close(new[member], step(scales[member], params[member], grads[member])[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", some_slow([torch.float32, torch.bfloat16], torch.bfloat16))
def test_under_compile(dtype):
    params = {"w": torch.randn(3, 5, dtype=dtype), "b": torch.randn((), dtype=dtype)}
    many = [_broken(params, value) for value in (None, None, INF, None)]
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1, momentum=0.9), init_scale=0.3, growth_interval=2)
    expected, last = trajectory(optimizer.step, params, many, optimizer.init(params))
    step = compiled(optimizer.step)
    out, state = trajectory(step, params, many, optimizer.init(params))
    assert_same(out, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert_trees_equal((state.scale, state.growth_tracker, state.skipped), (last[0], last[1], last[2]))


# The loss


def _mean(w, x):
    return torch.tanh(x @ w).square().mean()


def _weighted(w, x):
    y = torch.tanh(x @ w).square()
    return Mean(y.sum(), y.numel()), {"average": y.mean(), "rows": x.sum(1)}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0)], ids=["number", "tensor"])
def test_the_loss_is_scaled_and_nothing_else(scale, engine):
    w, x = torch.randn(3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    plain = gradacc.accumulate_and_value(_mean, steps=3)(w, x)
    scaled = gradacc.accumulate_and_value(optim.scaled_loss(_mean), steps=3)
    assert_trees_close(engine(lambda: scaled(w, x, loss_scale=scale)), (8 * plain[0], 8 * plain[1]))

    grads, (value, aux) = gradacc.accumulate_and_value(_weighted, steps=3, has_aux=True)(w, x)
    scaled = gradacc.accumulate_and_value(optim.scaled_loss(_weighted, has_aux=True), steps=3, has_aux=True)
    expected = 8 * grads, (Mean(8 * value.total, value.weight), aux)
    assert_trees_close(engine(lambda: scaled(w, x, loss_scale=scale)), expected)


def test_a_half_precision_loss_is_scaled_in_float32():
    loss = optim.scaled_loss(lambda w, x: (w * x).sum())
    w, x = torch.ones(1, dtype=torch.float16), torch.full((1,), 60000.0, dtype=torch.float16)
    assert_trees_equal(loss(w, x, loss_scale=torch.tensor(4.0)), torch.tensor(240000.0))


def test_a_scale_for_each_member_of_an_ensemble():
    w, x, scales = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([1.0, 2.0, 4.0])
    grad_fn = gradacc.accumulate(optim.scaled_loss(_mean), steps=2)
    found = torch.vmap(lambda w, scale: grad_fn(w, x, loss_scale=scale))(w, scales)
    plain = torch.stack([gradacc.accumulate(_mean, steps=2)(each, x) for each in w])
    assert_trees_close(found, plain * scales[:, None], rtol=1e-5)


def _underflowing(params, x):
    """float16 inside; its gradients are far below float16's smallest number, 6e-8."""
    with torch.autocast("cpu", dtype=torch.float16):
        hidden = F.linear(x, params["a"])
        out = F.linear(hidden, params["b"])
    return (out.float() * 1e-7).mean()


def _model():
    params = {"a": torch.randn(5, 3), "b": torch.randn(2, 5)}
    return params, [torch.randn(8, 3) for _ in range(6)]


def test_float16_autocast_is_gradscalers_loop():
    """Four micro-batches a step; steps that overflow, steps whose gradients vanish without a scale."""
    params, batches = _model()
    batches[1] = batches[1] * 1e6  # inf in float16
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    theirs = torch.optim.AdamW(leaves.values(), lr=0.1, foreach=False)
    scaling = dict(init_scale=2.0**18, growth_interval=2)
    scaler = torch.amp.GradScaler(device="cpu", **scaling)

    optimizer = optim.dynamic_loss_scale(optim.clip_by_global_norm(optim.adamw(0.1), 1e-8), **scaling)
    grad_fn = gradacc.accumulate_and_value(optim.scaled_loss(_underflowing), steps=4)
    step = gradacc.train_step(grad_fn, optimizer)
    state = TrainState(params, optimizer.init(params))
    scales = []
    for batch in batches:
        value = 0.0
        for part in batch.chunk(4):
            loss = _underflowing(leaves, part) / 4
            scaler.scale(loss).backward()
            value += loss.detach()
        scale = scaler.get_scale()
        scaler.unscale_(theirs)
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1e-8)
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()

        state, metrics = step(state, batch)
        assert (metrics["loss_scale"], state.opt_state.scale) == (scale, scaler.get_scale())
        assert_trees_close(state.params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-6, atol=1e-7)
        assert_trees_close((metrics["loss"], metrics["grad_norm"]), (value, norm), rtol=1e-5)
        scales.append(scale)
    assert state.opt_state.skipped == 1
    assert scales == [2.0**18, 2.0**18, 2.0**17, 2.0**17, 2.0**18, 2.0**18]

    unscaled = gradacc.accumulate(_underflowing, steps=4)(params, batches[0])
    assert all(leaf.eq(0).all() for leaf in unscaled.values())
    assert all(leaf.ne(0).any() for leaf in grad_fn(params, batches[0], loss_scale=2.0**18)[0].values())


def _bfloat16(params, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.linear(torch.tanh(F.linear(x, params["a"])), params["b"])
    assert out.dtype == torch.bfloat16
    return out.float().square().mean()


def test_bfloat16_autocast_is_the_loop():
    """No scale needed; the optimizer sees float32."""
    params, batches = _model()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    theirs = torch.optim.SGD(leaves.values(), lr=0.1)
    optimizer = optim.sgd(0.1)
    step = gradacc.train_step(gradacc.accumulate_and_value(_bfloat16, steps=4), optimizer)
    state = TrainState(params, optimizer.init(params))
    for batch in batches:
        for part in batch.chunk(4):
            (_bfloat16(leaves, part) / 4).backward()
        theirs.step()
        theirs.zero_grad()
        state, _ = step(state, batch)
        assert_trees_close(state.params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-5, atol=1e-6)


def _on_ranks(group, params, loaders):
    """Four steps; the second one overflows on rank 0 only."""
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=2.0)
    sync = gradacc.all_reduce(group)
    step = gradacc.train_step(gradacc.accumulate_and_value(optim.scaled_loss(_mean), steps=2, sync=sync), optimizer)
    state, scales = TrainState(params, optimizer.init(params)), []
    for batch in loaders[torch.distributed.get_rank()]:
        state, metrics = step(state, batch)
        scales.append((metrics["loss_scale"].item(), metrics["skipped"].item()))
    return state, scales


def test_an_overflow_on_one_rank_is_skipped_by_all(pool):
    params = torch.randn(3)
    loaders = [[torch.randn(4, 3) for _ in range(4)] for _ in range(2)]
    loaders[0][1][2, 0] = INF
    (first, scales), (second, others) = pool.run(2, _on_ranks, params, loaders)
    assert_trees_equal(tuple(first), tuple(second))
    assert scales == others == [(2.0, 0), (2.0, 1), (1.0, 1), (1.0, 1)]
    assert first.params.isfinite().all()


# Mistakes

REFUSED = {
    "class": (
        lambda: optim.dynamic_loss_scale(optim.sgd),
        TypeError,
        "dynamic_loss_scale: the optimizer must be a gradacc",
    ),
    "zero": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), init_scale=0.0),
        ValueError,
        "init_scale must be greater than 0 and less than 3.4.*, got 0.0",
    ),
    "negative": (lambda: optim.dynamic_loss_scale(optim.sgd(1), init_scale=-1), ValueError, "init_scale must be"),
    "infinite": (lambda: optim.dynamic_loss_scale(optim.sgd(1), init_scale=INF), ValueError, "init_scale must be"),
    "too large": (lambda: optim.dynamic_loss_scale(optim.sgd(1), init_scale=1e39), ValueError, "init_scale must be"),
    "bool": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), init_scale=True),
        TypeError,
        "init_scale must be a number, got True",
    ),
    "growth": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), growth_factor=1.0),
        ValueError,
        "growth_factor must be greater than 1 and less than inf, got 1.0",
    ),
    "endless growth": (lambda: optim.dynamic_loss_scale(optim.sgd(1), growth_factor=INF), ValueError, "growth_factor"),
    "NaN growth": (lambda: optim.dynamic_loss_scale(optim.sgd(1), growth_factor=NAN), ValueError, "growth_factor"),
    "no back-off": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), backoff_factor=1.0),
        ValueError,
        "backoff_factor must be greater than 0 and less than 1, got 1.0",
    ),
    "back-off to 0": (lambda: optim.dynamic_loss_scale(optim.sgd(1), backoff_factor=0), ValueError, "backoff_factor"),
    "interval": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), growth_interval=0),
        ValueError,
        "dynamic_loss_scale: growth_interval must be at least 1, got 0",
    ),
    "interval bool": (
        lambda: optim.dynamic_loss_scale(optim.sgd(1), growth_interval=True),
        TypeError,
        "growth_interval must be an int, got True",
    ),
    "module": (
        lambda: optim.scaled_loss(torch.nn.Linear(1, 1)),
        TypeError,
        "scaled_loss: loss_fn is an nn.Module .*gradacc.functional",
    ),
    "no function": (lambda: optim.scaled_loss(None), TypeError, "scaled_loss: loss_fn must be a function"),
    "has_aux": (lambda: optim.scaled_loss(_mean, has_aux=1), TypeError, "scaled_loss: has_aux must be True or False"),
    "no scale": (
        lambda: optim.scaled_loss(_mean)(torch.ones(3), torch.ones(2, 3)),
        TypeError,
        "scaled_loss: no loss_scale",
    ),
    "twice": (
        lambda: optim.scaled_loss(optim.scaled_loss(_mean)),
        ValueError,
        "scaled_loss: loss_fn takes loss_scale itself.*scaled already",
    ),
    "a loss with such a parameter": (
        lambda: optim.scaled_loss(lambda w, x, loss_scale=1.0: (w * x).sum() * loss_scale),
        ValueError,
        "scaled_loss: loss_fn takes loss_scale itself.*needs another name",
    ),
    "scale None": (
        lambda: optim.scaled_loss(_mean)(torch.ones(3), torch.ones(2, 3), loss_scale=None),
        TypeError,
        "scaled_loss: loss_scale must be a number, got None",
    ),
    "scales": (
        lambda: optim.scaled_loss(_mean)(torch.ones(3), torch.ones(2, 3), loss_scale=torch.ones(2)),
        ValueError,
        r"scaled_loss: loss_scale is a torch.float32 tensor of shape \(2,\); .*torch.vmap over it",
    ),
    "aux": (
        lambda: optim.scaled_loss(_weighted)(torch.ones(3), torch.ones(2, 3), loss_scale=1.0),
        TypeError,
        "scaled_loss: loss_fn returned a tuple of 2; pass has_aux=True",
    ),
    "vector": (
        lambda: optim.scaled_loss(lambda w: w)(torch.ones(3), loss_scale=1.0),
        ValueError,
        r"scaled_loss: loss_fn returned a tensor of shape \(3,\); it must be 0-dim",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_and_losses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _state(**fields):
    return optim.dynamic_loss_scale(optim.adam(0.1)).init(torch.ones(2))._replace(**fields)


STEPS = {
    "state": (
        torch.ones(2),
        optim.adam(0.1).init(torch.ones(2)),
        TypeError,
        "state is a .*AdamState, where .*LossScaleState",
    ),
    "inner state": (torch.ones(2), _state(inner=()), TypeError, "adam: state is a tuple, where"),
    "scale": (torch.ones(2), _state(scale=2.0), TypeError, r"state.scale must be a 0-dim tensor.*got 2.0 \(float\)"),
    "double scale": (
        torch.ones(2),
        _state(scale=torch.ones((), dtype=torch.float64)),
        TypeError,
        "state.scale must be.*torch.float32, got torch.float64",
    ),
    "batched": (torch.ones(2), _state(scale=torch.ones(3)), TypeError, "state.scale must be .*torch.vmap the step"),
    "tracker": (torch.ones(2), _state(growth_tracker=0), TypeError, "state.growth_tracker must be a 0-dim tensor"),
    "skipped": (torch.ones(2), _state(skipped=torch.ones(())), TypeError, "state.skipped must be a 0-dim tensor"),
    "shape": (torch.ones(3), _state(), ValueError, r"grads has shape \(3,\), but params has shape \(2,\)"),
    "dtype": (torch.ones(2).double(), _state(), TypeError, "grads has dtype torch.float64"),
    "structure": ([torch.ones(2)], _state(), ValueError, "grads has another structure than params"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("grads", "state", "error", "message"), STEPS.values(), ids=STEPS)
def test_bad_gradients_and_states(grads, state, error, message, donate):
    params = torch.ones(2)
    before = fingerprint((params, grads, state))
    with pytest.raises(error, match=message):
        optim.dynamic_loss_scale(optim.adam(0.1)).step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32])
def test_float16_parameters_are_refused(dtype):
    """GradScaler: "Attempting to unscale FP16 gradients"."""
    params = {"b": torch.ones(1), "w": torch.ones(2).to(dtype)}
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1))
    message = rf"dynamic_loss_scale: params\['w'\] is a tensor of dtype {dtype}.*Keep params in float32.*torch.autocast"
    with pytest.raises(TypeError, match=message):
        optimizer.init(params)
    with pytest.raises(TypeError, match=message):
        optimizer.step(params, params, optimizer.init({"w": torch.ones(2)}))
