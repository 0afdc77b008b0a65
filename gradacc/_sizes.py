"""How many examples a batch has: the one size that its tensors have along their split dimensions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradacc import _batch
from gradacc._describe import describe


def splittable(name: str, leaf: Any, dim: Any, path: str) -> int | None:
    """The size along ``dim`` of a leaf of what is split; None for what is passed through (numbers, bools)."""
    if dim is None:
        return None
    if isinstance(leaf, Tensor):
        _batch.check_layout(name, leaf, path)
        return size(name, leaf, dim, path)
    _check_dim(name, dim, path)
    if _batch.is_passed_through(leaf):
        return None
    if hasattr(leaf, "__array__"):
        fix = "Convert it with torch.as_tensor"
    elif _batch.is_iterable(leaf):
        fix = "An iterable of micro-batches is passed without steps or microbatch_size. Otherwise convert it to tensors"
    else:
        fix = (
            "Convert it to tensors (or a dict of them), or register its class as a pytree node; pass several of what cannot "
            "be split by views (a batch of graphs), as an iterable of micro-batches or from split=, and return "
            "gradacc.Mean(loss_sum, number), since nothing counts its examples"
        )
    raise TypeError(
        f"{name}: {path} is {describe(leaf)}, which cannot be split: the batch is a pytree of tensors, "
        f"numbers, bools and None. {fix}. Where it is meant whole, give it None in in_dims, or pass it as another argument of "
        "loss_fn"
    )


def size(name: str, leaf: Tensor, dim: Any, path: str) -> int:
    """Of a tensor of any layout along ``dim``."""
    _check_dim(name, dim, path)
    if leaf.dim() == 0:
        raise ValueError(
            f"{name}: {path} is a 0-dim tensor, which has no dimension to split. Pass a Python number, give it "
            "None in in_dims, or pass it as another argument of loss_fn"
        )
    if not -leaf.dim() <= dim < leaf.dim():
        raise ValueError(f"{name}: in_dims has {dim} for {path}, {describe(leaf)}")
    if leaf.is_nested and dim % leaf.dim():
        raise ValueError(f"{name}: in_dims has {dim} for {path}, {describe(leaf)}: its examples are along dim 0")
    size: int = leaf.size(dim)
    return size


def _check_dim(name: str, dim: Any, path: str) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name}: in_dims has {describe(dim)} for {path}; an entry is an int or None")


def batch_size(name: str, sizes: Sequence[int | None], paths: Sequence[str]) -> int:
    """The one size that all split leaves have."""
    known = [(size, path) for size, path in zip(sizes, paths, strict=True) if size is not None]
    if not known:
        raise TypeError(
            f"{name}: there is no tensor to split in the batch; by default that is the argument after params. Only "
            "tensors are split: convert lists of numbers or strings first (torch.tensor)"
        )
    size, path = known[0]
    others = [(other, where) for other, where in known if other != size]
    if others:
        if len(known) <= 6:
            listing = ", ".join(f"{where} has {each}" for each, where in known)
        else:
            listing = (
                f"{path} has {size}, {others[0][1]} has {others[0][0]} "
                f"({len(others)} of {len(known)} tensors differ from the first)"
            )
        raise ValueError(
            f"{name}: the split dimensions differ: {listing}. Give None in in_dims to what is not per example, "
            f"or pass it as another argument of loss_fn{_hint_for_lists(path, others[0][1])}"
        )
    return size


def _hint_for_lists(first: str, other: str) -> str:
    """What to do where a path leads to an item of a list: they may be ragged examples, or if both do, micro-batches."""
    a, b = (re.split(r"(?=[.\[])", path) for path in (first, other))
    shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    of_one = shared >= 2 and all(_ITEM.fullmatch(parts[shared]) for parts in (a, b))
    # Part 1 of a path is the argument of the call.
    place = shared if of_one else next((n for n, part in enumerate(b) if n >= 2 and _ITEM.fullmatch(part)), 0)
    if place == 0:
        return ""
    ragged = (
        f"If {''.join(b[:place])} is a list of ragged examples, pad them into one tensor, or cut the batch with split="
    )
    return f". {ragged}" + (
        "; a list of micro-batches is passed without steps or microbatch_size" if of_one and shared == 2 else ""
    )


_ITEM = re.compile(r"\[\d+\]")
"""Of a path: one item of a list."""
