"""Micro-batches that were cut to be the batch of one call."""

from __future__ import annotations

from typing import TypeVar

from gradacc import _tree

T = TypeVar("T")


class Window(list[T]):
    """A list that can only be micro-batches: NOTE [one batch or micro-batches] in ``_batch.py``."""

    number = 0
    """Which one of a loop that all ranks of a group run, from 1 on; 0 where there is no such loop."""


_tree.register_list(Window)
