"""`reduce_scatter`: another value for ``sync=``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradacc import _all_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class ReduceScatter:
    """What `reduce_scatter` returns."""

    group: Any
    compress: torch.dtype | None
    overlap: bool


def reduce_scatter(
    group: ProcessGroup | DeviceMesh | None = None, *, compress: torch.dtype | None = None, overlap: bool = False
) -> ReduceScatter:
    """For ``sync=``: the union's gradients as with `gradacc.all_reduce`, but each rank receives its own part of them alone.

    .. code-block:: text

        gradient of rank r = (sum_s sum_i w_si g_si / sum w)[offset_r : offset_r + length_r]      of every parameter, flattened

    A gradient is a `gradacc.Shard` in the place of the tensor; of all elements together no rank has more than
    ``ceil(n / W)``. `gradacc.optim.sharded` updates parameters with them, and has an optimizer's state for that part
    only (ZeRO-1; with ``overlap`` ZeRO-2). Value, weight and metrics are the union's on every rank, and ranks agree and fail
    together, as `gradacc.all_reduce` says. One collective a call (one for each accumulator dtype and device, and bucket),
    of half the bytes of an all-reduce; the other half is the new parameters'.

    Where the backend is gloo, values cross by an all-to-all and are summed on the rank that receives them, in rank order, in
    the accumulators' dtype: the bits of ``all_reduce(ordered=True)``. (gloo has no reduce-scatter of its own: torch's sends
    what an all-reduce does.) NCCL reduces and scatters by itself, in an order of its own.

    Parameters may be DTensors of placement ``Shard(0)``, as ``fully_shard`` leaves them: they are gathered before the call
    differentiates anything, in one more collective, and their gradients are DTensors like them. See ``docs/fsdp.md``.

    Arguments:
        group: as of `gradacc.all_reduce`. Without ranks to talk to, a part is the whole.
        compress: `torch.bfloat16`: gradients cross in it, rounded once, and are summed in float32. (float16, whose sums may
            have to cross once more, is for `gradacc.all_reduce`.)
        overlap: buckets leave while the last micro-batch's backward pass still runs, as with `gradacc.all_reduce`; their memory
            is given back meanwhile, so that beside the gradients there are only some buckets (of at least one tensor each).

    Raises:
        TypeError: an option of another type; when called, a DTensor of other placements. Further errors are those of
            `gradacc.all_reduce`.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(params, batch):
        ...     return (batch @ params["w"] - 1).square().mean()
        >>> grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2, sync=gradacc.reduce_scatter())
        >>> optimizer = gradacc.optim.sharded(gradacc.optim.adamw(0.1))
        >>> params = {"w": torch.zeros(2)}
        >>> state = gradacc.TrainState(params, optimizer.init(params))
        >>> step = gradacc.train_step(grad_fn, optimizer)
        >>> state, metrics = step(state, torch.eye(2).repeat(4, 1))
        >>> state.params["w"]
        tensor([0.1000, 0.1000])

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
    arXiv 1910.02054.
    """
    if compress is not None and compress != torch.bfloat16:
        raise TypeError(
            f"reduce_scatter: compress must be torch.bfloat16, got {compress!r}"
            + (", which is for all_reduce" if compress == torch.float16 else "")
        )
    _all_reduce.check("reduce_scatter", group, overlap)
    return ReduceScatter(group, compress, overlap)
