"""The training loop: one exact gradient an iteration, handed to an ordinary `torch.optim` optimizer."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import gradacc
from gradacc.demo.batch import batch_at, draw, pad
from gradacc.demo.model import GPT, next_byte_loss
from gradacc.demo.proof import LossFn, Params
from gradacc.demo.ranks import ALONE, Ranks
from gradacc.demo.settings import Settings

MAX_GRADIENT_NORM = 1.0
HELD_OUT_PIECES = 256
HELD_OUT_SEED = 2**40


class State(NamedTuple):
    """All that training carries from one iteration to the next; batches follow from the seed and the iteration."""

    params: Params
    optimizer: Optimizer
    scheduler: LRScheduler
    iteration: int = 0


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


def build(settings: Settings, device: torch.device) -> tuple[Model, State]:
    """A fresh model, and the state to train it from."""
    torch.manual_seed(settings.seed)
    apply, params, _ = gradacc.functional(GPT(settings.model).to(device))

    def loss_fn(params: Params, tokens: Tensor) -> gradacc.Mean:
        return gradacc.Mean(*next_byte_loss(apply(params, tokens), tokens))

    optimizer = torch.optim.AdamW(params.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = LambdaLR(optimizer, lambda iteration: lr_share(iteration, settings.iterations))
    return Model(apply, loss_fn), State(params, optimizer, scheduler)


def lr_share(iteration: int, iterations: int) -> float:
    """Share of the learning rate: up linearly over the first 5 %, then down to 5 % along a cosine."""
    warm_up = max(1, iterations // 20)
    return min((iteration + 1) / warm_up, 0.525 + 0.475 * math.cos(math.pi * min(1.0, iteration / max(1, iterations))))


def train(
    settings: Settings,
    loss_fn: LossFn,
    state: State,
    pieces: Sequence[bytes],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[State, Metrics]]:
    """Yields after every iteration, up to ``settings.iterations``; the parameters are updated in place.

    On every rank the same: the batch is all ranks' together.
    """
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=settings.steps, sync=gradacc.all_reduce())
    while state.iteration < settings.iterations:
        start = time.perf_counter()
        batch = batch_at(pieces, settings.batch_size, settings.seed, state.iteration, device, ranks)
        grads, mean = grad_fn(state.params, batch)
        for name, parameter in state.params.items():
            parameter.grad = grads[name]
        norm = torch.nn.utils.clip_grad_norm_(state.params.values(), MAX_GRADIENT_NORM)
        lr = float(state.scheduler.get_last_lr()[0])
        state.optimizer.step()
        state.scheduler.step()
        loss, tokens = mean.value.item(), int(mean.weight)
        seconds = time.perf_counter() - start
        state = state._replace(iteration=state.iteration + 1)
        bits = loss / math.log(2)
        yield state, Metrics(state.iteration, loss, bits, tokens, lr, norm.item(), seconds, tokens / seconds)


def held_out_bits_per_byte(
    loss_fn: LossFn, params: Params, pieces: Sequence[bytes], device: torch.device, batch_size: int = 64
) -> float:
    """Bits per byte of up to `HELD_OUT_PIECES` of the held-out pieces: always the same ones."""
    chosen = pieces if len(pieces) <= HELD_OUT_PIECES else draw(pieces, HELD_OUT_PIECES, HELD_OUT_SEED)
    parts = (pad(chosen[start : start + batch_size], device) for start in range(0, len(chosen), batch_size))
    with torch.no_grad():
        mean = functools.reduce(operator.add, (loss_fn(params, part) for part in parts))
    return float(mean.value) / math.log(2)
