"""From a batch to micro-batches: the four ways, all lazy, all by views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradacc import _batch, _call, _order, _sizes, _tree
from gradacc._describe import describe
from gradacc._options import Options


class Microbatch(NamedTuple):
    """One call of ``loss_fn``."""

    args: tuple[Any, ...]
    """All positional arguments, those that are split replaced by their part."""

    sizes: tuple[int, ...]
    """The sizes of its tensors along their split dimension: one where they agree."""

    empty: bool = False
    """Whether there is nothing in it: tensors without examples, and no other leaf that a weight could be counted from."""

    order: _order.Order | None = None
    """Where its examples are in the batch, where they are not in its order."""


class Run(NamedTuple):
    """Micro-batches of one size, one after the other."""

    offset: int
    size: int
    repeats: int


class Microbatches(NamedTuple):
    """What a call is divided into."""

    parts: Iterable[Microbatch]
    examples: int | None
    """Of all parts together, where that is known before the first one."""
    whole: Microbatch | None
    """The undivided batch, where there is one."""
    cut: Cut | None = None
    """How ``parts`` are cut from it, where they are."""


class Cut(NamedTuple):
    """A batch that is cut along its dimensions."""

    runs: list[Run]
    """At most two: `torch.tensor_split`'s sizes differ by one; the last of equal micro-batches may be smaller."""
    at: Callable[[int, int], Microbatch]
    """``at(offset, size)``: one micro-batch, of views."""
    stacked: Callable[[Run], list[Tensor]]
    """What is split, with the micro-batches of a run as a new leading dimension: views too."""
    unstacked: Callable[[Sequence[Tensor], int], Microbatch]
    """``unstacked(tensors, size)``: the micro-batch of one index along that dimension."""


