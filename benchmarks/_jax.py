"""The workloads again, in plain jax.numpy, accumulated by optax: same weights, same batch, same maths.

Parameters are the PyTorch module's own, by name and in PyTorch's layout (a linear layer's weight is ``(out, in)``; on a
CPU the transposed layout is as fast: XLA folds the transposition into the product), so gradients compare by name.

Importing this module imports JAX. The size of its thread pool is fixed then: say it to `use_threads` before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]  # optax ships no types
import torch
from torch import Tensor

from benchmarks._workloads import Workload
from gradacc.demo.model import GPT

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]


def use_threads(count: int) -> None:
    """Let JAX's CPU client, which is made at the first use of JAX, work with `count` threads."""
    os.environ["NPROC"] = os.environ["PJRT_NPROC"] = str(count)


def gradient(work: Workload, steps: int) -> tuple[Callable[[], Params], Callable[[Params], dict[str, Tensor]]]:
    """``jax.jit(optax.microbatching.microbatch(jax.value_and_grad(loss), ...))``, ready to run, and its result for PyTorch.

    The first function computes the mean gradient over the batch and waits for it.
    """
    params = {name: jnp.asarray(leaf.detach().cpu().numpy()) for name, leaf in work.module.named_parameters()}
    batch = (jnp.asarray(work.inputs.cpu().numpy()), jnp.asarray(work.targets.cpu().numpy()))
    value_and_grad = jax.jit(
        optax.microbatching.microbatch(
            jax.value_and_grad(_loss(work)),
            argnums=1,
            microbatch_size=len(work.inputs) // steps,
            accumulator=optax.microbatching.AccumulationType.MEAN,
        )
    )

    def compute() -> Params:
        _, grads = jax.block_until_ready(value_and_grad(params, batch))  # type: ignore[no-untyped-call]  # jax's
        return grads  # type: ignore[no-any-return]  # what jax returns

    return compute, _to_torch


def _to_torch(grads: Params) -> dict[str, Tensor]:
    return {name: torch.from_dlpack(grad) for name, grad in grads.items()}  # type: ignore[attr-defined]


def _loss(work: Workload) -> Callable[[Params, Batch], jax.Array]:
    if isinstance(work.module, GPT):
        config = work.module.config

        def cross_entropy(params: Params, batch: Batch) -> jax.Array:
            tokens, targets = batch
            logits = _gpt(params, tokens, layers=config.layers, heads=config.heads)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

        return cross_entropy

    layers = [name.removesuffix(".weight") for name, _ in work.module.named_parameters() if name.endswith(".weight")]

    def squared_error(params: Params, batch: Batch) -> jax.Array:
        x, targets = batch
        for name in layers[:-1]:
            x = jax.nn.relu(_linear(params, name, x))
        return jnp.mean(jnp.square(_linear(params, layers[-1], x) - targets))

    return squared_error


def _gpt(params: Params, tokens: jax.Array, *, layers: int, heads: int) -> jax.Array:
    """`gradacc.demo.model.GPT`, line by line."""
    x = params["token.weight"][tokens] + params["position.weight"][: tokens.shape[1]]
    for layer in range(layers):
        x = _block(params, f"blocks.{layer}", x, heads)
    return _linear(params, "head", _norm(params, "norm", x))


def _block(params: Params, name: str, x: jax.Array, heads: int) -> jax.Array:
    batch, time, width = x.shape
    qkv = _linear(params, f"{name}.qkv", _norm(params, f"{name}.norm_attention", x))
    query, key, value = jnp.moveaxis(qkv.reshape(batch, time, 3, heads, width // heads), 2, 0)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + _linear(params, f"{name}.project", mixed.reshape(batch, time, width))
    expanded = jax.nn.gelu(_linear(params, f"{name}.expand", _norm(params, f"{name}.norm_mlp", x)), approximate=False)
    return x + _linear(params, f"{name}.contract", expanded)


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    product = x @ params[f"{name}.weight"].T
    return product + params[f"{name}.bias"] if f"{name}.bias" in params else product


def _norm(params: Params, name: str, x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return centred * deviation * params[f"{name}.weight"] + params[f"{name}.bias"]


def trivial() -> Any:
    """Compile and run next to nothing, so that what JAX does once in a process is done."""
    return jax.block_until_ready(jax.jit(jnp.sin)(jnp.zeros(1)))  # type: ignore[no-untyped-call]
