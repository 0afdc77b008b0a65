"""One step of a torch optimizer, on memory that is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc.optim import _elsewhere, _memory, _slots

_NAME = "from_torch"
_PART = 2 * _memory.CHUNK
"""Elements that a ``foreach`` step updates together: more than our own, since it makes more calls each time."""


def take_step(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    leaves: list[Tensor],
    grad_leaves: Sequence[Tensor],
    slots: Sequence[dict[str, Any]] | None,
) -> list[dict[str, Any]]:
    """Update ``leaves``; what the optimizer then keeps for each. ``slots``: what it kept before, None in its first step."""
    plain = cls.__module__.startswith("torch.optim.")  # its constructor remembers nothing of a parameter but its state
    made = cls(leaves[:1] if plain and slots is not None else leaves, **options)
    (group,) = made.param_groups
    fused = bool(group.get("fused"))
    if fused:
        _slots.make_dense(leaves)
    before = _options_of(group)
    parts = [leaves]
    if plain and options.get("foreach"):  # a part at a time, which stays in a CPU's cache
        parts = [[leaves[i] for i in chunk] for chunk in _memory.chunks(leaves, _PART)]
    made.param_groups = [{"params": part, **before} for part in parts]
    if slots is not None:
        for leaf, slot in zip(leaves, slots, strict=True):
            kept = _slots.restored(slot)
            made.state[leaf] = {k: _slots.with_strides_of(leaf, v) for k, v in kept.items()} if fused else kept
    for leaf, grad_leaf in zip(leaves, grad_leaves, strict=True):
        leaf.grad = _slots.with_strides_of(leaf, grad_leaf) if fused else grad_leaf
    elsewhere = [] if plain else _elsewhere.attributes(made)
    try:
        made.step()
    except Exception as error:
        error.add_note(
            f"{_NAME}: raised by {type(made).__name__}.step(), which is called without a closure, with gradients in .grad"
        )
        raise
    finally:
        for leaf in leaves:
            leaf.grad = None
    if not plain:
        _elsewhere.check(_NAME, made, elsewhere, leaves)
    _check_options(made, before)
    return list(made.state.values()) if plain and slots is not None else [made.state[leaf] for leaf in leaves]


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in group.items() if option != "params"}


def _check_options(made: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    """A step has changed no option."""
    after = {option: value for group in made.param_groups for option, value in _options_of(group).items()}
    changed = [option for option, value in after.items() if value is not before.get(option)]
    if changed:
        raise TypeError(
            f"{_NAME}: {type(made).__name__} keeps state in its param_groups ({', '.join(changed)}), which a pytree of tensors "
            "cannot hold; write it as gradacc.optim.Optimizer(init, step)"
        )
