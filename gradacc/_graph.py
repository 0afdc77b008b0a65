"""What autograd has recorded."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import Node


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
