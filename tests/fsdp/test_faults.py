"""Where one rank fails, or differs, all of them raise; and the next call is exact."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

import gradacc
from gradacc import optim
from tests.fsdp import cases
from tests.helpers import assert_trees_equal


def attempts(group, what):
    """What each rank says of a step in which rank 1 does something wrong; and the results of steps around it."""
    mesh, rank = cases.mesh_of(group), dist.get_rank(group)
    params, batch = cases.divide(mesh, cases.params_of(), "b"), cases.batch_of(rank, number=1)
    inner, bad = optim.adamw(0.1), rank == 1

    def loss_fn(params, batch):
        if bad and what == "loss" and failing:
            raise ValueError("of the loss")
        return cases.loss_fn(params, batch)

    def update(*args, **kwargs):
        if bad and what == "update" and failing:
            raise ValueError("of the update")
        return inner.step(*args, **kwargs)

    optimizer = optim.sharded(inner._replace(step=update, check=None), mesh)
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh))
    state, failing, told, found = optimizer.init(params), False, "", []
    for number in range(4):
        failing, given = number == 2, dict(params)
        if failing and bad and what == "placement":
            given["w"] = DTensor.from_local(cases.params_of()["w"], mesh, [Replicate()], run_check=False)
        if failing and bad and what == "structure":
            del given["b"]
        if failing and bad and what == "whole":
            given["few"] = cases.params_of()["few"]
        if failing and bad and what == "all whole":
            given = cases.params_of()
        if failing and bad and what == "shape":
            given["w"] = cases.divided(mesh, torch.ones(6, 3, dtype=torch.float64))
        if failing and bad and what == "no module":
            given = torch.nn.Linear(1, 1)
        try:
            grads, value = grad_fn(given, batch)
            new, _ = optimizer.step(params, grads, state)
            found.append((value, cases.undivided({name: leaf for name, leaf in new.items() if name != "b"}), new["b"]))
        except Exception as error:
            assert failing, "an error in another step"
            told = f"{type(error).__name__}: {error}"
    return told, found


WRONG = {
    "loss": ("ValueError: of the loss", "RuntimeError: .*rank.*1"),
    "update": ("ValueError: of the update", "RuntimeError: .*rank.*1"),
    "placement": (r"TypeError: .*params\['w'\].*Replicate.*to_local", "RuntimeError: .*rank.*1"),
    "structure": ("KeyError: 'b'", "RuntimeError: .*rank.*1"),
    "whole": (
        WHOLE := r"RuntimeError: .*ranks? 0(?:, 2)?: .*4 tensors, 43 elements.*rank 1: .*3 tensors, 39 elements",
        WHOLE,
    ),
    "all whole": ("RuntimeError: .*rank 1", "RuntimeError: .*rank 1"),
    "shape": (
        SHAPE := r"RuntimeError: .*ranks? 0(?:, 2)?: .*4 tensors, 43 elements.*rank 1: .*4 tensors, 46 elements",
        SHAPE,
    ),
    "no module": ("TypeError: .*nn.Module", "RuntimeError: .*rank.*1"),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("what", WRONG)
def test_all_ranks_raise(pool, what, world):
    here, elsewhere = WRONG[what]
    for rank, (told, found) in enumerate(pool.run(world, attempts, what)):
        assert len(found) == 3
        assert_trees_equal(found[1], found[0])
        assert_trees_equal(found[2], found[0])
        with pytest.raises(Exception, match=f"(?s){here if rank == 1 else elsewhere}"):
            raise Exception(told)


def of_another_group(group):
    mesh = cases.mesh_of(group)
    params, batch = cases.divide(mesh, cases.params_of()), cases.batch_of(dist.get_rank(group))
    grads = gradacc.accumulate(cases.loss_fn, steps=2, sync=gradacc.reduce_scatter(mesh))(params, batch)
    other, told = cases.mesh_of(dist.group.WORLD), []
    optimizer = optim.sharded(optim.adamw(0.1), other)
    for call in (
        lambda: gradacc.accumulate(cases.loss_fn, steps=2, sync=gradacc.reduce_scatter(other))(params, batch),
        lambda: optimizer.init(params),
        lambda: optim.sharded(optim.adamw(0.1), mesh).step(cases.divide(other, cases.params_of()), grads, None),
        lambda: optim.sharded(optim.adamw(0.1), mesh).step(
            params,
            {**grads, "w": DTensor.from_local(grads["w"].to_local(), mesh, [Shard(1)], run_check=False)},
            optim.sharded(optim.adamw(0.1), mesh).init(params),
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        told.append(str(caught.value))
    return told


def test_another_mesh(pool):
    for told in pool.run(4, of_another_group):
        assert all("is another one of 4 ranks. Pass the mesh" in each for each in told[:3])
        assert "rows are supported, Shard(0)" in told[3]
