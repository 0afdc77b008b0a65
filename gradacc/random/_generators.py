"""Generators that keys do not replace: whether anything drew from them."""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import torch
from torch import Tensor

from gradacc import _surroundings


def states(keys: Tensor) -> dict[str, Any]:
    """The states of those that keys do not replace."""
    now = _surroundings.of([keys])
    found: dict[str, Any] = {"torch's generator": [now.cpu, *now.states], "Python's random": random.getstate()}
    if "numpy" in sys.modules:
        name, words, *rest = importlib.import_module("numpy.random").get_state()
        found["NumPy's random"] = name, words.tobytes(), *rest
    return found


def moved(before: dict[str, Any], keys: Tensor) -> list[str]:
    """The names of those whose states are others now."""
    return [name for name, state in states(keys).items() if not _same(before[name], state)]


def _same(before: Any, now: Any) -> bool:
    if isinstance(now, list):
        return len(before) == len(now) and all(map(torch.equal, before, now))
    return bool(before == now)
