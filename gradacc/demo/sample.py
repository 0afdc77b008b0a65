"""What the trained model writes: bytes drawn one at a time after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradacc.demo.batch import draw

TEMPERATURE = 0.7
SAMPLES = 3
SAMPLE_BYTES = 240
PROMPT_BYTES = 16
_PROMPT_SEED = 2**40 + 1

Logits = Callable[[Tensor], Tensor]
"""Tokens of shape ``(batch, time)`` to logits of shape ``(batch, time, vocabulary)``."""


class Sample(NamedTuple):
    """Generated text: ``prompt`` was given (the start of a held-out piece), ``text`` is the model's."""

    prompt: str
    text: str


def samples(logits: Logits, held_out: Sequence[bytes], context: int, seed: int, device: torch.device) -> list[Sample]:
    """`SAMPLES` continuations of the first bytes of held-out pieces."""
    long = [piece for piece in held_out if len(piece) > 2 * PROMPT_BYTES] or held_out
    drawn = draw(long, SAMPLES, _PROMPT_SEED + seed)
    size = min(PROMPT_BYTES, *map(len, drawn))
    prompts = [piece[:size] for piece in drawn]
    texts = generate(logits, prompts, context, torch.Generator().manual_seed(seed), device)
    return [Sample(readable(prompt), readable(text).rstrip()) for prompt, text in zip(prompts, texts, strict=True)]


@torch.no_grad()
def generate(
    logits: Logits, prompts: Sequence[bytes], context: int, generator: torch.Generator, device: torch.device
) -> list[bytes]:
    """`SAMPLE_BYTES` bytes after every prompt (all of one length), drawn from the model's distribution at `TEMPERATURE`.

    The model sees the last ``context`` bytes. Padding, its 257th token, is never drawn.
    """
    tokens = torch.tensor([list(prompt) for prompt in prompts])
    given = tokens.shape[1]
    for _ in range(SAMPLE_BYTES):
        seen = tokens[:, -context:].to(device)
        chances = (logits(seen)[:, -1, :256].float().cpu() / TEMPERATURE).softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return [bytes(row) for row in tokens[:, given:].tolist()]


def readable(text: bytes) -> str:
    """``text`` with a replacement character for whatever a terminal or a page could not show.

    >>> readable(b"a" + bytes([27, 255]) + b"b")
    'a\ufffd\ufffdb'
    """
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)
