"""The transform of any function: `microbatch`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypedDict, Unpack, overload

import torch

from gradacc import _options, _sync, _where
from gradacc._describe import describe
from gradacc._options import Backward
from gradacc._pieces import composite, divide, functional, node, outputs, ranks
from gradacc._reduce import AllReduce, ReduceScatter

_NAME = "microbatch"


class MicrobatchOptions(TypedDict, total=False):
    """The options of `microbatch`, for ``**options`` of a function around it."""

    steps: int | None
    microbatch_size: int | None
    split: Callable[[Any], Any] | None
    in_dims: Any
    out_dims: Any
    out: Any
    dtype: torch.dtype | None
    backward: Backward
    sync: AllReduce | None


@overload
def microbatch(func: Callable[..., Any], **options: Unpack[MicrobatchOptions]) -> Callable[..., Any]: ...
@overload
def microbatch(
    func: None = None, **options: Unpack[MicrobatchOptions]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
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
    backward: Backward = "auto",
    sync: AllReduce | None = None,
) -> Callable[..., Any]:
    """Any function piece by piece, and gradients through it, in the memory of a piece.

    .. code-block:: text

        microbatch(func, steps=k)(x) = func(x)        where func treats the rows of x one by one (out="concat"),
                                                      or sums over them (out="sum", "mean", "max", "min", a Mean)

    It replaces this loop, and ``torch.utils.checkpoint`` around its body, which `torch.func` refuses:

    .. code-block:: python

        outputs = [func(piece) for piece in x.split(size)]               # each with its activations
        return torch.cat(outputs)

    ``microbatch(func, steps=1)`` is the functional activation checkpoint; ``microbatch(torch.vmap(func), microbatch_size=m)``
    is `torch.vmap` in chunks. ``docs/microbatch.md`` has a language model's head, a tiled MLP, and what composes with what.

    Arguments:
        func: any function of tensors (a module, too). Its positional arguments are split, keyword arguments are passed whole.
            It returns a pytree of tensors, numbers and None, of the same structure for every piece.
        steps: at most this many pieces, of `torch.tensor_split`'s sizes: they differ by at most one.
        microbatch_size: pieces of this many examples; the last one may be smaller.
        split: ``split(batch)`` yields the pieces of the one argument that ``in_dims`` does not pass whole. Without these three,
            that argument *is* an iterable of pieces.
        in_dims: along which dimension arguments are split, as in `torch.vmap`: an int for all, or a tuple with an int, None
            ("passed whole") or a pytree prefix of them for each. ``in_dims=(None, 1), out_dims=1`` tiles a (batch, tokens,
            width) tensor over its tokens.
        out_dims: along which dimension outputs are put together (``"concat"``, ``"stack"``): an int or a pytree prefix of them.
        out: how outputs are put together, a pytree prefix of: ``"concat"``; ``"sum"``; ``"mean"``, weighted by examples;
            ``"max"``, ``"min"`` (ties share the gradient); ``"stack"``, one row a piece; or a value with pure functions
            ``init(leaf)``, ``update(state, leaf)``, ``finalize(state)``. A `Mean` adds up without being told. A Python number
            under ``"concat"`` must be the same of every piece.
        dtype: sum in this floating dtype, and return sums in it. By default float16 and bfloat16 are summed in float32 and cast
            back, integers and bools in int64. Gradients of what is passed whole are summed likewise, and rounded once.
        backward: ``"recompute"``: the backward pass runs each piece again (its random numbers too) and keeps inputs only.
            ``"forward"``: where one differentiable 0-dim output is summed, its gradients are taken with the forward pass, and
            only scaled in the backward pass. ``"auto"``: the second where it applies (and no float16 could overflow), else the
            first. Under `torch.func`'s transforms all recompute; while Dynamo traces, pieces are checkpoints.

        sync: `gradacc.all_reduce`: sums, means and each `Mean` are then of all ranks' examples, and cross once a call; what
            is concatenated stays on its rank. For evaluation: such results have no gradient.

    Returns:
        ``by_pieces(*args, **kwargs)``, which returns what ``func`` would have, in new tensors. Derivatives of any order go
        through it, with respect to its arguments and to what ``func`` closes over.

    Raises:
        TypeError, ValueError: options that contradict each other; arguments that cannot be split, or disagree in size; outputs
            of another structure, shape or dtype from piece to piece, or that cannot be put together as ``out`` says;
            ``backward="forward"`` where it does not apply; a closed-over tensor whose gradient would be lost.
        RuntimeError: in a backward pass: what it needs has changed in place; ``func`` uses other tensors than before.

    The equality fails where rows see each other (BatchNorm in training mode is an error where it would run twice), and for
    random numbers, which are drawn piece after piece. What is run again must be the same: ``func`` changes nothing outside
    of itself.

    Example:
        >>> import torch, torch.nn.functional as F, gradacc
        >>> def head(hidden, labels, weight):                        # logits of one piece at a time
        ...     loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=-100)
        ...     return gradacc.Mean(loss, (labels != -100).sum())
        >>> hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
        >>> labels = torch.tensor([3, 1, -100, 7, 4, -100, 0, 2, 9, 11])
        >>> loss = gradacc.microbatch(head, microbatch_size=4, in_dims=(0, 0, None))(hidden, labels, weight).value
        >>> expected = F.cross_entropy(hidden @ weight.T, labels)
        >>> torch.testing.assert_close(loss, expected)
        >>> torch.testing.assert_close(
        ...     torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
        ... )

    Source: ``optax.microbatching.microbatch``; Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    if func is None:
        return functools.partial(
            microbatch,
            steps=steps,
            microbatch_size=microbatch_size,
            split=split,
            in_dims=in_dims,
            out_dims=out_dims,
            out=out,
            dtype=dtype,
            backward=backward,
            sync=sync,
        )
    if not callable(func):
        raise TypeError(f"{_NAME}: func must be a function, got {describe(func)}; options are keyword-only")
    if backward not in ("auto", "recompute", "forward"):
        raise ValueError(f"{_NAME}: backward must be 'auto', 'recompute' or 'forward', got {backward!r}")
    if not isinstance(in_dims, (int, tuple)) or isinstance(in_dims, bool):
        raise TypeError(
            f"{_NAME}: in_dims must be an int, or a tuple with an int, None or a pytree prefix for each positional argument, "
            f"got {describe(in_dims)}"
        )
    _options.check_dtype(_NAME, dtype)
    _options.check_sync(_NAME, sync)
    if isinstance(sync, ReduceScatter):
        raise TypeError(
            f"{_NAME}: sync is gradacc.reduce_scatter(...), which divides gradients among ranks, and outputs have none; use "
            "gradacc.all_reduce(...)"
        )
    ways = divide.Ways(_NAME, *_options.ways(_NAME, steps, microbatch_size, split), in_dims)
    outs = outputs.Outs(_NAME, out, out_dims, dtype)
    return by_pieces(func, ways, outs, backward) if sync is None else _over_ranks(func, ways, outs, sync)


