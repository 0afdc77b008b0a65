"""DTensor parameters: gradients and steps are those of the large batch with whole parameters, in one gather, one exchange."""

import gc
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import optim
from tests.fsdp import cases
from tests.helpers import assert_trees_close, assert_trees_equal, living_tensors


def gradients(group, options, whole):
    mesh, found = cases.mesh_of(group), []
    params = cases.divide(mesh, cases.params_of(), *whole)
    before = {name: leaf.full_tensor() for name, leaf in params.items() if isinstance(leaf, DTensor)}
    grad_fn = gradacc.accumulate_and_value(cases.loss_fn, steps=3, sync=gradacc.reduce_scatter(mesh, **options))
    for number in range(3):
        grads, value = grad_fn(params, cases.batch_of(dist.get_rank(group), number=number))
        for name, grad in grads.items():
            assert isinstance(grad, gradacc.Shard if name in whole else DTensor)
            if name not in whole:
                assert (grad.device_mesh, grad.placements, grad.shape) == (
                    mesh,
                    params[name].placements,
                    params[name].shape,
                )
                assert grad.to_local().shape == params[name].to_local().shape
                assert grad.stride() == params[name].stride()
        own = {name: grad.values for name, grad in grads.items() if name in whole}
        rest = cases.undivided({name: grad for name, grad in grads.items() if name not in whole})
        offsets = {name: grads[name].offset for name in own}
        found.append((rest, own, offsets, value))
    assert_trees_equal({name: leaf.full_tensor() for name, leaf in params.items() if isinstance(leaf, DTensor)}, before)
    return found


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=str)
@pytest.mark.parametrize("whole", [(), ("b", "few")], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_are_the_large_batchs(pool, world, whole, options):
    answers = pool.run(world, gradients, options, whole)
    for number in range(3):
        batch = cases.union(world, number=number)
        expected, value = gradacc.accumulate_and_value(cases.loss_fn, steps=1)(cases.params_of(), batch)
        for answer in answers:
            rest, own, offsets, actual = answer[number]
            assert_trees_close((rest, actual), ({k: v for k, v in expected.items() if k not in whole}, value))
            for name, part in own.items():
                flat = expected[name].reshape(-1)[offsets[name] : offsets[name] + len(part)]
                assert_trees_close(part, flat)


def both_ways(group, compress):
    """Rows of DTensors, and those of gradients that are summed in rank order."""
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    ordered = gradacc.all_reduce(group, ordered=True, compress=compress)
    expected = gradacc.accumulate(cases.loss_fn, steps=2, sync=ordered)
    grad_fn = gradacc.accumulate(cases.loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh, compress=compress))
    params = cases.params_of(torch.float32)
    batch = cases.batch_of(rank, torch.float32)
    whole = expected(params, batch)
    rows = {name: cases.divided(mesh, leaf).to_local() for name, leaf in whole.items()}
    found = {name: leaf.to_local() for name, leaf in grad_fn(cases.divide(mesh, params), batch).items()}
    return found, rows


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bits_are_those_of_ordered_sums(pool, world):
    for found, rows in pool.run(world, both_ways, None):
        assert_trees_equal(found, rows)


def test_compressed_bits(pool):
    for found, rows in pool.run(3, both_ways, torch.bfloat16):
        assert_trees_close(found, rows, rtol=2e-2, atol=1e-6)  # what comes back whole is rounded twice


MAKERS = {
    "adamw": lambda share: share(optim.adamw(0.1, weight_decay=0.1)),
    "momentum": lambda share: share(optim.sgd(0.1, momentum=0.9)),
    "torch's AdamW": lambda share: share(optim.from_torch(torch.optim.AdamW, lr=0.1)),
    "groups": lambda share: share(optim.by_path(optim.adamw(0.1), (lambda path, leaf: leaf.ndim < 2, optim.sgd(0.1)))),
    "clip outside": lambda share: optim.clip_by_global_norm(share(optim.adamw(0.1)), 1e-3),
    "clip inside": lambda share: share(optim.clip_by_global_norm(optim.sgd(0.1), 1e-3)),
    "skip": lambda share: optim.skip_nonfinite(share(optim.adamw(0.1))),
    "spikes": lambda share: optim.skip_spikes(share(optim.adamw(0.1)), window=4),
    "scale": lambda share: optim.dynamic_loss_scale(share(optim.adamw(0.1)), init_scale=2.0**10),
}
STEPS = 5


def trained(group, name, whole, donate, options):
    mesh = None if group is None else cases.mesh_of(group)
    share = (lambda optimizer: optimizer) if mesh is None else (lambda inner: optim.sharded(inner, mesh, **options))
    optimizer = MAKERS[name](share)
    loss = optim.scaled_loss(cases.loss_fn) if optimizer.loss_scale else cases.loss_fn
    sync = None if mesh is None else gradacc.reduce_scatter(mesh)
    step = gradacc.train_step(gradacc.accumulate_and_value(loss, steps=2, sync=sync), optimizer, donate=donate)
    params = cases.params_of()
    params = params if mesh is None else cases.divide(mesh, params, *whole)
    rows = _addresses(params)
    state, told = gradacc.TrainState(params, optimizer.init(params)), []
    for number in range(STEPS):
        batch = cases.union(3, number=number) if mesh is None else cases.batch_of(dist.get_rank(group), number=number)
        state, metrics = step(state, batch)
        told.append({key: metrics[key] for key in ("loss", "grad_norm")})
    for key, leaf in state.params.items():
        assert isinstance(leaf, DTensor) == (mesh is not None and key not in whole)
    same = [one == other for one, other in zip(rows, _addresses(state.params), strict=True)]
    return cases.undivided(state.params), told, same


