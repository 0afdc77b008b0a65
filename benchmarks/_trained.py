"""Whole training steps over several ranks that are compared: an accumulated gradient and an AdamW update.

Each is built around its own copy of the workload's module and trains on its rank's share. The parameters that it arrives at are
those of one process that trains on the union.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import gradacc
from benchmarks._sharded_report import AGAIN, BASE, FSDP, FSDP_KEPT, OURS, SHARDED, SHARDED_HALF, SHARDED_OVERLAP, ZERO
from benchmarks._synced import EXACT
from benchmarks._variants import microbatches
from benchmarks._workloads import Workload
from gradacc.demo.model import GPT

Tree = dict[str, Tensor]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-6, "weight_decay": 1e-2}
"""Of AdamW everywhere. Where a gradient is zero but for rounding, eps keeps it from being a whole step."""
ROUNDED = 0.1
"""Relative error of an update that passes where gradients cross in bfloat16. AdamW makes whole steps of gradients of any size:
where ranks' contributions all but cancel, of what was rounded."""
UPDATES = 2
"""After so many, parameters are compared."""


class Training(NamedTuple):
    """A way to train, ready to run."""

    step: Callable[[], object]
    params: Callable[[], Tree]
    """Whole, under the names of the module."""
    held: Callable[[], tuple[Iterable[Tensor], Iterable[Tensor]]]
    """This rank's own tensors between steps: parameters, state of the optimizer."""
    gradients: Callable[[], Iterable[Tensor]]
    """Those that a step gives the optimizer; no step is made with them, nor behind them."""


class Trained(NamedTuple):
    """How to build it from a rank's share, and how far its updates may be off."""

    build: Callable[[Workload, int], Training]
    tolerance: float = EXACT


def ddp(optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Workload, int], Training]:
    """torch's DistributedDataParallel, within `no_sync` but for the last micro-batch."""

    def build(work: Workload, steps: int) -> Training:
        bare = copy.deepcopy(work.module)
        model = DistributedDataParallel(bare)
        moving = optimizer(bare.parameters())

        def before(last: bool) -> Any:
            return nullcontext() if last else model.no_sync()

        return _imperative(work, steps, model, moving, before)._replace(params=lambda: _named(bare))

    return build


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own."""
    return torch.optim.AdamW(params, **OPTIONS)


def zero(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Its state divided over ranks by whole parameters, which each rank then broadcasts."""
    with warnings.catch_warnings():
        # Its package compiles functions with torch.jit.script, which torch itself calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, **OPTIONS)


def fsdp(*, keep: bool) -> Callable[[Workload, int], Training]:
    """torch's `fully_shard` of every block and the rest; gradients are reduced after the last micro-batch.

    ``keep``: parameters stay whole from the first micro-batch to the end of the step (ZeRO-2); without, they are gathered anew
    for every forward and every backward pass (ZeRO-3).
    """

    def build(work: Workload, steps: int) -> Training:
        model: Any = copy.deepcopy(work.module)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in [*_blocks(model), model]:
            fully_shard(part, mesh=mesh, reshard_after_forward=not keep)

        def before(last: bool) -> Any:
            model.set_requires_gradient_sync(last)
            if keep:
                model.set_reshard_after_backward(last)
            return nullcontext()

        return _imperative(work, steps, model, adamw(model.parameters()), before)

    return build


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Of the GPT its blocks, of the MLP its layers."""
    parts = model.blocks if isinstance(model, GPT) else model
    return [part for part in parts.children() if any(True for _ in part.parameters())]


def _imperative(
    work: Workload, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[bool], Any]
) -> Training:
    """The loop of torch; ``before(last)`` is entered for each micro-batch."""

    def gradients() -> Iterable[Tensor]:
        for index, (inputs, targets) in enumerate(microbatches(work, steps)):
            with before(index + 1 == steps):
                (work.loss(model(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]
        return [param.grad for param in model.parameters() if param.grad is not None]

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    def held() -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer has one of this rank's parameters
        return model.parameters(), tree_leaves([dict(kept) for kept in inner.state.values()])

    return Training(step, lambda: _named(model), held, gradients)


def _named(module: nn.Module) -> Tree:
    found = {name: leaf.detach() for name, leaf in module.named_parameters()}
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in found.items()}


def ours(*, shard: bool, **how: Any) -> Callable[[Workload, int], Training]:
    """`gradacc.train_step(grad_fn, optimizer, donate=True)`, in a group of its own (as `benchmarks._synced.ours`)."""

    def build(work: Workload, steps: int) -> Training:
        apply, params, _ = gradacc.functional(copy.deepcopy(work.module))
        group, optimizer = dist.new_group(), gradacc.optim.adamw(**OPTIONS)
        if shard:
            optimizer = gradacc.optim.sharded(optimizer, group)

        def loss(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = batch
            return work.loss(apply(params, inputs), targets)

        sync = gradacc.reduce_scatter(group, **how) if shard else gradacc.all_reduce(group, **how)
        grad_fn = gradacc.accumulate_and_value(loss, steps=steps, sync=sync)
        take = gradacc.train_step(grad_fn, optimizer, donate=True)
        held = [gradacc.TrainState(params, optimizer.init(params))]

        def step() -> None:
            held[0], _ = take(held[0], (work.inputs, work.targets))

        def gradients() -> Iterable[Tensor]:
            grads, _ = grad_fn(held[0].params, (work.inputs, work.targets))
            leaves: list[Tensor] = tree_leaves(grads)
            return leaves

        def kept() -> tuple[Iterable[Tensor], Iterable[Tensor]]:
            return tree_leaves(held[0].params), tree_leaves(held[0].opt_state)

        return Training(step, lambda: held[0].params, kept, gradients)

    return build


WAYS = {
    BASE: Trained(ddp(adamw)),
    AGAIN: Trained(ddp(adamw)),
    ZERO: Trained(ddp(zero)),
    FSDP_KEPT: Trained(fsdp(keep=True)),
    FSDP: Trained(fsdp(keep=False)),
    OURS: Trained(ours(shard=False)),
    SHARDED: Trained(ours(shard=True)),
    SHARDED_OVERLAP: Trained(ours(shard=True, overlap=True)),
    SHARDED_HALF: Trained(ours(shard=True, compress=torch.bfloat16), ROUNDED),
}
"""In the order of the tables."""


def alone(work: Workload) -> Tree:
    """The parameters of one process after `UPDATES` steps on the union."""
    module = copy.deepcopy(work.module)
    moving = adamw(module.parameters())
    training = _imperative(work, 1, module, moving, lambda last: nullcontext())
    for _ in range(UPDATES):
        training.step()
    return _named(module)


def check(work: Workload, built: dict[str, Training]) -> dict[str, float]:
    """Largest relative error (2-norm, leaf by leaf) of the change that each has made to the parameters in `UPDATES` steps.

    Raises `AssertionError` above the tolerance: nothing that trains another way is timed.
    """
    begin, expected = _named(work.module), alone(work)
    errors: dict[str, float] = {}
    for name, training in built.items():
        for _ in range(UPDATES):
            training.step()
        found = training.params()
        assert found.keys() == expected.keys(), f"{name}: other parameters than one process has"
        errors[name] = max(_off(found[leaf], expected[leaf], begin[leaf]) for leaf in expected)
        assert errors[name] <= WAYS[name].tolerance, f"{name}: off the union's updates by {errors[name]:.1e}"
    return errors


def _off(found: Tensor, expected: Tensor, begin: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected - begin))
