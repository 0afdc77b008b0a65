"""What encodes, how it divides the batch, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _call, _order, _split, _surroundings, _tree, _where
from gradacc._batch import is_dense, is_iterable
from gradacc._describe import describe
from gradacc._dtypes import is_inexact
from gradacc._options import Options
from gradacc._pieces import outputs


class Encoder(NamedTuple):
    """One function of ``through=``."""

    key: str | None
    """Of its outputs in the dict that the loss is given; None where there is one function."""
    func: Callable[..., Any]
    options: Options
    """How it divides the batch."""

    @property
    def name(self) -> str:
        """For messages."""
        return self.options.name + (", through" if self.key is None else f", through[{self.key!r}]")


class Ran(NamedTuple):
    """One run of an encoder."""

    output: outputs.Output
    """Without its graph."""
    differentiable: list[int]
    """Leaves of it that have one."""
    tape: Any
    cotangents: list[Tensor]
    """What the tape plays back: filled before."""


class Encoded(NamedTuple):
    """What an encoder returned for this rank's batch."""

    encoder: Encoder
    microbatches: list[_split.Microbatch]
    around: _surroundings.Surroundings
    """Of its first micro-batch."""
    leaves: list[Any]
    treedef: _tree.TreeDef | None
    """None where there is no example."""
    differentiable: list[int]
    rows: list[int]
    """Of each micro-batch."""
    kept: Ran | None
    """Of the one micro-batch, where there is one."""

    @property
    def name(self) -> str:
        """Of its outputs, in messages."""
        return named(self.encoder.key)


def named(key: str | None) -> str:
    """What the outputs of an encoder are called in messages."""
    return "outputs" if key is None else f"outputs[{key!r}]"


def encoders(options: Options) -> list[Encoder]:
    """All of them."""
    through = options.through
    assert through is not None
    if not isinstance(through, Mapping):
        return [Encoder(None, through, options)]
    return [
        Encoder(
            key,
            func,
            options._replace(steps=_of(options.steps, key), microbatch_size=_of(options.microbatch_size, key)),
        )
        for key, func in through.items()
    ]


def _of(sizes: Any, key: str) -> Any:
    return sizes[key] if isinstance(sizes, Mapping) else sizes


def arguments(args: Sequence[Any], differentiated: Sequence[int], batch: int) -> tuple[Any, ...]:
    """What an encoder is given: the arguments of a call up to the parameters and the batch."""
    return tuple(args[: max(*differentiated, batch) + 1])


