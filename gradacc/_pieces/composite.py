"""A function by pieces, of operations that torch differentiates by itself: under transforms, and while Dynamo traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradacc._pieces import join
from gradacc._pieces.divide import Piece, Pieces


def run(
    func: Callable[..., Any],
    of: Pieces,
    outs: join.Outs,
) -> tuple[list[Any], join.Output]:
    """All pieces, then all of them together: a pure function of the sources."""
    outputs, places = [], []
    for index, piece in enumerate(of.parts):
        outputs.append(called(func, piece, of.sources))
        places.append(join.Place(index, piece.size, of.total, of.number))
    return join.together(outs, outputs, places)


def called(func: Callable[..., Any], piece: Piece, sources: Sequence[Any]) -> Any:
    """One piece."""
    return piece.call(func, piece.leaves(sources))
