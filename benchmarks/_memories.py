"""Peaks that pieces keep flat, exact: a tiled MLP over tokens, `vmap` in chunks, an activation checkpoint under `torch.func`.

Each is a run at several sizes, plain and by pieces; a peak is over what the call is given and what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves

import gradacc
from benchmarks._measure import allocated_peak

Call = Callable[[], object]


class Growth(NamedTuple):
    """What grows, and how much is needed for it."""

    title: str
    sizes: Sequence[int]
    quick: Sequence[int]
    make: Callable[[int], tuple[Call, Call]]
    """Plain, and by pieces."""


def tiled_mlp(tokens: int) -> tuple[Call, Call]:
    """A gated MLP of width 128, of which a layer's hidden state is 8 times as wide, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 128, requires_grad=True)
    up, gate = (torch.randn(1024, 128, requires_grad=True) for _ in range(2))
    down, cotangent = torch.randn(128, 1024, requires_grad=True), torch.randn(2, tokens, 128)

    def mlp(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    tiled = gradacc.microbatch(mlp, microbatch_size=64, in_dims=(1, None, None, None), out_dims=1)

    def call(function: Callable[..., Tensor]) -> Call:
        def run() -> object:
            y = function(x, up, gate, down)
            return y, torch.autograd.grad(y, (x, up, gate, down), cotangent)

        return run

    return call(mlp), call(tiled)


def chunked_vmap(examples: int) -> tuple[Call, Call]:
    """Norms of each example's gradient of an MLP of 64 x 256 x 64."""
    torch.manual_seed(0)
    weights, batch = (torch.randn(256, 64), torch.randn(64, 256)), torch.randn(examples, 64)

    def norm(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        grads = grad(lambda w: (torch.tanh(x @ w[0].T) @ w[1].T).square().sum())(weights)
        return sum((g.square().sum() for g in grads), torch.zeros(())).sqrt()

    by_example = vmap(norm, (0, None))
    chunked = gradacc.microbatch(by_example, microbatch_size=16, in_dims=(0, None))
    return lambda: by_example(batch, weights), lambda: chunked(batch, weights)


def checkpointed_layers(layers: int) -> tuple[Call, Call]:
    """`torch.func.grad` of a chain of MLPs on 256 rows, each a checkpoint (``steps=1``)."""
    torch.manual_seed(0)
    params = [(torch.randn(256, 64) / 8, torch.randn(64, 256) / 16) for _ in range(layers)]
    x = torch.randn(256, 64)

    def layer(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return x + torch.tanh(F.gelu(x @ weights[0].T)) @ weights[1].T

    def loss(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(params: list[tuple[Tensor, Tensor]]) -> Tensor:
            h = x
            for weights in params:
                h = layer(h, weights)
            return h.square().mean()

        return of

    kept = gradacc.microbatch(layer, steps=1, in_dims=(0, None))
    return lambda: grad(loss(layer))(params), lambda: grad(loss(kept))(params)


GROWTHS = {
    "tokens": Growth("a gated MLP over tokens, pieces of 64", (512, 1024, 2048, 4096), (128, 256), tiled_mlp),
    "examples": Growth("`vmap` over examples, pieces of 16", (64, 128, 256, 512), (32, 64), chunked_vmap),
    "layers": Growth(
        "`torch.func.grad` through layers, each a checkpoint", (4, 8, 16, 32), (2, 4), checkpointed_layers
    ),
}


def peaks(name: str, quick: bool, device: torch.device) -> dict[str, dict[str, int]]:
    """Bytes over what is given and returned, at each size: plain, and by pieces."""
    growth = GROWTHS[name]
    found: dict[str, dict[str, int]] = {"plain": {}, "by pieces": {}}
    for size in growth.quick if quick else growth.sizes:
        for way, call in zip(found, growth.make(size), strict=True):
            found[way][str(size)] = _over_the_results(call, device)
    return found


def _over_the_results(call: Call, device: torch.device) -> int:
    result = call()
    held = {id(leaf): leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    kept: list[object] = []
    return allocated_peak(lambda: kept.append(call()), device) - sum(held.values())
