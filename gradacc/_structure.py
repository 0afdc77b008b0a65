"""A tree of tensors without its numbers, as JSON, and back: how one process tells another what it has.

NOTE [told classes]
    What is read may come from somebody else, so a class is only looked up: in the modules that this process has imported,
    and only where it is a node of trees there (a ``NamedTuple``, or a registered dataclass). Nothing is imported or unpickled.
    A class that is not found, or holds more than its children, is unknown; a tree that is alike has it.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc import _keys, _tree


def to_json(tree: Any, device: torch.device) -> Any:
    """The structure, shapes and dtypes of ``tree``, and which of its tensors are on devices like ``device``."""
    leaves, treedef = _tree.flatten(tree)
    tensors = [[dtype_name(leaf.dtype), list(leaf.shape), leaf.device.type == device.type] for leaf in leaves]
    return {
        "paths": _tree.paths(treedef),
        "tensors": tensors,
        "tree": _to_json(tree, {id(leaf): index for index, leaf in enumerate(leaves)}),
    }


def from_json(told: Any, like: Any, device: torch.device) -> Any:
    """A tree of the structure that was told, of tensors that hold anything, with the memory of one number each.

    Where ``like`` has the same paths, of its classes; see NOTE [told classes].

    Raises:
        ValueError: a class is unknown.
        Exception: any other, where it was not `to_json` that told.
    """
    tensors = [
        empty(shape, dtype_named(dtype), device if near else torch.device("cpu"))
        for dtype, shape, near in told["tensors"]
    ]
    leaves, treedef = _tree.flatten(like)
    own = _to_json(like, {id(leaf): index for index, leaf in enumerate(leaves)})
    if _tree.paths(treedef) != told["paths"] or _facts(own) != _facts(told["tree"]):
        _, treedef = _tree.flatten(_from_json(told["tree"], tensors))
        if _tree.paths(treedef) != told["paths"]:
            raise ValueError("its paths are not those of its tree")
    return _tree.unflatten(treedef, tensors)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that stands for its shape, with the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


def dtype_name(dtype: torch.dtype) -> str:
    """Without ``torch.``"""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The inverse."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _to_json(tree: Any, index: dict[int, int]) -> Any:
    cls = type(tree)
    if tree is None:
        return None
    if cls is bool or cls is torch.dtype:
        return ["fact", tree if cls is bool else dtype_name(tree)]
    if id(tree) in index:
        return index[id(tree)]
    if cls in (dict, OrderedDict) and all(map(_keys.is_literal, tree)):
        return [cls.__name__, [[repr(key), _to_json(child, index)] for key, child in tree.items()]]
    if cls in (list, tuple):
        return [cls.__name__, [_to_json(child, index) for child in tree]]
    fields = _fields(tree)
    if fields is None:
        return ["unknown", f"{cls.__module__}.{cls.__qualname__}"]
    return [
        "class",
        [cls.__module__, cls.__qualname__, {name: _to_json(child, index) for name, child in fields.items()}],
    ]


def _from_json(told: Any, tensors: Sequence[Tensor]) -> Any:
    if told is None:
        return None
    if isinstance(told, int):
        return tensors[told]
    kind, inside = told
    match kind:
        case "dict" | "OrderedDict":
            cls = dict if kind == "dict" else OrderedDict
            return cls((ast.literal_eval(key), _from_json(child, tensors)) for key, child in inside)
        case "list" | "tuple":
            children = (_from_json(child, tensors) for child in inside)
            return list(children) if kind == "list" else tuple(children)
        case "fact":
            return inside if isinstance(inside, bool) else dtype_named(inside)
        case "class":
            module, qualname, fields = inside
            return _class(module, qualname)(**{name: _from_json(child, tensors) for name, child in fields.items()})
    raise ValueError(f"holds a {inside}, and only a tree of the same structure tells how to make one")


def _fields(node: Any) -> dict[str, Any] | None:
    """All that a node is made of, by the names that its class takes; None where that is not known."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if not dataclasses.is_dataclass(node):
        return None
    found = {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.init}
    inside = [id(leaf) for leaf in _tree.flatten(list(found.values()))[0] if type(leaf) not in (bool, torch.dtype)]
    children = [id(leaf) for leaf in _tree.flatten(node)[0]]
    return found if sorted(inside) == sorted(children) else None


def _facts(told: Any) -> list[Any]:
    """What is told of a tree and is neither a tensor nor a class: dtypes and bools, in order."""
    if isinstance(told, dict):
        return [fact for child in told.values() for fact in _facts(child)]
    if not isinstance(told, list):
        return []
    if len(told) == 2 and told[0] == "fact":
        return [told[1]]
    return [fact for child in told for fact in _facts(child)]


def _class(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, type) or not _tree.is_node(found):
        raise ValueError(f"holds a {module}.{qualname}, which is no class of trees that this process has imported")
    return found
