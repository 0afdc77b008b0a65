"""What a function depends on beside its arguments: kept of one run, and restored around a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


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
    found = {tensor.device.type for tensor in tensors} - {"meta", "cpu"}
    # A function of tensors on the CPU may move them.
    used = _accelerator_in_use() if not found else None
    kinds = sorted(found | {"cpu"} | ({used} if used is not None else set()))
    device = next((kind for kind in kinds if kind != "cpu"), "cpu")
    devices, states = get_device_states(*tensors)
    if used is not None:
        devices = [torch.accelerator.current_device_index()]
        states = [torch.get_device_module(used).get_rng_state(each) for each in devices]
    return Surroundings(
        torch.get_rng_state(),
        device,
        devices,
        states,
        [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ],
        torch.is_autocast_cache_enabled(),
    )


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
    set_device_states(surroundings.devices, surroundings.states, device_type=surroundings.device)


@contextmanager
def restored(surroundings: Surroundings) -> Iterator[None]:
    """With the random numbers and the autocast of then; afterwards those of now."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(surroundings.devices, device_type=surroundings.device))
        rewind(surroundings)
        for kind, dtype, enabled in surroundings.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, surroundings.cached))
        yield
