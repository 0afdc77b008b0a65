"""What gradients and values are summed in, and numbers of one dtype in terms of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, but float32 for floats of 8 and 16 bits and complex64 for complex of 32."""
    if dtype.is_complex:
        return torch.complex64 if dtype.itemsize < 8 else dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the real and imaginary part (`torch.dtype.to_real`, which Dynamo does not trace)."""
    return {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}.get(
        dtype, dtype
    )


def is_inexact(tensor: Tensor) -> bool:
    """Whether it holds floating or complex numbers, which have derivatives and are rounded."""
    return tensor.is_floating_point() or tensor.is_complex()


def widened(tensor: Tensor) -> Tensor:
    """A floating or complex tensor in the dtype that it is summed in."""
    return tensor.to(sum_dtype(tensor.dtype))


def as_real(tensor: Tensor) -> Tensor:
    """A complex number as two real ones, along a last dimension; in the same memory, where that holds the number itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def global_norm(tensors: Iterable[Tensor], *, wide: bool) -> Tensor:
    """The Euclidean norm of all tensors as one vector, 0-dim; ``wide``: at least float32."""
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.float32 if wide and tensor.dtype.itemsize < 4 else None)
        for tensor in tensors
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    return norm


def dtypes(asked: torch.dtype | None, params: Sequence[Tensor]) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """What each gradient is summed in, and what it is returned in.

    Summed in float32 for half precision and returned in the parameter's dtype; with ``asked``, summed and returned in
    that one (complex parameters: in its complex counterpart).
    """
    own = [param.dtype for param in params]
    if asked is None:
        return [sum_dtype(dtype) for dtype in own], own
    given = [asked.to_complex() if dtype.is_complex else asked for dtype in own]
    return given, given
