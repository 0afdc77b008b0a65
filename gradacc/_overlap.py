"""Which tensors share memory, and lists of tensors that share none.

NOTE [memory that is shared]
    Two tensors share memory where the ranges of addresses from their first element to behind their last one overlap: views of
    one tensor may begin at different places (``f[:2]`` and ``f[1:]``), and arrays from elsewhere may be one memory in two
    storages. Columns of one matrix have overlapping ranges, and not one element in common; they are taken for shared all the
    same: then one is updated where it is, and the others in copies. A tensor whose own elements share memory (an expanded
    one, a sliding window) is copied too, and one that is the negative or the conjugate of what its memory holds.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def in_separate_memory(lists: Sequence[Sequence[Any]], besides: Iterable[Any] = ()) -> list[list[Any]]:
    """Lists of donated leaves, no two tensors of which share memory, nor one with a tensor of ``besides``; without a graph.

    The first to have some memory keeps it, the others are copied: see NOTE [memory that is shared].
    """
    others = [leaf for leaf in besides if isinstance(leaf, Tensor)]
    if _disjoint(itertools.chain(others, *lists)):
        return [
            [leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in each]
            for each in lists
        ]
    taken = _union([_span(leaf) for leaf in others])
    return [[_claimed(taken, leaf) if isinstance(leaf, Tensor) else leaf for leaf in each] for each in lists]


def shared(leaves: Sequence[Any], given: Iterable[Any]) -> list[bool]:
    """Of each of ``leaves``, whether it shares memory with a tensor of ``given``."""
    union = _union([_span(leaf) for leaf in given if isinstance(leaf, Tensor)])
    return [isinstance(leaf, Tensor) and _meets(union, _span(leaf)) for leaf in leaves]


def _disjoint(leaves: Iterable[Any]) -> bool:
    """Whether no element of a tensor is in the memory of another element, of its own or of another tensor, as it is."""
    begins, ends = [], []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        if leaf.is_neg() or leaf.is_conj():
            return False
        if leaf.is_contiguous() and (begin := leaf.data_ptr()):  # a call less for most tensors
            end = begin + leaf.nbytes
        elif _overlaps_itself(leaf):
            return False
        else:
            begin, end = _span(leaf)
        if begin < end:
            begins.append(begin)
            ends.append(end)
    begins.sort()
    ends.sort()
    return all(map(operator.le, ends, begins[1:]))


def _span(leaf: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's elements, from the first one's to behind the last one's; the same of no element."""
    begin: int = leaf.data_ptr()
    if leaf.is_contiguous():
        size: int = leaf.nbytes
    else:
        last = sum((n - 1) * stride for n, stride in zip(leaf.shape, leaf.stride(), strict=True))
        size = (last + 1) * leaf.itemsize if leaf.numel() else 0
    if not begin and size:  # memory without an address (a tensor around another one): at least it is itself
        return -id(leaf) - 1, -id(leaf)
    return begin, begin + size


def _overlaps_itself(leaf: Tensor) -> bool:
    """Whether a tensor's own elements share memory, as far as its strides rule it out."""
    reach = 0
    for stride, n in sorted(zip(leaf.stride(), leaf.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += (n - 1) * stride
    return False


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses as ranges in order that do not overlap."""
    union: list[tuple[int, int]] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if union and begin < union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((begin, end))
    return union


def _meets(union: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    if span[0] == span[1]:
        return False
    at = bisect.bisect_left(union, (span[1],))
    return at > 0 and union[at - 1][1] > span[0]


def _claimed(taken: list[tuple[int, int]], leaf: Tensor) -> Tensor:
    """The tensor itself, where it has memory of its own, which is then ``taken``; else a copy."""
    leaf, span = leaf.detach(), _span(leaf)
    if span[0] == span[1]:
        return leaf
    if leaf.is_neg() or leaf.is_conj() or _overlaps_itself(leaf) or _meets(taken, span):
        return leaf.resolve_conj().resolve_neg().clone()
    bisect.insort(taken, span)
    return leaf
