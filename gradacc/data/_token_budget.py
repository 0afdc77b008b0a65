"""A ``split=`` by cost: examples of about the same length together, in micro-batches of about equal size with their padding.

NOTE [which positions are cut]
    A batch is padded to its longest example, and a micro-batch of short ones would cost as much as any other with that padding.
    So each is cut to its own longest example. Position ``j`` of example ``i`` may be cut where ``j >= length_i``, and a number
    of tokens does not say where they are: with padding on the left the same cut would take tokens. Nor does a size say what a
    dimension is: there may be as many features as positions. So it is looked at: whatever is cut must hold one value at all
    positions beyond its examples' lengths, which padding does, and tokens and features do not.

NOTE [groups of examples]
    With the examples sorted by length, longest first, the longest one of a group is its first, and what the group may hold
    besides is known. Filling one group after the other with the next longest examples makes the smallest number of groups: it
    leaves the shortest ones. Of all budgets under which that is as many groups, the smallest one is then the limit, and each
    group takes about its share of what is left, so that the last one is not a small rest.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc import _batch, _order, _tree, _where
from gradacc._describe import describe
from gradacc._order import Order, Reordered
from gradacc._values import positive_int

_NAME = "token_budget"


def token_budget(max_tokens: int, length: Callable[[Any], Any], *, trim: Any = 1) -> Callable[[Any], Reordered]:
    """A ``split=`` for examples of very different length: micro-batches of about equal cost, padding included.

    .. code-block:: text

        accumulate(f, split=token_budget(m, length))(params, batch) = torch.func.grad(f)(params, batch)
        examples(microbatch) * longest(microbatch) <= m                     # what each costs, in tokens with padding

    Examples of about the same length come together, in the smallest number of micro-batches within the budget, of about equal
    cost; the longest come first. Each micro-batch is cut to its longest example. What is concatenated (``aux`` of
    `gradacc.accumulate`, the output of `gradacc.microbatch`) comes back in the order of the batch: `Reordered`. The large batch
    of the equation is one that is padded to its longest example, and ``f`` must not depend on padding (attention masks,
    ``ignore_index``): else it is not the same with another amount of padding either.

    Arguments:
        max_tokens: the most that a micro-batch costs. An example that is longer than that is a micro-batch of its own: nothing
            is left out.
        length: ``length(batch)`` returns for each example the position behind its last token: an integer tensor of shape [B],
            or a list of ints. With padding on the right that is the number of its tokens,
            ``lambda batch: batch["attention_mask"].sum(1)``. Position ``j`` of example ``i`` may be cut where
            ``j >= length_i``.
        trim: along which dimension tensors are cut, an int or a pytree prefix of the batch of ints and None ("not cut"):
            ``trim={"input_ids": 1, "attention_mask": 1, "labels": 1, "features": None}``. By default that is dim 1 of whatever
            has it. None: nothing is cut (for a model that drops padding by itself).

    Returns:
        ``split(batch)``, which returns a `Reordered`: its ``order`` says which examples each micro-batch has. ``batch`` is a
        pytree of tensors with their examples along dim 0; numbers, bools, None and a lone string go into each micro-batch.
        Only this one argument is split: put what belongs to an example into it.

    Raises:
        TypeError: options, lengths or leaves of the batch of another type.
        ValueError: ``max_tokens`` is less than 1; lengths of another number than the examples, negative, or more than the batch
            is wide; tensors of several widths, or what is cut holds more than padding there (padding on the left, features):
            then ``trim`` says what is cut.
        NotImplementedError: under `torch.vmap` of the batch, in a compiled function, of fake tensors: lengths decide shapes.

    Lengths are read, and one number that says whether all that is cut is padding: on an accelerator a call waits for it twice.
    Micro-batches are copies (their examples are not neighbours in the batch), made one at a time.

    Example:
        >>> import torch, gradacc
        >>> ids = torch.tensor([[5, 3, 0, 0, 0], [2, 7, 1, 4, 6], [8, 0, 0, 0, 0], [9, 1, 2, 0, 0]])
        >>> split = gradacc.data.token_budget(6, length=lambda ids: (ids != 0).sum(1))
        >>> [(tuple(ids.shape), order) for ids, order in zip(split(ids), split(ids).order)]
        [((1, 5), (1,)), ((1, 3), (3,)), ((2, 2), (0, 2))]
        >>> gradacc.microbatch(lambda ids: ids.sum(1), split=split)(ids)            # in the order of the batch
        tensor([ 8, 20,  8, 12])

    Source: fairseq's ``--max-tokens`` (batches by size, sorted by length); sentence-transformers' ``mini_batch_num_tokens``.
    """
    budget = positive_int(_NAME, "max_tokens", max_tokens)
    if not callable(length):
        raise TypeError(
            f"{_NAME}: length must be a function of the batch that returns each example's length, got {describe(length)}; for "
            'example length=lambda batch: batch["attention_mask"].sum(1)'
        )

    def split(batch: Any) -> Reordered:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{_NAME}: in a compiled function lengths are not known, and they decide shapes. Compile the loss instead: "
                "accumulate(torch.compile(loss_fn, dynamic=True), split=...)"
            )
        leaves, treedef = _tree.flatten(batch)
        paths = _tree.paths(treedef, "batch")
        examples = _examples(batch, leaves, paths)
        dims = _dims(trim, batch, leaves, paths)
        lengths = _lengths(length(_tree.map_tensors(lambda leaf: leaf, batch)), examples)
        _check_cut(leaves, dims, paths, lengths)
        groups = grouped(lengths, budget)
        longest = [max((lengths[place] for place in group), default=0) for group in groups]
        return Reordered(_Microbatches(leaves, treedef, dims, groups, longest), groups)

    _where.whole_or_not_at_all(split)
    return split


@dataclass(frozen=True, slots=True, eq=False)
class _Microbatches:
    """Made one at a time."""

    leaves: list[Any]
    treedef: _tree.TreeDef
    dims: list[int | None]
    groups: list[Order]
    longest: list[int]

    def __iter__(self) -> Iterator[Any]:
        for group, longest in zip(self.groups, self.longest, strict=True):
            parts = [_part(leaf, dim, group, longest) for leaf, dim in zip(self.leaves, self.dims, strict=True)]
            yield _tree.unflatten(self.treedef, parts)

    def __len__(self) -> int:
        return len(self.groups)


def _part(leaf: Any, dim: int | None, group: Order, longest: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if dim is not None and group:
        leaf = leaf.narrow(dim, 0, min(max(longest, 1), leaf.size(dim)))
    return _order.taken(leaf, group, 0)


def grouped(lengths: Sequence[int], budget: int) -> list[Order]:
    """Which examples are in each micro-batch: NOTE [groups of examples]. An example of no tokens costs one."""
    ranked = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    costs = [max(lengths[place], 1) for place in ranked]
    if not costs:
        # One empty micro-batch: it says what types to return.
        return [()]
    number = _filled(costs, budget)[0][0]
    least = bisect.bisect_left(range(budget), -number, key=lambda limit: -_filled(costs, limit)[0][0])
    needed, total = _filled(costs, least)
    groups, start = [], 0
    for left in range(number, 0, -1):
        share, most = total[start] / left, max(1, least // costs[start])
        size = min(max(round(share / costs[start]), 1), most, len(costs) - start - left + 1)
        while needed[start + size] > left - 1:
            size += 1
        groups.append(tuple(sorted(ranked[start : start + size])))
        start += size
    return groups


def _filled(costs: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """Of the examples from each place on, longest first, in groups filled up to ``limit``: their number and cost."""
    number, total = [0] * (len(costs) + 1), [0] * (len(costs) + 1)
    for start in range(len(costs) - 1, -1, -1):
        size = min(max(1, limit // costs[start]), len(costs) - start)
        number[start] = number[start + size] + 1
        total[start] = total[start + size] + size * costs[start]
    return number, total


def _examples(batch: Any, leaves: Sequence[Any], paths: Sequence[str]) -> int:
    """How many there are: the one size that all tensors have along dim 0."""
    sizes: dict[int, str] = {}
    for leaf, path in zip(leaves, paths, strict=True):
        if isinstance(leaf, Tensor):
            if not _batch.is_dense(leaf) or leaf.ndim == 0:
                layout = "" if _batch.is_dense(leaf) else f" and layout {leaf.layout}"
                raise TypeError(
                    f"{_NAME}: {path} is {describe(leaf)}{layout}; the batch's tensors are dense, with the examples along "
                    "dim 0. Pass what is not of each example as another argument of loss_fn, or as a Python number"
                )
            sizes.setdefault(leaf.size(0), path)
        elif not _batch.is_passed_through(leaf):
            raise TypeError(
                f"{_NAME}: {path} is {describe(leaf)}, of which no examples can be taken: the batch is a pytree of "
                "tensors, numbers, bools and None. Convert it to a tensor (torch.as_tensor), or pass it as another argument of "
                "loss_fn"
            )
    if len(sizes) != 1:
        found = ", ".join(f"{path} has {size}" for size, path in sizes.items())
        raise ValueError(
            f"{_NAME}: the tensors of the batch have different sizes along dim 0: {found}. Pass what is not of each example as "
            "another argument of loss_fn"
            if sizes
            else f"{_NAME}: there is no tensor in the batch, {describe(batch)}"
        )
    (examples,) = sizes
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        _batch.check_lists(_NAME, batch, [0] * len(leaves), "batch", examples, whole="")
    if len(leaves) >= examples > 1:
        _batch.check_tensor_lists(_NAME, batch, [0] * len(leaves), "batch", examples, True)
    return examples


def _dims(trim: Any, batch: Any, leaves: Sequence[Any], paths: Sequence[str]) -> list[int | None]:
    """Along which dimension each leaf is cut; None where it is not."""
    try:
        dims = _tree.broadcast_prefix(trim, batch)
    except ValueError as error:
        raise ValueError(f"{_NAME}: trim={trim} is not a pytree prefix of the batch: {error}") from error
    for dim, path in zip(dims, paths, strict=True):
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
            raise ValueError(
                f"{_NAME}: trim has {describe(dim)} for {path}; an entry is a dimension, 1 or more (dim 0 is that of the "
                "examples), or None"
            )
    return [
        dim if dim is not None and isinstance(leaf, Tensor) and leaf.ndim > dim else None
        for leaf, dim in zip(leaves, dims, strict=True)
    ]


def _lengths(found: Any, examples: int) -> list[int]:
    """What ``length`` returned, as ints."""
    fix = f"return an integer tensor of shape ({examples},), or a list of {examples} ints: one length for each example"
    if isinstance(found, Tensor):
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"{_NAME}: length returned {describe(found)} of {found.dtype}; {fix}")
        if tuple(found.shape) != (examples,):
            raise ValueError(f"{_NAME}: length returned {describe(found)}; {fix}")
        _check_values(found, "length returned")
        lengths: list[int] = found.detach().cpu().tolist()
    elif isinstance(found, (list, tuple)):
        wrong = [each for each in found if isinstance(each, bool) or not hasattr(each, "__index__")]
        if wrong:
            raise TypeError(f"{_NAME}: length returned a {type(found).__name__} with {describe(wrong[0])} in it; {fix}")
        if len(found) != examples:
            raise ValueError(f"{_NAME}: length returned a {type(found).__name__} of {len(found)} items; {fix}")
        lengths = [operator.index(each) for each in found]
    else:
        raise TypeError(f"{_NAME}: length returned {describe(found)}; {fix}")
    for place, each in enumerate(lengths):
        if each < 0:
            raise ValueError(f"{_NAME}: length returned {each} for example {place}; a length is 0 or more")
    return lengths


def _check_values(tensor: Tensor, what: str) -> None:
    """Values are known here, which decide shapes."""
    if tensor.is_meta or hasattr(tensor, "fake_mode"):
        raise NotImplementedError(
            f"{_NAME}: {what} {describe(tensor)} on {tensor.device} without values (meta or fake), and lengths decide shapes. "
            "Return a list of ints"
        )
    if not _where.is_readable(tensor):
        raise NotImplementedError(
            f"{_NAME}: under torch.vmap, {what} {describe(tensor)} with other values for each of what is batched, and "
            "shapes depend on them. Pass steps= or microbatch_size= there"
        )


def _check_cut(leaves: Sequence[Any], dims: Sequence[int | None], paths: Sequence[str], lengths: Sequence[int]) -> None:
    """What is cut is of one width, no example is longer, and beyond their lengths there is padding."""
    cut = [(leaf, dim, path) for leaf, dim, path in zip(leaves, dims, paths, strict=True) if dim is not None]
    if not cut or not lengths:
        return
    first, along, where = cut[0]
    width = first.size(along)
    for leaf, dim, path in cut:
        if leaf.size(dim) != width:
            raise ValueError(
                f"{_NAME}: {where} has size {width} along dim {along}, and {path} {leaf.size(dim)} along dim {dim}: which of "
                f"them are a token each? {_say_so(paths)}"
            )
    for place, each in enumerate(lengths):
        if each > width:
            raise ValueError(
                f"{_NAME}: length returned {each} for example {place}, and {where}, {describe(first)}, has {width} positions "
                f"(dim {along}). Is it padded to its longest example? Or, where that dimension is none of tokens: "
                f"{_say_so(paths)}"
            )
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    if lengths[shortest] < width:
        _check_padding([each for each in cut if not each[0].is_meta], lengths, shortest, paths)


def _check_padding(
    cut: Sequence[tuple[Tensor, int, str]], lengths: Sequence[int], shortest: int, paths: Sequence[str]
) -> None:
    """NOTE [which positions are cut]"""
    flags = []
    for leaf, dim, path in cut:
        _check_values(leaf, f"{path} is")
        values = leaf.detach().movedim(dim, 1)
        ends = torch.tensor(lengths).to(leaf.device, non_blocking=True)[:, None]
        beyond = torch.arange(values.size(1), device=leaf.device) >= ends
        padding = values[shortest, -1]
        same = (values == padding) | ((values != values) & (padding != padding))
        flags.append((beyond.view(*beyond.shape, *[1] * (values.ndim - 2)) & ~same).any())
    if not flags or not bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
        return
    _, dim, path = next(each for each, flag in zip(cut, flags, strict=True) if bool(flag))
    raise ValueError(
        f"{_NAME}: {path} has more than one value at positions (dim {dim}) that are beyond the lengths of their examples, and "
        "cutting it would lose them. Is the padding on the left (padding_side='right' puts it there; or let length return the "
        "position behind the last token, of all the width)? Does length count something else? What has a position of its own "
        f"there, as position_ids do, set to one value or make in loss_fn; what is no token: {_say_so(paths)}"
    )


def _say_so(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return "Say with trim= along which dimension it is cut; None cuts nothing"
    return (
        "Say with trim= along which dimension each is cut, a pytree prefix of the batch with None for what is not: "
        'trim={"input_ids": 1, "features": None}'
    )