def in_dims(options: Options, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> tuple[Any, ...]:
    """Of what an encoder is given."""
    dims = _call.in_dims(options, args, differentiated, batch)
    count = len(arguments(args, differentiated, batch))
    for n, dim in enumerate(dims[count:], count):
        if dim is not None:
            raise ValueError(
                f"{options.name}: in_dims[{n}]={dim} splits an argument that only loss_fn gets, which sees the whole batch: "
                "with through= its entry must be None"
            )
    return dims[:count]


def divided(
    encoder: Encoder, args: Sequence[Any], differentiated: Sequence[int], batch: int
) -> list[_split.Microbatch]:
    """The micro-batches of an encoder, decided once."""
    own = arguments(args, differentiated, batch)
    dims = in_dims(encoder.options, args, differentiated, batch)
    options = encoder.options._replace(in_dims=dims, split=split(encoder, dims[batch]))
    parts = _split.microbatches(options, own, differentiated, batch).parts
    return [part for part in parts if not part.empty]


def split(encoder: Encoder, dims: Any) -> Callable[[Any], Any] | None:
    """That of the options, with what it yields looked at: outputs are paired with the examples of the batch, along ``dims``."""
    given = encoder.options.split

    def checked_split(batch: Any) -> Any:
        assert given is not None
        found = given(batch)
        # One that says in which order they are is believed; while Dynamo traces there is nothing to compare.
        if isinstance(found, _order.Reordered) or not is_iterable(found) or torch.compiler.is_compiling():
            return found
        parts = list(found)
        _check_order(encoder, batch, parts, dims)
        return parts

    return None if given is None else checked_split


def _check_order(encoder: Encoder, batch: Any, parts: Sequence[Any], dims: Any) -> None:
    """A split that reorders examples says so. What it changes besides (a cast, a crop) is its own."""
    whole = _by_path(batch, dims)
    begin = dict.fromkeys(whole, 0)
    for part in parts:
        for path, own in _by_path(part, dims).items():
            rows = whole.get(path)
            if rows is None or rows.dtype != own.dtype or rows.ndim != own.ndim or rows.device != own.device:
                continue
            for dim in range(1, rows.ndim):
                # Cut to its longest example.
                rows = rows.narrow(dim, 0, min(rows.size(dim), own.size(dim)))
            there = rows[begin[path] : begin[path] + len(own)]
            begin[path] += len(own)
            if not _are_same(there, own) and _are_rows(rows, own):
                raise ValueError(
                    f"{encoder.name}: split yields examples in another order than the batch's ({path} differs), and loss_fn "
                    "would pair their outputs with other examples. Return gradacc.data.Reordered(microbatches, order), which "
                    "says where each is"
                )


def _by_path(tree: Any, dims: Any) -> dict[str, Tensor]:
    """What can be compared, with its examples in dim 0."""
    leaves, treedef = _tree.flatten(tree)
    try:
        each = _tree.broadcast_prefix(dims, tree)
    except ValueError:
        # A micro-batch of another structure than the batch's, to which the dims of that say nothing.
        return {}
    return {
        path: leaf.movedim(dim, 0)
        for path, leaf, dim in zip(_tree.paths(treedef, "batch"), leaves, each, strict=True)
        if isinstance(leaf, Tensor)
        and dim is not None
        and -leaf.ndim <= dim < leaf.ndim
        and is_dense(leaf)
        and not leaf.is_meta
        and _where.is_readable(leaf)
    }


def _are_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _are_rows(whole: Tensor, part: Tensor) -> bool:
    """Whether each row of ``part`` is one of ``whole``'s."""
    return whole.shape[1:] == part.shape[1:] and all(bool((whole == row).flatten(1).all(1).any()) for row in part)


def check_total(name: str, rows: Mapping[str, int], examples: int | None) -> None:
    """All encoders have encoded the whole batch; ``rows``: by the name of their outputs."""
    # No set: Dynamo would fix the sizes.
    numbers = [*rows.values(), *([] if examples is None else [examples])]
    if any(number != numbers[0] for number in numbers):
        found = " and ".join(f"{number} rows of {key}" for key, number in rows.items())
        of = "" if examples is None else f" of a batch of {examples} examples"
        raise ValueError(
            f"{name}: {found} were encoded{of}; the micro-batches that split yields must be all of the batch"
        )


def checked(encoder: Encoder, positions: tuple[Sequence[int], int], dims: tuple[Any, ...]) -> Callable[..., Any]:
    """The encoder, of arguments that are split along these dimensions, with what it returns looked at."""
    options = encoder.options._replace(in_dims=dims)

    def encode(*own: Any) -> Any:
        out = encoder.func(*own)
        check_rows(encoder, outputs.flatten(out), _split.undivided(options, own, *positions).sizes)
        return out

    return encode


def check_rows(encoder: Encoder, flat: outputs.Output, sizes: Sequence[int]) -> None:
    """What was returned for a micro-batch of this size has a row for each example, and something to differentiate."""
    name = encoder.name
    for n, leaf in enumerate(flat.leaves):
        if flat.pooled or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)):
            found = "a gradacc.Mean" if flat.pooled else describe(leaf)
            path = _tree.paths(flat.treedef, "outputs")[n]
            raise TypeError(
                f"{name}: {path} is {found}, of one micro-batch, and what the whole batch would have is not known. Return "
                "tensors with a row for each example; what is not per example is computed in loss_fn"
            )
    if not any(isinstance(leaf, Tensor) and is_inexact(leaf) for leaf in flat.leaves):
        found = ", ".join(describe(leaf) for leaf in flat.leaves) or "nothing"
        raise TypeError(
            f"{name}: encode returned {found}: no floating or complex tensor, so that no gradient leads through it. Return "
            "what loss_fn is to be differentiated by; what needs no gradient can be computed in loss_fn"
        )
    # Of a micro-batch whose tensors disagree, outputs must agree among themselves.
    rows = (
        sizes if len(sizes) == 1 else [leaf.size(0) for leaf in flat.leaves if isinstance(leaf, Tensor) and leaf.ndim]
    )
    for n, leaf in enumerate(flat.leaves):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.size(0) != rows[0]):
            path = _tree.paths(flat.treedef, "outputs")[n]
            raise ValueError(
                f"{name}: {path} is {describe(leaf)}, of a micro-batch of {' or '.join(map(str, sizes))} examples; what encode "
                "returns has a row for each example in dim 0 (loss_fn sees those of the whole batch, put together)"
            )
