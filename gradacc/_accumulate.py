"""The transforms: `accumulate` and `accumulate_and_value`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from gradacc import _call, _carry, _connect, _lengths, _loop, _options, _split, _sync, _tree, _weights, _where
from gradacc._describe import describe
from gradacc._options import AccumulateOptions, Nonfinite, Options, Reduction, Sync, Through
from gradacc._through import stages


@overload
def accumulate(loss_fn: Callable[..., Any], **options: Unpack[AccumulateOptions]) -> Callable[..., Any]: ...
@overload
def accumulate(
    loss_fn: None = None, **options: Unpack[AccumulateOptions]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def accumulate(
    loss_fn: Callable[..., Any] | None = None,
    *,
    steps: int | Mapping[str, int] | None = None,
    microbatch_size: int | Mapping[str, int] | None = None,
    split: Callable[[Any], Any] | None = None,
    in_dims: tuple[Any, ...] | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    dtype: torch.dtype | None = None,
    sync: Sync | None = None,
    nonfinite: Nonfinite = "keep",
    weights: Callable[..., Any] | None = None,
    has_carry: bool = False,
    through: Through | None = None,
) -> Callable[..., Any]:
    """The gradient of one large batch, in the memory of a micro-batch.

    .. code-block:: text

        accumulate(f, steps=k)(params, batch) = torch.func.grad(f)(params, batch)

    `accumulate_and_value` without the value: same arguments, same errors, same edge cases, told there.

    Returns:
        ``grad_fn(params, batch, *args, **kwargs)``, which returns ``grads``, or ``(grads, aux)`` with ``has_aux``.

    Example:
        >>> import torch, gradacc
        >>> @gradacc.accumulate(steps=2)
        ... def grad_fn(w, x):
        ...     return (w * x).sum(dim=1).square().mean()
        >>> grad_fn(torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        tensor([52.6667, 66.6667])
    """
    given: dict[str, Any] = {
        "steps": steps,
        "microbatch_size": microbatch_size,
        "split": split,
        "in_dims": in_dims,
        "argnums": argnums,
        "has_aux": has_aux,
        "reduction": reduction,
        "dtype": dtype,
        "sync": sync,
        "nonfinite": nonfinite,
        "weights": weights,
        "has_carry": has_carry,
        "through": through,
    }
    if loss_fn is None:
        return functools.partial(accumulate, **given)
    return _without_value(_grad_and_value("accumulate", loss_fn, given), has_aux, has_carry)


@overload
def accumulate_and_value(
    loss_fn: Callable[..., Any], **options: Unpack[AccumulateOptions]
) -> Callable[..., tuple[Any, Any]]: ...
@overload
def accumulate_and_value(
    loss_fn: None = None, **options: Unpack[AccumulateOptions]
) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, Any]]]: ...
def accumulate_and_value(
    loss_fn: Callable[..., Any] | None = None,
    *,
    steps: int | Mapping[str, int] | None = None,
    microbatch_size: int | Mapping[str, int] | None = None,
    split: Callable[[Any], Any] | None = None,
    in_dims: tuple[Any, ...] | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    dtype: torch.dtype | None = None,
    sync: Sync | None = None,
    nonfinite: Nonfinite = "keep",
    weights: Callable[..., Any] | None = None,
    has_carry: bool = False,
    through: Through | None = None,
) -> Callable[..., Any]:
    """The gradient and the value of one large batch, in the memory of a micro-batch.

    .. code-block:: text

        accumulate_and_value(f, steps=k)(params, batch) = torch.func.grad_and_value(f)(params, batch)

    The two sides are equal to rounding for any ``k``, and bit for bit for ``k = 1`` (the bits are plain autograd's; torch.func
    decomposes the backward pass of ``group_norm``, and differs there). For a mean over examples it replaces this loop:

    .. code-block:: python

        grads, value = 0, 0
        for microbatch in split(batch):                                  # at most `steps`, sizes differ by at most one
            share = examples(microbatch) / examples(batch)
            g, v = torch.func.grad_and_value(loss_fn)(params, microbatch)
            grads, value = grads + share * g, value + share * v

    ``docs/batches.md`` has the edge cases (empty batches, weight 0, half precision), ``docs/transforms.md`` the table of what
    composes with what, and ``docs/limits.md`` the losses for which the equality fails: examples that see each other
    (BatchNorm in training mode), random numbers. `gradacc.testing.check_accumulation` tests yours.

    Arguments:
        loss_fn: ``loss_fn(params, batch, *args, **kwargs)``. It returns a 0-dim floating tensor (the mean over the examples, or
            with ``reduction="sum"`` their sum), a `Mean` (a mean over tokens, pixels or edges: ``total / weight``), or a tuple,
            list or dict of `Mean`s (the sum of their values; a backward pass and gradients for each). With ``has_aux`` it
            returns ``(loss, aux)``. Without ``loss_fn`` the result is a decorator: ``@accumulate_and_value(steps=4)``.
        steps: at most this many micro-batches, of `torch.tensor_split`'s sizes: they differ by at most one.
        microbatch_size: micro-batches of this many examples; the last one may be smaller.
        split: ``split(batch)`` yields the micro-batches. Without these three, the batch *is* an iterable of micro-batches of
            any sizes, which is consumed lazily. A list or tuple of bare tensors may also be one batch in parts (a
            ``DataLoader`` yields ``[x, y]``): it is an error where they do not go together, and a warning where they are alike.
            ``split=iter`` says that they are micro-batches.
        in_dims: what is split, as in `torch.vmap`: a tuple with an int, None ("passed whole") or a pytree prefix of them for
            each positional argument, ``(None, 0, 0)`` for ``loss_fn(params, x, y)``. By default the first argument that is not
            differentiated is split along dim 0. Tensors are split by views; Python numbers, bools, None and a lone string are
            passed whole; other leaves are an error. The micro-batches of an iterable are counted along these dims.
        argnums: what is differentiated, pytrees of floating or complex tensors: an int, or a tuple for a tuple of gradients.
        has_aux: ``loss_fn`` returns ``(loss, aux)``. In the pytree ``aux``, `Mean` leaves add up, tensors with a leading batch
            dimension are concatenated (from copies), 0-dim floating tensors are averaged with the loss's weights (with numbers
            of examples under ``reduction="sum"``), and anything else is an error.
        reduction: what a loss that is a plain tensor is over its examples, ``"mean"`` or ``"sum"``.
        dtype: accumulate in this floating dtype, and return gradients in it (complex ones in its complex counterpart). By
            default float16 and bfloat16 are accumulated in float32 and cast back; other dtypes accumulate in themselves.
        sync: `gradacc.all_reduce` or `gradacc.reduce_scatter`: the large batch is then the union of all ranks' batches.
        nonfinite: ``"drop"``: a micro-batch with a NaN or inf in loss or gradient counts as weight 0; the value is a `Kept`.
        through: ``encode(params, batch)``, for a loss over the whole batch (contrastive, ranking): it is run for each
            micro-batch, twice, and ``loss_fn(params, outputs, batch)`` once, for all outputs (a row an example). The
            gradient is that of ``loss_fn(params, encode(params, batch), batch)``. A dict of functions gives a dict of outputs;
            ``steps`` and ``microbatch_size`` may be dicts then. With ``sync``, outputs are of all ranks: ``docs/through.md``.
        weights: ``weights(batch)``, of several means: the weight of each, in their structure, counted before the first forward
            pass (of what is split of the arguments; of a list of micro-batches one by one). One backward pass is then enough.
        has_carry: ``loss_fn(params, batch, carry=c)`` returns ``(usual, c)``, and so does ``grad_fn``. ``c`` is a tree of
            tensors, which go from one micro-batch to the next, and of `Mean`s and `Moments`, which add up: ``docs/state.md``.

    Returns:
        ``grad_fn(params, batch, *args, **kwargs)``, which returns ``(grads, value)``, or ``(grads, (value, aux))`` with
        ``has_aux``. ``grads`` has the structure, shapes and (without ``dtype=``) dtypes of the differentiated arguments;
        with `gradacc.reduce_scatter` its leaves are this rank's parts (`gradacc.Shard`), or DTensors where the arguments' are.
        ``value`` has the type that ``loss_fn`` returns (a 0-dim tensor where an empty iterable says nothing of it). All are
        new; nothing passed in is changed. Transforms batch and differentiate them as they do `torch.func.grad`'s. They are
        detached, unless an argument requires grad and grad mode is enabled: ``docs/transforms.md``.

    Raises:
        TypeError: parameters that are not floating or complex tensors (an ``nn.Module``, integers; DTensors: docs/fsdp.md);
            batch leaves that cannot be split (NumPy arrays, strings, lists with an item for each example, sparse and nested
            tensors); a loss that is not a floating tensor or a `Mean` of one.
        ValueError: options that contradict each other; split dimensions that differ; a loss that is not 0-dim or does not
            depend on the parameters; a negative, infinite or NaN weight, where it is a number or on the CPU (on an accelerator
            it makes the gradients and the value NaN: ``docs/limits.md``); reentrant checkpointing.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(params, batch):
        ...     return (batch["x"] @ params["w"] - batch["y"]).square().mean()
        >>> params = {"w": torch.ones(3, dtype=torch.float64)}
        >>> batch = {"x": torch.arange(21, dtype=torch.float64).view(7, 3), "y": torch.zeros(7, dtype=torch.float64)}
        >>> actual = gradacc.accumulate_and_value(loss_fn, steps=3)(params, batch)     # 7 examples: 3, 2, 2
        >>> torch.testing.assert_close(actual, torch.func.grad_and_value(loss_fn)(params, batch))

    Source: ``optax.microbatching.microbatch``; torchtitan's trainer (count first); Gao et al., arXiv 2101.06983 (``through``).
    """
    given: dict[str, Any] = {
        "steps": steps,
        "microbatch_size": microbatch_size,
        "split": split,
        "in_dims": in_dims,
        "argnums": argnums,
        "has_aux": has_aux,
        "reduction": reduction,
        "dtype": dtype,
        "sync": sync,
        "nonfinite": nonfinite,
        "weights": weights,
        "has_carry": has_carry,
        "through": through,
    }
    if loss_fn is None:
        return functools.partial(accumulate_and_value, **given)
    return _grad_and_value("accumulate_and_value", loss_fn, given)


class _Lasting(NamedTuple):
    """What a ``grad_fn`` has from one call to the next."""

    agreed: _sync.Agreed | None
    counting: _sync.Agreed | None
    """Of the calls that count weights."""
    note: Callable[[int], None]
    """Of the lists for which it is compiled."""
    first: Callable[[], bool]
    """Whether it is asked for the first time."""


def _grad_and_value(name: str, loss_fn: Callable[..., Any], given: dict[str, Any]) -> Callable[..., Any]:
    options = _options.options(name, loss_fn, **given)
    agreed = counting = None
    if options.sync is not None:
        agreed = _sync.Agreed(name, loss_fn, options.sync.group)
        if options.weights is not None:
            counting = _sync.Agreed(f"{name}, weights", options.weights, options.sync.group)
    once = itertools.chain([True], itertools.repeat(False))
    lasting = _Lasting(agreed, counting, _lengths.lengths(name), functools.partial(next, once))

    @functools.wraps(loss_fn, updated=())  # the __dict__ of a compiled loss holds Dynamo's marks, which are not ours
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        return _run(options, lasting, loss_fn, args, kwargs)

    return grad_fn


def _without_value(grad_and_value: Callable[..., Any], has_aux: bool, has_carry: bool) -> Callable[..., Any]:
    @functools.wraps(grad_and_value)
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        results = grad_and_value(*args, **kwargs)
        (grads, rest), carry = results if has_carry else (results, None)
        usual = (grads, rest[1]) if has_aux else grads
        return (usual, carry) if has_carry else usual

    return grad_fn


def _run(
    options: Options,
    lasting: _Lasting,
    loss_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One call of ``grad_fn``: ``finalize . sync . fold . init``."""
    args, homes = _sync.whole(options, args)
    divisors = None if options.weights is None else _weights.divisors(options, options.weights, lasting.counting, args)
    boundary = _sync.connect(options, lasting.agreed, homes)
    try:
        differentiated, batch = _call.positions(options, args)
        params, treedef = _call.parameters(options, args, differentiated)
        rest = [arg for n, arg in enumerate(args) if n not in differentiated]
        call = _connect.call_to_connect((args, kwargs), params, (rest, kwargs))
        named, carry = _carry.of_call(options.name, kwargs) if options.has_carry else (kwargs, None)
        loss = _loop.loss_of(options, loss_fn, args, differentiated, treedef, (named, carry))
        fold = _loop.start(options, params, treedef, loss, divisors, carry)
        boundary.bind(params, treedef, fold.accumulated, args[batch])
        with _where.dividing():
            if options.through is None:
                fold, folded = _fold(options, lasting, fold, (args, kwargs), (differentiated, batch), boundary)
            else:
                given = stages.Given(loss_fn, args, kwargs, (differentiated, batch))
                fold, folded = stages.run(fold, given, boundary, lasting.first)
        buffer, sums, empty = folded
    except BaseException as error:
        boundary.fail(error)
        raise
    results, carried = _loop.finish(fold, buffer, sums, boundary, lambda sums: _loop.typed(fold, sums, empty))
    if call is None:
        return (results, carried) if options.has_carry else results
    alone = _Lasting(None, None, lasting.note, lasting.first)
    again = _why_not_again(boundary.crosses or bool(homes), args[batch]) or functools.partial(
        _run, options, alone, loss_fn
    )
    results = _connect.connect(options.name, call, results, buffer.closed_over(), again)
    # The carry has no graph: what it was computed from ends with the call.
    return (results, carried) if options.has_carry else results


