"""What autograd has recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

_LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # the node of a leaf


def nodes(roots: Iterable[Node | None]) -> dict[Node, int]:
    """The nodes of an autograd graph, each with the number of edges that lead to it."""
    uses = {root: 0 for root in roots if root is not None}
    stack = list(uses)
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None:
                count = uses.get(parent)
                if count is None:
                    count = 0
                    stack.append(parent)
                uses[parent] = count + 1
    return uses


def now(leaf: Tensor) -> int:
    """The number that the next node has at least, as autograd numbers them where it is enabled; ``leaf``: one of any graph."""
    return get_gradient_edge(leaf.view_as(leaf)).node._sequence_nr()


def leaves(nodes: Iterable[Node]) -> list[Tensor]:
    """The leaves whose nodes are among these."""
    found: list[Any] = [node for node in nodes if type(node) is _LEAF]
    return [node.variable for node in found]


def check_checkpoints(nodes: Iterable[Node], who: str, inputs: str) -> None:
    """NOTE [reentrant checkpoints] in ``_engines/eager.py``; ``who`` begins a message."""
    if CheckpointFunction._backward_cls in set(map(type, nodes)):
        raise ValueError(
            f"{who} uses torch.utils.checkpoint with use_reentrant=True, which torch cannot combine with a backward pass "
            f"restricted to {inputs}. Pass use_reentrant=False"
        )
