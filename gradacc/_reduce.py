"""`all_reduce` and `reduce_scatter`: values for ``sync=``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradacc._describe import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class AllReduce:
    """What `all_reduce` returns."""

    group: Any
    compress: torch.dtype | None
    overlap: bool
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class ReduceScatter:
    """What `reduce_scatter` returns."""

    group: Any
    compress: torch.dtype | None
    overlap: bool


def all_reduce(
    group: ProcessGroup | DeviceMesh | None = None,
    *,
    compress: torch.dtype | None = None,
    overlap: bool = False,
    ordered: bool = False,
) -> AllReduce:
    r"""For ``sync=``: "one large batch" is then the union of the batches of all ranks.

    .. code-block:: text

        gradient = sum_r sum_i w_ri g_ri / sum_r sum_i w_ri       rank r, its micro-batch i of weight w_ri

    Ranks may hold different numbers of micro-batches, examples and tokens, or none at all (an empty batch, an empty list of
    micro-batches). A mean on one rank stays a mean over all of them: gradacc divides once, after the sum. The results have the
    same bits on every rank.

    Each call of ``grad_fn`` makes one all-reduce (a sum; with ``ordered`` or ``compress`` two collectives, an all-to-all and
    an all-gather), after the last micro-batch (for `gradacc.accumulator`: each call of ``finalize``), whatever the number of
    micro-batches, parameters and metrics. Parameters of several accumulator dtypes or devices need one, or two, for each. At
    first use the ranks also exchange descriptions once: if their parameters differ in structure, shape or dtype, all get the
    same error. Ranks must make the same calls in the same order; if a call raises on one rank, every rank raises, and nobody
    hangs. ``docs/ranks.md`` says what crosses, what happens when a rank fails or makes another call, how to end a script, and
    what is different when compiled.

    Arguments:
        group: a ProcessGroup, a one-dimensional DeviceMesh or one dimension of a mesh (``mesh["dp"]``); by default the
            default process group. Where there is none (a plain ``python train.py``), or it has one rank, nothing crosses.
        compress: gradients cross in this dtype, `torch.bfloat16` or `torch.float16`, half the bytes; weights, values
            and metrics stay exact. Each contribution is rounded once, they are summed in float32, and the sum is rounded once:
            with the dtype's unit roundoff u (2**-8, 2**-11), an element's error is at most about
            ``u (sum_r |c_r| + |sum_r c_r|)``, ``c_r = sum_i w_ri g_ri / sum w``, for any number of ranks.
            float16 is for mean gradients whose elements are larger than about 1e-3 where they count:
            ``docs/ranks.md`` has its range, and says when gradients cross once more, not compressed.
        overlap: send buckets of about 25 MB (of a fifth of all gradients, but at least 1 MB, where that is less; the first
            one of a dtype a sixteenth of that, the second a quarter) while the last micro-batch's backward pass still runs,
            on every rank in the order in which gradients were final in the first call, which does not overlap. Each bucket
            is an all-reduce (two collectives with ``ordered`` or ``compress``). For two ranks the bits are the same; for more,
            the sums are associated differently (not with ``ordered``, nor with ``compress``). An iterable of micro-batches is
            read one ahead. ``overlap`` pays where the network takes longer than packing (``docs/speed.md``).
        ordered: sums are in rank order, by an all-to-all and an all-gather in the place of an all-reduce (the bytes of a ring):
            then neither buckets nor the backend change a bit. With ``compress`` they always are.

    Raises:
        TypeError: an option of another type. The following errors come when ``grad_fn`` is called.
        RuntimeError: the environment says WORLD_SIZE > 1 and no process group was initialised.
        RuntimeError: on another rank the call has raised, or it made another call. And once where the weights of a `Mean`, on
            an accelerator, differ from the last call's by a factor of over a billion; the same call again goes through.
        ValueError: a weight on an accelerator, of any rank, is negative, infinite or NaN.
        ValueError: this process is not in ``group``; a mesh of several dimensions; parameters, options or losses that differ.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, x):
        ...     return (w * x).square().mean()
        >>> grad_fn = gradacc.accumulate(loss_fn, steps=2, sync=gradacc.all_reduce())
        >>> grad_fn(torch.ones(()), torch.arange(4.0))      # one process: nothing crosses
        tensor(7.)

    Source: PyTorch DDP (buckets, overlap: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel
    Training", VLDB 2020); torchtitan (count first, divide by the global count).
    """
    if compress is not None and compress not in (torch.bfloat16, torch.float16):
        raise TypeError(f"all_reduce: compress must be torch.bfloat16 or torch.float16, got {compress!r}")
    if not isinstance(ordered, bool):
        raise TypeError(f"all_reduce: ordered must be True or False, got {describe(ordered)}")
    _check("all_reduce", group, overlap)
    return AllReduce(group, compress, overlap, ordered)


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
    _check("reduce_scatter", group, overlap)
    return ReduceScatter(group, compress, overlap)


def _check(name: str, group: Any, overlap: Any) -> None:
    """What is no group, and no switch."""
    if not isinstance(overlap, bool):
        raise TypeError(f"{name}: overlap must be True or False, got {describe(overlap)}")
    if isinstance(group, (torch.dtype, str, list, tuple, set, bool)):
        raise TypeError(
            f"{name}: group must be a ProcessGroup, a DeviceMesh or None, got {describe(group)}. "
            "Make one with torch.distributed.new_group(ranks)"
        )
