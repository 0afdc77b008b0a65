"""BatchNorm's running statistics as those of the large batch.

NOTE [statistics of the large batch]
    A layer that normalises with a micro-batch's statistics moves its running ones once each micro-batch. Here
    nothing is moved while micro-batches run: each layer's input gives `Moments`, which add up over micro-batches and ranks,
    and `BatchNorm.step` moves the running statistics once a call. The layers of a copy of the module, which shares its
    parameters and buffers and follows its mode, are of a class that adds the moments of its input to three more buffers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradacc import _module, _where
from gradacc._describe import describe
from gradacc._moments import Moments

_MOMENTS = "gradacc_count", "gradacc_mean", "gradacc_m2"


class BatchNorm(NamedTuple):
    """What `batch_norm` returns."""

    apply: Callable[..., Any]
    """``apply(params, *inputs, carry=carry, **kwargs) -> (output, carry)``: one micro-batch."""
    params: dict[str, Tensor]
    """As of `gradacc.functional`."""
    carry: dict[str, Any]
    """``{"buffers": {name: tensor}, "moments": {layer: Moments}}``: the module's buffers, and moments of nothing."""
    step: Callable[[Mapping[str, Any]], dict[str, Any]]
    """``step(carry) -> carry``: the running statistics moved once, and moments of nothing."""