def _fold(
    options: Options,
    lasting: _Lasting,
    fold: _loop.Fold,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    positions: tuple[Sequence[int], int],
    boundary: _sync.Boundary,
) -> tuple[_loop.Fold, _loop.Folded]:
    """Of micro-batches, each with a loss of its own."""
    args, kwargs = arguments
    divided = _split.microbatches(options, args, *positions)
    if divided.cut is not None and divided.cut.runs and divided.cut.runs[0].size == 1:
        _call.warn_unsplit(options, args, kwargs, *positions)
    if divided.cut is None and torch.compiler.is_compiling():
        divided = divided._replace(parts=_lengths.counting(divided.parts, lasting.note))
    return fold._replace(known=divided.examples), _loop.run(fold, divided, boundary)


def _why_not_again(crosses: bool, batch: Any) -> str | None:
    """Why a call cannot be made again, where it cannot, and what to do."""
    if crosses:
        return (
            "with sync= that is not possible: the other ranks would have to take part. "
            "Call grad_fn under torch.no_grad(), or with parameters that do not require grad, for results without a graph"
        )
    if not isinstance(batch, Tensor) and _tree.flatten(batch)[1].is_leaf():
        return (
            f"its batch was {describe(batch)}, which may not give the same micro-batches again. Pass them as a list, or "
            "call grad_fn under torch.no_grad() for results without a graph"
        )
    return None
