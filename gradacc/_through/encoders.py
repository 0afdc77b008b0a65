"""What encodes, how it divides the batch, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _call, _order, _split, _surroundings, _tree, _where
from gradacc._batch import is_dense
from gradacc._describe import describe
from gradacc._dtypes import is_inexact
from gradacc._options import Options
from gradacc._pieces import outputs
from gradacc._pieces.outputs import Output


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


class Division(NamedTuple):
    """How an encoder divides a call."""

    encoder: Encoder
    microbatches: list[_split.Microbatch]


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

    division: Division
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
    def key(self) -> str | None:
        """Of its encoder."""
        return self.division.encoder.key

    @property
    def name(self) -> str:
        """Of its outputs, in messages."""
        return "outputs" if self.key is None else f"outputs[{self.key!r}]"


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


def divided(encoder: Encoder, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> Division:
    """The micro-batches of an encoder, decided once."""
    own = arguments(args, differentiated, batch)
    options = encoder.options._replace(in_dims=in_dims(encoder.options, args, differentiated, batch))
    parts = [part for part in _split.microbatches(options, own, differentiated, batch).parts if not part.empty]
    if options.split is not None:
        _check_order(encoder, own[batch], [part.args[batch] for part in parts], [part.order for part in parts])
    return Division(encoder, parts)


def _check_order(encoder: Encoder, batch: Any, parts: Sequence[Any], orders: Sequence[_order.Order | None]) -> None:
    """A split that reorders says so: outputs would be paired with the wrong examples of the batch.

    What can be compared is: tensors of the batch, on a CPU, where micro-batches have them too.
    """
    leaves, treedef = _tree.flatten(batch)
    known = [n for n, leaf in enumerate(leaves) if _is_comparable(leaf)]
    begin = [0] * len(leaves)
    for part, order in zip(parts, orders, strict=True):
        own, structure = _tree.flatten(part)
        if structure != treedef:
            return
        for n in known:
            if not _is_comparable(own[n]):
                continue
            rows = leaves[n][begin[n] : begin[n] + len(own[n])] if order is None else _order.taken(leaves[n], order, 0)
            begin[n] += len(own[n])
            if not _are_same(rows, own[n]):
                path = _tree.paths(treedef, "batch")[n]
                raise ValueError(
                    f"{encoder.name}: split yields examples in another order than the batch's ({path} differs), and loss_fn "
                    "would pair their outputs with other examples. Return gradacc.data.Reordered(microbatches, order), which "
                    "says where each is"
                )


def _is_comparable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.is_cpu and is_dense(leaf) and _where.is_readable(leaf)


def _are_same(rows: Tensor, own: Tensor) -> bool:
    """Of what both have: a micro-batch may be cut to its longest example."""
    for dim in range(1, min(rows.ndim, own.ndim)):
        rows = rows.narrow(dim, 0, min(rows.size(dim), own.size(dim)))
    if rows.shape != own.shape:
        return True
    return torch.equal(rows, own) or bool(((rows == own) | ((rows != rows) & (own != own))).all())


def checked(encoder: Encoder, positions: tuple[Sequence[int], int], dims: tuple[Any, ...]) -> Callable[..., Any]:
    """The encoder, of arguments that are split along these dimensions, with what it returns looked at."""
    options = encoder.options._replace(in_dims=dims)

    def encode(*own: Any) -> Any:
        out = encoder.func(*own)
        check_rows(encoder, outputs.flatten(out), _split.undivided(options, own, *positions).sizes)
        return out

    return encode


def check_rows(encoder: Encoder, flat: Output, sizes: Sequence[int]) -> None:
    """What was returned for a micro-batch of this size has a row for each example, and something to differentiate."""
    name = encoder.name
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
