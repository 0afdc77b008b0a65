"""Training on a device: optimizers, steps, checkpoints and windows; and what each of them waits for."""

from unittest import mock

import optree
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import Mean, TrainState, optim
from gradacc.checkpoint import _leaves
from gradacc.demo.model import GPT, PAD, GPTConfig
from tests.device import ACC, OnDevice, to_cpu, to_device
from tests.helpers import assert_trees_close, assert_trees_equal

STEPS = 3


def on_cpu(tree):
    return optree.tree_map(lambda leaf: to_cpu(leaf), tree, namespace="gradacc")


def parameters():
    g = torch.Generator().manual_seed(0)
    return {"w": torch.randn(4, 5, generator=g), "b": torch.randn(5, generator=g), "s": torch.tensor(0.5)}


OPTIMIZERS = {
    "sgd": (lambda: optim.sgd(0.1, momentum=0.9, nesterov=True), 0),
    "adam": (lambda: optim.adam(0.1, amsgrad=True), 0),
    "adamw": (lambda: optim.adamw(lambda step: 0.1 / (step + 1)), 0),
    "by_path": (lambda: optim.by_path(optim.sgd(0.1), (lambda path, leaf: leaf.ndim < 2, optim.adamw(0.1))), 0),
    "clip_by_global_norm": (lambda: optim.clip_by_global_norm(optim.adamw(0.1), 0.1), 0),
    "clip_by_global_norm of a tensor": (lambda: optim.clip_by_global_norm(optim.sgd(0.1), torch.tensor(0.1)), 0),
    "from_torch SGD": (lambda: optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9), 0),
    "from_torch AdamW": (lambda: optim.from_torch(torch.optim.AdamW, lr=0.1), 0),
    "from_torch AdamW foreach": (lambda: optim.from_torch(torch.optim.AdamW, lr=0.1, foreach=True), 0),
    "from_torch RMSprop": (lambda: optim.from_torch(torch.optim.RMSprop, lr=0.1), 0),
    "skip_nonfinite": (lambda: optim.skip_nonfinite(optim.adamw(0.1)), 1),
    "skip_spikes": (lambda: optim.skip_spikes(optim.clip_by_global_norm(optim.adamw(0.1), 0.1)), 1),
    "dynamic_loss_scale": (lambda: optim.dynamic_loss_scale(optim.clip_by_global_norm(optim.adamw(0.1), 1.0)), 1),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_cpus_bit_for_bit(name, donate, waits):
    make, reads = OPTIMIZERS[name]
    optimizer, g = make(), torch.Generator().manual_seed(1)
    params = parameters()
    state = optimizer.init(params)
    there = to_device(params)
    kept = optimizer.init(there)
    for step in range(STEPS):
        grads = {name: torch.randn(leaf.shape, generator=g) for name, leaf in params.items()}
        if step == 1:
            grads["w"][0, 0] = float("inf") if reads else 1.0
        on_device = to_device(grads)
        waits.clear()
        there, kept = optimizer.step(there, on_device, kept, donate=donate)
        assert sum(waits.values()) == reads
        params, state = optimizer.step(params, grads, state)
        assert_trees_equal(on_cpu(there), params)
        assert_trees_equal(on_cpu(kept), state)
    assert all(isinstance(leaf, OnDevice) for leaf in there.values())


def test_states_count_on_the_cpu_whatever_the_default_device_is(waits):
    params = to_device(parameters())
    with torch.device("acc"):
        optimizer = optim.dynamic_loss_scale(optim.skip_spikes(optim.adamw(0.1)))
        state = optimizer.init(params)
        waits.clear()
        _, state = optimizer.step(params, params, state)
        assert sum(waits.values()) == 2
        nothing = {"w": torch.ones(0)}
        optim.skip_nonfinite(optim.sgd(0.1)).step(nothing, nothing, optim.skip_nonfinite(optim.sgd(0.1)).init(nothing))
        assert sum(waits.values()) == 2
    counts = (state.scale, state.growth_tracker, state.skipped, state.inner.recent, state.inner.skipped)
    assert all(each.is_cpu for each in (*counts, state.inner.inner.step))


def mean_of_tokens(params, batch):
    x, mask = batch
    each = (x @ params["w"] + params["b"]).square().sum(1) * params["s"]
    return Mean((each * mask).sum(), mask.sum())


def plain(params, batch):
    x, _ = batch
    return ((x @ params["w"] + params["b"]).square().sum(1) * params["s"]).mean()


