"""The ways to accumulate that are compared. Each computes one accumulated gradient; no optimizer steps, in any of them.

A variant is built once, outside the clock, around its own copy of the workload's module that shares the parameters'
memory but not their `.grad`. `compute` is what is timed, from no gradients to all of them; `release` drops them, as a
training loop does after its optimizer's step, and is inside the clock too, so that everyone pays for freeing once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import gradacc
from benchmarks._workloads import Workload

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to accumulate, ready to run: `compute` returns the gradients, `release` drops what holds them."""

    compute: Callable[[], Grads]
    release: Callable[[], object]

    def __call__(self) -> None:
        """What is timed and measured: compute the gradients, then drop them."""
        self.compute()
        self.release()


def twin(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters are new leaves over the same memory."""
    return copy.deepcopy(module, {id(leaf): nn.Parameter(leaf.detach()) for leaf in module.parameters()})


def grads_of(module: nn.Module) -> Grads:
    return {name: leaf.grad for name, leaf in module.named_parameters() if leaf.grad is not None}


def microbatches(work: Workload, steps: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(work.inputs.chunk(steps), work.targets.chunk(steps), strict=True))


def loop(work: Workload, steps: int) -> Variant:
    """The hand-written loop: `loss / steps`, `.backward()`, and `zero_grad(set_to_none=True)` once the sum is used."""
    module = twin(work.module)

    def compute() -> Grads:
        for inputs, targets in microbatches(work, steps):
            (work.loss(module(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]
        return grads_of(module)

    return Variant(compute, module.zero_grad)


def _discard(name: str, gradient: Tensor) -> None:
    """What the floor does with a gradient: nothing."""


def floor(work: Workload, steps: int, use: Callable[[str, Tensor], None] = _discard) -> Variant:
    """The floor: forward and backward of the same micro-batches, every gradient freed the moment that it is complete.

    A post-accumulate hook sets `.grad` to `None` as the backward pass delivers it, so nothing is ever added and no two
    large gradients need to be alive at once. `use` sees each gradient first (for the check; when timed, nothing).
    """
    module = twin(work.module)

    def hook(name: str) -> Callable[[Tensor], None]:
        def drop(leaf: Tensor) -> None:
            if leaf.grad is not None:
                use(name, leaf.grad)
            leaf.grad = None

        return drop

    for name, leaf in module.named_parameters():
        leaf.register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]

    def compute() -> Grads:
        for inputs, targets in microbatches(work, steps):
            (work.loss(module(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]
        return {}

    return Variant(compute, module.zero_grad)


def accelerate(work: Workload, steps: int) -> Variant:
    """Hugging Face Accelerate as its documentation says: `with accelerator.accumulate(model)`, `accelerator.backward`.

    Model and optimizer are prepared; the micro-batches are the same views that the others get.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=work.inputs.device.type == "cpu")
    bare = twin(work.module)
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.0))

    def compute() -> Grads:
        for inputs, targets in microbatches(work, steps):
            with accelerator.accumulate(model):
                accelerator.backward(work.loss(model(inputs), targets))
        return grads_of(bare)

    return Variant(compute, optimizer.zero_grad)


def fabric(work: Workload, steps: int) -> Variant:
    """Lightning Fabric as its documentation says: `fabric.no_backward_sync` but for the last, `fabric.backward`."""
    from lightning_fabric import Fabric

    runner = Fabric(accelerator=work.inputs.device.type, devices=1)
    bare = twin(work.module)
    model, optimizer = runner.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.0))

    def compute() -> Grads:
        for index, (inputs, targets) in enumerate(microbatches(work, steps)):
            with runner.no_backward_sync(model, enabled=index + 1 < steps):
                runner.backward(work.loss(model(inputs), targets) / steps)
        return grads_of(bare)

    return Variant(compute, optimizer.zero_grad)


def naive(work: Workload, steps: int) -> Variant:
    """The functional loop that one writes first: add up the trees that `torch.func.grad` returns."""
    module = twin(work.module)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}

    def loss(params: Grads, inputs: Tensor, targets: Tensor) -> Tensor:
        return work.loss(functional_call(module, params, (inputs,)), targets) / steps

    def compute() -> Grads:
        first, *rest = microbatches(work, steps)
        total: Grads = grad(loss)(params, *first)
        for microbatch in rest:
            grads = grad(loss)(params, *microbatch)
            total = {name: total[name] + grads.pop(name) for name in total}
        return total

    return Variant(compute, _nothing)


def ours(work: Workload, steps: int) -> Variant:
    """`gradacc.accumulate(loss_fn, steps=steps)(params, batch)`, the module called through `gradacc.functional`."""
    apply, params, _ = gradacc.functional(twin(work.module))

    def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return work.loss(apply(params, inputs), targets)

    grad_fn = gradacc.accumulate(loss, steps=steps)

    def compute() -> Grads:
        grads: Grads = grad_fn(params, (work.inputs, work.targets))
        return grads

    return Variant(compute, _nothing)


def _nothing() -> None:
    """A function's gradients are dropped with its result."""


def large_batch(work: Workload) -> Grads:
    """The oracle: one backward pass over the whole batch."""
    return loop(work, steps=1).compute()


FLOOR, LOOP, AGAIN, OURS = "forward + backward only", "hand-written loop", "the same loop again", "gradacc.accumulate"
VARIANTS: dict[str, Callable[[Workload, int], Variant]] = {
    FLOOR: floor,
    LOOP: loop,
    AGAIN: loop,
    "Accelerate": accelerate,
    "Lightning Fabric": fabric,
    "naive torch.func.grad loop": naive,
    OURS: ours,
}


def check(work: Workload, rtol: float = 1e-4) -> dict[str, float]:
    """Largest relative error (2-norm, leaf by leaf) of each variant's gradient from the large batch's.

    Raises `AssertionError` above `rtol`: nothing that computes something else is timed. The floor's gradients, which it
    drops, are summed here as they pass.
    """
    expected = large_batch(work)
    errors: dict[str, float] = {}
    for name, build in VARIANTS.items():
        passed: Grads = {}

        def add(leaf: str, gradient: Tensor, passed: Grads = passed) -> None:
            passed[leaf] = passed[leaf] + gradient if leaf in passed else gradient.clone()

        variant = floor(work, work.steps, use=add) if build is floor else build(work, work.steps)
        grads = variant.compute() or passed
        assert grads.keys() == expected.keys(), f"{name}: other parameters than the large batch's"
        errors[name] = max(
            (torch.linalg.vector_norm(grads[leaf] - expected[leaf]) / torch.linalg.vector_norm(expected[leaf])).item()
            for leaf in expected
        )
        assert errors[name] <= rtol, f"{name}: off the large batch's gradient by {errors[name]:.1e}"
        variant.release()
    return errors
