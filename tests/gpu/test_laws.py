"""The laws on a GPU; and that no call waits for it."""

import math

import optree
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import Mean, TrainState, optim
from gradacc._sync import group
from tests.gpu.cases import LOSSES, batch, move, nothing_waits, parameters, weighted
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, crossings, large

SPLITS = [{"steps": 1}, {"steps": 3}, {"steps": 12}, {"microbatch_size": 5}]


def on_cpu(tree):
    return move(tree, "cpu")


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_any_split_is_the_large_batch_and_nothing_waits(loss, engine, split, device):
    params, data = move(parameters(), device), move(batch(), device)
    expected = torch.func.grad(large(loss))(params, data)
    grad_fn = gradacc.accumulate(loss, **split)
    ENGINES[engine](lambda: grad_fn(params, data))  # what is loaded at first use
    with nothing_waits(device):
        grads = ENGINES[engine](lambda: grad_fn(params, data))
    assert_trees_close(grads, expected)
    assert all(leaf.device.type == device.type for leaf in optree.tree_leaves(grads))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_step_is_plain_autograd_bit_for_bit(loss, device):
    params, data = move(parameters(), device), move(batch(), device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    expected = torch.autograd.grad(large(loss)(leaves, data), list(leaves.values()))
    grads = gradacc.accumulate(loss, steps=1)(params, data)
    assert_trees_equal(grads, dict(zip(leaves, expected, strict=True)))


@pytest.mark.parametrize("donate", [False, True])
def test_the_streaming_form_and_nothing_waits(donate, device):
    params, data = move(parameters(), device), move(batch(), device)
    parts = [tuple(leaf[i : i + 3] for leaf in data) for i in range(0, 12, 3)]
    init, update, merge, finalize = gradacc.accumulator(weighted, donate=donate)

    def run():
        a, b = init(params), init(params)
        for part in parts[:2]:
            a = update(a, params, part)
        for part in parts[2:]:
            b = update(b, params, part)
        return finalize(merge(a, b))[0]

    run()
    with nothing_waits(device):
        grads = run()
    assert_trees_close(grads, torch.func.grad(large(weighted))(params, data))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_0_contributes_exactly_0(dtype, bad, device):
    params, (x, index, mask) = move(parameters(dtype), device), move(batch(dtype=dtype), device)
    grad_fn = gradacc.accumulate_and_value(weighted, microbatch_size=3)
    expected = grad_fn(params, (x, index, mask))
    worse = x.clone()
    worse[:3] = bad  # a micro-batch of weight 0
    assert_trees_equal(grad_fn(params, (worse, index, mask)), expected)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_a_wrong_weight_makes_everything_nan(weight, device):
    def loss(w, weight):
        return Mean(w * 2.0, weight)

    weights = [torch.tensor(3.0, device=device), torch.tensor(float(weight), device=device)]
    if device.type == "cpu":
        with pytest.raises(ValueError, match="weight is"):
            gradacc.accumulate(loss)(torch.ones(()), weights)
        return
    grads, value = gradacc.accumulate_and_value(loss)(torch.ones((), device=device), weights)
    assert grads.isnan()
    assert value.value.isnan()


OPTIMIZERS = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "adamw": lambda: optim.adamw(1e-3),
    "clipped": lambda: optim.clip_by_global_norm(optim.adamw(1e-3), 0.1),
    "from_torch": lambda: optim.from_torch(torch.optim.AdamW, lr=1e-3),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_waits_for_nothing(name, donate, device):
    optimizer = OPTIMIZERS[name]()
    step = gradacc.train_step(gradacc.accumulate_and_value(weighted, steps=4), optimizer, donate=donate)
    params, data = move(parameters(torch.float32), device), move(batch(dtype=torch.float32), device)
    state, _ = step(TrainState(params, optimizer.init(params)), data)
    with nothing_waits(device):
        state, metrics = step(state, data)
    assert metrics["loss"].isfinite()


@pytest.mark.parametrize("make", [optim.skip_nonfinite, optim.skip_spikes, optim.dynamic_loss_scale])
def test_a_step_that_reads_reads_once(make, device):
    if device.type != "cuda":
        pytest.skip("only CUDA says what waits")
    optimizer = make(optim.adamw(1e-3))
    params = move(parameters(torch.float32), device)
    params, state = optimizer.step(params, params, optimizer.init(params))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as found:
            optimizer.step(params, params, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 1


def test_on_a_stream_of_its_own(device):
    if device.type != "cuda":
        pytest.skip("a CPU has no streams")
    params, data = move(parameters(), device), move(batch(), device)
    grad_fn = gradacc.accumulate(weighted, steps=4)
    expected = grad_fn(params, data)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grads = grad_fn(params, data)
        sums = {name: leaf.clone() for name, leaf in grads.items()}  # used on the stream where it was made
    torch.cuda.current_stream().wait_stream(stream)
    assert_trees_close(sums, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    params, data = move(parameters(torch.float32), device), move(batch(dtype=torch.float32), device)

    def loss(params, data):
        with torch.autocast(device.type, dtype=dtype):
            return weighted(params, data)

    grads = gradacc.accumulate(loss, steps=4)(params, data)
    whole = gradacc.accumulate(weighted, steps=1)(params, data)
    assert_trees_close(grads, whole, rtol=0.1, atol=0.02)
    assert all(leaf.dtype == torch.float32 for leaf in grads.values())


def test_compiled(device):
    params, data = move(parameters(), device), move(batch(), device)
    torch._dynamo.reset()
    compiled = torch.compile(gradacc.accumulate(weighted, steps=6), fullgraph=True, backend="aot_eager")
    assert_trees_close(compiled(params, data), gradacc.accumulate(weighted, steps=6)(params, data))


def test_a_checkpoint(tmp_path, device):
    optimizer = optim.adamw(1e-3)
    params = move(parameters(torch.float32), device)
    state = TrainState(*optimizer.step(params, params, optimizer.init(params)))
    gradacc.checkpoint.save(tmp_path / "saved", state)
    loaded = gradacc.checkpoint.load(tmp_path / "saved", TrainState(params, optimizer.init(params)))
    assert_trees_equal(loaded, state)


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"compress": torch.bfloat16}], ids=str)
def test_one_rank_of_nccl(options, tmp_path, device, monkeypatch):
    """A group of one process, where nothing would cross, is taken as any other: the backend gets the buffers."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    monkeypatch.setattr(group, "resolve", lambda name, given: dist.group.WORLD)
    try:
        params, data = move(parameters(), device), move(batch(), device)
        expected = gradacc.accumulate_and_value(weighted, steps=4)(params, data)
        synced = gradacc.accumulate_and_value(weighted, steps=4, sync=gradacc.all_reduce(**options))
        synced(params, data)
        with CommDebugMode() as counter:
            grads, value = synced(params, data)
        assert crossings(counter) == 1 or options.get("overlap")
        assert counter.get_total_counts() > 0
        assert_trees_close(value, expected[1])
        within = {"rtol": 2**-8, "atol": 0} if options.get("compress") else {}
        assert_trees_close(grads, expected[0], **within)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_pieces_and_nothing_waits(backward, size, device):
    params, data = move(parameters(), device), move(batch(), device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    expected = torch.autograd.grad(weighted(leaves, data).value, list(leaves.values()))
    by_pieces = gradacc.microbatch(weighted, microbatch_size=size, in_dims=(None, 0), backward=backward)

    def run():
        return torch.autograd.grad(by_pieces(leaves, data).value, list(leaves.values()))

    run()  # what is loaded at first use
    with nothing_waits(device):
        grads = run()
    assert_trees_close(list(grads), list(expected))


def test_random_numbers_of_pieces_are_drawn_again(device):
    x, weight = torch.ones(10, 50, device=device), torch.ones(50, device=device, requires_grad=True)

    def noisy(x):
        return torch.dropout(x * weight, 0.5, True).sum()

    torch.manual_seed(3)
    sum(noisy(piece) for piece in x.split(3)).backward()
    expected, after = weight.grad, torch.rand((), device=device)
    for backward in ("recompute", "forward"):
        weight.grad = None
        torch.manual_seed(3)
        total = gradacc.microbatch(noisy, microbatch_size=3, out="sum", backward=backward)(x)
        assert torch.equal(torch.rand((), device=device), after)
        total.backward()
        assert torch.equal(weight.grad, expected)
