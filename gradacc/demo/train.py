"""The training loop: `gradacc.train_step` with an optimizer of `gradacc.optim`, one exact gradient an iteration."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gradacc
from gradacc.demo.batch import batch_at, draw, pad
from gradacc.demo.model import GPT, next_byte_loss
from gradacc.demo.proof import LossFn, Params
from gradacc.demo.ranks import ALONE, Ranks
from gradacc.demo.settings import Settings

MAX_GRADIENT_NORM = 1.0
HELD_OUT_PIECES = 256
HELD_OUT_SEED = 2**40


class Model(NamedTuple):
    """A GPT as pure functions of its parameters: to logits, ``apply(params, tokens)``, and to the loss."""

    apply: Callable[[Params, Tensor], Tensor]
    loss_fn: LossFn


class Metrics(NamedTuple):
    """One iteration, as a line of ``metrics.jsonl``.

    ``loss`` is in nats per byte and the same in bits; ``tokens`` counts the bytes predicted (no padding), ``seconds``
    the iteration's time; ``lr`` is the learning rate used, ``grad_norm`` the gradient's norm before clipping.
    """

    iteration: int
    loss: float
    bits_per_byte: float
    tokens: int
    lr: float
    grad_norm: float
    seconds: float
    tokens_per_second: float


def build(settings: Settings, device: torch.device) -> tuple[Model, gradacc.TrainState]:
    """A fresh model, and the state to train it from: batches follow from the seed and the iteration."""
    torch.manual_seed(settings.seed)
    apply, params, _ = gradacc.functional(GPT(settings.model).to(device))

    def loss_fn(params: Params, tokens: Tensor) -> gradacc.Mean:
        return gradacc.Mean(*next_byte_loss(apply(params, tokens), tokens))

    return Model(apply, loss_fn), gradacc.TrainState(params, optimizer(settings).init(params))


def optimizer(settings: Settings) -> gradacc.optim.Optimizer:
    """AdamW whose learning rate is a function of the step, after clipping."""

    def lr(iteration: int) -> float:
        return settings.lr * lr_share(iteration, settings.iterations)

    adamw = gradacc.optim.adamw(lr, betas=(0.9, 0.98), weight_decay=0.01)
    own = gradacc.optim.sharded(adamw) if settings.shard else adamw
    return gradacc.optim.clip_by_global_norm(own, MAX_GRADIENT_NORM)


def lr_share(iteration: int, iterations: int) -> float:
    """Share of the learning rate: up linearly over the first 5 %, then down to 5 % along a cosine."""
    warm_up = max(1, iterations // 20)
    return min((iteration + 1) / warm_up, 0.525 + 0.475 * math.cos(math.pi * min(1.0, iteration / max(1, iterations))))


def train(
    settings: Settings,
    loss_fn: LossFn,
    state: gradacc.TrainState,
    pieces: Sequence[bytes],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[gradacc.TrainState, Metrics]]:
    """Yields the state and the metrics after every iteration, up to ``settings.iterations``.

    On every rank the same: the batch is all ranks' together.
    """
    sync = gradacc.reduce_scatter() if settings.shard else gradacc.all_reduce()
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=settings.steps, sync=sync)
    step = gradacc.train_step(grad_fn, optimizer(settings))
    for iteration in range(int(state.step), settings.iterations):
        start = time.perf_counter()
        batch = batch_at(pieces, settings.batch_size, settings.seed, iteration, device, ranks)
        state, metrics = step(state, batch)
        loss, tokens = metrics["loss"].item(), int(metrics["weight"])
        lr, norm = metrics["lr"].item(), metrics["grad_norm"].item()
        seconds = time.perf_counter() - start
        bits = loss / math.log(2)
        yield state, Metrics(iteration + 1, loss, bits, tokens, lr, norm, seconds, tokens / seconds)


def held_out_bits_per_byte(
    loss_fn: LossFn, params: Params, pieces: Sequence[bytes], device: torch.device, batch_size: int = 64
) -> float:
    """Bits per byte of up to `HELD_OUT_PIECES` of the held-out pieces: always the same ones."""
    chosen = pieces if len(pieces) <= HELD_OUT_PIECES else draw(pieces, HELD_OUT_PIECES, HELD_OUT_SEED)
    parts = (pad(chosen[start : start + batch_size], device) for start in range(0, len(chosen), batch_size))
    with torch.no_grad():
        mean = functools.reduce(operator.add, (loss_fn(params, part) for part in parts))
    return float(mean.value) / math.log(2)
