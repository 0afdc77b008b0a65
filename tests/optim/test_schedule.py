"""lr: numbers, tensors, functions; and torch's schedulers as functions."""

import functools
import math
import threading

import pytest
import torch
from torch.optim import lr_scheduler

from gradacc import optim
from tests.optim.cases import assert_same, compiled, gradients, leaves_of, parameters, trajectory


def _sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def _chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.95**step),
    "MultiplicativeLR": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=3),
    "MultiStepLR": functools.partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": functools.partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "CosineAnnealingWarmRestarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": functools.partial(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, cycle_momentum=False
    ),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20, cycle_momentum=False),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
}


def _rates(scheduler, count):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    driven = scheduler(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        driven.step()
    return rates


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_schedule_is_the_librarys_own(scheduler):
    """In order, after a jump, and backwards."""
    expected = _rates(scheduler, 12)
    rate = optim.schedule(scheduler, 0.1)
    assert [rate(step) for step in range(12)] == expected
    rate = optim.schedule(scheduler, 0.1)
    assert [rate(step) for step in reversed(range(12))] == expected[::-1]
    assert rate(torch.tensor(7)) == expected[7]


def test_options_are_the_schedulers():
    rate = optim.schedule(lr_scheduler.StepLR, 1, step_size=1, gamma=0.5)
    assert [rate(step) for step in range(3)] == [1.0, 0.5, 0.25]


def test_threads_see_one_schedule():
    rate = optim.schedule(lr_scheduler.ExponentialLR, 0.1, gamma=0.999)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append([rate(step) for step in range(500)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [_rates(functools.partial(lr_scheduler.ExponentialLR, gamma=0.999), 500)] * 4


@pytest.mark.parametrize("factory", [optim.sgd, optim.adam, optim.adamw])
def test_a_function_of_the_step_is_a_scheduler(factory):
    params = parameters()
    many = [gradients(params) for _ in range(5)]
    cls = {optim.sgd: torch.optim.SGD, optim.adam: torch.optim.Adam, optim.adamw: torch.optim.AdamW}[factory]
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    theirs = cls(leaves, lr=0.1, foreach=False)
    driven = lr_scheduler.LinearLR(theirs)
    expected = []
    for grads in many:
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad
        theirs.step()
        driven.step()
        expected.append([leaf.clone() for leaf in leaves])
    steps = []
    rate = optim.schedule(lr_scheduler.LinearLR, 0.1, length=3)

    def lr(step):
        steps.append(step)
        return rate(step)

    optimizer = factory(lr)
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    assert_same(out, expected)
    assert steps == [0, 1, 2, 3, 4]
    assert all(type(step) is int for step in steps)
    if factory is optim.adam:
        return  # a compilation takes seconds
    traced = factory(optim.schedule(lr_scheduler.LinearLR, 0.1, length=5))
    out, _ = trajectory(compiled(traced.step), params, many, traced.init(params))
    assert_same(out, expected, rtol=1e-6, atol=1e-6)


def test_a_table_ends_with_its_last_value_and_is_batched():
    rate = optim.schedule(lr_scheduler.ExponentialLR, 1.0, gamma=0.5, length=3)
    assert torch.vmap(rate)(torch.tensor([0, 2, 1, 9])).tolist() == [1.0, 0.25, 0.5, 0.25]


def test_without_a_table_a_traced_step_is_refused():
    rate = optim.schedule(lr_scheduler.ExponentialLR, 1.0, gamma=0.5)
    with pytest.raises(ValueError, match="pass length="):
        torch.vmap(rate)(torch.tensor([0, 1]))


REFUSED = {
    "plateau": (lr_scheduler.ReduceLROnPlateau, 0.1, {}, TypeError, "ReduceLROnPlateau depends on a metric"),
    "momentum": (
        lr_scheduler.OneCycleLR,
        0.1,
        {"max_lr": 1.0, "total_steps": 9},
        ValueError,
        "pass cycle_momentum=False",
    ),
    "no scheduler": (
        lambda optimizer: None,
        0.1,
        {},
        TypeError,
        "must be an LRScheduler, got None.*becomes a function",
    ),
    "not callable": (0.1, 0.1, {}, TypeError, "must be a class of torch.optim.lr_scheduler or a function"),
    "negative": (lr_scheduler.LinearLR, -0.1, {}, ValueError, "lr must be finite and not negative, got -0.1"),
    "tensor": (lr_scheduler.LinearLR, torch.tensor(0.1), {}, TypeError, "lr must be a number, got a tensor"),
    "length": (lr_scheduler.LinearLR, 0.1, {"length": 0}, ValueError, "length must be at least 1, got 0"),
}


@pytest.mark.parametrize(("scheduler", "lr", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_schedule_is_refused(scheduler, lr, options, error, message):
    with pytest.raises(error, match=f"schedule: .*{message}"):
        optim.schedule(scheduler, lr, **options)


def test_an_lr_that_is_neither_a_number_nor_a_function_is_told_both():
    with pytest.raises(TypeError, match="adamw: lr must be a number, or a function of the step, got a list"):
        optim.adamw(lr=[0.1, 0.2])


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="a step is at least 0, got -1"):
        optim.schedule(lr_scheduler.LinearLR, 0.1)(-1)


RATES = {
    "negative": (-0.1, ValueError, "lr must be finite and not negative, got -0.1"),
    "NaN": (math.nan, ValueError, "lr must be finite and not negative, got nan"),
    "infinite": (math.inf, ValueError, "lr must be finite and not negative, got inf"),
    "NaN tensor": (torch.tensor(math.nan), ValueError, "lr must be finite and not negative, got nan"),
    "vector": (torch.ones(2), ValueError, r"lr is a torch.float32 tensor of shape \(2,\).*torch.vmap over lr"),
    "integer tensor": (torch.tensor(1), ValueError, r"lr is a torch.int64 tensor of shape \(\)"),
    "string": ("0.1", TypeError, "lr must be a number.* got a str"),
    "bool": (True, TypeError, r"lr must be a number, got True \(bool\)"),
}
FACTORIES = {
    "sgd": optim.sgd,
    "adam": optim.adam,
    "adamw": optim.adamw,
    "from_torch": lambda lr: optim.from_torch(torch.optim.SGD, lr=lr),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize(("lr", "error", "message"), RATES.values(), ids=RATES)
def test_a_bad_lr_is_refused_at_once_or_in_its_step(factory, lr, error, message):
    with pytest.raises(error, match=message):
        factory(lr)
    params = parameters()
    optimizer = factory(lambda step: lr)
    state = optimizer.init(params) if factory is not FACTORIES["from_torch"] else factory(0.1).init(params)
    with pytest.raises(error, match=message.replace("lr", r"lr\(0\)", 1)):
        optimizer.step(params, gradients(params), state)
