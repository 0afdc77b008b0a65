"""A function by pieces, of operations that torch differentiates by itself: under transforms, and while Dynamo traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
    """All pieces, then all of them together: a pure function of the sources. ``before`` is called before each, with its number.

    ``checkpoints``: each piece is one, that a compiler understands.
    """
    returned, places = [], []
    for index, piece in enumerate(of.parts):
        if before is not None:
            before(index)
        own = functools.partial(called, func, piece, of.sources)
        returned.append(checkpoint(own, use_reentrant=False) if checkpoints else own())
        places.append(outputs.Place(index, piece.size, of.total, of.number, piece.order))
    return join.together(outs, returned, places)


def called(func: Callable[..., Any], piece: Piece, sources: Sequence[Any]) -> Any:
    """One piece."""
    return piece.call(func, piece.leaves(sources))