def microbatches(options: Options, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> Microbatches:
    """Divide a call's arguments as ``options`` say; ``batch`` is the position of the batch."""
    dims = _call.in_dims(options, args, differentiated, batch)
    if options.steps is None and options.microbatch_size is None:
        _call.only_the_batch(options, dims, batch)
        if options.split is None:
            _batch.check_parts(options.name, args[batch], dims[batch])
        parts = _iterable(options, args[batch])
        return Microbatches(_iterate(options, parts, args, dims, batch), None, None)
    return _slice(options, args, dims)


def undivided(options: Options, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> Microbatch:
    """A call's arguments as one micro-batch."""
    return _counted(options, tuple(args), _call.in_dims(options, args, differentiated, batch))


class Splittable(NamedTuple):
    """What is split of a call's arguments."""

    flat: dict[int, tuple[list[Any], _tree.TreeDef]]
    """By position: leaves and structure."""
    dims: dict[int, list[int | None]]
    """For each leaf, where it is split; None where it is passed whole."""
    total: int
    """The number of examples."""


def splittable(name: str, args: Sequence[Any], dims: Sequence[Any]) -> Splittable:
    """What ``dims``, an entry for each argument, split of them, checked."""
    split = [n for n, dim in enumerate(dims) if dim is not None]
    flat = {n: _tree.flatten(args[n]) for n in split}
    own = {n: leaf_dims(name, dims[n], args[n], n) for n in split}
    paths = {n: _tree.paths(treedef, f"args[{n}]") for n, (_, treedef) in flat.items()}
    sizes = [_sizes.splittable(name, *leaf) for n in split for leaf in zip(flat[n][0], own[n], paths[n], strict=True)]
    for n in split:
        if any(path.endswith(".batch_sizes") for path in paths[n]):
            _batch.check_packed(name, args[n], own[n], f"args[{n}]")
    total = _sizes.batch_size(name, sizes, [path for n in split for path in paths[n]])
    for n, (leaves, _) in flat.items():
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            _batch.check_lists(name, args[n], own[n], f"args[{n}]", total)
        # Most batches have fewer tensors than examples, and so no list of tensors that is as long.
        if len(leaves) >= total > 1:
            is_all = all(n == m for m in flat)
            _batch.check_tensor_lists(name, args[n], own[n], f"args[{n}]", total, is_all)
    return Splittable(
        flat,
        {
            n: [dim if isinstance(leaf, Tensor) else None for leaf, dim in zip(leaves, own[n], strict=True)]
            for n, (leaves, _) in flat.items()
        },
        total,
    )


def _slice(options: Options, args: Sequence[Any], dims: Sequence[Any]) -> Microbatches:
    flat, own, total = splittable(options.name, args, dims)
    pairs = [pair for n, (leaves, _) in flat.items() for pair in zip(leaves, own[n], strict=True)]

    def with_leaves(leaves: Sequence[Any], size: int) -> Microbatch:
        part, left = list(args), iter(leaves)
        for n, (inside, treedef) in flat.items():
            part[n] = _tree.unflatten(treedef, [next(left) for _ in inside])
        return Microbatch(tuple(part), (size,))

    def at(offset: int, size: int) -> Microbatch:
        return with_leaves([leaf if dim is None else leaf.narrow(dim, offset, size) for leaf, dim in pairs], size)

    def stacked(run: Run) -> list[Tensor]:
        return [
            leaf.narrow(dim, run.offset, run.size * run.repeats)
            .unflatten(dim, (run.repeats, run.size))
            .movedim(dim % leaf.ndim, 0)
            for leaf, dim in pairs
            if dim is not None
        ]

    def unstacked(tensors: Sequence[Tensor], size: int) -> Microbatch:
        left = iter(tensors)
        return with_leaves([leaf if dim is None else next(left) for leaf, dim in pairs], size)

    cut = Cut(runs(total, options.steps, options.microbatch_size), at, stacked, unstacked)
    return Microbatches(
        (at(offset, size) for offset, size in cuts(total, options.steps, options.microbatch_size)),
        total,
        Microbatch(tuple(args), (total,)),
        cut,
    )


def runs(total: int, steps: int | None = None, microbatch_size: int | None = None) -> list[Run]:
    """The micro-batches of a batch; with ``steps`` of the sizes of `torch.tensor_split`, empty ones left out."""
    if total == 0:
        return []
    if steps is None:
        size = microbatch_size or total
        count, rest = total // size, total % size
        return [Run(0, size, count)] * (count > 0) + [Run(count * size, _plain_one(rest), 1)] * (rest > 0)
    if total < steps:
        return [Run(0, 1, total)]
    size, larger = _plain_one(total // steps), total % steps
    if larger == 0:
        return [Run(0, size, steps)]
    return [Run(0, size + 1, larger), Run(larger * (size + 1), size, steps - larger)]


def _plain_one(size: int) -> int:
    """A size, and 1 itself where it is that: of a symbolic one Inductor of torch 2.13 makes a wrong outer product."""
    return 1 if size == 1 else size


def cuts(total: int, steps: int | None = None, microbatch_size: int | None = None) -> Iterator[tuple[int, int]]:
    """``(offset, size)`` of each micro-batch of `runs`."""
    for run in runs(total, steps, microbatch_size):
        for i in range(run.repeats):
            yield run.offset + i * run.size, run.size


def _iterable(options: Options, batch: Any) -> Any:
    """The micro-batches, where nothing says how to split: the batch must be an iterable of them."""
    if options.split is not None:
        batch = options.split(batch)
        if not _batch.is_iterable(batch):
            raise TypeError(f"{options.name}: split returned {describe(batch)}; it must yield or return micro-batches")
        return batch
    if not _batch.is_iterable(batch):
        raise TypeError(
            f"{options.name}: without steps, microbatch_size or split, the batch must be an iterable of micro-batches, "
            f"got {describe(batch)}. Pass steps= to have it split, or a list of micro-batches"
        )
    return batch


def _iterate(
    options: Options, parts: Iterable[Any], args: Sequence[Any], dims: Sequence[Any], batch: int
) -> Iterator[Microbatch]:
    for part, order in _order.each(options.name, parts):
        microbatch = _counted(options, (*args[:batch], part, *args[batch + 1 :]), dims)
        _order.check_size(options.name, microbatch.sizes[0] if len(microbatch.sizes) == 1 else None, order)
        yield microbatch._replace(order=order)


def _counted(options: Options, args: tuple[Any, ...], dims: Sequence[Any]) -> Microbatch:
    """With the sizes of its tensors along ``dims``."""
    sizes: list[int] = []
    number = 0
    for n, dim in enumerate(dims):
        if dim is None:
            continue
        leaves, treedef = _tree.flatten(args[n])
        number += len(leaves)
        if options.in_dims is None:  # nothing was said, and nothing is split: what has a size along dim 0 has one
            sizes += [leaf.size(0) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
            continue
        each, paths = leaf_dims(options.name, dim, args[n], n), _tree.paths(treedef, f"args[{n}]")
        sizes += [
            _sizes.size(options.name, leaf, d, path)
            for leaf, d, path in zip(leaves, each, paths, strict=True)
            if isinstance(leaf, Tensor) and d is not None
        ]
    empty = bool(sizes) and not any(sizes) and len(sizes) == number
    different = [size for n, size in enumerate(sizes) if size not in sizes[:n]]  # no set: Dynamo would fix the sizes
    return Microbatch(args, tuple(different), empty)


def leaf_dims(name: str, dims: Any, tree: Any, position: int) -> list[Any]:
    try:
        return _tree.broadcast_prefix(dims, tree)
    except ValueError as error:
        raise ValueError(
            f"{name}: in_dims[{position}]={dims} is not a pytree prefix of args[{position}]: {error}"
        ) from error
