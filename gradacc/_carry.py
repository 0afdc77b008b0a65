"""The carry: what one micro-batch hands to the next, and what all of them add up to beside aux.

.. code-block:: text

    for microbatch:
        usual, carry = loss_fn(params, microbatch, carry=carry)

NOTE [what a carry is]
    A carry is a tree of tensors, `Mean`s and `Moments`, of fixed structure, shapes and dtypes. A *tensor* is threaded: what a
    micro-batch returns is what the next one gets, without its graph (truncated backpropagation through time); a micro-batch
    that is dropped hands on what it got. Order matters there, so states in which both have one are not merged, and ranks keep
    their own. A *Mean* or *Moments* adds up: every micro-batch gets the one that the call was given, what it returns is its
    own contribution, and what the call returns is the sum of these, over ranks too, and without the one that it was given. So
    it is what one large batch would have returned.

NOTE [memory of a carry]
    The loss may write into what it is given, and may return that, or a slice of the batch. And an activation checkpoint runs
    layers again in the backward pass, which move their running statistics once more, in the tensors that were returned (in a
    hand-written loop all of them count). So a call begins with a copy, and takes a copy of what the loss returns, before its
    backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _batch, _dtypes, _parts, _tree
from gradacc._describe import describe
from gradacc._mean import Mean, with_plain_weight
from gradacc._moments import Moments
from gradacc._parts import Combined, Latest, Part, Total


class Given(NamedTuple):
    """What a call was given: leaves (tensors, `Mean`s and `Moments`, whose weights and counts are tensors), structure."""

    leaves: list[Any]
    treedef: _tree.TreeDef


def given(name: str, carry: Any) -> Given:
    """A carry that was passed in, checked."""
    leaves, treedef = _flatten(carry)
    known = [_known(leaf) for leaf in leaves]
    for at, leaf in enumerate(known):
        if leaf is None:
            path = _tree.paths(treedef, "carry")[at]
            raise TypeError(
                f"{name}: {path} is {_words(leaves[at])}; the leaves of a carry are dense tensors, gradacc.Means (of a tensor "
                "and a weight of a shape that goes with it) and gradacc.Moments (a count, and two floating tensors of one "
                "shape and dtype). Pass a number as torch.tensor(number)"
            )
    return Given(known, treedef)


def of_call(
    name: str, kwargs: dict[str, Any], call: str = "grad_fn(params, batch, carry=c)"
) -> tuple[dict[str, Any], Given]:
    """The keyword arguments of a call, without its carry, and that."""
    if "carry" not in kwargs:
        raise TypeError(
            f"{name}: with has_carry=True the call needs the carry to begin with: {call}. "
            "(gradacc.train_step passes that of the state: TrainState(params, opt_state, carry=c))"
        )
    return {key: value for key, value in kwargs.items() if key != "carry"}, given(name, kwargs["carry"])


def start(carry: Given, detached: bool) -> list[Part]:
    """Before the first micro-batch; ``detached``: without the graph of what was passed in. NOTE [memory of a carry]"""
    return [_start(leaf, detached) for leaf in carry.leaves]


def tree(carry: Given, parts: Sequence[Part]) -> Any:
    """What the next micro-batch gets."""
    pairs = zip(carry.leaves, parts, strict=True)
    return _tree.unflatten(carry.treedef, [part.tensor if isinstance(part, Latest) else leaf for leaf, part in pairs])


def returned(name: str, carry: Given, out: Any) -> list[Any]:
    """The leaves of what a micro-batch returned, checked against what the call was given."""
    leaves, treedef = _flatten(out)
    if treedef != carry.treedef:
        raise ValueError(
            f"{name}: loss_fn returned a carry {_difference(treedef, carry.treedef, 'what it was given')}; return every leaf "
            "of what was given, in its structure, also one that has not changed"
        )
    found = []
    for at, (leaf, old) in enumerate(zip(leaves, carry.leaves, strict=True)):
        new = _like(leaf, old)
        if new is None:
            path = _tree.paths(treedef, "carry")[at]
            error = ValueError if _dtypes_of(_known(leaf)) == _dtypes_of(old) else TypeError
            raise error(
                f"{name}: loss_fn returned {path} as {_words(leaf)}, and was given {_words(old)}; a carry keeps its kinds, "
                "shapes, dtypes and devices: return it like what was given, or begin with another one"
            )
        # NOTE [memory of a carry]
        found.append(new.clone() if isinstance(new, Tensor) else new)
    return found


def add(parts: Sequence[Part], leaves: Sequence[Any], dropped: int | Tensor | None) -> list[Part]:
    """With what one more micro-batch returned, which may have been ``dropped``."""
    if not isinstance(dropped, Tensor):
        return list(parts) if dropped else [_add(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
    kept = []
    for part, leaf in zip(parts, leaves, strict=True):
        pairs = zip(_parts.numbers(part), _parts.numbers(_add(part, leaf)), strict=True)
        kept.append(
            _parts.with_numbers(part, iter([torch.where(dropped.to(new.device) == 0, new, old) for old, new in pairs]))
        )
    return kept


def check_alike(name: str, one: Any, other: Any) -> None:
    """Carries that two states began with."""
    a, b = given(name, one), given(name, other)
    if a.treedef != b.treedef:
        raise ValueError(
            f"{name}: b began with a carry {_difference(b.treedef, a.treedef, 'that of a')}; merge takes states that began "
            "with carries of one structure"
        )
    for at, (leaf, like) in enumerate(zip(b.leaves, a.leaves, strict=True)):
        if type(leaf) is not type(like) or list(map(_facts, _numbers(leaf))) != list(map(_facts, _numbers(like))):
            raise ValueError(
                f"{name}: b began with {_tree.paths(b.treedef, 'carry')[at]} as {_words(leaf)}, and a with {_words(like)}; "
                "merge takes states that began with carries of one structure"
            )


def merge(name: str, one: Sequence[Part], other: Sequence[Part]) -> list[Part]:
    """Of two states."""
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Latest) or isinstance(b, Latest):
            raise ValueError(
                f"{name}: the carry has a tensor (of shape {tuple(_parts.numbers(a)[0].shape)}), which goes from one "
                "micro-batch to the next, and two states that have both seen some do not say which came first. Update one "
                "state with all of them; or carry a gradacc.Mean or gradacc.Moments, which add up in any order"
            )
    return [_parts.add(name, a, b, lambda: "a leaf of the carry") for a, b in zip(one, other, strict=True)]


def final(carry: Given, parts: Sequence[Part]) -> Any:
    """What the call returns."""
    return _tree.unflatten(carry.treedef, [_parts.final(part, 1.0) for part in parts])


def that_crosses(carry: Given, parts: Sequence[Part]) -> Any:
    """As a tree, with None for what stays on its rank; in a graph, where ranks are not compared, as a list of what crosses."""
    if torch.compiler.is_compiling():
        # Of a dict that is None throughout Dynamo folds the unflatten, with the keys of another dict (torch 2.13).
        return [part for part in parts if not isinstance(part, Latest)]
    return _tree.unflatten(carry.treedef, [None if isinstance(part, Latest) else part for part in parts])


def crossed(tree: Any, parts: Sequence[Part]) -> list[Part]:
    """The inverse: with those of ``parts`` that stayed."""
    left = iter(_tree.flatten(tree, _parts.is_part)[0])
    return [part if isinstance(part, Latest) else next(left) for part in parts]


def _difference(one: _tree.TreeDef, other: _tree.TreeDef, what: str) -> str:
    """Which leaf is missing, or too many; ``what`` says what the other one is."""
    new, old = _tree.paths(one, "carry"), _tree.paths(other, "carry")
    missing, more = [path for path in old if path not in new], [path for path in new if path not in old]
    if not missing and not more:
        return f"of the structure {one}, compared with {what}: {other}"
    found = [f"lacks {path}" for path in missing[:1]] + [f"adds {path}" for path in more[:1]]
    return f"that {' and '.join(found)}, compared with {what}"


def _flatten(carry: Any) -> tuple[list[Any], _tree.TreeDef]:
    return _tree.flatten(carry, lambda leaf: isinstance(leaf, (Mean, Moments)))


def _known(leaf: Any) -> Any:
    """A leaf, with its weight or count as a tensor; None where it is none of a carry."""
    if isinstance(leaf, Tensor):
        return leaf if _batch.is_dense(leaf) else None
    if isinstance(leaf, Mean):
        mean = with_plain_weight(leaf)
        return Mean(mean.total, _as_tensor(mean.weight, mean.total)) if _aux.can_be_summed(mean) else None
    if isinstance(leaf, Moments) and _are_moments(leaf):
        return Moments(_as_tensor(leaf.count, leaf.mean), leaf.mean, leaf.m2)
    return None


def _are_moments(leaf: Moments) -> bool:
    mean, m2, count = leaf.mean, leaf.m2, leaf.count
    if not (isinstance(mean, Tensor) and isinstance(m2, Tensor) and mean.is_floating_point()):
        return False
    if (mean.shape, mean.dtype) != (m2.shape, m2.dtype):
        return False
    if not isinstance(count, Tensor):
        return isinstance(count, (int, float))
    return not count.is_complex() and _aux.broadcast(count, mean) == mean.shape


def _as_tensor(number: Any, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    dtype = torch.float64 if like.device.type != "mps" else torch.float32
    tensor: Tensor = torch.zeros((), dtype=dtype, device=like.device) + number
    return tensor


def _like(leaf: Any, old: Any) -> Any:
    """A returned leaf, its weight or count in the dtype of the one that was given; None where it is not like it."""
    new = _known(leaf)
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return new if _facts(new) == _facts(old) else None
    if isinstance(new, Mean) and isinstance(old, Mean) and _facts(new.total) == _facts(old.total):
        weight = _counted(new.weight, old.weight)
        return None if weight is None else Mean(new.total, weight)
    if isinstance(new, Moments) and isinstance(old, Moments) and _facts(new.mean) == _facts(old.mean):
        count = _counted(new.count, old.count)
        return None if count is None else Moments(count, new.mean, new.m2)
    return None


def _counted(new: Any, old: Any) -> Tensor | None:
    """In the dtype and on the device of ``old``; integers may become floats, and not the other way round."""
    if new.shape != old.shape or (new.is_floating_point() and not old.is_floating_point()):
        return None
    counted: Tensor = new.to(
        device=old.device, dtype=_dtypes.sum_dtype(old.dtype) if old.is_floating_point() else torch.int64
    )
    return counted


def _start(leaf: Any, detached: bool) -> Part:
    if isinstance(leaf, Tensor):
        return Latest((leaf.detach() if detached else leaf).clone())
    if isinstance(leaf, Mean):
        return Total(Mean(_zeros(leaf.total), _zeros(leaf.weight)), leaf.total.dtype)
    return Combined(Moments(_zeros(leaf.count), _zeros(leaf.mean), _zeros(leaf.m2)), leaf.mean.dtype)


def _zeros(tensor: Any) -> Tensor:
    return torch.zeros_like(_parts.widened(tensor), requires_grad=False)


def _add(part: Part, leaf: Any) -> Part:
    if isinstance(part, Total):
        return Total(part.mean + _aux.summable(leaf), part.dtype)
    if isinstance(part, Combined):
        return Combined(part.moments + _summable(leaf), part.dtype)
    return Latest(leaf)


def _summable(moments: Moments) -> Moments:
    """In what is summed; what has count 0 is exactly 0, whatever its mean says."""
    nothing: Any = moments.count == 0
    mean, m2 = (torch.where(nothing, 0.0, _parts.widened(part)) for part in (moments.mean, moments.m2))
    return Moments(moments.count, mean, m2)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _numbers(leaf: Any) -> list[Tensor]:
    return [tensor for tensor in _tree.flatten(leaf)[0] if isinstance(tensor, Tensor)]


def _dtypes_of(leaf: Any) -> list[Any]:
    return [type(leaf), *(tensor.dtype for tensor in _numbers(leaf))]


def _words(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        layout = "" if leaf.layout == torch.strided else f" and layout {leaf.layout}"
        return f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)} on {leaf.device}{layout}"
    if isinstance(leaf, Mean):
        return f"a Mean of {_words(leaf.total)} over {_words(leaf.weight)}"
    if isinstance(leaf, Moments):
        return f"Moments of {_words(leaf.mean)}, {_words(leaf.m2)} and the count {_words(leaf.count)}"
    return describe(leaf)
