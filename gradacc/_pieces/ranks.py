"""What is reduced of a call's output, over ranks too: once a call, as `accumulate`'s aux."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradacc import _parts, _sync, _tree
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._parts import Sum, Total
from gradacc._pieces import forward, node, outputs
from gradacc._pieces.divide import Pieces
from gradacc._sums import Sums


def run(
    options: Options, agreed: _sync.Agreed, divided: Callable[[], Pieces], func: Callable[..., Any], outs: outputs.Outs
) -> Any:
    """What the union of all ranks' batches would have returned; what is concatenated is this rank's own."""
    boundary = _sync.connect(options, agreed)
    try:
        pieces = divided()
        tensors = [leaf for leaf in pieces.sources if isinstance(leaf, Tensor)]
        nothing = torch.zeros((), device=tensors[0].device if tensors else None)
        boundary.bind([nothing], _tree.flatten(nothing)[1], [nothing.dtype], None)
        joined = forward.Joined(outs, pieces)
        for n, leaf in enumerate(node.results(func, joined, "recompute")):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"{outs.name}: {joined.leaves[n].path} requires grad, and what crosses between ranks (sync=) has no "
                    "gradient. Call it under torch.no_grad(), or take gradients with accumulate(sync=)"
                )
        own = [_part(outs, leaf, joined, n) for n, leaf in enumerate(joined.leaves)]
        sent = {leaf.path: part for leaf, part in zip(joined.leaves, own, strict=True) if part is not None}
        sums = Sums(value=Sum(nothing, nothing.dtype), aux=sent, weight=1.0, unit=1.0, differentiated=False)
    except BaseException as error:
        boundary.fail(error)
        raise
    _, sums, _ = boundary.cross([None], sums, True, lambda sums: sums)
    boundary.done()
    assert joined.first is not None
    results = joined.results()
    for n, leaf in enumerate(joined.leaves):
        if own[n] is not None:
            results[n] = _whole(outs, leaf, sums.aux[leaf.path].mean, joined.first.leaves[n])
    return outputs.unflatten(results, joined.first)


def _part(outs: outputs.Outs, leaf: outputs.Leaf, joined: forward.Joined, n: int) -> Total | None:
    """What crosses of a leaf; None where it stays."""
    if leaf.out == "concat":
        return None
    if leaf.out not in ("sum", "mean"):
        what = repr(leaf.out) if isinstance(leaf.out, str) else "a reducer of your own"
        raise ValueError(
            f"{outs.name}: {leaf.path} is put together by {what}, which is not summed and does not cross between ranks "
            "(sync=); use 'sum', 'mean' or a gradacc.Mean, or 'concat', which stays on its rank"
        )
    value = joined.states[n].value
    if not isinstance(value, Tensor):
        # Python's floats are of 64 bits.
        value = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if leaf.out == "sum":
        return Total(Mean(value, 0), value.dtype)
    examples = sum(place.size or 0 for place in joined.places)
    if joined.of.total is not None:
        value = value * examples
    return Total(Mean(value if examples else torch.zeros_like(value), examples), value.dtype)


def _whole(outs: outputs.Outs, leaf: outputs.Leaf, mean: Mean, like: Any) -> Any:
    total = mean.value if leaf.out == "mean" else mean.total
    if not isinstance(like, Tensor):
        return total.item()
    kept = outs.dtype is not None or not like.dtype.is_floating_point
    return _parts.widened(total) if kept else total.to(like.dtype)
