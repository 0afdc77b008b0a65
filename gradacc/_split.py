"""From a batch to micro-batches: the four ways, all lazy, all by views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradacc import _tree, _validate
from gradacc._options import Options


class Microbatch(NamedTuple):
    """One call of ``loss_fn``."""

    args: tuple[Any, ...]
    """All positional arguments, those that are split replaced by their part."""

    sizes: frozenset[int]
    """The sizes of its tensors along their split dimension: one where they agree."""

    empty: bool = False
    """Whether there is nothing in it: tensors without examples, and no other leaf that a weight could be counted from."""

    @property
    def examples(self) -> int | None:
        """How many examples it has; None where that cannot be told."""
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None


class Microbatches(NamedTuple):
    """What a call is divided into."""

    parts: Iterable[Microbatch]
    examples: int | None
    """Of all parts together, where that is known before the first one."""
    whole: Microbatch | None
    """The undivided batch, where there is one."""


def microbatches(options: Options, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> Microbatches:
    """Divide a call's arguments as ``options`` say; ``batch`` is the position of the batch."""
    dims = _validate.in_dims(options, args, differentiated, batch)
    if options.steps is None and options.microbatch_size is None:
        parts = _validate.iterable(options, args[batch])
        return Microbatches(_iterate(options, parts, args, dims[batch], batch), None, None)
    return _slice(options, args, dims)


def _slice(options: Options, args: Sequence[Any], dims: Sequence[Any]) -> Microbatches:
    split = [n for n, dim in enumerate(dims) if dim is not None]
    flat = {n: _tree.flatten(args[n]) for n in split}
    leaf_dims = {n: _leaf_dims(options, dims[n], args[n], n) for n in split}
    paths = {n: _tree.paths(treedef, f"args[{n}]") for n, (_, treedef) in flat.items()}
    sizes = [
        _validate.splittable(options.name, *leaf)
        for n in split
        for leaf in zip(flat[n][0], leaf_dims[n], paths[n], strict=True)
    ]
    total = _validate.batch_size(options.name, sizes, [path for n in split for path in paths[n]])

    def cut(offset: int, size: int) -> Microbatch:
        part = list(args)
        for n, (leaves, treedef) in flat.items():
            part[n] = _tree.unflatten(
                treedef,
                [
                    leaf if dim is None or not isinstance(leaf, Tensor) else leaf.narrow(dim, offset, size)
                    for leaf, dim in zip(leaves, leaf_dims[n], strict=True)
                ],
            )
        return Microbatch(tuple(part), frozenset({size}))

    return Microbatches(
        (cut(offset, size) for offset, size in cuts(total, options.steps, options.microbatch_size)),
        total,
        Microbatch(tuple(args), frozenset({total})),
    )


def cuts(total: int, steps: int | None = None, microbatch_size: int | None = None) -> Iterator[tuple[int, int]]:
    """``(offset, size)`` of each micro-batch; with ``steps`` the sizes of `torch.tensor_split`, empty ones left out."""
    offset = 0
    while offset < total:
        if steps is None:
            size = min(microbatch_size or total, total - offset)
        else:
            size = -(-(total - offset) // steps)  # what is left, divided by the steps that are left, rounded up
            steps -= 1
        yield offset, size
        offset += size


def _iterate(options: Options, parts: Iterable[Any], args: Sequence[Any], dim: Any, batch: int) -> Iterator[Microbatch]:
    for part in parts:
        leaves, treedef = _tree.flatten(part)
        if options.in_dims is None:  # nothing was said, and nothing is split: what has a size along dim 0 has one
            sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        else:
            dims, paths = _leaf_dims(options, dim, part, batch), _tree.paths(treedef, f"args[{batch}]")
            sizes = [
                leaf.shape[d]
                for leaf, d, path in zip(leaves, dims, paths, strict=True)
                if isinstance(leaf, Tensor) and _validate.splittable(options.name, leaf, d, path) is not None
            ]
        empty = set(sizes) == {0} and len(sizes) == len(leaves)
        yield Microbatch((*args[:batch], part, *args[batch + 1 :]), frozenset(sizes), empty)


def _leaf_dims(options: Options, dims: Any, tree: Any, position: int) -> list[Any]:
    try:
        return _tree.broadcast_prefix(dims, tree)
    except ValueError as error:
        raise ValueError(
            f"{options.name}: in_dims[{position}]={dims} is not a pytree prefix of args[{position}]: {error}"
        ) from error
