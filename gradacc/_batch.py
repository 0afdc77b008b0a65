"""What a batch is made of: lists among its tensors, layouts that have no views, one batch or several micro-batches.

NOTE [lists in a batch]
    A list of numbers is a pytree of numbers, and numbers pass through a split. But ``"length": [4, 1, 2]`` beside tensors of
    three examples is one number an example: passed whole, every micro-batch would see the numbers of all, and a mean over
    them would come out divided by the number of micro-batches. So a list or tuple without tensors that is as long as the batch
    is refused, at any depth, whatever it nests (``[[4, 1], [2]]`` is two ragged examples). One of another length passes whole,
    and a record too (a dict, a ``NamedTuple``), which has fields and not items. Strings have no other use in a list than one
    an example, and are refused there in any number; a lone one beside tensors passes whole.

NOTE [one batch or micro-batches]
    A ``DataLoader`` of pairs yields ``[x, y]``. Where nothing says how to split, a list is one of micro-batches, so the loss
    would get ``x``, and then ``y``; where it takes its batch apart, ``x[0]`` and ``x[1]`` are the first two examples, and
    nothing need raise. What a list of bare tensors is can mostly be told:

    - tensors of different sizes along the batch dimension, the pieces of one tensor in order (``x.split(8)``), and what
      `gradacc.data.windows` yields are micro-batches;
    - tensors of different dtypes or numbers of dimensions, or tensors beside something else, are the parts of one batch.

    What is left is two or more tensors that look alike, or one alone: both readings are possible, and a warning names them.
    The same holds for a deque and for a dict's ``values()``. A list of *lists* is what a loader of pairs makes of several
    batches, and taken for micro-batches. ``split=iter`` says that a batch is an iterable of micro-batches, and an iterator can
    be nothing else: of these two the call does not warn.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradacc import _tree
from gradacc._describe import describe


def _is_list(node: Any) -> bool:
    """A sequence of any class; a ``NamedTuple`` is a record, and a dict is one unless numbers are its keys."""
    if isinstance(node, dict):
        return bool(node) and all(type(key) is int for key in node)
    return isinstance(node, (list, tuple, deque)) and not hasattr(node, "_fields")


def is_passed_through(leaf: Any) -> bool:
    """Whether a leaf of what is split goes whole to every micro-batch."""
    return isinstance(leaf, (bool, int, float, complex, str))


def check_lists(
    name: str, tree: Any, dims: Sequence[Any], root: str, examples: int, whole: str = "give it None in in_dims, or "
) -> None:
    """Refuse a list that holds something of each example, and no tensors: NOTE [lists in a batch].

    Arguments:
        dims: what `in_dims` says of each leaf; a list of which all is passed whole may hold anything.
        examples: the size of the batch.
        whole: for the message, how to pass it whole but as another argument.
    """

    def is_suspect(node: Any) -> bool:
        if not _is_list(node) or not _is_plain(node):
            return False
        items = node.values() if isinstance(node, dict) else node
        return len(node) == examples > 1 or any(isinstance(item, str) for item in items)

    for node, leaves, path in _split_nodes(tree, dims, root, is_suspect):
        kind = "strings" if any(isinstance(leaf, str) for leaf in leaves) else "numbers"
        of_each = f", one item for each of the {examples} examples" if len(node) == examples else ""
        fix = "Convert it to a tensor (torch.tensor)" if kind == "numbers" else "Encode it as a tensor"
        raise TypeError(
            f"{name}: {path} is a {type(node).__name__} of {len(node)} items ({kind}){of_each}, "
            f"which cannot be split: every micro-batch would get all of it. {fix}; where it is meant whole, {whole}"
            "pass it as another argument of loss_fn"
        )


def check_tensor_lists(name: str, tree: Any, dims: Sequence[Any], root: str, examples: int, is_all: bool) -> None:
    """Refuse a list with tensors of each example: NOTE [lists in a batch].

    Arguments:
        dims: what `in_dims` says of each leaf.
        examples: the size of the batch; all tensors that are split have it.
        is_all: whether nothing else is split but this tree.

    Raises:
        TypeError: the items are containers. (Of bare tensors there is a warning.)
    """
    for node, _, path in _split_nodes(tree, dims, root, lambda node: _is_list(node) and len(node) == examples):
        items = list(node.values()) if isinstance(node, dict) else list(node)
        kinds = [_kinds(item) for item in items]
        bare = all(isinstance(item, Tensor) for item in items)
        if any(kind != kinds[0] for kind in kinds) or not any(kinds[0][1]) or (bare and is_all and node is tree):
            continue
        what = (
            f"{name}: {path} is a {type(node).__name__} of {len(node)} items with tensors, and the batch has {examples} "
            "examples. If each item is of one example, the split is wrong: every tensor in it is divided along its own dim 0. "
            "Pad and stack them into one tensor, or pass split= or an iterable of micro-batches"
        )
        names = "If each item is of all examples, give the items names (a dict)"
        if not bare:
            raise TypeError(f"{what}. {names}; where it is meant whole, give it None in in_dims")
        warn(f"{what}. {names}, and there is no warning")


def _split_nodes(
    tree: Any, dims: Sequence[Any], root: str, chosen: Callable[[Any], bool]
) -> list[tuple[Any, list[Any], str]]:
    """The chosen nodes of which anything is split: each with its leaves and its path."""
    nodes, treedef = _tree.flatten(tree, chosen)
    found: list[tuple[Any, list[Any], str]] = []
    start = 0
    for index, node in enumerate(nodes):
        leaves = _tree.flatten(node)[0]
        own, start = dims[start : start + len(leaves)], start + len(leaves)
        if any(dim is not None for dim in own) and chosen(node):
            found.append((node, leaves, _tree.paths(treedef, root)[index]))
    return found


def _kinds(item: Any) -> tuple[Any, list[Any]]:
    """The structure of an item, and of each leaf its dtype and number of dimensions; None of what is no tensor."""
    leaves, treedef = _tree.flatten(item)
    return treedef, [(leaf.dtype, leaf.ndim) if isinstance(leaf, Tensor) else None for leaf in leaves]


def _is_plain(node: Any) -> bool:
    """Whether it holds numbers and strings only, at least one."""
    leaves = _tree.flatten(node)[0]
    return bool(leaves) and all(map(is_passed_through, leaves))


def is_dense(leaf: Tensor) -> bool:
    """Whether it has strides, and views along any of its dimensions."""
    return leaf.layout == torch.strided and not leaf.is_nested


def check_layout(name: str, leaf: Tensor, path: str) -> None:
    """Refuse to split what has no views along a dimension."""
    if is_dense(leaf):
        return
    fix = "Pad it (torch.nested.to_padded_tensor)" if leaf.is_nested else "Pass it as to_dense()"
    raise TypeError(
        f"{name}: {path} is {describe(leaf)} and layout {leaf.layout}, of which there are no views to split it by. {fix}; or "
        "divide it yourself, and pass split= or an iterable of micro-batches; where it is meant whole, give it None in in_dims"
    )


def check_packed(name: str, tree: Any, dims: Sequence[Any], root: str) -> None:
    """Refuse to split a `PackedSequence`, a ``NamedTuple`` whose tensors are no examples."""
    for _, _, path in _split_nodes(tree, dims, root, lambda node: isinstance(node, PackedSequence)):
        raise TypeError(
            f"{name}: {path} is a PackedSequence, which holds its sequences step by step, so that there are no views of some "
            "of them. Split the padded batch and pack in loss_fn (pack_padded_sequence), or pass an iterable of packed "
            "micro-batches (split= may make them) and return gradacc.Mean(loss_sum, number)"
        )


def is_iterable(batch: Any) -> bool:
    """Whether it can be micro-batches: a record (a dict, a ``NamedTuple``), a tensor or an array is one batch."""
    is_one = isinstance(batch, (str, bytes)) or any(hasattr(batch, name) for name in ("__array__", "keys", "_fields"))
    return hasattr(batch, "__iter__") and not is_one


def check_parts(name: str, batch: Any, dim: Any) -> None:
    """Where a batch comes divided: whether a list of tensors may be one batch; NOTE [one batch or micro-batches].

    Raises:
        TypeError: it can only be one. (Where it may be, there is a warning.)
    """
    if isinstance(batch, (deque, ValuesView)):
        # Of a dict: its parts.
        batch = list(batch)
    if not may_be_one(batch):
        return
    first, along = batch[0], dim if isinstance(dim, int) else 0
    if not (all(map(_is_array, batch)) and all((item.dtype, item.ndim) == (first.dtype, first.ndim) for item in batch)):
        raise TypeError(
            f"{name}: the batch is {_listing(batch)}: read as micro-batches they do not fit one loss, so it is one batch in "
            f"parts. {_AS_ONE}; if they are micro-batches, {_AS_MICRO_BATCHES}"
        )
    if not -first.ndim <= along < first.ndim or any(_size(item, along) != _size(first, along) for item in batch[1:]):
        return
    if not _are_pieces(batch, along):
        warn(
            f"{name}: the batch is {_listing(batch)}, read as {_count(batch)}. If it is one batch in parts (as a DataLoader "
            f"yields it), the result is wrong: {_AS_ONE[0].lower()}{_AS_ONE[1:]}. If it is right, {_AS_MICRO_BATCHES}, and "
            "there is no warning"
        )


_AS_ONE = "Pass steps= or microbatch_size= to have it split"
_AS_MICRO_BATCHES = "say so with split=iter"


def may_be_one(batch: Any) -> bool:
    """Whether a batch that comes divided is a list or tuple with bare tensors (or arrays) in it."""
    return type(batch) in (list, tuple) and any(map(_is_array, batch))


def is_of_examples(batch: Any) -> bool:
    """Whether it is a list of lists or tuples, which may be examples: pairs of an image and its boxes, say."""
    return type(batch) in (list, tuple) and len(batch) > 1 and all(type(item) in (list, tuple) for item in batch)


def _is_array(item: Any) -> bool:
    return isinstance(item, Tensor) or all(hasattr(item, name) for name in ("__array__", "dtype", "ndim"))


def _size(item: Any, dim: int) -> int:
    size: int = item.size(dim) if isinstance(item, Tensor) else item.shape[dim]  # a nested tensor has no shape
    return size


def note_parts(name: str, batch: Any) -> str:
    """What a loss's own error may come from."""
    return f"{name}: the batch is {_listing(batch)}, read as {_count(batch)}; if it is one batch, pass steps= or split="


