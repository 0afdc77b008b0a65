"""Pytrees: the only module that imports optree (and the only one that knows of torch's own registry).

Differences that matter: to optree ``None`` is structure, to ``torch.utils._pytree`` it is a leaf; a class registered with
torch only (``register_dataclass``, Hugging Face's ``ModelOutput``) is unknown to optree. `flatten` understands both; and
NOTE [mappings and dataclasses].
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from gradacc import _records

NAMESPACE = "gradacc"

TensorTree: TypeAlias = Any
"""A tensor or a pytree of tensors (nested dicts, lists, tuples, named tuples, registered classes). ``None`` is an empty one."""

TreeDef: TypeAlias = optree.PyTreeSpec


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TreeDef]:
    """Leaves and structure; `unflatten` is the inverse."""
    try:
        leaves, treedef = optree.tree_flatten(tree, is_leaf, namespace=NAMESPACE)
    except RecursionError:
        return optree.tree_flatten(tree, functools.partial(_is_leaf_or_record, is_leaf), namespace=NAMESPACE)
    foreign = {
        type(leaf)
        for leaf in leaves
        if type(leaf) is not Tensor and _is_foreign(type(leaf)) and not (is_leaf is not None and is_leaf(leaf))
    }
    if not foreign:
        return leaves, treedef
    with _adopting:
        for cls in foreign - _adopted:
            _adopt(cls)
            _adopted.add(cls)
    return flatten(tree, is_leaf)


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Any:
    """The tree of structure ``treedef`` with these leaves."""
    return optree.tree_unflatten(treedef, leaves)


def paths(treedef: TreeDef, root: str = "") -> list[str]:
    """Where each leaf is, as Python: ``["batch['x']", "batch['y'][0]"]`` for ``root="batch"``."""
    return [accessor.codify(root) for accessor in treedef.accessors()]


class Node(NamedTuple):
    """A node of a tree."""

    path: str
    kind: str
    """``leaf``, ``dict``, ``list of 2``, ``Mean``: what two trees have in common at one path, or not."""
    entries: tuple[Any, ...]
    """The children's names: a dict's keys."""


def nodes(treedef: TreeDef, root: str = "") -> Iterator[Node]:
    """Every node, from the root on; None is none."""
    if treedef.type is type(None):
        return
    entries = tuple(treedef.entries())
    yield Node(root, _kind(treedef, entries), entries)
    children = treedef.one_level()
    if children is not None:
        for child, accessor in zip(treedef.children(), children.accessors(), strict=True):
            yield from nodes(child, accessor.codify(root))


def kinds(treedef: TreeDef) -> Iterator[type]:
    """The class of every node."""
    if not treedef.is_leaf() and treedef.type is not None:
        yield treedef.type
    for child in treedef.children():
        yield from kinds(child)


def _kind(treedef: TreeDef, entries: tuple[Any, ...]) -> str:
    if treedef.is_leaf():
        return "leaf"
    if treedef.kind in (optree.PyTreeKind.DICT, optree.PyTreeKind.ORDEREDDICT, optree.PyTreeKind.DEFAULTDICT):
        return "dict"
    assert treedef.type is not None
    name = treedef.type.__qualname__
    return name if entries and all(isinstance(entry, str) for entry in entries) else f"{name} of {len(entries)}"


def broadcast_prefix(
    prefix: Any,
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    is_entry: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """One entry of ``prefix`` for every leaf of ``tree``; ``None`` is an entry like any other.

    ``is_entry``: what else is one, of what would be nodes of ``prefix``.

    Raises:
        ValueError: ``prefix`` is not a prefix of ``tree``.
    """
    leaves, _ = flatten(tree, is_leaf)  # adopts what only torch's registry knows
    if prefix is None or isinstance(prefix, int):
        return [prefix] * len(leaves)
    boxes = optree.tree_map(
        _Box,
        prefix,
        is_leaf=lambda x: x is None or (is_entry is not None and is_entry(x)),
        namespace=NAMESPACE,
        none_is_leaf=True,
    )
    # Boxes also because Dynamo breaks at constant leaves.
    entries, outer = optree.tree_flatten(boxes, namespace=NAMESPACE)
    return [
        entry.value
        for entry, subtree in zip(entries, outer.flatten_up_to(tree), strict=True)
        for _ in flatten(subtree, is_leaf)[0]
    ]


def placed(leaves: Iterable[Any], places: Iterable[int], values: Iterable[Any]) -> list[Any]:
    """``leaves``, with ``values`` in these places."""
    found = list(leaves)
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def map_tensors(func: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with ``func`` of every tensor; other leaves stay."""
    leaves, treedef = flatten(tree)
    return unflatten(treedef, [func(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def register(
    cls: type, to_children: Callable[[Any], tuple[Any, ...]], names: tuple[str, ...], mark: str | None = None
) -> None:
    """Make ``cls`` a pytree node for optree and for torch: its children are ``to_children(x)``, and ``cls(*children)``.

    ``mark`` names a bool of a node that torch's maps keep, and is structure to torch where it is set.
    """

    def context(node: Any) -> str | None:
        return mark if mark is not None and getattr(node, mark) else None

    def from_torch(children: Iterable[Any], marked: str | None) -> Any:
        node = cls(*children)
        if marked is not None:
            object.__setattr__(node, marked, True)
        return node

    optree.register_pytree_node(
        cls,
        lambda node: (to_children(node), None, names),
        lambda _, children: cls(*children),
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )
    torch_pytree.register_pytree_node(
        cls,
        lambda node: (list(to_children(node)), context(node)),
        from_torch,
        serialized_type_name=f"gradacc.{cls.__name__}",
        flatten_with_keys_fn=lambda node: (
            [(torch_pytree.GetAttrKey(name), child) for name, child in zip(names, to_children(node), strict=True)],
            context(node),
        ),
    )


def register_list(cls: type) -> None:
    """Make a kind of list a pytree node as lists are: for torch, from which `flatten` adopts it."""
    torch_pytree.register_pytree_node(
        cls,
        lambda node: (list(node), None),
        lambda items, _: cls(items),
        serialized_type_name=f"gradacc.{cls.__name__}",
    )


def register_with_facts(cls: type, names: tuple[str, ...], facts: str) -> None:
    """Make ``cls`` a pytree node: its children are the attributes ``names``, and it is made of these and ``facts`` by name.

    ``facts`` names an attribute that is structure: hashable, and compared. To torch all tensors in it are children: what
    torch would take for a leaf (None, a class that it does not know) is structure too.
    """

    def to_children(node: Any) -> tuple[Any, ...]:
        return tuple(getattr(node, name) for name in names)

    def made(structure: Any, children: Iterable[Any]) -> Any:
        return cls(**dict(zip(names, children, strict=True)), **{facts: structure})

    def to_torch(node: Any) -> tuple[list[Any], tuple[TreeDef, Any]]:
        leaves, treedef = flatten(to_children(node))
        return leaves, (treedef, getattr(node, facts))

    def from_torch(leaves: Iterable[Any], context: tuple[TreeDef, Any]) -> Any:
        return made(context[1], unflatten(context[0], list(leaves)))

    optree.register_pytree_node(
        cls,
        lambda node: (to_children(node), getattr(node, facts), names),
        made,
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )
    torch_pytree.register_pytree_node(cls, to_torch, from_torch, serialized_type_name=f"gradacc.{cls.__name__}")


def is_node(cls: type) -> bool:
    """Whether its instances are nodes, not leaves."""
    named = issubclass(cls, tuple) and hasattr(cls, "_fields")
    known = optree.register_pytree_node.get(cls, namespace=NAMESPACE)
    return named or known is not None or cls in torch_pytree.SUPPORTED_NODES


_adopting = threading.Lock()
_adopted: set[type] = set()


class _Box:
    """Hides an entry of a prefix from optree, to which ``None`` would be structure."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _is_leaf_or_record(is_leaf: Callable[[Any], bool] | None, node: Any) -> bool:
    """Of a tree with an object that holds itself: there, a record is a leaf."""
    is_record = type(node) in _adopted and type(node) not in torch_pytree.SUPPORTED_NODES
    return is_record or (is_leaf is not None and is_leaf(node))


def _is_foreign(cls: type) -> bool:
    """Whether optree can be taught it. While Dynamo traces, what it has not learnt before stays a leaf."""
    return cls in torch_pytree.SUPPORTED_NODES or (not torch.compiler.is_compiling() and _records.of(cls) is not None)


def _adopt(cls: type) -> None:
    """Teach optree, in our namespace, a class that only torch's registry knows, or that is a record."""
    node = torch_pytree.SUPPORTED_NODES.get(cls)
    if node is None:
        record = _records.of(cls)
        assert record is not None
        optree.register_pytree_node(
            cls,
            lambda tree: (record.values(tree), record.names(tree), record.names(tree)),
            lambda names, values: record.make(cast(tuple[Any, ...], names), list(values)),
            path_entry_type=optree.MappingEntry if record.is_mapping else optree.GetAttrEntry,
            namespace=NAMESPACE,
        )
        return

    def to_children(tree: Any) -> tuple[Any, Any, tuple[Any, ...] | None]:
        children, context = node.flatten_fn(tree)
        return children, context, _names(node, tree, len(children), context)

    optree.register_pytree_node(
        cls, to_children, lambda context, xs: node.unflatten_fn(xs, context), namespace=NAMESPACE
    )


def _names(node: torch_pytree.NodeDef, tree: Any, children: int, context: Any) -> tuple[Any, ...] | None:
    """The children's names, where there are any: a position names another child where one that was there is None.

    They are torch's own; of a class that registers none (Hugging Face's ``ModelOutput``), the keys in its context.
    """
    if node.flatten_with_keys_fn is not None:
        keys, _ = node.flatten_with_keys_fn(tree)
        return tuple(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key, _ in keys)
    named = isinstance(context, (list, tuple)) and len(context) == children == len({*map(str, context)})
    return tuple(context) if named and all(isinstance(key, str) for key in context) else None
