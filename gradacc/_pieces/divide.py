"""A call's arguments as pieces, by views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradacc import _batch, _order, _split, _tree
from gradacc._describe import describe


class Ways(NamedTuple):
    """How a call is divided."""

    name: str
    steps: int | None
    microbatch_size: int | None
    split: Callable[[Any], Any] | None
    in_dims: Any


class Pick(NamedTuple):
    """What a piece has of one source."""

    source: int
    dim: int | None
    """None where it has all of it."""


class Piece(NamedTuple):
    """One call of the function."""

    treedef: _tree.TreeDef
    """Of its positional arguments, and the values of the others."""
    names: Sequence[str]
    """Of the others. (Dynamo does not flatten an empty dict of them.)"""
    picks: Sequence[Pick]
    """Their leaves."""
    offset: int
    size: int | None
    """The number of its examples; None where its tensors do not agree, or there is none."""
    order: _order.Order | None = None
    """Where its examples are in the batch, where they are not in its order."""

    def leaves(self, sources: Sequence[Any]) -> list[Any]:
        """Cut out of the sources: views."""
        return [
            sources[source] if dim is None else sources[source].narrow(dim, self.offset, self.size)
            for source, dim in self.picks
        ]

    def call(self, func: Callable[..., Any], leaves: Sequence[Any]) -> Any:
        """The function, of these as its arguments' leaves."""
        args, values = _tree.unflatten(self.treedef, leaves)
        return func(*args, **dict(zip(self.names, values, strict=True)))


class Pieces(NamedTuple):
    """All of a call."""

    sources: list[Any]
    """Leaves of the arguments. Those of an iterable of pieces are added as it is read."""
    parts: Iterable[Piece]
    total: int | None
    """The number of examples; None where the pieces come from an iterable."""
    number: int | None
    """The number of pieces, likewise."""


def pieces(ways: Ways, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Pieces:
    """Divide a call's arguments as ``ways`` say; keyword arguments are passed whole."""
    dims = _dims(ways, args)
    if ways.steps is None and ways.microbatch_size is None:
        return _iterate(ways, args, kwargs, dims)
    flat, leaf_dims, total = _split.splittable(ways.name, args, dims)
    sources, treedef = _tree.flatten((tuple(args), [kwargs[name] for name in kwargs]))
    each = [leaf_dims[n] if n in flat else [None] * len(_tree.flatten(arg)[0]) for n, arg in enumerate(args)]
    picked = [dim for own in each for dim in own]
    picked += [None] * (len(sources) - len(picked))
    # Counted from the front, as views of the pieces of pieces are.
    picks = [Pick(i, None if dim is None else dim % sources[i].ndim) for i, dim in enumerate(picked)]
    cuts = list(_split.cuts(total, ways.steps, ways.microbatch_size)) or [(0, 0)]
    return Pieces(
        sources, [Piece(treedef, list(kwargs), picks, offset, size) for offset, size in cuts], total, len(cuts)
    )


def _dims(ways: Ways, args: Sequence[Any]) -> tuple[Any, ...]:
    """One entry of ``in_dims`` for each positional argument."""
    dims = ways.in_dims
    if not args:
        raise TypeError(f"{ways.name}: there is no positional argument to split (keyword arguments are passed whole)")
    if not isinstance(dims, tuple):
        return (dims,) * len(args)
    if len(dims) != len(args):
        raise ValueError(
            f"{ways.name}: in_dims={dims} has {len(dims)} entries for a call with {len(args)} positional arguments"
        )
    if all(dim is None for dim in dims):
        raise ValueError(f"{ways.name}: in_dims={dims} splits nothing; give the dimension to what is to be split")
    return dims


def _iterate(ways: Ways, args: Sequence[Any], kwargs: Mapping[str, Any], dims: Sequence[Any]) -> Pieces:
    """Pieces from an iterable, or from ``split=``."""
    split = [n for n, dim in enumerate(dims) if dim is not None]
    if len(split) != 1:
        raise ValueError(
            f"{ways.name}: without steps or microbatch_size one argument is divided, and in_dims={ways.in_dims} has "
            f"{len(split)} for a call with {len(args)} positional arguments; give None to those that are passed whole"
        )
    at = split[0]
    batch = args[at] if ways.split is None else ways.split(args[at])
    if not _batch.is_iterable(batch):
        what = "the argument that is divided" if ways.split is None else "what split returned"
        raise TypeError(
            f"{ways.name}: {what} is {describe(batch)}, which is no iterable of pieces. Pass steps= or microbatch_size= to "
            "have it split, or a list of pieces"
        )
    if ways.split is None:
        _batch.check_parts(ways.name, batch, dims[at])
    values = [kwargs[name] for name in kwargs]
    sources, _ = _tree.flatten(([arg for n, arg in enumerate(args) if n != at], values))
    whole, before = range(len(sources)), len(_tree.flatten(list(args[:at]))[0])

    def parts() -> Iterator[Piece]:
        for part, order in _order.each(ways.name, batch):
            leaves, _ = _tree.flatten(part)
            _, treedef = _tree.flatten(((*args[:at], part, *args[at + 1 :]), values))
            own = range(len(sources), len(sources) + len(leaves))
            sources.extend(leaves)
            picks = [Pick(i, None) for i in (*whole[:before], *own, *whole[before:])]
            size = _size(ways.name, part, leaves, dims[at], at)
            _order.check_size(ways.name, size, order)
            yield Piece(treedef, list(kwargs), picks, 0, size, order)

    return Pieces(sources, parts(), None, None)


def _size(name: str, part: Any, leaves: Sequence[Any], dims: Any, at: int) -> int | None:
    """The one size that the tensors of a piece have."""
    each = _split.leaf_dims(name, dims, part, at)
    sizes = [
        leaf.size(dim)
        for leaf, dim in zip(leaves, each, strict=True)
        if isinstance(leaf, Tensor) and dim is not None and -leaf.ndim <= dim < leaf.ndim
    ]
    return sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
