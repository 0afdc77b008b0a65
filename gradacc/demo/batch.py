"""Ragged pieces of text to padded batches, each a pure function of the seed and the iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradacc.demo.model import PAD
from gradacc.demo.ranks import ALONE, Ranks

_SEED_STRIDE = 1_000_003


def pad(pieces: Sequence[bytes], device: torch.device) -> Tensor:
    """Pieces of text as int64 tokens of shape ``(len(pieces), longest)``: the bytes, then `PAD`."""
    rows = [torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces]
    if not rows:
        return torch.empty((0, 1), dtype=torch.int64, device=device)
    return pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


def draw(pieces: Sequence[bytes], size: int, seed: int) -> list[bytes]:
    """``size`` pieces, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return [pieces[index] for index in torch.randint(len(pieces), (size,), generator=generator).tolist()]


def batch_at(
    pieces: Sequence[bytes], size: int, seed: int, iteration: int, device: torch.device, ranks: Ranks = ALONE
) -> Tensor:
    """The batch of one iteration: it depends on nothing that came before, so a run can be resumed anywhere.

    Of this one batch each rank takes its contiguous share, which may be empty.
    """
    return pad(draw(pieces, size, seed * _SEED_STRIDE + iteration)[ranks.share(size)], device)
