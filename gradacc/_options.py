"""The options of a factory, checked once, before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import nn

from gradacc._describe import describe
from gradacc._reduce import AllReduce, ReduceScatter
from gradacc._values import positive_int, takes_keyword

Reduction = Literal["mean", "sum"]
"""What a loss that is a plain tensor is over its examples."""


Nonfinite = Literal["keep", "drop"]
"""What becomes of a micro-batch with a NaN or inf in its loss or gradient."""


Backward = Literal["auto", "recompute", "forward"]
"""How the gradients of pieces are taken: by running each again, or with the forward pass."""


Through: TypeAlias = Callable[..., Any] | Mapping[str, Callable[..., Any]]
"""What encodes micro-batches for a loss over the whole batch."""


Sync: TypeAlias = AllReduce | ReduceScatter
"""How ranks are added up, and what each of them gets."""


class _LossOptions(TypedDict, total=False):
    in_dims: tuple[Any, ...] | None
    argnums: int | tuple[int, ...]
    has_aux: bool
    reduction: Reduction
    dtype: torch.dtype | None
    sync: Sync | None
    nonfinite: Nonfinite
    has_carry: bool


class AccumulateOptions(_LossOptions, total=False):
    """The options of `accumulate` and `accumulate_and_value`, for ``**options`` of a function around one of them."""

    weights: Callable[..., Any] | None
    through: Through | None
    steps: int | Mapping[str, int] | None
    microbatch_size: int | Mapping[str, int] | None
    split: Callable[[Any], Any] | None


class AccumulatorOptions(_LossOptions, total=False):
    """The options of `accumulator`."""

    donate: bool


class Options(NamedTuple):
    """The options of a factory, checked; ``name`` is the factory's, for messages."""

    name: str
    steps: Any = None
    """An int, or one for each encoder; None."""
    microbatch_size: Any = None
    """Likewise."""
    split: Callable[[Any], Any] | None = None
    in_dims: tuple[Any, ...] | None = None
    argnums: int | tuple[int, ...] = 0
    has_aux: bool = False
    reduction: Reduction = "mean"
    dtype: torch.dtype | None = None
    sync: Sync | None = None
    nonfinite: Nonfinite = "keep"
    weights: Callable[..., Any] | None = None
    has_carry: bool = False
    through: Through | None = None
    rows: bool = False
    """Whether the loss is of some rows against all."""

    @property
    def counted(self) -> bool:
        """Whether what several means are divided by is known before their gradients: NOTE [several means] in ``_sums.py``."""
        return self.weights is not None or self.through is not None


def options(name: str, loss_fn: Any, **options: Any) -> Options:
    """Check everything that is known before the first batch."""
    given = Options(name, **options)
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
    steps, microbatch_size, _ = ways(name, given.steps, given.microbatch_size, given.split, given.through)
    if given.in_dims is not None and type(given.in_dims) is not tuple:
        raise TypeError(
            f"{name}: in_dims must be a tuple with an int, None or a pytree prefix for each positional argument, "
            f"for example (None, 0, 0) for loss_fn(params, x, y); got {describe(given.in_dims)}"
        )
    for option in ("has_aux", "has_carry"):
        if not isinstance(getattr(given, option), bool):
            raise TypeError(f"{name}: {option} must be True or False, got {describe(getattr(given, option))}")
    if given.reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {given.reduction!r}")
    check_dtype(name, given.dtype)
    _check_weights(name, given)
    _check_through(name, given)
    check_sync(name, given.sync)
    if isinstance(given.sync, ReduceScatter) and given.dtype == torch.float16:
        raise ValueError(
            f"{name}: got dtype=torch.float16 and reduce_scatter: where sums do not fit into float16, no rank sees it in its "
            "part alone. Use dtype=torch.float32 (half precision is summed in it anyway), or all_reduce"
        )
    _check_argnums(name, given.argnums)
    rows = given.through is not None and takes_keyword(loss_fn, "rows")
    return given._replace(steps=steps, microbatch_size=microbatch_size, rows=rows)


