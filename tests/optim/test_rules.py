"""sgd, adam and adamw against torch.optim: to the last bit eagerly; under transforms as close as said."""

import optree
import pytest
import torch

import gradacc
from gradacc import optim
from tests.helpers import assert_trees_equal, fingerprint
from tests.optim.cases import (
    NAMESPACE,
    OURS,
    STEPS,
    assert_same,
    compiled,
    gradients,
    imperative,
    leaves_of,
    parameters,
    trajectory,
)

CASES = [pytest.param(*case, id=name) for name, case in OURS.items()]
EXACT = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def _many(params, steps=STEPS):
    return [gradients(params) for _ in range(steps)]


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_five_steps_are_torchs_to_the_last_bit(factory, cls, options, dtype, donate):
    params = parameters(dtype)
    many = _many(params)
    optimizer = factory(**options)
    out, state = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )
    assert_same(out, imperative(cls, params, many, foreach=False, **options))
    assert state.step == STEPS


@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_a_tensor_lr_is_read_as_torch_reads_it(factory, cls, options):
    params = parameters()
    many = _many(params)
    options = options | {"lr": torch.tensor(0.1)}
    optimizer = factory(**options)
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(cls, params, many, foreach=False, **options))


def test_many_parameters_are_updated_chunk_by_chunk():
    """More elements than a chunk has, of two dtypes, in turns."""
    params = [torch.randn(n, dtype=dtype) for n in (90_000, 200_000, 10) for dtype in (torch.float32, torch.float64)]
    many = _many(params, 2)
    optimizer = optim.adamw(0.1)
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, imperative(torch.optim.AdamW, params, many, foreach=True, lr=0.1))


TRANSFORMS = {
    "compile": compiled,
    "vmap": lambda step: lambda *args: _first(torch.vmap(step)(*(_stacked(arg) for arg in args))),
}
TRACED = [  # a compilation takes seconds
    pytest.param(transform, *OURS[name], kind, id=f"{how}-{name}-{kind}")
    for how, transform in TRANSFORMS.items()
    for kind in ("number", "tensor")
    for name in (
        OURS if how == "vmap" else ("dampened", "amsgrad") if kind == "tensor" else ("nesterov decayed", "adamw")
    )
]


def _stacked(tree):
    return optree.tree_map(lambda x: torch.stack([x, x]), tree, namespace=NAMESPACE)


def _first(tree):
    return optree.tree_map(lambda x: x[0], tree, namespace=NAMESPACE)


@pytest.mark.parametrize(("transform", "factory", "cls", "options", "kind"), TRACED)
def test_five_steps_under_a_transform(transform, factory, cls, options, kind):
    """A number as lr: sgd's arithmetic is the same; adam's bias corrections are tensors of float64."""
    params = parameters(torch.float64 if kind == "tensor" else torch.float32)
    many = _many(params)
    if kind == "tensor":
        options = options | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    optimizer = factory(**options)
    out, state = trajectory(transform(optimizer.step), params, many, optimizer.init(params))
    exact = kind == "number" and factory is optim.sgd
    rtol, atol = (0.0, 0.0) if exact else (2e-15, 2e-15) if kind == "tensor" else (5e-7, 5e-7)
    assert_same(out, imperative(cls, params, many, foreach=False, **options), rtol=rtol, atol=atol)
    assert state.step == STEPS


def test_compiled_once_for_all_steps():
    counter = torch._dynamo.testing.CompileCounter()
    optimizer = optim.clip_by_global_norm(optim.adamw(optim.schedule(_linear, 0.1, length=10)), 1.0)
    params = parameters()
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    trajectory(step, params, _many(params), optimizer.init(params))
    assert counter.frame_count == 1


def _linear(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer)


@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_an_ensemble_has_a_learning_rate_each(factory, cls, options):
    rates = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    params = {"w": torch.randn(3, 4, dtype=torch.float64)}
    grads = {"w": torch.randn(3, 4, dtype=torch.float64)}

    def two_steps(lr, p, g):
        optimizer = factory(**(options | {"lr": lr}))
        p, state = optimizer.step(p, g, optimizer.init(p))
        return optimizer.step(p, g, state)

    out, state = torch.vmap(two_steps)(rates, params, grads)
    for member, rate in enumerate(rates):
        one, many = {"w": params["w"][member]}, [{"w": grads["w"][member]}] * 2
        expected = imperative(cls, one, many, foreach=False, **(options | {"lr": rate.item()}))[-1]
        assert_same([[out["w"][member]]], [expected], rtol=1e-14, atol=1e-14)
    assert state.step.tolist() == [2, 2, 2]


