"""A function by pieces, of operations that torch differentiates by itself: under transforms, and while Dynamo traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradacc._pieces import join, outputs
from gradacc._pieces.divide import Piece, Pieces


def run(
    func: Callable[..., Any],
    of: Pieces,
    outs: outputs.Outs,
    before: Callable[[int], None] | None = None,
    checkpoints: bool = False,
) -> tuple[list[Any], outputs.Output]:
    """All pieces, then all of them together: a pure function of the sources. And the output of the first piece.

    ``before`` is called before each, with its number. ``checkpoints``: each piece is one, that a compiler understands.
    """
    returned, places = [], []
    for index, piece in enumerate(of.parts):
        if before is not None:
            before(index)
        own = functools.partial(called, func, piece, of.sources)
        returned.append(checkpoint(own, use_reentrant=False) if checkpoints else own())
        places.append(outputs.Place(index, piece.size, of.total, of.number, piece.order))
    flat = [outputs.flatten(output) for output in returned]
    for other in flat:
        outputs.check_alike(outs, flat[0], other)
    shares = join.examples(places)
    values = [
        join.whole(outs, leaf, [output.leaves[i] for output in flat], places, shares)
        for i, leaf in enumerate(outputs.described(outs, flat[0]))
    ]
    if len(flat) == 1:
        # Its output may be in the caller's memory.
        values = [value.clone() if isinstance(value, Tensor) else value for value in values]
    return values, flat[0]


def called(func: Callable[..., Any], piece: Piece, sources: Sequence[Any]) -> Any:
    """One piece."""
    return piece.call(func, piece.leaves(sources))
