"""The loss through its encoders as one function of the whole batch.

It is what is differentiated where there is one micro-batch, and under transforms and while Dynamo traces, where each encoder
is a `microbatch`, whose backward pass runs pieces again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gradacc import _split, _tree
from gradacc._describe import describe
from gradacc._mean import Mean
from gradacc._microbatch import by_pieces
from gradacc._options import Options
from gradacc._pieces.divide import Ways
from gradacc._pieces.outputs import Outs
from gradacc._through import encoders
from gradacc._through.encoders import Encoder


def composed(options: Options, loss_fn: Callable[..., Any], positions: tuple[Sequence[int], int]) -> Callable[..., Any]:
    """``loss(*arguments)``, of the arguments of a call."""
    differentiated, batch = positions

    def loss(*args: Any, **kwargs: Any) -> Any:
        own = encoders.arguments(args, differentiated, batch)
        dims = encoders.in_dims(options, args, differentiated, batch)
        found: dict[str | None, Any] = {
            encoder.key: _by_pieces(encoder, args, positions, dims)(*own) for encoder in encoders.encoders(options)
        }
        sizes = _split.undivided(options._replace(in_dims=dims), own, *positions).sizes
        rows = {encoders.named(key): _rows_of(output) for key, output in found.items()}
        encoders.check_total(options.name, rows, sizes[0] if len(sizes) == 1 else None)
        whole = slice(0, next(iter(rows.values()))) if options.rows else None
        return call(options, loss_fn, (args, kwargs), batch, found.get(None, found), whole)

    return loss


def _rows_of(output: Any) -> int:
    """How many rows its tensors have, which have been looked at."""
    return next(leaf.size(0) for leaf in _tree.flatten(output)[0] if isinstance(leaf, Tensor))


def call(
    options: Options,
    loss_fn: Callable[..., Any],
    arguments: tuple[Sequence[Any], dict[str, Any]],
    batch: int,
    outputs: Any,
    rows: slice | None,
) -> Any:
    """``loss_fn(params, outputs, batch, ...)``, checked where it is of some rows."""
    args, kwargs = arguments
    if rows is not None and "rows" in kwargs:
        raise TypeError(
            f"{options.name}: rows is what loss_fn is told, those of the outputs that it is of; leave it out of the call"
        )
    named = kwargs if rows is None else {**kwargs, "rows": rows}
    found = loss_fn(*args[:batch], outputs, *args[batch:], **named)
    value = found[0] if options.has_aux and isinstance(found, tuple) and len(found) == 2 else found
    if rows is not None and not isinstance(value, Mean):
        raise TypeError(
            f"{options.name}: loss_fn takes rows, those of the outputs that it is of, and returned {describe(value)}; it must "
            "return gradacc.Mean(sum over these rows, number of them), which adds up over ranks"
        )
    return found


def _by_pieces(
    encoder: Encoder, args: Sequence[Any], positions: tuple[Sequence[int], int], dims: tuple[Any, ...]
) -> Callable[..., Any]:
    """The encoder, of the whole batch."""
    options = encoder.options
    checked = encoders.checked(encoder, positions, dims)
    if options.split is None and len(encoders.divided(encoder, args, *positions)) <= 1:
        return checked
    ways = Ways(encoder.name, options.steps, options.microbatch_size, encoders.split(encoder, dims[positions[1]]), dims)
    return by_pieces(checked, ways, Outs(encoder.name, "concat", 0, options.dtype), "recompute")
