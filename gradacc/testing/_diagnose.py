"""Why a split is not exact: experiments, from the one that would spoil the others to the one that is left."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from gradacc.testing import _additive, _composition
from gradacc.testing._evidence import Evidence, finite, result_or_none
from gradacc.testing._probe import Probe, Result, distance, errors
from gradacc.testing._report import Diagnosis


def diagnose(evidence: Evidence) -> Diagnosis:
    """The first cause that an experiment confirms."""
    early = _state(evidence) or _randomness(evidence) or _carry(evidence)
    if early is not None:
        return early
    double = result_or_none(partial(_in_double, evidence))
    rounding = _rounding(evidence, double)
    if rounding is not None:
        return rounding
    if all(max(finite(each.grad), finite(each.value)) <= evidence.rtol for each in evidence.found):
        return _aux(evidence)
    # Rounding would blur what follows.
    probe, tolerance = (evidence.probe, min(10 * evidence.rtol, 0.05)) if double is None else (double.probe, 1e-6)
    return _composition.explain(evidence, probe, tolerance)


def nonfinite(probe: Probe, large: Result) -> Diagnosis:
    """NaN or infinity in the large batch."""
    paths = [path for path, grad in zip(probe.paths(), large.grads, strict=True) if not bool(grad.isfinite().all())]
    where = "its value" if not bool(large.value.isfinite()) else f"the gradient of {paths[0]}"
    return Diagnosis(
        "nonfinite",
        f"the large batch itself gives NaN or infinity, in {where}: there is nothing to compare with.",
        "find the operation with torch.autograd.set_detect_anomaly(True).",
    )


def _state(evidence: Evidence) -> Diagnosis | None:
    probe = evidence.probe
    first = probe.evaluate()
    second = probe.evaluate(modules=False)
    change = max(errors(second, first, probe).largest, errors(first, evidence.large, probe).largest)
    if change <= evidence.rtol / 10:
        return None
    return Diagnosis(
        "state",
        f"the same call, on the same batch and from the same random state, gives another result: it differs by "
        f"{change:.1e}. The loss reads something that it changes itself (a counter, a cache, a torch.Generator of its own, "
        "a buffer or an attribute of a module).",
        "make what it reads an argument, and what it changes a result (has_aux=True); then the loss is a function.",
    )


def _randomness(evidence: Evidence) -> Diagnosis | None:
    probe = evidence.probe
    change = max(errors(probe.evaluate(seed=seed), evidence.large, probe).largest for seed in (1, 2, 3))
    if change <= evidence.rtol / 10:
        return None
    return Diagnosis(
        "randomness",
        f"the loss draws random numbers: the same large batch from another random state differs by {change:.1e}. Micro-"
        "batches draw one after the other, reproducibly, but not what the large batch draws.",
        "if that is meant (dropout in training), nothing is wrong with it; to see the rest, switch only the randomness off "
        "(p=0), and leave the modules in training mode. Where the draw must not depend on the split, make it data: noise, or "
        "a key for each example, as a leaf of the batch (gradacc.random).",
    )


def _carry(evidence: Evidence) -> Diagnosis | None:
    probe = evidence.probe
    if not probe.options.has_carry:
        return None
    alone = [errors(probe.accumulate(k, threaded=False), evidence.large, probe).largest for k in evidence.counts]
    if max(alone) > evidence.rtol:
        return None
    return Diagnosis(
        "carry",
        "the loss reads a tensor of its carry, which a micro-batch before has changed: where every micro-batch gets the carry "
        "that the call begins with, every split is exact.",
        "if that is meant (recurrent state), nothing is wrong with it: the micro-batches are steps of one sequence, and not "
        "parts of one batch. Else leave it out of the loss, or pass what it is to read as a further argument.",
    )


class _Double(NamedTuple):
    """The same comparison in float64."""

    probe: Probe
    worst: float


def _in_double(evidence: Evidence) -> _Double:
    probe = evidence.probe.double()
    large = probe.evaluate()
    if not all(bool(tensor.isfinite().all()) for tensor in (large.value, *large.grads)):
        raise ValueError("nothing to compare with")
    return _Double(probe, max(errors(probe.accumulate(k), large, probe).largest for k in evidence.counts))


def _rounding(evidence: Evidence, double: _Double | None) -> Diagnosis | None:
    worst = evidence.worst
    if double is not None and evidence.eps > 1e-12:
        if not double.worst <= 1e-3 * min(worst, 1.0):  # worst is infinite where a micro-batch gives NaN
            return None
        why = f"in float64 the error of {worst:.1e} falls to {double.worst:.1e}: it is rounding"
    elif worst <= min(1e3 * evidence.eps, math.sqrt(evidence.eps)):
        why = f"an error of {worst:.1e} is of the size of rounding in this dtype (eps = {evidence.eps:.1e})"
    elif _cancels(evidence):
        why = (
            "the micro-batches' gradients or values nearly cancel, and the difference is of the size of rounding in what "
            f"cancels (eps = {evidence.eps:.1e})"
        )
    else:
        return None
    return Diagnosis(
        "rounding",
        f"{why}, and not the split that is wrong.",
        "accept it, with rtol= above the error, or compare with parameters and batch in float64.",
    )


def _cancels(evidence: Evidence) -> bool:
    """Whether every error is rounding in the micro-batches' gradients and values, before they cancel."""
    probe, large = evidence.probe, evidence.large
    sizes = result_or_none(partial(_additive.sizes, probe))
    if sizes is None:
        return False
    bound = min(1e4 * evidence.eps, math.sqrt(evidence.eps))
    for k in evidence.counts:
        result = probe.accumulate(k)
        grad = math.hypot(*(distance(a, b) for a, b in zip(result.grads, large.grads, strict=True)))
        if not (grad <= bound * sizes.grad and distance(result.value, large.value) <= bound * sizes.value):
            return False
    return all((each.aux or 0.0) <= evidence.rtol for each in evidence.found)


def _aux(evidence: Evidence) -> Diagnosis:
    worst = max(finite(each.aux or 0.0) for each in evidence.found)
    return Diagnosis(
        "aux",
        f"gradient and value are exact, the aux is not (error {worst:.1e}): a 0-dim leaf is averaged with the loss's "
        "weights, a leaf with a leading batch dimension is concatenated, and a Mean or Moments (of a carry, too) adds up; "
        "for one of them that is not what it means.",
        "return gradacc.Mean(total, weight) in the aux for what is a mean over something else, or a sum; and in the carry what "
        "the micro-batch itself adds, without what was given.",
    )