def _listing(batch: Sequence[Any]) -> str:
    items = ", ".join(_kind(item) for item in batch[:4]) + (", ..." if len(batch) > 4 else "")
    return f"a {type(batch).__name__} of {len(batch)} ({items})"


def _count(batch: Sequence[Any]) -> str:
    return f"{len(batch)} micro-batch{'es' * (len(batch) > 1)}"


def _kind(item: Any) -> str:
    if not _is_array(item):
        return describe(item)
    # Dynamo has no numbers to write where sizes are dynamic.
    hidden = torch.compiler.is_compiling() or (isinstance(item, Tensor) and item.is_nested)
    shape = "" if hidden else str(list(item.shape))
    return f"{str(item.dtype).removeprefix('torch.')}{shape}"


def _are_pieces(batch: Sequence[Any], dim: int) -> bool:
    """Whether it is what ``x.split(2, dim)`` returns: a tuple of views, one behind the other. Dynamo cannot tell."""
    first = batch[0]
    if torch.compiler.is_compiling() or type(batch) is not tuple or not isinstance(first, Tensor):
        return False
    if first._base is None or not is_dense(first):
        return False
    if len(batch) == 1:
        return first.shape == first._base.shape
    place, step = first.storage_offset(), first.size(dim) * first.stride(dim)
    return all(
        item._base is first._base
        and item.shape == first.shape
        and item.stride() == first.stride()
        and item.storage_offset() == place + n * step
        for n, item in enumerate(batch)
    )


def warn(message: str) -> None:
    """Where the caller called; of a compiled function, when it is traced."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gradacc."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


warn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result imports Dynamo