def batch_norm(module: nn.Module) -> BatchNorm:
    """A module as a pure function whose BatchNorm statistics are the large batch's: one momentum step a call.

    .. code-block:: text

        running_mean = (1 - momentum) running_mean + momentum mean
        running_var  = (1 - momentum) running_var  + momentum m2 / (count - 1)

    Mean and m2 are over all numbers of a channel that all micro-batches of a call, on all ranks, gave to the layer (`Moments`),
    also where a forward pass runs it more than once. Normalisation stays the micro-batch's own, so a deeper layer's input is
    not quite what it is in the large batch.

    Arguments:
        module: with layers ``BatchNorm1d``, ``2d`` or ``3d`` that track running statistics. It is not changed; ``apply``
            follows its mode (``train()`` or ``eval()``) at the time of the call.

    Returns:
        `BatchNorm`: ``(apply, params, carry, step)``. Other buffers, and those of layers in evaluation mode, are threaded as by
        `gradacc.functional`.

    Raises:
        TypeError: as `gradacc.functional`.
        ValueError: the module has no such layer.

    Example:
        >>> import torch, gradacc
        >>> apply, params, carry, step = gradacc.batch_norm(torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)))
        >>> def loss_fn(params, batch, carry):
        ...     output, carry = apply(params, batch, carry=carry)
        ...     return output.square().mean(), carry
        >>> grad_fn = gradacc.accumulate(loss_fn, steps=3, has_carry=True)
        >>> x = torch.arange(12.0).view(6, 2)
        >>> grads, carry = grad_fn(params, x, carry=carry)
        >>> step(carry)["buffers"]["0.running_mean"]
        tensor([0.5000, 0.6000])
        >>> 0.1 * x.mean(0)
        tensor([0.5000, 0.6000])
    """
    own = _converted(module)
    every = own.named_modules() if isinstance(own, nn.Module) else ()
    layers: dict[str, Any] = {name: part for name, part in every if isinstance(part, _WithMoments)}
    if not layers and isinstance(own, nn.Module):
        raise ValueError(
            f"batch_norm: the {type(module).__qualname__} has no BatchNorm layer that tracks running statistics; use "
            "gradacc.functional"
        )
    apply, params, buffers = _module.functional(own)
    pairs = [*zip(module.modules(), own.modules(), strict=True)]
    prefixes = {name: f"{name}." if name else "" for name in layers}
    extra = {f"{prefix}{key}" for prefix in prefixes.values() for key in _MOMENTS}

    def moments_of(found: Mapping[str, Tensor]) -> dict[str, Moments]:
        return {
            # A checkpoint that runs a layer again, in the backward pass, adds to what it wrote into.
            name: Moments(*(found[prefix + key].clone() for key in _MOMENTS))
            for name, prefix in prefixes.items()
        }

    def applied(params: Mapping[str, Tensor], *inputs: Any, carry: Mapping[str, Any], **kwargs: Any) -> Any:
        given = _known(carry)
        for part, follower in pairs:
            if follower.training != part.training:
                follower.training = part.training
        _check_moved(given["moments"])
        nothing = {
            prefix + key: zero
            for name, prefix in prefixes.items()
            for key, zero in zip(_MOMENTS, _zeros(given["moments"][name]), strict=True)
        }
        output, new = apply(params, *inputs, buffers={**given["buffers"], **nothing}, **kwargs)
        kept = {name: tensor for name, tensor in new.items() if name not in extra}
        for name, prefix in prefixes.items():
            if layers[name].training:
                # They are moved by `step`.
                kept |= {prefix + key: given["buffers"][prefix + key] for key in _STATISTICS}
        return output, {"buffers": kept, "moments": moments_of(new)}

    def step(carry: Mapping[str, Any]) -> dict[str, Any]:
        given = _known(carry)
        moved = dict(given["buffers"])
        for name, prefix in prefixes.items():
            moved |= _moved(layers[name], prefix, moved, given["moments"][name])
        nothing = {name: Moments(*_zeros(moments)) for name, moments in given["moments"].items()}
        return {"buffers": moved, "moments": nothing}

    start = {name: tensor for name, tensor in buffers.items() if name not in extra}
    return BatchNorm(applied, params, {"buffers": start, "moments": moments_of(buffers)}, step)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _moved(layer: _BatchNorm, prefix: str, buffers: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """One momentum step of a layer; none where nothing was seen."""
    mean, variance, number = (buffers[prefix + key] for key in _STATISTICS)
    count = torch.as_tensor(moments.count, device=mean.device)
    seen, after = count > 0, number + 1
    rate: Any = 1.0 / after.to(mean.dtype) if layer.momentum is None else layer.momentum
    found = moments.m2 / (count - 1)
    pairs = ((mean, (1 - rate) * mean + rate * moments.mean), (variance, (1 - rate) * variance + rate * found))
    moved = [torch.where(seen, new.to(old.dtype), old) for old, new in pairs]
    return dict(zip((prefix + key for key in _STATISTICS), [*moved, torch.where(seen, after, number)], strict=True))


def _check_moved(moments: Mapping[str, Moments]) -> None:
    """What a call has returned was given to `step` before the next one, or its moments would be lost; where it can be read."""
    for name, each in moments.items():
        count = torch.as_tensor(each.count)
        if count.is_cpu and _where.is_readable(count) and bool((count != 0).any()):
            raise ValueError(
                f"batch_norm: the carry has the moments of {int(count.sum())} numbers of layer {name!r}, with which no "
                "statistics have been moved. After each call: carry = step(carry), with the step that batch_norm returned "
                "(its fourth)"
            )


def _zeros(moments: Moments) -> list[Tensor]:
    """Those of nothing, of the same shapes."""
    return [torch.zeros_like(torch.as_tensor(number)) for number in (moments.count, moments.mean, moments.m2)]


def _known(carry: Any) -> Mapping[str, Any]:
    if not isinstance(carry, Mapping) or {*carry} != {"buffers", "moments"}:
        raise TypeError(f"batch_norm: the carry must be like the one that batch_norm returned, got {describe(carry)}")
    return carry


def _converted(module: Any) -> Any:
    """A copy that shares parameters and buffers, whose layers write moments. NOTE [statistics of the large batch]"""
    if not isinstance(module, nn.Module):
        return module
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, dict(shared))
    for part in own.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None:
            cls: Any = type(part)
            part.__class__ = _with_moments(cls)
            wide = part.running_mean.to(torch.promote_types(part.running_mean.dtype, torch.float32))
            count = torch.zeros((), dtype=torch.int64, device=wide.device)
            for key, number in zip(_MOMENTS, (count, torch.zeros_like(wide), torch.zeros_like(wide)), strict=True):
                part.register_buffer(key, number, persistent=False)
    return own


class _WithMoments:
    """A BatchNorm layer that adds up the moments of its input, in training mode."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's own."""
        layer: Any = self
        if layer.training:
            before = [getattr(layer, key) for key in _MOMENTS]
            found = Moments(*before) + Moments.of(input.detach(), [n for n in range(input.ndim) if n != 1])
            for buffer, number in zip(before, (found.count, found.mean, found.m2), strict=True):
                buffer.copy_(number)
        output: Tensor = super().forward(input)  # type: ignore[misc]  # the layer's
        return output


@functools.cache
def _with_moments(cls: type[Any]) -> type[Any]:
    return type(cls.__name__, (_WithMoments, cls), {"__module__": cls.__module__})
