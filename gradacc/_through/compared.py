"""Whether the second run of an encoder was the first: NOTE [encoded twice] in ``stages.py``."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from gradacc import _dtypes, _order, _split, _tree
from gradacc._through.encoders import Encoded, Ran


def compared(one: Encoded, ran: Ran, at: tuple[_split.Microbatch, int], read: bool) -> bool | Tensor:
    """NOTE [encoded twice]: whether the outputs are those of the first run, where that is not read; ``at``: of which rows."""
    same: bool | Tensor = True
    if ran.output.treedef != one.treedef:
        raise _changed(one, f"{one.treedef}, then {ran.output.treedef}")
    paths = functools.partial(_tree.paths, one.treedef, one.name)
    for i, leaf in enumerate(ran.output.leaves):
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            continue
        first = rows_of(one.leaves[i], *at, len(leaf))
        if first.shape != leaf.shape or first.dtype != leaf.dtype:
            raise _changed(one, f"{paths()[i]} of shape {tuple(first.shape)}, then {tuple(leaf.shape)}")
        if leaf.is_cpu:
            if not torch.equal(first, leaf) and not _is_near(first, leaf):
                raise _changed(one, f"another {paths()[i]} (by up to {_distance(first, leaf):.2g})")
            continue
        near = _is_near(first, leaf)
        if read and not near:
            raise _changed(one, f"another {paths()[i]}")
        same = near if same is True else same & near
    return same


def _is_near(first: Tensor, again: Tensor) -> Tensor:
    """Equal but for rounding; NaN is the same as NaN."""
    if not first.numel():
        return torch.ones((), dtype=torch.bool, device=first.device)
    if not _dtypes.is_inexact(first):
        return (first == again).all()
    eps = torch.finfo(first.dtype).eps
    near = eps**0.5 if first.dtype.itemsize >= 4 else 4 * eps
    one, other = (_dtypes.as_real(each) for each in (first, again))
    same = (one == other) | (one.isnan() & other.isnan())
    # What is about 0 by cancellation is rounding beside the others: beside their median, which no mask or sink moves.
    usual = torch.where(one.isfinite() & (one != 0), one.abs(), math.nan).nanmedian().nan_to_num()
    found: Tensor = (same | (one.isfinite() & ((one - other).abs() <= near * one.abs() + near * usual))).all()
    return found


def _distance(first: Tensor, again: Tensor) -> float:
    return (
        float((first.to(torch.float64) - again.to(torch.float64)).abs().max()) if not first.is_complex() else math.nan
    )


def _changed(one: Encoded, what: str) -> RuntimeError:
    return RuntimeError(
        f"{one.encoder.name}: encode, run again for the gradients, returned {what}. Both runs must be the same: what it "
        "changes (a counter, an attribute, an argument in place) or draws by itself (NumPy, random, a torch.Generator of its "
        "own) differs. Pass what changes as arguments, and draw with torch's own random numbers"
    )


def rows_of(whole: Tensor, microbatch: _split.Microbatch, begin: int, number: int) -> Tensor:
    """Those of a micro-batch, of what has a row for each example of the batch."""
    return whole[begin : begin + number] if microbatch.order is None else _order.taken(whole, microbatch.order, 0)
