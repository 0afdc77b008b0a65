"""The transform of any function: `microbatch`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gradacc import _where
from gradacc._pieces import composite, divide, join, node


def microbatch(
    func: Callable[..., Any] | None = None,
    *,
    steps: int | None = None,
    microbatch_size: int | None = None,
    split: Callable[[Any], Any] | None = None,
    in_dims: Any = 0,
    out_dims: Any = 0,
    out: Any = "concat",
    dtype: torch.dtype | None = None,
    backward: node.Backward = "auto",
) -> Callable[..., Any]:
    """TODO"""
    ways = divide.Ways("microbatch", steps, microbatch_size, split, in_dims)
    outs = join.Outs("microbatch", out, out_dims, dtype)

    @functools.wraps(func, updated=())
    def by_pieces(*args: Any, **kwargs: Any) -> Any:
        pieces = divide.pieces(ways, args, kwargs)
        if _where.under_transform():
            values, first = composite.run(func, pieces, outs)
            return join.unflatten(values, first)
        return node.run("microbatch", func, pieces, outs, backward)

    return by_pieces