def _addresses(params):
    rows = [leaf.to_local() for leaf in params.values() if isinstance(leaf, DTensor)]
    return [each.data_ptr() for each in rows if each.numel()]


@pytest.mark.parametrize(("whole", "donate"), [((), True), (("b", "w"), False)], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_the_large_batchs(pool, name, whole, donate):
    expected, told, _ = trained(None, name, (), False, {})
    for params, metrics, in_place in pool.run(3, trained, name, whole, donate, {}):
        assert_trees_close(params, expected, rtol=1e-10, atol=1e-12)
        assert_trees_close(metrics, told, rtol=1e-10, atol=1e-12)
        assert all(same is donate for same in in_place)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_of_other_numbers_of_ranks(pool, world):
    for params, _, _ in pool.run(world, trained, "adamw", (), True, {}):
        steps = optim.adamw(0.1, weight_decay=0.1)
        state = gradacc.TrainState(cases.params_of(), steps.init(cases.params_of()))
        for number in range(STEPS):
            step = gradacc.train_step(gradacc.accumulate_and_value(cases.loss_fn, steps=2), steps)
            state, _ = step(state, cases.union(world, number=number))
        assert_trees_close(params, state.params, rtol=1e-10, atol=1e-12)


def with_masters(group, donate):
    mesh = cases.mesh_of(group)
    optimizer = optim.sharded(optim.adamw(1e-3), mesh, master_dtype=torch.float32)
    grad_fn = gradacc.accumulate_and_value(
        cases.loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh), dtype=torch.float32
    )
    params = cases.divide(mesh, cases.params_of(torch.bfloat16))
    state = gradacc.TrainState(params, optimizer.init(params))
    step = gradacc.train_step(grad_fn, optimizer, donate=donate)
    for number in range(3):
        state, _ = step(state, cases.batch_of(dist.get_rank(group), torch.bfloat16, number))
    for name, leaf in state.params.items():
        assert leaf.dtype == torch.bfloat16
        assert torch.equal(leaf.to_local().reshape(-1), state.opt_state.masters[name].values.bfloat16())
    return True


@pytest.mark.parametrize("donate", [False, True])
def test_masters(pool, donate):
    assert all(pool.run(3, with_masters, donate))


# What crosses, and what a rank holds.


def counted(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    params = cases.divide(mesh, cases.params_of())
    optimizer = optim.sharded(optim.adamw(0.1), mesh)
    grad_fn = gradacc.accumulate_and_value(cases.loss_fn, steps=3, sync=gradacc.reduce_scatter(mesh))
    state, found = optimizer.init(params), []
    for _ in range(5):
        with CommDebugMode() as call:
            grads, _ = grad_fn(params, cases.batch_of(rank))
        with CommDebugMode() as update:
            params, state = optimizer.step(params, grads, state)
        found.append([{str(op): n for op, n in each.get_comm_counts().items()} for each in (call, update)])
    return found[-1]


def test_collectives_of_a_step(pool):
    """A gather and an exchange; and a gather of nothing but records, in which ranks hear of one whose update has failed."""
    gather, exchange = "c10d._allgather_base_", "c10d.alltoall_base_"
    for call, update in pool.run(3, counted):
        assert call == {gather: 1, exchange: 1}
        assert update == {gather: 1}


def largest_but(before):
    """Elements of the largest plain tensor that ``before`` has not got."""
    gc.collect()
    return max(
        leaf.numel() for key, leaf in living_tensors().items() if key not in before and not isinstance(leaf, DTensor)
    )


def held(group):
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    whole = {"w": torch.ones(9, 5), "b": torch.ones(8)}
    params = cases.divide(mesh, whole)
    optimizer = optim.sharded(optim.adamw(0.1), mesh)

    def loss_fn(params, x):
        return (x @ params["w"].T).square().mean() + params["b"].sum()

    step = gradacc.train_step(
        gradacc.accumulate_and_value(loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh)), optimizer
    )
    state = gradacc.TrainState(params, optimizer.init(params))
    state, _ = step(state, torch.ones(2, 5))
    gc.collect()
    before = living_tensors()
    state, metrics = step(state, torch.ones(2, 5))
    del metrics
    # A thread of gloo may hold the receiver of a collective for a moment after its end.
    until = time.monotonic() + 10
    while (largest := largest_but(before)) > 3 * 5 and time.monotonic() < until:
        time.sleep(0.01)
    rows = sum(leaf.to_local().numel() for leaf in params.values())
    slots = [shard.values for tree in (state.opt_state.exp_avg, state.opt_state.exp_avg_sq) for shard in tree.values()]
    return (
        rows,
        sum(slot.untyped_storage().nbytes() // 4 for slot in slots),
        largest,
        rank,
    )


def test_a_rank_holds_its_rows(pool):
    """At rest parameters and state are of its rows alone, and no whole tensor is left of a call."""
    for rows, slots, largest, rank in pool.run(4, held):
        assert rows == {0: 3, 1: 3, 2: 3, 3: 0}[rank] * 5 + 2
        assert slots == 2 * rows
        assert largest <= 3 * 5
