"""Trees for tests of checkpoints, and what is equal to what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradacc import _tree


class Pair(NamedTuple):
    """A tree."""

    first: Any
    second: Any


@dataclass
class Node:
    """A tree that only torch's registry knows."""

    inside: Any


torch.utils._pytree.register_dataclass(Node)


def bits(leaf):
    """Equal for equal leaves only: type, dtype, shape and bits."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf
    plain = leaf.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return leaf.dtype, tuple(leaf.shape), bytes(plain.reshape(-1).view(torch.uint8).tolist())


def same(a, b):
    """Whether two trees are, bit for bit."""
    (leaves, treedef), (others, other) = _tree.flatten(a), _tree.flatten(b)
    return treedef == other and list(map(bits, leaves)) == list(map(bits, others))


def blank(tree):
    """A tree like this one, of other values."""

    def other(leaf):
        return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else type(leaf)()

    leaves, treedef = _tree.flatten(tree)
    return _tree.unflatten(treedef, map(other, leaves))


def entries(folder: Path) -> list[str]:
    """What is in a checkpoint's folder, but for the lock."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "checkpoint.lock")


def files(folder: Path) -> list[Path]:
    """What a checkpoint is made of."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.lock")
