"""What several means are divided by, where it is counted before the first forward pass: ``weights=``.

.. code-block:: text

    W_t = sum over micro-batches and ranks of weights(microbatch)_t
    loss = sum_t total_t / W_t                                          # one target, one gradient: NOTE [several means]

NOTE [counted twice]
    What was counted is divided by, and the loss counts again. Where both can be read they are compared at the end of a call,
    over all micro-batches and ranks: a difference is an error. Where they cannot (an accelerator, a transform), the gradients
    are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradacc import _batch, _call, _loss, _parts, _sums, _sync, _tree
from gradacc._describe import describe
from gradacc._loss import Divisors
from gradacc._mean import Mean
from gradacc._options import Options
from gradacc._parts import Sum, Total
from gradacc._reduce import AllReduce
from gradacc._sums import Sums

NEAR = 1e-5
"""How far apart, relatively, two sums of weights that are no whole numbers may be by rounding."""


def divisors(
    options: Options, weights: Callable[..., Any], agreed: _sync.Agreed | None, args: Sequence[Any]
) -> Divisors | None:
    """What ``weights`` counts in the batch of a call, over all ranks; None where there is no micro-batch."""
    boundary = _sync.connect(_counting(options), agreed)
    try:
        differentiated, batch = _call.positions(options, args)
        params, _ = _call.parameters(options, args, differentiated)
        nothing = torch.zeros((), device=params[0].device)
        boundary.bind([nothing], _tree.flatten(nothing)[1], [nothing.dtype], args[batch])
        sums = _count(options, weights, args, (differentiated, batch), nothing)
    except BaseException as error:
        boundary.fail(error)
        raise
    _, sums, _ = boundary.cross([None], sums, True, lambda sums: sums)
    boundary.done()
    if sums.value is None:
        return None
    parts, treedef = _sums.parts_of(sums.aux)
    assert treedef is not None
    return Divisors([_weight_of(part) for part in parts], treedef)


def check(options: Options, sums: Sums, divisors: Divisors) -> float | Tensor:
    """NOTE [counted twice]: 1, or NaN where it cannot be read and is wrong."""
    losses, treedef = _sums.parts_of(sums.value)
    right: float | Tensor = 1.0
    for place, (part, counted) in enumerate(zip(losses, divisors.weights, strict=True)):
        weight = _weight_of(part)
        if isinstance(weight, Tensor) or isinstance(counted, Tensor):
            right = right * torch.where(_is_near(weight, counted), 1.0, math.nan)
        elif not _is_near(weight, counted):
            assert treedef is not None
            raise ValueError(
                f"{options.name}: weights= counted {counted:g} for {_tree.paths(treedef, 'loss')[place]}, and the Means that "
                f"loss_fn returned for it weigh {weight:g} together. Count in weights what loss_fn counts"
            )
    return right


def _counting(options: Options) -> Options:
    """Of a call that sums what it counts, uncompressed."""
    sync = None if options.sync is None else AllReduce(options.sync.group, None, overlap=False)
    return options._replace(reduction="sum", has_aux=True, dtype=None, sync=sync)


def _count(
    options: Options,
    weights: Callable[..., Any],
    args: Sequence[Any],
    positions: tuple[Sequence[int], int],
    nothing: Tensor,
) -> Sums:
    """In this rank's batch: the whole of it, or one micro-batch of an iterable after another."""
    differentiated, batch = positions
    dims = _call.in_dims(options, args, differentiated, batch)
    split = [args[n] for n, dim in enumerate(dims) if dim is not None]
    if options.steps is not None or options.microbatch_size is not None:
        # Containers of its own, as the loss has.
        return _counted(options, weights(*(_tree.map_tensors(lambda leaf: leaf, arg) for arg in split)), nothing)
    if options.split is not None:
        return _counted(options, weights(*split), nothing)
    sums, parts = _sums.NOTHING, args[batch]
    if not _batch.is_iterable(parts):
        return sums  # which the call says
    if iter(parts) is parts:
        raise TypeError(
            f"{options.name}: weights= counts every micro-batch before the first forward pass, and the batch is "
            f"{describe(parts)}, which gives them once. Pass them as a list, or leave weights= out"
        )
    for part in parts:
        sums = _sums.merge(options, sums, _counted(options, weights(part), nothing))[0]
    return sums


def _counted(options: Options, found: Any, nothing: Tensor) -> Sums:
    leaves, treedef = _tree.flatten(found)
    if not isinstance(found, (tuple, list, dict)) or not leaves:
        raise TypeError(
            f"{options.name}: weights returned {describe(found)}; return a tuple, list or dict like the loss's, of numbers or "
            "0-dim tensors"
        )
    weights = [_loss.weight(options, leaf, nothing, "weights returned") for leaf in leaves]
    parts = [Total(Mean(nothing, weight), nothing.dtype) for weight in weights]
    value, aux = Sum(nothing, nothing.dtype), _tree.unflatten(treedef, parts)
    return Sums(value=value, aux=aux, weight=1.0, unit=1.0, differentiated=False)


def _weight_of(part: _parts.Part) -> float | Tensor:
    assert isinstance(part, Total)
    return _sums.read(part.mean.weight)


def _is_near(one: float | Tensor, other: float | Tensor) -> Any:
    """Whole numbers are the same, others by rounding."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        a, b = (torch.as_tensor(number).to(torch.float64) for number in (one, other))
        return (a == b) | (((a != a.round()) | (b != b.round())) & ((a - b).abs() <= NEAR * b.abs()))
    # float() would fix a number that Dynamo holds symbolic.
    whole = all(isinstance(number, int) or number.is_integer() for number in (one, other))
    return one == other if whole else math.isclose(one, other, rel_tol=NEAR)
