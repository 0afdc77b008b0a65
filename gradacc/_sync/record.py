"""Records in a sum of floats: bytes, as integers that a float holds exactly. NOTE [one collective]"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = {torch.float64: 6, torch.float32: 3, torch.float16: 1, torch.bfloat16: 1}
"""Whole bytes that a float of this dtype holds exactly."""


def digits(columns: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that hold a record of so many columns of 8 bytes."""
    return -(-8 * columns // _BYTES[dtype])


def encode(record: Tensor, dtype: torch.dtype) -> Tensor:
    """A record (int64) as integers in ``dtype``, each of as many bytes as it holds exactly."""
    width = _BYTES[dtype]
    raw = record.contiguous().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -len(raw) % width))
    return (raw.view(-1, width).to(torch.int64) << _shifts(width, record.device)).sum(1).to(dtype)


def decode(coded: Tensor, columns: int) -> Tensor:
    """The inverse of `encode`, for the records of all ranks: ``[W, digits] -> [W, columns]``."""
    width = _BYTES[coded.dtype]
    raw = (coded.to(torch.int64).unsqueeze(-1) >> _shifts(width, coded.device)) & 255
    return raw.to(torch.uint8).flatten(1)[:, : 8 * columns].flatten().view(torch.int64).view(-1, columns)


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * width, 8, device=device)
