"""`check_accumulation`: any split against the large batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradacc import _batch, _call, _carry, _loss, _options, _split, _tree
from gradacc._describe import describe
from gradacc._mean import value_of
from gradacc._values import positive_int
from gradacc._where import transforming
from gradacc.testing import _diagnose, _sandbox
from gradacc.testing._evidence import Evidence, result_or_none
from gradacc.testing._probe import Errors, Probe, Result, copy, errors
from gradacc.testing._report import Diagnosis, Report, Split

_NAME = "check_accumulation"
_PASSED_ON = ("in_dims", "argnums", "has_aux", "reduction", "dtype", "weights", "has_carry")


def check_accumulation(
    loss_fn: Callable[..., Any],
    params: _tree.TensorTree,
    batch: Any,
    *args: Any,
    steps: int | Iterable[int] = (2, 3, 4),
    rtol: float | None = None,
    double: bool = False,
    **accumulate_options: Any,
) -> Report:
    """Whether accumulation is exact for this loss on this batch and, where it is not, why not.

    For each ``k`` in ``steps`` it compares ``grads, value = accumulate_and_value(loss_fn, steps=k)(params, batch, *args)``
    with the large batch, that is one call of ``loss_fn`` on the whole batch and `torch.autograd.grad` of it:

    .. code-block:: text

        gradient error = max over leaves of  |grads[leaf] - large[leaf]| / max(|large[leaf]|, 0.01 |large|)
        value error    = |value - large value| / max(|large value|, mean of the micro-batches' |value|)
        aux error      = max over leaves of  |aux[leaf] - large aux[leaf]| / |large aux[leaf]|

    ``|.|`` is the Euclidean norm, computed in float64; ``|large|`` is that of the whole gradient (a leaf far smaller than
    that can be nothing but rounding, such as a bias that cancels). With ``reduction="sum"`` the mean of the values is
    their sum. A split is exact when all errors are at most ``rtol``.

    Where a split is not exact, experiments look for the cause, and the first that explains it is reported (others may hide
    behind it: fix one, check again). `Cause` lists the causes; ``docs/batches.md`` has the experiment behind each.

    Arguments:
        loss_fn: as for `gradacc.accumulate`; ``params``, ``batch`` and ``args`` are its positional arguments.
        params: a pytree of floating or complex tensors. Values matter: where the gradient is zero, any error is large.
        batch: one whole batch, not micro-batches; at least two examples, of different content: with equal weights (the
            same number of tokens in each example, say) a wrong mean is exact by chance.
        steps: an int, or several: the splits to try, as in ``accumulate(steps=...)``.
        rtol: the tolerance. By default ``sqrt(eps)`` of the coarsest dtype among the parameters, the loss and ``dtype=``
            (float64: 1.5e-8, float32: 3.5e-4): half of the digits. Rounding errors are ``eps`` times how ill-conditioned
            the loss is, and mistakes are rarely below 1e-3. In 16 bits half of the digits would be 9 %, so there it is
            ``4 eps`` (bfloat16: 3.1e-2, float16: 3.9e-3): smaller mistakes are found with float32 parameters only.
        double: compare in float64 (what is passed is converted, what the loss closes over is not), whose tolerance sees a term
            of 1e-7 of the loss that float32 takes for rounding.
        accumulate_options: ``in_dims``, ``argnums``, ``has_aux``, ``reduction``, ``dtype``, ``weights``: as in
            `gradacc.accumulate`. With ``has_carry=True`` there is ``carry=``, which all calls begin with: its `Mean`s and
            `Moments` are compared like aux; its tensors, whose last one depends on the split, are not.

    Returns:
        A `Report`: ``exact``, ``splits`` (errors, worst leaf's path and verdict of each), ``cause``, ``why``, ``fix``;
        ``str(report)`` is a table with all of it, ``report.raise_if_inexact()`` raises `AssertionError` with that.

    Raises:
        TypeError, ValueError: as `gradacc.accumulate` for bad input; an option that is not one of the above; fewer than
            two examples; an iterable of micro-batches; parameters on the meta device.

    Nothing passed in is changed: parameters and batch are copied, and the state of the random generators (torch, Python,
    NumPy) and of the modules that ``loss_fn`` reaches (through its closure, globals, attributes) is put back, also when
    ``loss_fn`` raises. All calls start from the random state at the time of the call. It needs the memory of the large
    batch and of a handful of gradients, and the time of about ten large batches where a split is not exact.

    When it is wrong: it judges this batch, these parameters; "exact" is no proof for others. State that it cannot reach
    (a counter, a `torch.Generator` of the loss's own) advances with every call. A loss that closes over float32 tensors
    may refuse the float64 experiment; then rounding is told apart by its size alone.

    Example:
        >>> import torch
        >>> from gradacc.testing import check_accumulation
        >>> def loss_fn(w, batch):      # a mean over tokens, of which examples have different numbers
        ...     losses = (batch["x"] * w).square()
        ...     return (losses * batch["mask"]).sum() / batch["mask"].sum()
        >>> x = torch.arange(12, dtype=torch.float64).view(4, 3)
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
        >>> report = check_accumulation(loss_fn, torch.ones((), dtype=torch.float64), {"x": x, "mask": mask}, steps=(2, 4))
        >>> print(report)
        Accumulation is NOT exact (weights).
        steps  micro-batches of  gradient    value  verdict  worst leaf
            2              2, 2   1.4e-01  1.3e-01  INEXACT  params
            4        1, 1, 1, 1   3.0e-01  2.3e-01  INEXACT  params
        Errors are relative to the large batch (gradient: the worst leaf, relative to that leaf); tolerance 1.5e-08 (float64).
        Why: the loss is a mean, but not over the examples: the large batch is the weighted mean of its
             parts if 4 parts count 43% : 14% : 29% : 14%, and not 25% : 25% : 25% : 25%.
        Fix: return gradacc.Mean(loss_sum, number) with the number of what the mean is over (tokens, pixels,
             edges), counted from the data; for cross entropy with class weights w, Mean(sum of the weighted
             losses, w[y].sum()).
    """
    given, carry = _begins_with(accumulate_options)
    options = _checked(loss_fn, given)
    counts = _counts(steps)
    if rtol is not None and not (isinstance(rtol, (int, float)) and rtol >= 0 and not isinstance(rtol, bool)):
        raise ValueError(f"{_NAME}: rtol must be a number >= 0, got {rtol!r}")
    if transforming():
        raise ValueError(
            f"{_NAME}: called under a functorch transform or torch.compile, where no value can be compared"
        )
    before = _sandbox.snapshot(_sandbox.find_modules(loss_fn, params, batch, *args))
    start = Probe(loss_fn, given, options, (params, batch, *args), (), (), 0, before, carry)
    try:
        with torch.inference_mode(False):
            probe, large = _probe(start)
            if double:
                probe, large = _in_double(probe)
            return _check(probe, large, counts, rtol)
    finally:
        _sandbox.restore(before)


def _in_double(probe: Probe) -> tuple[Probe, Result]:
    probe = probe.double()
    try:
        return probe, probe.evaluate()
    except Exception as error:
        error.add_note(f"{_NAME}: with double=True; as it was given, the large batch went through")
        raise


def _check(probe: Probe, large: Result, counts: list[int], rtol: float | None) -> Report:
    dtypes = [param.dtype for param in probe.parameters()[0]] + [large.value.dtype]
    if probe.options.dtype is not None:
        dtypes.append(probe.options.dtype)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = _tolerance(coarsest) if rtol is None else float(rtol)
    found = [errors(probe.accumulate(k), large, probe) for k in counts]
    paths = probe.paths()
    splits = tuple(_row(probe, k, each, paths, tolerance) for k, each in zip(counts, found, strict=True))
    diagnosis = _diagnosis(probe, large, counts, found, tolerance, coarsest)
    dtype = str(coarsest).removeprefix("torch.")
    if diagnosis is None:
        return Report(splits, tolerance, dtype, None, "", "")
    if diagnosis.cause == "nonfinite":
        splits = tuple(split._replace(exact=False) for split in splits)
    return Report(splits, tolerance, dtype, *diagnosis)


def _diagnosis(
    probe: Probe, large: Result, counts: list[int], found: list[Errors], rtol: float, coarsest: torch.dtype
) -> Diagnosis | None:
    tensors = [large.value, *large.grads]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return _diagnose.nonfinite(probe, large)
    if all(each.largest <= rtol for each in found):
        return None
    evidence = Evidence(probe, large, counts, found, rtol, torch.finfo(coarsest).eps)
    return _diagnose.diagnose(evidence)


def _row(probe: Probe, k: int, found: Errors, paths: list[str], rtol: float) -> Split:
    return Split(
        steps=k,
        sizes=tuple(size for _, size in _split.cuts(probe.examples, steps=k)),
        grad_error=found.grad,
        worst=paths[found.worst],
        value_error=found.value,
        aux_error=found.aux,
        exact=found.largest <= rtol,
    )


def _tolerance(dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    return math.sqrt(eps) if dtype.itemsize >= 4 else 4 * eps


def _probe(start: Probe) -> tuple[Probe, Result]:
    """The loss on this batch, and what the large batch gives; ``start``: with the caller's own arguments."""
    options, args = start.options, start.args
    differentiated, batch = _call.positions(options, args)
    for n in differentiated:
        root = "params" if n == 0 else f"args[{n}]"
        for leaf in _call.check_parameters(_NAME, *_tree.flatten(args[n]), root):
            if leaf.is_meta:
                raise ValueError(f"{_NAME}: {root} holds meta tensors, which have no values to compare")
    try:
        examples = _split.microbatches(options, args, differentiated, batch).examples
        if examples is None or examples < 2:
            raise ValueError(f"{_NAME}: the batch has {examples} examples; a split needs at least 2")
        own = tuple(_tree.map_tensors(copy, arg) if n in differentiated else arg for n, arg in enumerate(args))
        dims = _call.in_dims(options, args, differentiated, batch)
        probe = start._replace(args=own, differentiated=differentiated, dims=dims, examples=examples)
        return probe, probe.evaluate()
    except Exception as error:
        if _holds_microbatches(start, batch):
            raise TypeError(
                f"{_NAME}: the batch is {describe(args[batch])} of micro-batches. Pass one whole batch, say theirs "
                "concatenated: check_accumulation splits it itself. Of what cannot be concatenated (graphs), pass the indices, "
                "torch.arange(n), and a loss that takes the items there (docs/recipes/graphs.md)"
            ) from error
        raise


def _holds_microbatches(start: Probe, batch: int) -> bool:
    """Where the loss refuses the batch: whether it is an iterable of micro-batches (it takes the first one of a list)."""
    args, whole = start.args, start.args[batch]
    if not _batch.is_iterable(whole):
        return False
    if _batch.may_be_one(whole) and not all(isinstance(item, Tensor) for item in whole):
        return False  # a tensor beside something else: parts of one batch
    if not isinstance(whole, (list, tuple)):
        return _tree.flatten(whole)[0] == [whole]  # a loader, a generator: nothing that could be split

    def first() -> Tensor:
        own = _tree.map_tensors(copy, (*args[:batch], whole[0], *args[batch + 1 :]))
        value, _ = start.called(own)
        _loss.losses(start.options, value)
        return value_of(value)

    return result_or_none(first) is not None


def _begins_with(given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Options without ``carry``, and that, checked."""
    if given.get("has_carry") is not True:
        if "carry" in given:
            raise TypeError(f"{_NAME}: got carry, which a loss gets with has_carry=True; pass both, or neither")
        return given, None
    rest, _ = _carry.of_call(_NAME, given, f"{_NAME}(loss_fn, params, batch, has_carry=True, carry=c)")
    return rest, given["carry"]


def _checked(loss_fn: Any, given: dict[str, Any]) -> _options.Options:
    for name in given:
        if name in ("microbatch_size", "split"):
            raise ValueError(f"{_NAME}: it splits the batch itself; say how with steps=(2, 3, 4), and leave {name} out")
        if name not in _PASSED_ON:
            raise TypeError(f"{_NAME}: there is no option {name!r}; it takes steps, rtol, {', '.join(_PASSED_ON)}")
    return _options.options(_NAME, loss_fn, steps=1, **given)


def _counts(steps: Any) -> list[int]:
    if isinstance(steps, Tensor) or not hasattr(steps, "__iter__"):
        steps = (steps,)
    counts = [operator.index(positive_int(_NAME, "steps", k)) for k in steps]
    if not counts:
        raise ValueError(f"{_NAME}: steps is empty; give at least one number of micro-batches")
    return counts
