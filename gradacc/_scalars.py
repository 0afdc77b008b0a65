"""0-dim tensors beside an accelerator's, without waiting for it.

NOTE [what waits for a device]
    An accelerator computes behind the program, which runs ahead and queues work. Reading a value (``item``, ``bool``, a copy to
    the CPU) and a copy from the CPU's ordinary memory, of one number too, stop the program until everything queued before
    has been computed. Neither happens here but where the documentation says so: eagerly, `skip_nonfinite`, `skip_spikes`
    and `dynamic_loss_scale` read once a step, a call with ``sync`` one record. What is on the CPU stays there: an operation
    on the device takes a 0-dim CPU tensor as a number.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from gradacc import _where


def beside(scalar: Tensor, tensor: Tensor) -> Tensor:
    """A 0-dim tensor as an operand beside another: on its device, or on the CPU."""
    batched = torch.compiler.is_compiling() or _where.functorch_is_active()  # then it is more than a number
    return scalar if scalar.is_cpu and not batched else scalar.to(tensor.device)


def scalar(number: float, device: torch.device, floating: torch.dtype) -> Tensor:
    """A new 0-dim tensor: int64 for an integer, else ``floating``; computed on the device, not copied there."""
    dtype = torch.int64 if isinstance(number, numbers.Integral) else floating
    tensor: Tensor = torch.zeros((), dtype=dtype, device=device) + number  # `full` would fix what Dynamo holds symbolic
    return tensor
