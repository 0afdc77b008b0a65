"""What a function depends on beside its arguments: kept of one run, and restored around a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.checkpoint import set_device_states

from gradacc import _where


class Surroundings(NamedTuple):
    """Torch's random numbers, and autocast."""

    cpu: Tensor
    device: str
    devices: list[int]
    states: list[Tensor]
    autocast: list[tuple[str, torch.dtype, bool]]
    """``(device, dtype, enabled)`` of each kind of device."""
    cached: bool


def of(tensors: Sequence[Tensor]) -> Surroundings:
    """Those of now, of a function of these tensors."""
    kinds = {tensor.device.type for tensor in tensors} - {"meta", "cpu"}
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.device.type in kinds})
    used = None if kinds else _accelerator_in_use()
    if used is not None:
        # A function of tensors on the CPU may move them.
        kinds, devices = {used}, [torch.accelerator.current_device_index()]
    device = min(kinds, default="cpu")
    autocast = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in sorted({"cpu", *kinds})
        if torch.amp.is_autocast_available(kind)
    ]
    cpu, cached = torch.get_rng_state(), torch.is_autocast_cache_enabled()
    return Surroundings(cpu, device, devices, _states(device, devices), autocast, cached)


def _states(device: str, devices: Sequence[int]) -> list[Tensor]:
    """Of the devices of a kind, as they are now."""
    if not devices:
        return []
    module = torch.get_device_module(device)
    with outside_of_transforms():
        return [module.get_rng_state(number) for number in devices]


def outside_of_transforms() -> AbstractContextManager[Any]:
    """For what is none of a transform's: a device's state may be a tensor that it copies."""
    return temporarily_clear_interpreter_stack() if _where.functorch_is_active() else nullcontext()


def _accelerator_in_use() -> str | None:
    """The kind of this machine's accelerator, where anything has been done on it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator.type)
    return accelerator.type if getattr(module, "_initialized", True) else None


def rewind(surroundings: Surroundings) -> None:
    """Torch's random numbers as they were then."""
    torch.set_rng_state(surroundings.cpu)
    with outside_of_transforms():
        set_device_states(surroundings.devices, surroundings.states, device_type=surroundings.device)


@contextmanager
def restored(surroundings: Surroundings) -> Iterator[None]:
    """With the random numbers and the autocast of then; afterwards those of now."""
    with ExitStack() as stack:
        states = _states(surroundings.device, surroundings.devices)
        stack.callback(rewind, surroundings._replace(cpu=torch.get_rng_state(), states=states))
        rewind(surroundings)
        for kind, dtype, enabled in surroundings.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, surroundings.cached))
        yield
