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
    found = {tensor.device.type for tensor in tensors} - {"meta", "cpu"}
    # A function of tensors on the CPU may move them.
    used = _accelerator_in_use() if not found else None
    kinds = sorted(found | {"cpu"} | ({used} if used is not None else set()))
    device = next((kind for kind in kinds if kind != "cpu"), "cpu")
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.device.type in found})
    if used is not None:
        devices = [torch.accelerator.current_device_index()]
    now = Surroundings(
        torch.get_rng_state(),
        device,
        devices,
        [],
        [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ],
        torch.is_autocast_cache_enabled(),
    )
    return now._replace(states=_states(now))


def _states(surroundings: Surroundings) -> list[Tensor]:
    """Of its devices, as they are now."""
    if not surroundings.devices:
        return []
    module = torch.get_device_module(surroundings.device)
    with _outside_of_transforms():
        return [module.get_rng_state(device) for device in surroundings.devices]


def _outside_of_transforms() -> AbstractContextManager[Any]:
    """A device's state may be a tensor that it copies, which is none of a transform's."""
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
    with _outside_of_transforms():
        set_device_states(surroundings.devices, surroundings.states, device_type=surroundings.device)


@contextmanager
def restored(surroundings: Surroundings) -> Iterator[None]:
    """With the random numbers and the autocast of then; afterwards those of now."""
    with ExitStack() as stack:
        stack.callback(rewind, surroundings._replace(cpu=torch.get_rng_state(), states=_states(surroundings)))
        rewind(surroundings)
        for kind, dtype, enabled in surroundings.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, surroundings.cached))
        yield
