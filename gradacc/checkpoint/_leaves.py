"""A tree as leaves with keys: what can be saved, and what is the same on two ranks."""

from __future__ import annotations

import ctypes
import hashlib
import json
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradacc import _tree
from gradacc._describe import describe

Value: TypeAlias = bool | int | float | str
Leaf: TypeAlias = Tensor | Value

_VALUES = (bool, int, float, str)
_TENSORS = (Tensor, nn.Parameter)


def flatten(name: str, tree: Any, root: str) -> tuple[list[str], list[Any], _tree.TreeDef]:
    """Keys, leaves and structure; a key is the leaf's path below the root: ``['w']``, ``.params[0]``.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves, treedef = _tree.flatten(tree)
    keys = [path[len(root) :] for path in _tree.paths(treedef, root)]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"{name}: two leaves are called {root}{twice}; give dict keys different reprs")
    return keys, leaves, treedef


def check(name: str, path: str, leaf: Any) -> Leaf:
    """``leaf``, if it can be saved.

    Raises:
        TypeError: it cannot.
        ValueError: it is an int of more digits than Python writes.
    """
    if type(leaf) is int:
        try:
            str(leaf)
        except ValueError:
            raise ValueError(
                f"{name}: {path} is an int of {leaf.bit_length()} bits, more than Python writes as digits; pass hex() of it, "
                "or see sys.set_int_max_str_digits"
            ) from None
    if type(leaf) in _VALUES:
        value: Leaf = leaf
        return value
    if not isinstance(leaf, Tensor):
        fix = "; pass its state_dict()" if hasattr(leaf, "state_dict") else ""
        raise TypeError(
            f"{name}: {path} is {describe(leaf)}; leaves are dense tensors, int, float, bool and str (not subclasses){fix}"
        )
    if type(leaf) not in _TENSORS:
        raise TypeError(
            f"{name}: {path} is a {type(leaf).__name__}; pass a plain tensor: of a DTensor, its full_tensor()"
        )
    if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_quantized or leaf.device.type == "meta":
        kind = "meta" if leaf.device.type == "meta" else "sparse, nested or quantized"
        raise TypeError(f"{name}: {path} is a {kind} tensor; pass a dense one that holds numbers")
    return leaf


def title(leaf: Leaf) -> str:
    """What must be the same in a checkpoint and in ``like``: ``float32 (2, 3)``, ``int``."""
    return f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def fingerprint(leaf: Leaf) -> tuple[str, str]:
    """Equal for equal bits: the title; and a tensor's SHA-256, or the value."""
    if not isinstance(leaf, Tensor):
        return title(leaf), json.dumps(leaf)
    plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
    numbers = (ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()) if plain.nbytes else b""
    return title(leaf), hashlib.sha256(numbers).hexdigest()