def by_pieces(
    func: Callable[..., Any], ways: divide.Ways, outs: outputs.Outs, backward: Backward
) -> Callable[..., Any]:
    """The transform, of options that have been checked."""

    @functools.wraps(func, updated=())
    def in_pieces(*args: Any, **kwargs: Any) -> Any:
        pieces = divide.pieces(ways, args, kwargs)
        with _where.dividing():
            if not _where.under_transform():
                return node.run(func, pieces, outs, backward)
            if _where.functorch_is_active() and not torch.compiler.is_compiling():
                return functional.run(func, pieces, outs)
            return outputs.unflatten(*composite.run(func, pieces, outs, checkpoints=_where.loops()))

    return in_pieces


def _over_ranks(func: Callable[..., Any], ways: divide.Ways, outs: outputs.Outs, sync: AllReduce) -> Callable[..., Any]:
    agreed = _sync.Agreed(_NAME, func, sync.group)
    # Of a call that sums, uncompressed.
    uncompressed = AllReduce(sync.group, None, overlap=False)
    options = _options.options(_NAME, ranks.run, reduction="sum", has_aux=True, sync=uncompressed)

    @functools.wraps(func, updated=())
    def by_pieces(*args: Any, **kwargs: Any) -> Any:
        if _where.under_transform():
            raise NotImplementedError(
                f"{_NAME}: sync= under a transform or in a compiled function is not available; call it outside, or "
                "leave sync out"
            )
        with _where.dividing():
            return ranks.run(options, agreed, functools.partial(divide.pieces, ways, args, kwargs), func, outs)

    return by_pieces
