"""A small byte-level GPT: the model that the demo trains and that the benchmarks time."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

PAD = 256
"""Token id of padding; 0..255 are the bytes themselves."""


class GPTConfig(NamedTuple):
    """Sizes of a `GPT`: the defaults make a six-layer model of about 5 million parameters."""

    layers: int = 6
    heads: int = 8
    width: int = 256
    context: int = 64
    vocabulary: int = 257


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))
        return out


class GPT(nn.Module):
    """Decoder-only transformer over bytes (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    ``GPT(config)(tokens)``: int64 token ids of shape ``(batch, time)``, ``time <= config.context``, to float logits of
    shape ``(batch, time, vocabulary)``. Padding must come after the text: attention is causal, so text never sees it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def next_byte_loss(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats of every next byte, and the number of bytes predicted; padding counts for nothing.

    ``logits`` has shape ``(batch, time, vocabulary)``; ``tokens`` (int64, ``(batch, time)``) is what was fed in.
    """
    targets = tokens[:, 1:]
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
    return total, (targets != PAD).sum()
