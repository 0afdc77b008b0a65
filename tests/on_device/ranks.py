"""One of two ranks on the stand-in device: ``python -m tests.on_device.ranks RANK STORE``; `test_ranks` starts both."""

import math
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import gradacc
from gradacc import Mean
from tests.device import WAITS, OnDevice, to_cpu, to_device
from tests.helpers import assert_trees_close

CALLS = 3


def weighted(params, batch):
    """A `Mean` and aux of each kind."""
    x, mask = batch
    each = (x @ params["w"]).square().sum(1)
    return Mean((each * mask).sum(), mask.sum()), [Mean(x.sum(), 2), x.mean(), each, Mean(x.sum(0), mask.sum() + 1)]


def data(rank):
    g = torch.Generator().manual_seed(rank)
    return torch.randn(5, 3, generator=g), torch.tensor([[0, 0, 1, 2, 0], [3, 0, 0, 0, 0]][rank])


def the_union_in_one_read(rank, overlap):
    params = {"w": torch.ones(3, 2)}
    union = [torch.cat(parts) for parts in zip(data(0), data(1), strict=True)]
    whole, (value, aux) = gradacc.accumulate_and_value(weighted, steps=1, has_aux=True)(params, union)
    grad_fn = gradacc.accumulate_and_value(
        weighted, microbatch_size=2, has_aux=True, sync=gradacc.all_reduce(overlap=overlap)
    )
    there, batch = to_device(params), to_device(data(rank))
    for call in range(CALLS):
        WAITS.clear()
        grads, (mean, more) = grad_fn(there, batch)
        if call:  # the first one agrees
            assert dict(WAITS) == {"to the CPU": 1}, WAITS
    assert isinstance(grads["w"], OnDevice)
    assert_trees_close(to_cpu(grads), whole, rtol=1e-5, atol=1e-6)
    assert_trees_close(to_cpu(mean.total), value.total, rtol=1e-5)
    assert to_cpu(mean.weight) == value.weight == 6
    assert_trees_close(to_cpu(more[0].total), aux[0].total, rtol=1e-5)
    assert_trees_close(to_cpu(more[3].total), aux[3].total, rtol=1e-5, atol=1e-6)


def loss(w, batch):
    slope, weight = batch
    return Mean(weight * (w * slope), weight)


def outcome(grad_fn, rank, weights):
    """Of a call with this rank's weight: gradients, or an error."""
    batch = torch.tensor([2.0, 4.0][rank]), torch.tensor(weights[rank])
    try:
        return grad_fn(to_device(torch.ones(())), [to_device(batch)]), None
    except (RuntimeError, ValueError) as error:
        return None, error


def wrong_weights(rank, overlap):
    """An error on both ranks; the next call is right."""
    grad_fn = gradacc.accumulate(loss, sync=gradacc.all_reduce(overlap=overlap))
    for wrong in (None, math.nan, -1.0, math.inf):
        if wrong is not None:
            _, problem = outcome(grad_fn, rank, [3.0, wrong])
            assert isinstance(problem, ValueError), problem
            assert "a Mean whose weight is negative, infinite or NaN on rank 1" in str(problem)
        grads, _ = outcome(grad_fn, rank, [3.0, 1.0])
        assert to_cpu(grads) == 2.5


def far_weights(rank, overlap):
    """Right, or an error on both ranks and right once more; both happen."""
    grad_fn = gradacc.accumulate(loss, sync=gradacc.all_reduce(overlap=overlap))
    refused = []
    for weights in ([3.0, 1.0], [3e8, 1e8], [3e28, 1e28], [3e-28, 1e-28], [3e-28, 0.0]):
        expected = (2.0 * weights[0] + 4.0 * weights[1]) / sum(weights)
        grads, problem = outcome(grad_fn, rank, weights)
        if problem is not None:
            assert isinstance(problem, RuntimeError), problem
            assert "differ from the last call's by a factor of over a billion" in str(problem)
            refused.append(weights[0])
            grads, _ = outcome(grad_fn, rank, weights)
        torch.testing.assert_close(to_cpu(grads), torch.tensor(expected))
    assert refused == [3e28, 3e-28], refused


def crossed(rank):
    """Sums from elsewhere: alone nothing is read, with ranks once a call; the rank without weight has NaN in its sums."""
    sums = to_device({"w": torch.tensor([6.0, 3.0]) if rank == 0 else torch.full((2,), math.nan)})
    weights = [3, 0]
    for sync, own in ((gradacc.all_reduce(), weights[rank]), (None, 3)):
        mean = Mean(*to_device((torch.tensor(9.0), torch.tensor(own))))
        for call in range(CALLS):
            WAITS.clear()
            grads, value = gradacc.cross(sums, mean, sync=sync)
            if call:
                assert dict(WAITS) == ({} if sync is None else {"to the CPU": 1}), WAITS
        if sync is not None or rank == 0:
            assert_trees_close(to_cpu(grads), {"w": torch.tensor([2.0, 1.0])})
            assert (to_cpu(value.total), to_cpu(value.weight)) == (9, 3)
    for wrong in (-1.0, math.nan):
        mean = Mean(*to_device((torch.tensor(9.0), torch.tensor([1.0, wrong][rank]))))
        with pytest.raises(
            ValueError, match="^cross: there is a Mean whose weight is negative, infinite or NaN on rank 1"
        ):
            gradacc.cross(sums, mean, sync=gradacc.all_reduce())


def divided(rank, overlap):
    """Three updates of parts are those of whole parameters on the CPU; records of each collective are read, and a verdict."""
    params, optimizer = {"w": torch.ones(3, 2), "b": torch.ones(())}, gradacc.optim.adamw(0.1)

    def both(params, batch):
        return gradacc.Mean((batch @ params["w"] * params["b"]).square().sum(), len(batch))

    union = torch.cat([data(0)[0], data(1)[0]])
    whole, state = params, optimizer.init(params)
    for _ in range(CALLS):
        grads = gradacc.accumulate(both, steps=1)(whole, union)
        whole, state = optimizer.step(whole, grads, state)
    own = gradacc.optim.skip_nonfinite(gradacc.optim.sharded(optimizer))
    grad_fn = gradacc.accumulate_and_value(both, microbatch_size=2, sync=gradacc.reduce_scatter(overlap=overlap))
    step = gradacc.train_step(grad_fn, own)
    there = to_device(params)
    state = gradacc.TrainState(there, own.init(there))
    for call in range(CALLS):
        WAITS.clear()
        state, _ = step(state, to_device(data(rank)[0]))
        if call == CALLS - 1:  # when the order of calls is known
            assert WAITS["to the CPU"] == 4, WAITS
    assert all(isinstance(leaf, OnDevice) for leaf in state.params.values())
    assert_trees_close(to_cpu(state.params), whole, rtol=1e-5, atol=1e-6)


def main():
    rank, store = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for check in (the_union_in_one_read, wrong_weights, far_weights, divided):
        for overlap in (False, True):
            check(rank, overlap)
            print(check.__name__, overlap)
    crossed(rank)
    print("crossed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
