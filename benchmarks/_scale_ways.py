"""The ways to accumulate over data-parallel ranks whose collectives and bytes are counted: add another to `WAYS`.

Each computes, on every rank, the gradient of the mean over the union of all ranks' examples, or its part of it. Nothing here is
timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gradacc
from benchmarks._synced import ddp, ours
from benchmarks._variants import Grads, Variant, microbatches, twin
from benchmarks._workloads import Workload


class Way(NamedTuple):
    """How to build one, and what every rank has in the end."""

    build: Callable[[Workload, int], Variant]
    gathered: str
    """Of the gradient, and of the parameters in between."""


class Sharding(NamedTuple):
    """How FSDP2 is told to accumulate."""

    deferred: bool = False
    """Gradients are reduced in the last micro-batch only: ``set_requires_gradient_sync(False)`` before."""
    reshard: bool = True
    """``reshard_after_forward``: parameters are gathered for the forward pass, and again for the backward pass."""
    kept: bool = False
    """They stay gathered until the last micro-batch is done: ``set_reshard_after_backward(False)`` before."""


def fsdp(how: Sharding) -> Callable[[Workload, int], Variant]:
    """torch's `fully_shard`, of each block of a GPT and of the rest."""

    def build(work: Workload, steps: int) -> Variant:
        model = twin(work.module)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        blocks: Any = model.blocks
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=how.reshard)
        sharded: Any = model

        def compute() -> Grads:
            for index, (inputs, targets) in enumerate(microbatches(work, steps)):
                last = index + 1 == steps
                sharded.set_requires_gradient_sync(last or not how.deferred)
                sharded.set_reshard_after_backward(last or not how.kept)
                (work.loss(sharded(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]
            return {name: leaf.grad for name, leaf in sharded.named_parameters() if leaf.grad is not None}

        return Variant(compute, sharded.zero_grad)

    return build


def sharded_step(**how: Any) -> Callable[[Workload, int], Variant]:
    """`gradacc.reduce_scatter`, and the step of a sharded SGD, which gathers parameters; gradients are told from those."""

    def build(work: Workload, steps: int) -> Variant:
        apply, params, _ = gradacc.functional(twin(work.module))

        def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> Tensor:
            return work.loss(apply(params, batch[0]), batch[1])

        group = dist.new_group()
        grad_fn = gradacc.accumulate(loss, steps=steps, sync=gradacc.reduce_scatter(group, **how))
        # Of a rate at which gradients are not lost beside the parameters' own digits.
        rate = 1e3
        optimizer = gradacc.optim.sharded(gradacc.optim.sgd(rate), group)
        state = optimizer.init(params)

        def compute() -> Grads:
            grads = grad_fn(params, (work.inputs, work.targets))
            stepped: Any = optimizer.step(params, grads, state)[0]
            return {name: (leaf - stepped[name]) / rate for name, leaf in params.items()}

        return Variant(compute, lambda: None)

    return build


def whole(grads: Grads) -> Grads:
    """Gradients of which a rank has a part, put together: to check them, outside of what is counted."""
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


WHOLE, PART = "whole", "a part"
OURS = "gradacc, `all_reduce()`"
WAYS: dict[str, Way] = {
    OURS: Way(ours(), WHOLE),
    "gradacc, `all_reduce(overlap=True)`": Way(ours(overlap=True), WHOLE),
    "gradacc, `all_reduce(ordered=True)`": Way(ours(ordered=True), WHOLE),
    "gradacc, `reduce_scatter()`, `optim.sharded`": Way(sharded_step(), PART),
    "gradacc, `reduce_scatter(overlap=True)`, `optim.sharded`": Way(sharded_step(overlap=True), PART),
    "DDP, `no_sync`": Way(ddp(skip=True), WHOLE),
    "DDP, every micro-batch": Way(ddp(skip=False), WHOLE),
    "FSDP2, every micro-batch": Way(fsdp(Sharding()), PART),
    "FSDP2, every micro-batch, not resharded after forward": Way(fsdp(Sharding(reshard=False)), PART),
    "FSDP2, deferred": Way(fsdp(Sharding(deferred=True)), PART),
    "FSDP2, deferred, not resharded after forward": Way(fsdp(Sharding(deferred=True, reshard=False)), PART),
    "FSDP2, deferred, parameters kept": Way(fsdp(Sharding(deferred=True, reshard=False, kept=True)), PART),
}