@pytest.mark.parametrize("through", ["torch.func", "autograd"])
@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_hyper_gradients_are_those_of_finite_differences(factory, cls, options, through):
    """By lr and by the initial parameters, through three steps of training."""
    inputs, target = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def loss(w):
        return ((inputs @ w).tanh() - target).square().mean()

    def trained(lr, w):
        optimizer = factory(**(options | {"lr": lr}))
        state = optimizer.init(w)
        for _ in range(3):
            if through == "torch.func":
                grads = torch.func.grad(loss)(w)
            else:
                (grads,) = torch.autograd.grad(loss(w), w, create_graph=True)
            w, state = optimizer.step(w, grads, state)
        return loss(w)

    point = torch.tensor(0.05, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    if through == "torch.func":
        by_lr, by_w = torch.func.grad(trained, argnums=(0, 1))(*point)
    else:
        point = tuple(x.requires_grad_() for x in point)
        by_lr, by_w = torch.autograd.grad(trained(*point), point)
        point = tuple(x.detach() for x in point)

    def value(lr, w):
        return trained(lr, w.requires_grad_(through == "autograd")).detach()

    h = 1e-6
    assert by_lr.item() == pytest.approx(
        ((value(point[0] + h, point[1]) - value(point[0] - h, point[1])) / (2 * h)).item(), rel=1e-6
    )
    for i in range(3):
        e = h * torch.eye(3, dtype=torch.float64)[i]
        slope = (value(point[0], point[1] + e) - value(point[0], point[1] - e)) / (2 * h)
        assert by_w[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_a_parameter_without_a_gradient_does_not_make_hyper_gradients_nan():
    def trained(lr, w):
        optimizer = optim.adam(lr)
        return optimizer.step(w, w * torch.tensor([1.0, 0.0]), optimizer.init(w))[0].sum()

    for grad in torch.func.grad(trained, argnums=(0, 1))(torch.tensor(0.1), torch.ones(2)):
        assert grad.isfinite().all()


def test_hyper_gradient_inside_accumulate():
    """The eager engine differentiates a loss that steps."""

    def loss_fn(lr, x):
        optimizer = optim.sgd(lr)
        w = torch.ones(())
        return (
            optimizer.step(w, torch.func.grad(lambda w: (w * x).square().mean())(w), optimizer.init(w))[0] * x
        ).mean()

    x = torch.arange(4.0)
    expected = torch.func.grad(loss_fn)(torch.tensor(0.1), x)
    assert gradacc.accumulate(loss_fn, steps=1)(torch.tensor(0.1), x) == expected


@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_a_step_changes_nothing_and_shares_nothing(factory, cls, options):
    params = parameters()
    for leaf in leaves_of(params):
        leaf.requires_grad_()
    optimizer = factory(**options)
    state = optimizer.init(params)
    with torch.no_grad():
        grads = gradients(params)
    before = fingerprint((params, grads, state))
    new = optimizer.step(params, grads, state)
    assert fingerprint((params, grads, state)) == before
    old = {leaf.data_ptr() for leaf in leaves_of((params, grads, state)) if leaf.numel()}
    for leaf in leaves_of(new):
        assert not leaf.requires_grad
        assert leaf.data_ptr() not in old or not leaf.numel()
    assert optree.tree_structure(new[1], namespace=NAMESPACE) == optree.tree_structure(state, namespace=NAMESPACE)


@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_a_donated_step_is_made_in_the_memory_given(factory, cls, options):
    params = parameters()
    optimizer = factory(**options)
    state = optimizer.init(params)
    held = [leaf.data_ptr() for leaf in leaves_of((params, state[1:]))]
    new, moved = optimizer.step(params, gradients(params), state, donate=True)
    assert [leaf.data_ptr() for leaf in leaves_of((new, moved[1:]))] == held


def test_what_shares_memory_is_not_donated_twice():
    shared = torch.randn(3)
    params = {"a": shared, "b": shared, "c": torch.randn(1).expand(3), "d": torch.randn(3)}
    grads = gradients(params) | {"d": params["d"]}
    many = [optree.tree_map(torch.clone, grads)]
    expected = imperative(torch.optim.AdamW, params, many, lr=0.1, foreach=False)
    optimizer = optim.adamw(0.1)
    new, _ = optimizer.step(params, grads, optimizer.init(params), donate=True)
    assert_same([leaves_of(new)], expected)


@pytest.mark.parametrize(("factory", "cls", "options"), CASES)
def test_a_batched_init_is_a_stack_of_inits(factory, cls, options):
    optimizer = factory(**options)
    params = parameters()
    assert_trees_equal(torch.vmap(optimizer.init)(_stacked(params)), _stacked(optimizer.init(params)))
