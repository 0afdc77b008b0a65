"""The options of a factory, checked once, before the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from gradacc._all_reduce import AllReduce
from gradacc._describe import describe
from gradacc._values import positive_int

Reduction = Literal["mean", "sum"]
"""What a loss that is a plain tensor is over its examples."""


Nonfinite = Literal["keep", "drop"]
"""What becomes of a micro-batch with a NaN or inf in its loss or gradient."""


Backward = Literal["auto", "recompute", "forward"]
"""How the gradients of pieces are taken: by running each again, or with the forward pass."""


class _LossOptions(TypedDict, total=False):
    in_dims: tuple[Any, ...] | None
    argnums: int | tuple[int, ...]
    has_aux: bool
    reduction: Reduction
    dtype: torch.dtype | None
    sync: AllReduce | None
    nonfinite: Nonfinite


class AccumulateOptions(_LossOptions, total=False):
    """The options of `accumulate` and `accumulate_and_value`, for ``**options`` of a function around one of them."""

    weights: Callable[..., Any] | None
    steps: int | None
    microbatch_size: int | None
    split: Callable[[Any], Any] | None


class AccumulatorOptions(_LossOptions, total=False):
    """The options of `accumulator`."""

    donate: bool


class Given(NamedTuple):
    """The options of a factory, as they came."""

    steps: Any = None
    microbatch_size: Any = None
    split: Any = None
    in_dims: Any = None
    argnums: Any = 0
    has_aux: Any = False
    reduction: Any = "mean"
    dtype: Any = None
    sync: Any = None
    nonfinite: Any = "keep"
    weights: Any = None


class Options(NamedTuple):
    """The options of a factory, checked; ``name`` is the factory's, for messages."""

    name: str
    steps: int | None
    microbatch_size: int | None
    split: Callable[[Any], Any] | None
    in_dims: tuple[Any, ...] | None
    argnums: int | tuple[int, ...]
    has_aux: bool
    reduction: Reduction
    dtype: torch.dtype | None
    sync: AllReduce | None
    nonfinite: Nonfinite
    weights: Callable[..., Any] | None


def options(name: str, loss_fn: Any, given: Given) -> Options:
    """Check everything that is known before the first batch."""
    if isinstance(loss_fn, nn.Module):
        raise TypeError(
            f"{name}: loss_fn is an nn.Module ({type(loss_fn).__name__}), which does not take its parameters as an "
            "argument. Use apply, params, buffers = gradacc.functional(module), and call apply(params, ...) in loss_fn"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"{name}: loss_fn must be a function of (params, batch), got {describe(loss_fn)}; options are keyword-only, "
            "as in accumulate(loss_fn, steps=4)"
        )
    steps, microbatch_size, split = ways(name, given.steps, given.microbatch_size, given.split)
    if given.in_dims is not None and type(given.in_dims) is not tuple:
        raise TypeError(
            f"{name}: in_dims must be a tuple with an int, None or a pytree prefix for each positional argument, "
            f"for example (None, 0, 0) for loss_fn(params, x, y); got {describe(given.in_dims)}"
        )
    if not isinstance(given.has_aux, bool):
        raise TypeError(f"{name}: has_aux must be True or False, got {describe(given.has_aux)}")
    if given.reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {given.reduction!r}")
    check_dtype(name, given.dtype)
    _check_weights(name, given)
    check_sync(name, given.sync)
    return Options(
        name=name,
        steps=steps,
        microbatch_size=microbatch_size,
        split=split,
        in_dims=given.in_dims,
        argnums=_argnums(name, given.argnums),
        has_aux=given.has_aux,
        reduction=given.reduction,
        dtype=given.dtype,
        sync=given.sync,
        nonfinite=given.nonfinite,
        weights=given.weights,
    )


def ways(
    name: str, steps: Any, microbatch_size: Any, split: Any
) -> tuple[int | None, int | None, Callable[[Any], Any] | None]:
    """How a batch is divided, checked: at most one of the three is given."""
    given = {"steps": steps, "microbatch_size": microbatch_size, "split": split}
    both = [way for way, value in given.items() if value is not None]
    if len(both) > 1:
        raise ValueError(f"{name}: got {' and '.join(both)}; give one of them, or none and an iterable as the batch")
    if split is not None and not callable(split):
        raise TypeError(
            f"{name}: split must be a function of the batch that yields micro-batches, got {describe(split)}"
        )
    return (
        None if steps is None else positive_int(name, "steps", steps),
        None if microbatch_size is None else positive_int(name, "microbatch_size", microbatch_size),
        split,
    )


def check_dtype(name: str, dtype: Any) -> None:
    """What is summed in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise TypeError(
            f"{name}: dtype must be a floating torch.dtype of 16 bits or more (torch.float32), got {dtype!r}"
        )


def check_sync(name: str, sync: Any) -> None:
    """How ranks are added up."""
    if sync is not None and not isinstance(sync, AllReduce):
        raise TypeError(f"{name}: sync must be gradacc.all_reduce(...), got {describe(sync)}")


def _check_weights(name: str, given: Given) -> None:
    """What micro-batches count for: ``nonfinite`` and ``weights``."""
    if given.nonfinite not in ("keep", "drop"):
        raise ValueError(f"{name}: nonfinite must be 'keep' or 'drop', got {given.nonfinite!r}")
    if given.weights is not None and given.nonfinite == "drop":
        raise ValueError(
            f"{name}: got weights, which are counted before anything is dropped, and nonfinite='drop'; leave weights out (each "
            "mean then has gradients of its own)"
        )
    if given.weights is not None and not callable(given.weights):
        raise TypeError(
            f"{name}: weights must be a function of the batch that returns the weight of each Mean in the loss, got "
            f"{describe(given.weights)}"
        )
    if given.weights is not None and given.reduction == "sum":
        raise ValueError(
            f"{name}: got weights, by which several means are divided, and reduction='sum', of a loss that is not divided; "
            "leave one of them out"
        )


def _argnums(name: str, argnums: Any) -> int | tuple[int, ...]:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"{name}: argnums must be an int or a non-empty tuple of ints, got {argnums!r}")
    return argnums  # type: ignore[no-any-return]  # just checked
