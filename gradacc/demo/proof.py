"""The promise, measured: accumulated gradients against the large batch's, on the demo's own model and first batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import gradacc
from gradacc.demo.memory import peak_memory
from gradacc.demo.model import PAD

STEPS = (1, 2, 3, 4, 8)

Params = dict[str, Tensor]
LossFn = Callable[[Params, Tensor], gradacc.Mean]
"""``(params, tokens) -> Mean``: what the demo trains on."""

GradFn = Callable[[Params, Tensor], tuple[Params, Tensor]]
"""``(params, tokens) -> (gradients, loss)``."""


class Measured(NamedTuple):
    """One way to a gradient: its relative differences from the large batch's, and peak memory in bytes."""

    gradient_error: float
    loss_error: float
    peak: int


class Row(NamedTuple):
    """What the proof found for one number of steps; ``sizes`` are the examples in every micro-batch."""

    steps: int
    sizes: tuple[int, ...]
    exact: Measured
    naive: Measured


class Proof(NamedTuple):
    """The large batch's shape, real tokens, loss (nats per byte) and peak memory (bytes), and the rows measured."""

    shape: tuple[int, int]
    tokens: int
    loss: float
    peak: int
    rows: tuple[Row, ...] = ()


def large_batch(loss_fn: LossFn) -> GradFn:
    """The oracle: `torch.func.grad_and_value` on the whole batch at once."""
    return torch.func.grad_and_value(lambda params, batch: loss_fn(params, batch).value)


def exact(loss_fn: LossFn, steps: int) -> GradFn:
    """What this library returns."""
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=steps)

    def call(params: Params, batch: Tensor) -> tuple[Params, Tensor]:
        grads, mean = grad_fn(params, batch)
        return grads, mean.value

    return call


def mean_of_means(loss_fn: LossFn, steps: int) -> GradFn:
    """The usual loop: every micro-batch's mean loss over the number of steps, ``.backward()``, added up in ``.grad``."""

    def call(params: Params, batch: Tensor) -> tuple[Params, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        value = torch.zeros((), device=batch.device)
        microbatches = batch.tensor_split(min(steps, len(batch)))
        for microbatch in microbatches:
            loss = loss_fn(leaves, microbatch).value / len(microbatches)
            torch.autograd.backward(loss)
            value += loss.detach()
        return {name: gradient(leaf) for name, leaf in leaves.items()}, value

    return call


def gradient(leaf: Tensor) -> Tensor:
    """``leaf.grad``, zeros where the loss did not use it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def prove(loss_fn: LossFn, params: Params, batch: Tensor, steps: tuple[int, ...] = STEPS) -> Iterator[Proof]:
    """Yields the proof as it grows: first the large batch alone, then with one more row every time.

    The large batch's gradient and loss are those of `large_batch`; its peak memory is that of one ``.backward()`` over
    the whole batch, because `torch.func` needs more.
    """
    grads, value = large_batch(loss_fn)(params, batch)

    def measure(grad_fn: GradFn) -> Measured:
        (found, found_value), peak = peak_memory(lambda: grad_fn(params, batch), batch.device)
        return Measured(distance(found, grads), distance({"": found_value}, {"": value}), peak)

    tokens = int((batch[:, 1:] != PAD).sum())
    peak = measure(mean_of_means(loss_fn, 1)).peak
    proof = Proof((batch.shape[0], batch.shape[1]), tokens, value.item(), peak)
    yield proof
    for k in steps:
        sizes = tuple(len(part) for part in batch.tensor_split(min(k, len(batch))))
        row = Row(k, sizes, measure(exact(loss_fn, k)), measure(mean_of_means(loss_fn, k)))
        proof = proof._replace(rows=(*proof.rows, row))
        yield proof


def distance(a: Params, b: Params) -> float:
    """``||a - b|| / ||b||`` over all leaves together, computed in float64."""
    difference = math.hypot(*(float((a[name].double() - b[name].double()).norm()) for name in b))
    return difference / math.hypot(*(float(b[name].double().norm()) for name in b))


def table_head(proof: Proof) -> str:
    """What stands above the table's rows, with the large batch as their measure."""
    examples, longest = proof.shape
    return (
        f"The large batch: {examples} pieces of text, {proof.tokens} bytes to predict, padded to {longest}; "
        f"loss {proof.loss:.4f}, peak memory {mebibytes(proof.peak)} MiB.\n"
        "Relative difference from it, and peak memory:\n\n"
        f"{'':7}{'gradacc':^34}  {'mean of means (the usual loop)':^34}\n"
        f"{'steps':>5}  " + "  ".join([f"{'gradient':>10}{'loss':>11}{'MiB':>10}   "] * 2)
    )


def table_row(row: Row) -> str:
    """One row of the table."""
    cells = (f"{m.gradient_error:10.1e}{m.loss_error:11.1e}{mebibytes(m.peak):>10}   " for m in (row.exact, row.naive))
    return f"{row.steps:5}  " + "  ".join(cells)


def mebibytes(size: int) -> str:
    """A number of bytes in MiB, to one decimal."""
    return f"{size / 2**20:.1f}"
