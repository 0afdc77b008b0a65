"""The eager engine's own promises: whose memory is whose, and how much of it."""

import numpy as np
import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, fingerprint

D = torch.float64


def test_gradients_that_share_a_storage_are_parted():
    """Autograd hands over two views of one storage as two gradients; NOTE [buffers that nobody else holds]."""

    def loss(params, c):
        return ((params["p"].view(2, 3) + params["q"].view(2, 3)) * c.mean()).sum()

    params = {"p": torch.ones(6, dtype=D), "q": torch.ones(6, dtype=D)}
    x = torch.arange(6, dtype=D)
    grads = gradacc.accumulate(loss, steps=3)(params, x)
    assert_trees_close(grads, torch.func.grad(loss)(params, x))
    assert grads["p"].untyped_storage().data_ptr() != grads["q"].untyped_storage().data_ptr()


def test_a_gradient_that_is_the_users_own_memory_is_copied():
    constant = torch.arange(3.0)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p, x):
            return (p * constant).sum() * x

        @staticmethod
        def backward(ctx, grad):
            return constant.view(3), None

    grads = gradacc.accumulate(lambda p, x: Product.apply(p, x.sum()), steps=3, reduction="sum")(
        torch.ones(3), torch.ones(3)
    )
    torch.testing.assert_close(grads, torch.tensor([0.0, 3.0, 6.0]))
    torch.testing.assert_close(constant, torch.arange(3.0))


def test_results_are_fresh_and_independent():
    params = {"w": torch.ones(3), "loss": torch.tensor(2.0)}
    grad_fn = gradacc.accumulate_and_value(lambda p, x: p["loss"] + 0 * (p["w"] * x).sum(), steps=1)
    first, second = grad_fn(params, torch.ones(3)), grad_fn(params, torch.ones(3))
    before = fingerprint(params)
    (first[0]["w"]).fill_(7)
    first[1].fill_(7)
    assert fingerprint(params) == before
    assert second[1] == 2
    assert (second[0]["w"] == 0).all()


def test_a_loss_that_is_a_parameter_itself():
    grads, value = gradacc.accumulate_and_value(lambda p, x: p, steps=2)(torch.tensor(3.0), torch.ones(4))
    assert grads == 1
    assert value == 3


def tensor_bytes(run) -> int:
    """Peak of what torch allocates during ``run()``, over what was allocated before, in bytes: exact, not sampled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    sizes = [
        e.nbytes()
        for e in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        if e.name() == "[memory]"
    ]
    del result
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return peak


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # one cycle is what is wanted
@pytest.mark.parametrize("half", [False, True])
def test_memory_is_one_gradient_and_one_micro_batch_whatever_steps(half):
    module = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])
    apply, params, _ = gradacc.functional(module)
    if half:
        params = {name: p.bfloat16() for name, p in params.items()}
    size = sum(p.numel() for p in params.values()) * 4
    x = torch.ones(16, 256, dtype=torch.bfloat16 if half else torch.float32)
    peaks = {
        steps: tensor_bytes(
            lambda s=steps: gradacc.accumulate(lambda p, x: apply(p, x).float().square().mean(), steps=s)(params, x)
        )
        for steps in (1, 2, 4, 8, 16)
    }
    layer = size / 8
    # Gradients once; while a layer's backward runs, one layer's new gradient (in half precision at the end: each result, of
    # half the size, beside a buffer that is given up only then); and 8 layers' activations of 16 rows, with their gradients.
    activations = 2 * 8 * 16 * 256 * 4
    assert max(peaks.values()) <= size + (1 if not half else 5) * layer + activations
    assert peaks[16] <= 1.01 * peaks[2]


def test_memory_is_the_hand_written_loops():
    """To the byte, but for a few 0-dim sums: also of mse_loss, whose 0-dim result is a view of a large storage."""
    module = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    apply, params, _ = gradacc.functional(module)
    x, y = torch.ones(2, 64, 256)

    def loop(steps):
        for part, target in zip(x.chunk(steps), y.chunk(steps), strict=True):
            (nn.functional.mse_loss(module(part), target) / steps).backward()
        grads = [p.grad for p in module.parameters()]
        module.zero_grad()
        return grads

    def loss(params, batch):
        return nn.functional.mse_loss(apply(params, batch[0]), batch[1])

    for steps in (1, 2, 4, 8):
        ours = tensor_bytes(lambda s=steps: gradacc.accumulate(loss, steps=s)(params, (x, y)))
        assert ours <= tensor_bytes(lambda s=steps: loop(s)) + 64


def test_a_gradient_in_numpys_memory_is_copied():
    array = np.arange(3.0)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p, x):
            return (p * torch.from_numpy(array)).sum() * x

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(array), None

    grad_fn = gradacc.accumulate(lambda p, x: Product.apply(p, x.sum()), steps=2, reduction="sum")
    grads = grad_fn(torch.ones(3, dtype=D), torch.ones(2, dtype=D))
    grads.add_(1)
    assert array.tolist() == [0, 1, 2]
    assert grads.tolist() == [1, 3, 5]


def test_a_gradient_keeps_no_larger_storage_alive():
    params = [torch.ones(4, 8), torch.ones(2, 8)]
    grads = gradacc.accumulate(lambda p, x: (torch.cat(p) * x.mean()).sum(), steps=2)(params, torch.ones(4))
    assert [grad.untyped_storage().nbytes() for grad in grads] == [4 * 8 * 4, 2 * 8 * 4]
