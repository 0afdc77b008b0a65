"""The draws of torch that have keyed counterparts: operators, below autograd and transforms.

Each takes ``take`` before its own arguments: ``take(shape, device)`` is the keys of this draw, and the shape of what each
of them draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradacc.random import _check, _draw, _real

Take = Callable[[Sequence[int], torch.device], tuple[Tensor, Sequence[int]]]

_ATEN = torch.ops.aten


def _bernoulli_(take: Take, self: Tensor, p: float | Tensor = 0.5) -> Tensor:
    """True with probability ``p``, in place."""
    keys, shape = take(self.shape, self.device)
    if isinstance(p, Tensor):
        _check_all(p, "bernoulli: p is in [0, 1]", lambda p: (p >= 0) & (p <= 1))
        return self.copy_(_draw.uniform(keys, shape, torch.float32) < p)
    return self.copy_(_draw.below(keys, shape, _check.probability("keyed: bernoulli", p)))


def _bernoulli(take: Take, self: Tensor, p: float | Tensor | None = None) -> Tensor:
    """Without ``p``, ``self`` is the probabilities."""
    return _bernoulli_(take, torch.empty_like(self), self if p is None else p)


def _native_dropout(take: Take, self: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """``(output, what is kept)``; it draws where torch's own, composed of `bernoulli_`, does."""
    if train is False or p == 0 or self.numel() == 0:
        return self.clone(), torch.ones_like(self, dtype=torch.bool)
    if p == 1:
        return self * 0, torch.zeros_like(self, dtype=torch.bool)
    kept = _bernoulli_(take, torch.empty_like(self, dtype=torch.bool), 1 - p)
    return self * kept * (1 / (1 - p)), kept


def _uniform_(take: Take, self: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    if not low <= high:
        raise ValueError(f"keyed: uniform numbers between {low} and {high}; the first is not above the second")
    keys, shape = take(self.shape, self.device)
    numbers = _draw.uniform(keys, shape, _dtype("uniform", self))
    return self.copy_(numbers if (low, high) == (0, 1) else numbers * (high - low) + low)


def _normal_(take: Take, self: Tensor, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> Tensor:
    _check_all(torch.as_tensor(std), "normal: the standard deviation is not negative", lambda std: std >= 0)
    keys, shape = take(self.shape, self.device)
    dtype = _dtype("normal", self)
    numbers = _draw.draw(keys, shape, dtype, _real.normal(dtype))
    return self.copy_(numbers * std + mean)


def _new(fill: Callable[..., Tensor], empty: Callable[..., Tensor], take: Take, of: Any, **kwargs: Any) -> Tensor:
    """A tensor that is made by ``empty``, of a size or of one that it is like."""
    return fill(take, empty(of, **kwargs))


def _normal_of_size(take: Take, mean: float, std: float, size: Sequence[int], **kwargs: Any) -> Tensor:
    return _normal_(take, torch.empty(size, **kwargs), mean, std)


def _normal(take: Take, mean: float | Tensor, std: float | Tensor = 1.0) -> Tensor:
    """Of means and standard deviations, of which one at least is a tensor."""
    tensors = [each for each in (mean, std) if isinstance(each, Tensor)]
    shape = torch.broadcast_shapes(*(each.shape for each in tensors))  # type: ignore[no-untyped-call]
    return _normal_(take, torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device), mean, std)


def _check_all(values: Tensor, rule: str, holds: Callable[[Tensor], Tensor]) -> None:
    """Where that does not wait for a device, as torch does."""
    if values.is_cpu and not bool(holds(values).all()):
        raise ValueError(f"keyed: {rule}; got {values.tolist() if values.ndim == 0 else 'other ones among them'}")


def _dtype(name: str, out: Tensor) -> torch.dtype:
    if out.dtype not in _real.UNIFORM:
        raise NotImplementedError(
            f"keyed: {name} numbers of dtype {out.dtype}; keyed ones are float16, bfloat16, float32 or float64: draw one of "
            "these, and convert it"
        )
    return out.dtype


DRAWS: dict[Any, Callable[..., Any]] = {
    _ATEN.bernoulli.default: _bernoulli,
    _ATEN.bernoulli.p: _bernoulli,
    _ATEN.bernoulli.Tensor: _bernoulli,
    _ATEN.bernoulli_.float: _bernoulli_,
    _ATEN.bernoulli_.Tensor: _bernoulli_,
    _ATEN.native_dropout.default: _native_dropout,
    _ATEN.uniform_.default: _uniform_,
    _ATEN.normal_.default: _normal_,
    _ATEN.normal.float_float: _normal_of_size,
    _ATEN.normal.Tensor_float: _normal,
    _ATEN.normal.float_Tensor: _normal,
    _ATEN.normal.Tensor_Tensor: _normal,
    _ATEN.rand.default: partial(_new, _uniform_, torch.empty),
    _ATEN.randn.default: partial(_new, _normal_, torch.empty),
    _ATEN.rand_like.default: partial(_new, _uniform_, torch.empty_like),
    _ATEN.randn_like.default: partial(_new, _normal_, torch.empty_like),
}
