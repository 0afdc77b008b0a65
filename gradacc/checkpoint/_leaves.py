"""A tree as leaves with keys: what can be saved, and what is the same on two ranks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradacc import _keys, _state_text, _tree
from gradacc._describe import describe
from gradacc._state import AccumulatorState
from gradacc.checkpoint import _shards
from gradacc.checkpoint._shards import Part

Value: TypeAlias = bool | int | float | str
Leaf: TypeAlias = Tensor | Part | Value

FACTS = ".facts"
"""Behind the path of a node with facts: their key. No child of such a node is called that."""

escaped = _keys.escaped

_VALUES = (bool, int, float, str)
_TENSORS = (Tensor, nn.Parameter)


def flatten(name: str, tree: Any, root: str) -> tuple[list[str], list[Any], _tree.TreeDef]:
    """Keys, leaves and structure; a key is the leaf's path below the root: ``['w']``, ``.params[0]``. NOTE [parts]

    Raises:
        ValueError: two leaves have the same path.
    """
    treedef = _tree.flatten(tree)[1]
    paths, leaves = _shards.flatten(name, tree, root)
    keys = [path[len(root) :] for path in paths]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"{name}: two leaves are called {root}{twice}; give dict keys different reprs")
    return keys, leaves, treedef


def check_keys(name: str, treedef: _tree.TreeDef, root: str) -> dict[str, str]:
    """What every node is (its kind, by path), of a tree whose leaves another process calls the same.

    Raises:
        TypeError: it would not. See NOTE [keys as text] in ``_keys.py``.
    """
    nodes = list(_tree.nodes(treedef, root))
    for node in nodes:
        for entry in node.entries:
            if not _keys.is_stable(entry):
                raise TypeError(
                    f"{name}: {node.path} has the key {entry!r}, {describe(entry)}, whose repr may be another one in the "
                    "process that loads it, which would then not find what is below; use a str or an int, or a tuple or "
                    "an Enum of them"
                )
    return {node.path[len(root) :]: node.kind for node in nodes}


def facts(tree: Any) -> dict[str, str]:
    """What of the tree's structure is saved, as text, by key: the facts of an accumulator's state."""
    nodes, treedef = _tree.flatten(tree, _has_facts)
    told = zip(_tree.paths(treedef), nodes, strict=True)
    return {path + FACTS: _state_text.to_text(node) for path, node in told if _has_facts(node)}


def with_saved_facts(tree: Any, values: dict[str, Value]) -> tuple[Any, set[str]]:
    """``tree`` with the facts that were saved in the place of its own, and their keys.

    Raises:
        ValueError: one is not like what was saved; the text goes on behind its path.
    """
    nodes, treedef = _tree.flatten(tree, _has_facts)
    new, used = [], set()
    for path, node in zip(_tree.paths(treedef), nodes, strict=True):
        saved = values.get(escaped(path) + FACTS)
        if _has_facts(node) and isinstance(saved, str):
            used.add(escaped(path) + FACTS)
            try:
                node = _state_text.from_text(node, saved)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
        new.append(node)
    return _tree.unflatten(treedef, new), used


def _has_facts(node: Any) -> bool:
    return type(node) is AccumulatorState


def check(name: str, path: str, leaf: Any) -> Leaf:
    """``leaf``, if it can be saved.

    Raises:
        TypeError: it cannot.
        ValueError: it is an int of more digits than Python reads, or a part without its elements.
    """
    if isinstance(leaf, Part):
        check(name, path, leaf.values)
        return _shards.check(name, path, leaf)
    if type(leaf) is int:
        try:
            long = len(str(abs(leaf))) > sys.int_info.default_max_str_digits
        except ValueError:
            long = True
        if long:  # though this process may have another limit
            raise ValueError(
                f"{name}: {path} is an int of {leaf.bit_length()} bits, more than Python reads as digits; pass hex() of it"
            )
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
            f"{name}: {path} is a {type(leaf).__name__}; pass a plain tensor: the full_tensor() of a DTensor; what "
            "the call returned that a tensor was donated to"
        )
    if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_quantized or leaf.device.type == "meta":
        kind = "meta" if leaf.device.type == "meta" else "sparse, nested or quantized"
        raise TypeError(f"{name}: {path} is a {kind} tensor; pass a dense one that holds numbers")
    if torch._C._functorch.is_functorch_wrapped_tensor(leaf) or leaf._is_zerotensor():
        raise TypeError(
            f"{name}: {path} is a tensor inside torch.func.vmap or grad; call this outside, with what they return"
        )
    if not _has_bytes(leaf.dtype):
        raise TypeError(
            f"{name}: {path} is {leaf.dtype}, whose numbers are not whole bytes; pass a view of it as uint8"
        )
    if leaf.numel() and leaf.untyped_storage().nbytes() == 0:
        raise TypeError(
            f"{name}: {path} is a tensor whose memory has been taken away (it was donated, or resized to 0)"
        )
    return leaf


def title(leaf: Leaf) -> str:
    """What must be the same in a checkpoint and in ``like``: ``float32 (2, 3)``, ``int``."""
    if isinstance(leaf, Part):
        return f"{str(leaf.values.dtype)[6:]} {leaf.facts.shape}"
    return f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def fingerprints(found: dict[str, Leaf]) -> dict[str, tuple[str, str]]:
    """What must be the same on two ranks, by key: of a part, what it is of; and the elements, where both have these."""
    told = {}
    for key, leaf in found.items():
        if isinstance(leaf, Part):
            told[key] = title(leaf), ""
            told[f"{key} from {leaf.facts.offset} to {leaf.facts.offset + leaf.facts.length}"] = fingerprint(
                leaf.values
            )
        else:
            told[key] = fingerprint(leaf)
    return told


def fingerprint(leaf: Tensor | Value) -> tuple[str, str]:
    """Equal for equal bits: the title; and a tensor's SHA-256, or the value."""
    if not isinstance(leaf, Tensor):
        return title(leaf), json.dumps(leaf)
    plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
    numbers = (ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()) if plain.nbytes else b""
    return title(leaf), hashlib.sha256(numbers).hexdigest()


def _has_bytes(dtype: torch.dtype) -> bool:
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return True
    try:
        return torch.iinfo(dtype).bits >= 8
    except TypeError:
        return False
