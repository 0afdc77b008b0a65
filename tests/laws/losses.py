"""The losses that the laws are tested on: parameters and batches in float64, sizes drawn by Hypothesis.

Every loss returns ``(loss, aux)``; aux has a leaf of each kind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradacc
from gradacc.demo.model import GPT, PAD, GPTConfig

D = torch.float64


class Case(NamedTuple):
    """A loss with its parameters, and ``batch(n, seed)`` with ``n`` examples."""

    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Callable[[int, int], Any]
    options: dict[str, Any]
    name: str = ""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_module(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    apply, params, _ = gradacc.functional(module.double())
    return apply, params


def aux_of(per_example: Tensor, weight: Tensor | int, average: Tensor) -> dict[str, Any]:
    return {"each": per_example, "rest": (gradacc.Mean(per_example.sum(), weight), None, [average])}


def least_squares() -> Case:
    def loss(params, batch):
        residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return residual.square().mean(), aux_of(residual, len(residual), residual.abs().mean())

    def batch(n, seed):
        g = generator(seed)
        return {"x": torch.randn(n, 3, generator=g, dtype=D), "y": torch.randn(n, generator=g, dtype=D)}

    return Case(loss, {"w": torch.tensor([1.0, -2.0, 0.5], dtype=D), "b": torch.tensor(0.3, dtype=D)}, batch, {})


def classification() -> Case:
    torch.manual_seed(1)
    apply, params = from_module(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))

    def loss(params, batch):
        x, labels = batch
        each = F.cross_entropy(apply(params, x), labels, reduction="none")
        return each.mean(), aux_of(each, len(each), (each * 2).mean())

    def batch(n, seed):
        g = generator(seed)
        return torch.randn(n, 4, generator=g, dtype=D), torch.randint(0, 3, (n,), generator=g)

    return Case(loss, params, batch, {})


def token_loss(logits: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Any]:
    def loss(params, tokens):
        targets = tokens[:, 1:]
        each = F.cross_entropy(
            logits(params, tokens)[:, :-1].transpose(1, 2), targets, ignore_index=PAD, reduction="none"
        ).sum(1)
        count = (targets != PAD).sum()
        return gradacc.Mean(each.sum(), count), aux_of(each, count, each.sum() / count)

    return loss


def ragged_tokens(n: int, seed: int) -> Tensor:
    """Lengths from 0 to 6 bytes: about every sixth example is nothing but padding."""
    g = generator(seed)
    tokens = torch.randint(0, 256, (n, 7), generator=g)
    lengths = torch.randint(0, 7, (n, 1), generator=g)
    return torch.where(torch.arange(7) < lengths, tokens, PAD)


def tokens() -> Case:
    torch.manual_seed(2)
    apply, params = from_module(nn.Sequential(nn.Embedding(257, 4), nn.Linear(4, 257)))
    return Case(token_loss(apply), params, ragged_tokens, {})


def transformer() -> Case:
    torch.manual_seed(3)
    apply, params = from_module(GPT(GPTConfig(layers=2, heads=2, width=8, context=7)))
    return Case(token_loss(apply), params, ragged_tokens, {})


def poisson() -> Case:
    def loss(params, batch):
        x, counts = batch
        rate = x @ params[0] + params[1]
        each = F.poisson_nll_loss(rate, counts, reduction="none")
        return each.sum(), aux_of(each, len(each), rate.mean())

    def batch(n, seed):
        g = generator(seed)
        x = torch.randn(n, 2, generator=g, dtype=D)
        return x, torch.poisson(x.square().sum(1), generator=g)

    return Case(loss, [torch.tensor([0.4, -0.2], dtype=D), torch.tensor(0.1, dtype=D)], batch, {"reduction": "sum"})


def convolutional() -> Case:
    torch.manual_seed(4)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)]
    apply, params = from_module(nn.Sequential(*layers))

    def loss(params, batch):
        each = F.cross_entropy(apply(params, batch["image"]), batch["label"], reduction="none")
        return each.mean(), aux_of(each, len(each), each.mean())

    def batch(n, seed):
        g = generator(seed)
        return {"image": torch.randn(n, 2, 4, 4, generator=g, dtype=D), "label": torch.randint(0, 3, (n,), generator=g)}

    return Case(loss, params, batch, {})


CASES: dict[str, Callable[[], Case]] = {
    "least squares": least_squares,
    "MLP classification": classification,
    "tokens": tokens,
    "Poisson": poisson,
    "transformer": transformer,
    "convolutions and GroupNorm": convolutional,
}
