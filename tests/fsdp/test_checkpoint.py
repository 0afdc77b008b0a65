"""A training state with DTensors in it: saved as whole tensors, loaded on other numbers of ranks, and into whole parameters."""

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import gradacc
from gradacc import optim
from tests.fsdp import cases
from tests.helpers import assert_trees_equal


def run(group, steps, folder, load):
    """Train from what was loaded, if so asked; save; and return whole parameters."""
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    optimizer = optim.sharded(optim.adamw(0.1), mesh)
    grad_fn = gradacc.accumulate_and_value(cases.loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh))
    step, params = gradacc.train_step(grad_fn, optimizer), cases.divide(mesh, cases.params_of(), "b")
    state = gradacc.TrainState(params, optimizer.init(params))
    if load:
        state = gradacc.checkpoint.load(folder, state)
        for name, leaf in state.params.items():
            assert isinstance(leaf, DTensor) == (name != "b")
    whole = cases.undivided(state.params)
    for _ in range(steps):
        state, _ = step(state, cases.batch_of(rank))
    if steps:
        gradacc.checkpoint.save(folder, state)
    return whole, cases.undivided(state.params), int(state.step)


@pytest.mark.parametrize("world", [4])
def test_a_state_goes_on(pool, tmp_path, world):
    """On as many ranks (`save` is of all of the default group), and in one process with whole parameters."""
    first = pool.run(world, run, 2, str(tmp_path), False)
    for before, _, number in pool.run(world, run, 0, str(tmp_path), True):
        assert_trees_equal(before, first[0][1])
        assert number == 2
    optimizer, params = optim.adamw(0.1), cases.params_of()
    loaded = gradacc.checkpoint.load(tmp_path, gradacc.TrainState(params, optimizer.init(params)))
    assert_trees_equal(loaded.params, first[0][1])
    assert {name: leaf.shape for name, leaf in loaded.opt_state.exp_avg.items()} == {
        name: leaf.shape for name, leaf in params.items()
    }


def test_it_loads_on_fewer(pool, tmp_path):
    first = pool.run(4, run, 2, str(tmp_path), False)
    for before, _, _ in pool.run(2, run, 0, str(tmp_path), True):
        assert_trees_equal(before, first[0][1])
