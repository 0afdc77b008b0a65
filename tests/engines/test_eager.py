"""The eager engine's own promises: whose memory is whose, and how much of it."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc
from tests.helpers import assert_trees_close, fingerprint, living_tensors, squares

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


def test_requires_grad_parameters_of_a_module_collect_nothing():
    module = nn.Linear(3, 1)
    params = dict(module.named_parameters())
    other = nn.Linear(3, 1)  # closed over, not passed

    def loss(params, x):
        return (torch.func.functional_call(module, params, (x,)) + other(x)).square().mean()

    with torch.no_grad():  # else they are connected, as torch.func.grad's
        grads, value = gradacc.accumulate_and_value(loss, steps=2)(params, torch.ones(4, 3))
    assert not value.requires_grad
    assert not any(grad.requires_grad for grad in grads.values())
    gradacc.accumulate_and_value(loss, steps=2)(params, torch.ones(4, 3))
    assert all(p.grad is None for p in (*module.parameters(), *other.parameters()))


def test_a_graph_of_the_caller_is_neither_used_up_nor_kept(params, batch):
    w = params["w"].requires_grad_()
    upstream = w.exp()
    x = batch["x"] * upstream
    gradacc.accumulate(squares, steps=2)({"w": upstream, "b": params["b"]}, {"x": x, "y": batch["y"]})
    (grad,) = torch.autograd.grad(x.sum(), w)  # the caller's own graph is still whole
    torch.testing.assert_close(grad, batch["x"].sum(0) * upstream.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 0])
def test_sparse_embeddings_are_densified(dtype, padding):
    table = torch.arange(12).view(6, 2).to(dtype)
    ids = torch.tensor([[1, 1], [0, 2], [1, 5]])

    def loss(p, ids, sparse=True):
        return F.embedding(ids, p["table"], padding_idx=padding, sparse=sparse).square().sum((1, 2)).mean()

    grads = gradacc.accumulate(loss, steps=3)({"table": table}, ids)
    assert grads["table"].layout == torch.strided
    expected = torch.func.grad(lambda p: loss(p, ids, sparse=False))({"table": table})
    assert_trees_close(grads, expected, rtol=1e-10 if dtype is D else 1e-2)


def test_activation_checkpointing(params, batch):
    def loss(params, batch):
        hidden = checkpoint(lambda x: torch.sin(x * params["w"]), batch["x"], use_reentrant=False)
        return (hidden.sum(1) - batch["y"]).square().mean()

    plain = torch.func.grad(lambda p, b: (torch.sin(b["x"] * p["w"]).sum(1) - b["y"]).square().mean())(params, batch)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, batch), plain)


@pytest.mark.parametrize("through_inputs", [True, False])
def test_reentrant_checkpointing_is_refused(through_inputs, params, batch):
    def loss(params, batch):
        # Not through inputs: params are used in the checkpoint, but only closed over; torch itself would not notice.
        x = (batch["x"] * params["w"]) if through_inputs else batch["x"].clone().requires_grad_()
        hidden = checkpoint(lambda x: torch.sin(x * params["w"]), x, use_reentrant=True)
        return (hidden.sum(1) + params["b"]).square().mean()

    before = fingerprint((params, batch))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradacc.accumulate(loss, steps=3)(params, batch)
    assert fingerprint((params, batch)) == before


def test_reentrant_checkpointing_in_a_later_micro_batch_is_refused(params):
    def loss(params, x):
        if x[0, 0] == 0:
            return (x * params["w"]).mean()
        return (
            checkpoint(lambda x: x * params["w"], x.clone().requires_grad_(), use_reentrant=True) * params["b"]
        ).mean()

    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradacc.accumulate(loss, microbatch_size=1)(params, torch.arange(6, dtype=D).view(2, 3))


def test_saved_tensor_hooks(params, batch):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        grads = gradacc.accumulate(squares, steps=3)(params, batch)
    assert packed
    assert_trees_close(grads, torch.func.grad(squares)(params, batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hooks_on_parameters_do_not_pile_up(dtype):
    def loss(w, x):
        w.register_hook(lambda grad: 2 * grad)
        return (w * x).mean()

    grads = gradacc.accumulate(loss, steps=4)(torch.ones((), dtype=dtype), torch.ones(4, dtype=dtype))
    assert grads == 2


def test_backward_inside_the_loss_is_refused():
    def loss(w, x):
        w.square().backward()
        return (w * x).mean()

    with pytest.raises(ValueError, match=r"called .backward\(\) through the parameters"):
        gradacc.accumulate(loss, steps=2)(torch.ones(()), torch.ones(4))


def test_memory_does_not_grow_under_an_outer_autocast():
    w, x = torch.ones(64, 64), torch.ones(4, 64)
    grad_fn = gradacc.accumulate(lambda w, x: (x @ w).float().mean(), steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            grad_fn(w, x)
        # Tensors that earlier tests left behind may go meanwhile, so it is the new ones that count.
        gc.collect()
        before = living_tensors()
        for _ in range(23):
            grad_fn(w, x)
        gc.collect()
        kept = living_tensors().keys() - before.keys()
        bytes_kept = tensor_bytes_kept(lambda: [grad_fn(w, x) for _ in range(20)])
    assert not kept
    assert bytes_kept == 0


def tensor_bytes_kept(run):
    """What torch has allocated and not freed after ``run()`` and its result are gone, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