def batches():
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(6, 4, generator=g), torch.tensor([0, 0, 1, 2, 0, 1])) for _ in range(STEPS)]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("loss", [plain, mean_of_tokens])
@pytest.mark.parametrize("spikes", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step(scaled, spikes, loss, donate, waits):
    """What skips reads once each; the loss and the norm together."""
    optimizer = optim.clip_by_global_norm(optim.adamw(0.1), 1.0)
    optimizer = optim.skip_spikes(optimizer) if spikes else optimizer
    grad_fn = gradacc.accumulate_and_value(optim.scaled_loss(loss) if scaled else loss, steps=3)
    optimizer = optim.dynamic_loss_scale(optimizer) if scaled else optimizer
    step = gradacc.train_step(grad_fn, optimizer, donate=donate)
    here = TrainState(parameters(), optimizer.init(parameters()))
    there = TrainState(to_device(parameters()), optimizer.init(to_device(parameters())))
    for batch in batches():
        on_device = to_device(batch)
        waits.clear()
        there, metrics = step(there, on_device)
        assert sum(waits.values()) == scaled + spikes
        here, expected = step(here, batch)
        assert_trees_close(on_cpu(metrics), expected, rtol=1e-5)
        assert_trees_close(on_cpu(there), here, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_in_an_open_window(tmp_path):
    """Saved from the device, loaded onto it, and on to the same bits."""
    init, update, _, finalize = gradacc.accumulator(mean_of_tokens)
    optimizer = optim.adamw(0.1)
    params = to_device(parameters())
    first, second, third = to_device(batches())
    window = update(update(init(params), params, first), params, second)
    state = TrainState(*optimizer.step(params, params, optimizer.init(params)))
    like = {"train": state, "window": update(init(params), params, third)}
    with mock.patch.object(_leaves, "_TENSORS", (*_leaves._TENSORS, OnDevice)):  # a real device's are torch.Tensor
        gradacc.checkpoint.save(tmp_path / "saved", {"train": state, "window": window})
        loaded = gradacc.checkpoint.load(tmp_path / "saved", like)
    assert_trees_equal(on_cpu(loaded), on_cpu({"train": state, "window": window}))
    assert all(isinstance(leaf, OnDevice) for leaf in loaded["train"].params.values())
    results = [finalize(update(each, params, third)) for each in (window, loaded["window"])]
    assert_trees_equal(on_cpu(results[0]), on_cpu(results[1]))


def test_windows_of_a_loader_that_copies_ahead(waits):
    """Copies that do not wait, and nothing else does."""
    data = torch.utils.data.TensorDataset(torch.arange(14.0).view(7, 2), torch.tensor([1, 0, 2, 0, 0, 3, 1]))
    loader = torch.utils.data.DataLoader(data, batch_size=2)

    def loss(w, batch):
        return Mean(((batch[0] * w).sum(1) * batch[1]).sum(), batch[1].sum())

    ahead = [tuple(leaf.to(ACC, non_blocking=True) for leaf in batch) for batch in loader]
    grad_fn, w = gradacc.accumulate(loss), torch.ones(2)
    there = to_device(w)
    waits.clear()
    results = [grad_fn(there, window) for window in gradacc.data.windows(ahead, 2)]
    assert not waits
    expected = [grad_fn(w, window) for window in gradacc.data.windows(loader, 2)]
    assert_trees_close(on_cpu(results), expected, rtol=1e-6)


def test_autocast_and_activation_checkpointing(waits):
    """Its dropout draws on the device, and recomputes the same draw."""
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).to(ACC)
    apply, params, _ = gradacc.functional(module)

    def loss(params, batch, recompute):
        x, mask = batch

        def forward(x):
            with torch.autocast("acc", dtype=torch.bfloat16):
                return apply(params, x)

        out = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        return Mean((out.float().square().sum(1) * mask).sum(), mask.sum())

    batch = to_device(batches()[0])
    grad_fn = gradacc.accumulate_and_value(loss, steps=2)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        waits.clear()
        results.append(on_cpu(grad_fn(params, batch, recompute)))
        assert not waits
    assert_trees_equal(*results)
    assert all(grad.dtype == torch.float32 for grad in results[0][0].values())


def test_a_language_model(waits):
    torch.manual_seed(3)
    apply, params, _ = gradacc.functional(GPT(GPTConfig(layers=2, heads=2, width=8, context=7)).double())
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 256, (6, 7), generator=g)
    tokens = torch.where(torch.arange(7) < torch.randint(0, 7, (6, 1), generator=g), tokens, PAD)

    def loss(params, tokens):
        targets = tokens[:, 1:]
        logits = apply(params, tokens)[:, :-1].transpose(1, 2)
        total = nn.functional.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum")
        return Mean(total, (targets != PAD).sum())

    grad_fn = gradacc.accumulate_and_value(loss, steps=6)
    there, batch = to_device(params), to_device(tokens)
    waits.clear()
    result = grad_fn(there, batch)
    assert not waits
    assert_trees_close(on_cpu(result), grad_fn(params, tokens), rtol=1e-9)