def ways(
    name: str, steps: Any, microbatch_size: Any, split: Any, through: Any = None
) -> tuple[Any, Any, Callable[[Any], Any] | None]:
    """How a batch is divided, checked: at most one of the three is given, of several encoders maybe to each its own."""
    given = {"steps": steps, "microbatch_size": microbatch_size, "split": split}
    both = [way for way, value in given.items() if value is not None]
    if len(both) > 1:
        raise ValueError(f"{name}: got {' and '.join(both)}; give one of them, or none and an iterable as the batch")
    if split is not None and not callable(split):
        raise TypeError(
            f"{name}: split must be a function of the batch that yields micro-batches, got {describe(split)}"
        )
    return (
        _numbers(name, "steps", steps, through),
        _numbers(name, "microbatch_size", microbatch_size, through),
        split,
    )


def _numbers(name: str, option: str, value: Any, through: Any) -> Any:
    """A positive int, or a dict of them in the structure of ``through``."""
    if value is None or not isinstance(value, Mapping):
        return None if value is None else positive_int(name, option, value)
    if not isinstance(through, Mapping) or set(value) != set(through):
        keys = list(through) if isinstance(through, Mapping) else describe(through)
        raise ValueError(
            f"{name}: {option} is a dict of {list(value)}, and through is {keys}; give one number, or one for each "
            "function of a through= that is a dict"
        )
    return {key: positive_int(name, f"{option}[{key!r}]", value[key]) for key in through}


def check_dtype(name: str, dtype: Any) -> None:
    """What is summed in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise TypeError(
            f"{name}: dtype must be a floating torch.dtype of 16 bits or more (torch.float32), got {dtype!r}"
        )


def check_sync(name: str, sync: Any) -> None:
    """How ranks are added up."""
    if sync is not None and not isinstance(sync, (AllReduce, ReduceScatter)):
        raise TypeError(
            f"{name}: sync must be gradacc.all_reduce(...) or gradacc.reduce_scatter(...), got {describe(sync)}"
        )


def _check_weights(name: str, given: Options) -> None:
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


def _check_through(name: str, given: Options) -> None:
    """What encodes micro-batches, and what does not go with one loss of the whole batch."""
    through = given.through
    if through is None:
        return
    named = through.items() if isinstance(through, Mapping) else [(None, through)]
    if not named:
        raise ValueError(f"{name}: through is an empty dict; give it a function for each output that loss_fn reads")
    for key, func in named:
        what = "through" if key is None else f"through[{key!r}]"
        if isinstance(func, nn.Module):
            raise TypeError(
                f"{name}: {what} is an nn.Module ({type(func).__name__}), which does not take its parameters as an argument. "
                "Use apply, params, buffers = gradacc.functional(module), and a function of (params, batch) that calls "
                "apply(params, ...)"
            )
        if not callable(func):
            raise TypeError(
                f"{name}: {what} must be a function of (params, batch) that returns outputs with a leading batch dimension, or "
                f"a dict of such functions, got {describe(func)}"
            )
    if given.steps is None and given.microbatch_size is None and given.split is None:
        raise ValueError(
            f"{name}: got through, whose loss_fn sees the whole batch, and nothing that says how encode divides it; give "
            "steps, microbatch_size or split"
        )
    if given.nonfinite == "drop":
        raise ValueError(
            f"{name}: got through, with one loss of the whole batch, and nonfinite='drop', which drops micro-batches; leave it "
            "out (gradacc.optim.skip_nonfinite leaves out the update)"
        )
    if given.weights is not None:
        raise ValueError(
            f"{name}: got weights, which counts what several means are divided by before the first micro-batch, and through, "
            "whose loss_fn sees the whole batch and counts it; leave weights out"
        )
    if given.has_carry:
        raise ValueError(
            f"{name}: got through, with one loss of the whole batch and encoders that are run twice, and has_carry=True, with "
            "what one micro-batch hands to the next; leave has_carry out, and put BatchNorm of an encoder in evaluation mode"
        )


def _check_argnums(name: str, argnums: Any) -> None:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"{name}: argnums must be an int or a non-empty tuple of ints, got {argnums!r}")
