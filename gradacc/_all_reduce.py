"""`all_reduce`: a value for ``sync=``."""

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


def all_reduce(
    group: ProcessGroup | DeviceMesh | None = None, *, compress: torch.dtype | None = None, overlap: bool = False
) -> AllReduce:
    r"""For ``sync=``: "one large batch" is then the union of the batches of all ranks.

    .. code-block:: text

        gradient = sum_r sum_i w_ri g_ri / sum_r sum_i w_ri       rank r, its micro-batch i of weight w_ri

    Ranks may hold different numbers of micro-batches, examples and tokens, or none at all (an empty batch, an empty list of
    micro-batches). What is a mean on one rank stays one over all of them: it is divided once, after the sum. The results
    have the same bits on every rank.

    **What crosses, and when.** One all-reduce (a sum) in each call of ``grad_fn``, after the last micro-batch (of
    `gradacc.accumulator`: in each call of ``finalize``), whatever the number of micro-batches, parameters and metrics; one for
    each accumulator dtype and device, where the parameters have several. It carries every gradient (in the accumulators' dtype:
    float32 for half precision), `Mean` and 0-dim leaves of ``aux``, and for each rank a record of about 100 bytes with its
    weight and value, which cross exactly. Per step and rank that is ``4 bytes x parameters`` of float32 to reduce, of which a
    ring sends ``2 (W - 1) / W`` times as much. Leaves of ``aux`` that are concatenated stay on their rank. A `Mean` leaf that
    is not 0-dim crosses in its own dtype, in a call of its own where no gradient has that dtype. At first use one exchange
    more, of descriptions: ranks whose parameters differ in structure, shape or dtype all get the same error.

    **Failure.** If the call raises on one rank, wherever it does (parameters of a wrong kind, the loss, the loader, aux that
    cannot be packed), that rank raises its error, and every other one a RuntimeError that names it; nobody hangs, and the next
    call is exact on all ranks. A rank that is interrupted (KeyboardInterrupt) tells the others in its next call. If it raised
    when the others already had their results (no memory for its own), the next call is an error on every rank that says so, as
    their parameters may differ: load a checkpoint, and go on. If a rank is killed or does not come, the others raise a
    RuntimeError that names the group, at the latest after the process group's timeout
    (``init_process_group(timeout=...)``). A NaN on one rank is a NaN on all.

    **The end.** With gloo, end a script by ``torch.distributed.destroy_process_group()`` in a ``finally``. Otherwise one of its
    threads may still hold the last collective's tensors when Python takes itself apart, and end the process by SIGABRT
    ("terminate called without an active exception"), after a last call that raised and after one that did not. It is so in
    plain torch. ``destroy_process_group()`` waits for that thread, unless something else still holds the group (a variable,
    ``all_reduce(group)``).

    **Order.** Ranks must make the same calls in the same order. The n-th call of a rank in a group meets the n-th call of the
    others, and each says what it is (of which ``grad_fn``, and its number); where that differs, every rank gets the same
    RuntimeError, which names all the calls, and nothing is returned. Catch it on every rank and go on from the same place on
    all of them: the numbers are the same again from the next call on. Several ``grad_fn`` are told apart by where their
    losses are written; of several that one piece of code makes (closures), by the order in which they were made for this group,
    so every rank must make all of them, in the same order. A call that a rank leaves out is not noticed: its next one, with its
    next window, takes its place, and the others wait for its last one. Where calls of several, of different sizes, come in a
    new order, one all-reduce more crosses, of the size of the one that was expected.

    What is returned for one call are views of one tensor for each dtype: keeping one gradient keeps all. Only where the
    strides of a parameter are not a contiguous tensor's, and leave no gaps (``channels_last``, a transpose), its gradient is
    copied out, into the same strides; that of an `accumulator` on a rank that had no micro-batch is contiguous. Compiled
    (`torch.compile(grad_fn)`), the all-reduce is a node of the graph: nothing is compared or told then, ``overlap`` is left
    out, and a rank needs at least an empty batch of the right shape.

    Arguments:
        group: a ProcessGroup, a one-dimensional DeviceMesh or one dimension of a mesh (``mesh["dp"]``); by default the
            default process group. Where there is none (a plain ``python train.py``), or it has one rank, nothing crosses.
        compress: gradients cross in this dtype, `torch.bfloat16` or `torch.float16`, half the bytes; weights, values
            and metrics stay exact. With W ranks and the dtype's unit roundoff u (2**-8, 2**-11), an element's error is at
            most about ``W u sum_r |c_r|``, ``c_r = sum_i w_ri g_ri / sum w``: each contribution is rounded once, then the
            partial sums. float16 is for mean gradients whose elements are larger than about 1e-3 where they count: below
            2**-12 they lose digits, and below 2**-23 they are 0 (with ``reduction="sum"``, where nothing says what they could
            be divided by, it is the elements of the sums). That holds for any weights: where the total weight is not within a
            factor of 4 (or so) of that of the call before, where a sum is not finite, or where no element of any gradient is
            above 2**-14, gradients cross once more, not compressed, so that nothing overflows or vanishes which would not in
            the accumulators' dtype. They are kept until then.
        overlap: send buckets of about 25 MB (of a fifth of all gradients, but at least 1 MB, where that is less; the first
            one of a dtype a sixteenth of that, the second a quarter) while the last micro-batch's backward pass still runs,
            on every rank in the order in which gradients were final in the first call, which does not overlap. As many
            all-reduces as there are buckets; the same bits for two ranks, for more the sums are associated differently. An
            iterable of micro-batches is read one ahead. It pays where the network takes longer than packing
            (``benchmarks/boundary.py``).

    Raises:
        TypeError: an option of another type. What follows comes when ``grad_fn`` is called.
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
    if not isinstance(overlap, bool):
        raise TypeError(f"all_reduce: overlap must be True or False, got {describe(overlap)}")
    if isinstance(group, (torch.dtype, str, list, tuple, set, bool)):
        raise TypeError(
            f"all_reduce: group must be a ProcessGroup, a DeviceMesh or None, got {describe(group)}. "
            "Make one with torch.distributed.new_group(ranks)"
        )
    return AllReduce(group, compress, overlap)
