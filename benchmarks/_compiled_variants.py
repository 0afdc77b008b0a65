"""The compiled ways to accumulate that are compared, beside the eager ones of `benchmarks._variants`.

As there, a contestant is built once, outside the clock, and frees its gradients inside it; compilation happens at the
first run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradacc
from benchmarks._variants import AGAIN, LOOP, Grads, Variant, grads_of, large_batch, loop, microbatches, twin
from benchmarks._workloads import Workload

LOOP_COMPILED = "the loop, torch.compile(module)"
EAGER = "accumulate(loss), eager"
ONE_GRAPH = "torch.compile(accumulate(loss))"
AROUND = "accumulate(torch.compile(loss))"
OPTAX = "optax on JAX, jit"

Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]


class Contestant(NamedTuple):
    """One way to accumulate: `run` is what is timed, `gradients` the same run with its result, as PyTorch tensors."""

    run: Callable[[], object]
    gradients: Callable[[], Grads]


def _loop(work: Workload, steps: int) -> Contestant:
    return _contestant(loop(work, steps))


def _loop_compiled(work: Workload, steps: int) -> Contestant:
    """The hand-written loop around ``torch.compile(module)``; the loss stays outside, as users write it."""
    module = twin(work.module)
    compiled = torch.compile(module)

    def compute() -> Grads:
        for inputs, targets in microbatches(work, steps):
            (work.loss(compiled(inputs), targets) / steps).backward()  # type: ignore[no-untyped-call]  # torch's
        return grads_of(module)

    return _contestant(Variant(compute, module.zero_grad))


def _eager(work: Workload, steps: int) -> Contestant:
    """``gradacc.accumulate_and_value(loss, steps=steps)``."""
    loss, params = _functional(work)
    return _ours(gradacc.accumulate_and_value(loss, steps=steps), params, work)


def _one_graph(work: Workload, steps: int) -> Contestant:
    """``torch.compile(gradacc.accumulate_and_value(loss, steps=steps), fullgraph=True)``: one graph."""
    return one_graph(work, steps, "inductor")


def one_graph(work: Workload, steps: int, backend: str | Backend) -> Contestant:
    loss, params = _functional(work)
    grad_fn = torch.compile(gradacc.accumulate_and_value(loss, steps=steps), fullgraph=True, backend=backend)
    return _ours(grad_fn, params, work)


def _around(work: Workload, steps: int) -> Contestant:
    """``gradacc.accumulate_and_value(torch.compile(loss), steps=steps)``: the eager engine around a compiled loss."""
    loss, params = _functional(work)
    return _ours(gradacc.accumulate_and_value(torch.compile(loss), steps=steps), params, work)


def _optax(work: Workload, steps: int) -> Contestant:
    from benchmarks import _jax

    _jax.use_threads(torch.get_num_threads())
    compute, to_torch = _jax.gradient(work, steps)
    return Contestant(compute, lambda: to_torch(compute()))


CONTESTANTS: dict[str, Callable[[Workload, int], Contestant]] = {
    LOOP: _loop,
    AGAIN: _loop,
    LOOP_COMPILED: _loop_compiled,
    EAGER: _eager,
    ONE_GRAPH: _one_graph,
    AROUND: _around,
    OPTAX: _optax,
}
OURS = (EAGER, ONE_GRAPH, AROUND)
COMPILED = (LOOP_COMPILED, ONE_GRAPH, AROUND, OPTAX)


def check(work: Workload, contestants: dict[str, Contestant], rtol: float = 1e-4) -> dict[str, float]:
    """Largest relative error (2-norm, leaf by leaf) of each contestant's gradient from the large batch's in PyTorch.

    Raises `AssertionError` above `rtol`: nothing that computes something else is timed. It also compiles what compiles.
    """
    expected = large_batch(work)
    errors: dict[str, float] = {}
    for name, contestant in contestants.items():
        grads = contestant.gradients()
        assert grads.keys() == expected.keys(), f"{name}: other parameters than the large batch's"
        errors[name] = max(
            (torch.linalg.vector_norm(grads[leaf] - expected[leaf]) / torch.linalg.vector_norm(expected[leaf])).item()
            for leaf in expected
        )
        assert errors[name] <= rtol, f"{name}: off the large batch's gradient by {errors[name]:.1e}"
    return errors


def graph_nodes(work: Workload, steps: int) -> int:
    """How many nodes Dynamo's graph of the one-graph variant has, those of graphs within it (a loop's body) included."""
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        counted.append(sum(len(module.graph.nodes) for module in modules))
        return graph.forward

    one_graph(work, steps, count).run()
    (nodes,) = counted
    return nodes


def _functional(work: Workload) -> tuple[Callable[[Grads, tuple[Tensor, Tensor]], Tensor], Grads]:
    apply, params, _ = gradacc.functional(twin(work.module))

    def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return work.loss(apply(params, inputs), targets)

    return loss, params


def _ours(grad_fn: Callable[..., tuple[Grads, Tensor]], params: Grads, work: Workload) -> Contestant:
    def gradients() -> Grads:
        grads, _ = grad_fn(params, (work.inputs, work.targets))
        return grads

    return Contestant(gradients, gradients)


def _contestant(variant: Variant) -> Contestant:
    def gradients() -> Grads:
        grads = variant.compute()
        variant.release()
        return grads

    return Contestant(variant, gradients)
