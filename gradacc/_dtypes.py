"""What gradients and values are summed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, but float32 for floats of 8 and 16 bits and complex64 for complex of 32."""
    if dtype.is_complex:
        return torch.complex64 if dtype.itemsize < 8 else dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def real(dtype: torch.dtype) -> torch.dtype:
    """Of the real and imaginary part (`torch.dtype.to_real`, which Dynamo does not trace)."""
    return {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}.get(
        dtype, dtype
    )


def dtypes(asked: torch.dtype | None, params: Sequence[Tensor]) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """What each gradient is summed in, and what it is returned in.

    Summed in float32 for half precision and returned in the parameter's dtype; with ``asked``, summed and returned in
    that one (complex parameters: in its complex counterpart).
    """
    own = [param.dtype for param in params]
    if asked is None:
        return [wide(dtype) for dtype in own], own
    given = [asked.to_complex() if dtype.is_complex else asked for dtype in own]
    return given, given
