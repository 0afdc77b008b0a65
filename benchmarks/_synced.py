"""The ways to accumulate over several ranks that are compared; built and run like those of `benchmarks._variants`.

Each rank of a variant holds `rank_share` of the workload. What is timed is the gradient of the union of the shares, on
every rank (but for the floor: of the rank's own share).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import gradacc
from benchmarks._variants import Grads, Variant, accelerate, grads_of, large_batch, microbatches, twin
from benchmarks._workloads import Workload

FLOOR, EVERY, NO_SYNC = "no communication", "DDP, every micro-batch", "DDP, no_sync"
ACCELERATE, AGAIN = "Accelerate, accumulate", "Accelerate again"
OURS, OVERLAP, COMPRESS, BOTH = "gradacc", "gradacc, overlap", "gradacc, bfloat16", "gradacc, bfloat16 + overlap"
RECIPE, WEIGHTED = "Accelerate's token-weighted recipe", "gradacc, a loss that returns Mean"

EXACT, ROUNDED = 1e-4, 1e-2
"""Relative errors (2-norm, of a leaf) that `check` lets pass: in float32, and where gradients cross in bfloat16."""


class Way(NamedTuple):
    """How to build a variant from a rank's share, and how far its gradient may be off."""

    build: Callable[[Workload, int], Variant]
    tolerance: float = EXACT


def rank_share(work: Workload, rank: int, world: int) -> Workload:
    """A rank's examples: `1/world` of the batch, in order."""
    return work._replace(inputs=work.inputs.chunk(world)[rank], targets=work.targets.chunk(world)[rank])


def ddp(*, skip: bool) -> Callable[[Workload, int], Variant]:
    """torch's DistributedDataParallel; `skip`: within `no_sync` but for the last micro-batch, as its documentation says."""

    def build(work: Workload, steps: int) -> Variant:
        bare = twin(work.module)
        model = DistributedDataParallel(bare)

        def compute() -> Grads:
            for index, (inputs, targets) in enumerate(microbatches(work, steps)):
                with model.no_sync() if skip and index + 1 < steps else nullcontext():
                    (work.loss(model(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]
            return grads_of(bare)

        return Variant(compute, bare.zero_grad)

    return build


def ours(**how: Any) -> Callable[[Workload, int], Variant]:
    """`gradacc.accumulate_and_value(loss_fn, steps=steps, sync=gradacc.all_reduce(**how))(params, batch)`.

    Each in a group of its own, as in a training script: calls of several in one group, in another order every round, would send
    zeros now and then, before they know which one it is.
    """
    return lambda work, steps: _ours(work, steps, gradacc.all_reduce(dist.new_group(), **how))


def floor(work: Workload, steps: int) -> Variant:
    """The same without `sync`."""
    return _ours(work, steps, None)


def _ours(work: Workload, steps: int, sync: gradacc.AllReduce | None) -> Variant:
    apply, params, _ = gradacc.functional(twin(work.module))

    def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return work.loss(apply(params, inputs), targets)

    grad_fn = gradacc.accumulate_and_value(loss, steps=steps, sync=sync)

    def compute() -> Grads:
        grads: Grads = grad_fn(params, (work.inputs, work.targets))[0]
        return grads

    return Variant(compute, _nothing)


def _nothing() -> None:
    """A function's gradients are dropped with its result."""


def weighted(work: Workload, steps: int) -> Variant:
    """The gradient and loss of a mean over the tokens of all ranks: `return gradacc.Mean(loss_sum, tokens)`."""
    apply, params, _ = gradacc.functional(twin(work.module))

    def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> gradacc.Mean:
        inputs, targets = batch
        total = F.cross_entropy(apply(params, inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        return gradacc.Mean(total, targets.numel())

    grad_fn = gradacc.accumulate_and_value(loss, steps=steps, sync=gradacc.all_reduce())

    def compute() -> Grads:
        grads: Grads = grad_fn(params, (work.inputs, work.targets))[0]
        return grads

    return Variant(compute, _nothing)


def recipe(work: Workload, steps: int) -> Variant:
    """The same in Accelerate, as in its example `gradient_accumulation_for_autoregressive_models.py`.

    Gather the number of tokens, scale the loss so that Accelerate's and DDP's divisions cancel, gather the losses.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
    bare = twin(work.module)
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.0))

    def compute() -> Grads:
        batches = microbatches(work, steps)
        items = accelerator.gather(torch.tensor(sum(targets.numel() for _, targets in batches))).sum().item()
        losses = []
        for index, (inputs, targets) in enumerate(batches):
            with model.no_sync() if index + 1 < len(batches) else nullcontext():
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum") / items
                loss = loss * steps * accelerator.num_processes
                accelerator.backward(loss)
                losses.append(loss.detach())
        accelerator.gather(torch.stack(losses).sum()).sum().item()
        return grads_of(bare)

    return Variant(compute, optimizer.zero_grad)


def ways() -> dict[str, Way]:
    """What is timed, in the order of the tables."""
    half = torch.bfloat16
    return {
        FLOOR: Way(floor),
        EVERY: Way(ddp(skip=False)),
        NO_SYNC: Way(ddp(skip=True)),
        ACCELERATE: Way(accelerate),
        AGAIN: Way(accelerate),
        OURS: Way(ours()),
        OVERLAP: Way(ours(overlap=True)),
        COMPRESS: Way(ours(compress=half), ROUNDED),
        BOTH: Way(ours(compress=half, overlap=True), ROUNDED),
    }


def counted() -> dict[str, Way]:
    """What is not timed: only its collectives are counted."""
    return {RECIPE: Way(recipe), WEIGHTED: Way(weighted)}


def check(work: Workload, variants: dict[str, Variant], tolerances: dict[str, float]) -> dict[str, float]:
    """Largest relative error (2-norm, leaf by leaf) of each variant's gradient from the union's, computed by one rank.

    Raises `AssertionError` above its tolerance: nothing that computes something else is timed. The floor's gradient is
    averaged over the ranks here.
    """
    expected = large_batch(work)
    errors: dict[str, float] = {}
    for name, variant in variants.items():
        grads = variant.compute()
        assert grads.keys() == expected.keys(), f"{name}: other parameters than the large batch's"
        if name == FLOOR:
            for gradient in grads.values():
                dist.all_reduce(gradient.div_(dist.get_world_size()))
        errors[name] = max(
            (torch.linalg.vector_norm(grads[leaf] - expected[leaf]) / torch.linalg.vector_norm(expected[leaf])).item()
            for leaf in expected
        )
        assert errors[name] <= tolerances[name], f"{name}: off the large batch's gradient by {errors[name]:.1e}"
        variant.release()
    return errors
