"""Tensors that were given away (``donate=True``): a later use of one is an error.

NOTE [use after donation]
    What a call makes of a donated tensor is made in its memory, so whoever still holds the tensor (an average of the
    parameters that is "the dict of the first step") would see other numbers, without a word. So results are new tensor
    *objects* over that memory, and the objects that were given are emptied and become `Donated`: every use of them raises, by
    name, in the next call with the same state too. That costs about 2 us a tensor and no memory, and it is all that can be
    done: other objects over the same memory (views, ``detach()``, NumPy arrays) see what is written. (And ``torch.tensor`` asks
    no class: it makes an empty tensor of one.) Left alone are tensors of a subclass: an ``nn.Parameter`` is a module's own, and
    a module whose parameters `gradacc.functional` returned is trained in place by a donated step. So are tensors in a
    transform or while Dynamo traces, where nothing is written in place.
    It happens last: what was given to a call that fails is not emptied. Where an accumulator fails in the middle of writing
    (a backward pass that raises), its sums are worth nothing, and are retired all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradacc import _tree

T = TypeVar("T")


class Donated(Tensor):
    """What a tensor that was given away has become; see NOTE [use after donation]."""

    call = ""
    """What it was given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        call = next(kind.call for kind in types if issubclass(kind, Donated))
        raise ValueError(
            f"this tensor was given away to {call} (donate=True), and its memory has been written to. Use what that call "
            "returned; keep what is needed afterwards (an average of the parameters) by a clone() beforehand"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents
        return f"<a tensor that was given away to {self.call} (donate=True)>"


@functools.lru_cache(maxsize=64)
def _kind(call: str) -> type[Donated]:
    return type("Donated", (Donated,), {"call": call})


def retire(call: str, *lists: Iterable[Any]) -> None:
    """Make every plain tensor of these lists `Donated`: nothing that is still used may be one of these objects."""
    kind = _kind(call)
    with torch.inference_mode(False):
        empty = torch.empty(0, device="cpu")
        for leaves in lists:
            for leaf in leaves:
                if type(leaf) is Tensor:
                    leaf.data = empty if leaf.is_cpu else torch.empty(0, device=leaf.device)
                    leaf.__class__ = kind


def written_by(call: str, given: Any, func: Callable[[], T]) -> T:
    """`hand_over` of ``func()``, which may write to the tensors of a tree; `retire` of them if it raises after it has."""
    leaves = _tree.flatten(given)[0]
    before = [_version(leaf) for leaf in leaves]
    try:
        results = func()
    except BaseException:
        if before != [_version(leaf) for leaf in leaves]:
            retire(call, leaves)
        raise
    return hand_over(call, leaves, results)


def _version(leaf: Any) -> int | None:
    if isinstance(leaf, Donated):
        return -1  # by a call inside
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def hand_over(call: str, given: Sequence[Any], results: T) -> T:
    """``results``, as objects none of which is in the list ``given``; and `retire` of what is.

    Where results have a graph it retires nothing: the graph needs what it was made of (and nothing was written in place).
    """
    donated = [leaf for leaf in given if type(leaf) is Tensor]
    if not donated:
        return results
    leaves, treedef = _tree.flatten(results)
    if any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves):
        return results
    old = {id(leaf) for leaf in donated}
    with torch.inference_mode(False):
        leaves = [leaf.detach() if id(leaf) in old else leaf for leaf in leaves]
    retire(call, donated)
    fresh: T = _tree.unflatten(treedef, leaves)
    return fresh
