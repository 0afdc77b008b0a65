"""What ``fully_shard`` has put on a module, where a replica of it runs.

NOTE [FSDP's hooks]
    ``fully_shard`` registers a forward pre-hook and a forward hook on each module that it divides: they gather the module's
    own parameters, and free them. A replica runs with the parameters that it is given, which are whole, and whose gradients
    cross at the end of the call, so it is made without these two. The module's state stays as it is, and its own forward pass
    may be run between calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gradacc import _rows


def drop_hooks(module: nn.Module, hooks: Iterable[dict[int, Any]]) -> None:
    """Take FSDP's hooks of a module out of copies of its dicts of hooks."""
    state = _state(module)
    if state is None:
        return
    dropped: set[int] = set()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        if handle is not None:
            # Of several modules that are divided as one, a handle has theirs all.
            dropped.update(each.id for each in getattr(handle, "handles", [handle]))
    for held in hooks:
        for key in dropped.intersection(held):
            del held[key]


COMPILED = (
    "apply: fully_shard has divided the module, and in a compiled function FSDP's hooks would run. Leave "
    "torch.compile out, or pass the parameters of a module that is not divided"
)


def is_divided(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it."""
    return _state(module) is not None


def _state(module: nn.Module) -> Any:
    """What FSDP knows of a module that it divides, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return module._get_fsdp_state() if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None


def check(modules: Iterable[nn.Module]) -> None:
    """Refuse what FSDP's hooks would do to numbers.

    Raises:
        ValueError: a policy of mixed precision, or one that keeps parameters elsewhere.
    """
    for module in modules:
        state = _state(module)
        if state is None:
            continue
        policy = state._mp_policy
        dtypes = {key: value for key, value in vars(policy).items() if key.endswith("dtype") and value is not None}
        if dtypes:
            raise ValueError(
                f"functional: a {type(module).__name__} has a MixedPrecisionPolicy ({dtypes}), which FSDP's hooks apply, and "
                "these do not run here. Leave mp_policy out of fully_shard; use torch.autocast in the loss, or cast there, and "
                "reduce_scatter(compress=) for what crosses"
            )
        if not all(group.is_sharded for group in state._fsdp_param_groups):
            raise ValueError(
                f"functional: a {type(module).__name__} holds whole parameters, as its own forward pass has left them. Call "
                "module.reshard() on every module that fully_shard has divided, which frees them"
            )


def check_whole(modules: Iterable[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """What a replica of a module that FSDP has divided is given are whole tensors.

    Raises:
        ValueError: one is a DTensor.
    """
    divided = [name for name, tensor in tensors.items() if _rows.is_dtensor(tensor)]
    if divided and any(_state(module) is not None for module in modules):
        raise ValueError(
            f"apply: {divided[:3]} of a module that fully_shard has divided would be a DTensor in the forward pass, and "
            "whole tensors are due. In the loss of grad_fn(params, ...) with sync=gradacc.reduce_scatter(mesh) those of "
            "params are whole. Elsewhere, and for what is not in params (what is frozen), pass DTensor.full_tensor()"
        )
