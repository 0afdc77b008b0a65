"""What parts of the batch say about a loss that no split leaves exact: how the large batch is made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradacc.testing import _additive, _sandbox
from gradacc.testing._evidence import Evidence, result_or_none
from gradacc.testing._probe import Probe, errors
from gradacc.testing._report import Diagnosis, unknown


def explain(evidence: Evidence, probe: Probe, tolerance: float) -> Diagnosis:
    """The first rule of composition that holds within ``tolerance``; ``probe``: the evidence's, or it in float64."""
    attempts = (result_or_none(partial(_additive.measure, probe, number)) for number in (4, 3, 2))
    found = [parts for parts in attempts if parts is not None]
    if not found:
        return unknown("the loss cannot be called on parts of this batch.")
    # Parts that happen to weigh what accumulate says (as many tokens in each) say nothing of what is wrong in others.
    parts = next((parts for parts in found if not _is_as_used(parts, tolerance)), found[0])
    return (
        _reduction(evidence, parts, tolerance)
        or _weights(evidence, parts, tolerance)
        or _weights_of_terms(probe, parts.number, tolerance)
        or _constant(parts, tolerance)
        or _nonlinear(parts, tolerance)
        or _interaction(evidence, probe, parts, tolerance)
    )


def _is_as_used(parts: _additive.Parts, tolerance: float) -> bool:
    used = parts.shares if parts.means is None else parts.means
    return parts.residual(used) <= tolerance


def _reduction(evidence: Evidence, parts: _additive.Parts, tolerance: float) -> Diagnosis | None:
    declared = evidence.probe.options.reduction
    if declared == "mean" and parts.means is None and parts.residual_of_sum() <= tolerance:
        return Diagnosis(
            "reduction",
            "the gradients and values of parts of the batch add up to the large batch's: the loss is a sum, and was "
            "divided as a mean.",
            'pass reduction="sum", or return the mean over the examples.',
        )
    if declared == "sum" and parts.residual(parts.shares) <= tolerance:
        return Diagnosis(
            "reduction",
            "the large batch's gradient and value are those of its parts, averaged over the examples: the loss is a mean, "
            'and was added up as a sum (reduction="sum").',
            'leave reduction="sum" out.',
        )
    return None


def _weights(evidence: Evidence, parts: _additive.Parts, tolerance: float) -> Diagnosis | None:
    if parts.means is not None and _is_mean_of_totals(parts, tolerance):
        return Diagnosis(
            "weights",
            "the loss returns a Mean whose total is itself a mean: totals of parts of the batch do not add up, they average.",
            "return Mean(total, weight) with the sum as total: its value is total / weight.",
        )
    weights = _additive.solve(parts)
    if weights is None or parts.residual(weights) > tolerance:
        return None
    used = parts.shares if parts.means is None else parts.means
    if _close(weights, used):
        # Within the tolerance: a small term between examples, or a mistake of ours.
        return None
    listing = " : ".join(f"{weight:.0%}" for weight in weights)
    instead = " : ".join(f"{share:.0%}" for share in used)
    return Diagnosis(
        "weights",
        f"the loss is a mean, but not over {'the examples' if parts.means is None else 'the weights of its Mean'}: the "
        f"large batch is the weighted mean of its parts if {len(weights)} parts count {listing}, and not {instead}.",
        "return gradacc.Mean(loss_sum, number) with the number of what the mean is over (tokens, pixels, edges), counted "
        "from the data; for cross entropy with class weights w, Mean(sum of the weighted losses, w[y].sum())"
        + ("" if evidence.probe.options.reduction == "mean" else ', and leave reduction="sum" out')
        + ".",
    )


def _weights_of_terms(probe: Probe, number: int, tolerance: float) -> Diagnosis | None:
    """Of a loss that is several means: whether the total of one is itself a mean."""
    for place in itertools.count():
        parts = result_or_none(partial(_additive.measure, probe.of_term(place), number))
        if parts is None:
            return None
        if _is_mean_of_totals(parts, tolerance):
            return Diagnosis(
                "weights",
                f"the Mean at place {place} of those that the loss returns has a total that is itself a mean: totals of parts "
                "of the batch do not add up, they average.",
                "return Mean(total, weight) with the sum as total: its value is total / weight.",
            )
    return None


def _is_mean_of_totals(parts: _additive.Parts, tolerance: float) -> bool:
    totals = parts.totals()
    if totals.residual_of_sum() <= tolerance:
        return False
    weights = _additive.solve(totals)
    return weights is not None and totals.residual(weights) <= tolerance


def _constant(parts: _additive.Parts, tolerance: float) -> Diagnosis | None:
    sums = parts if parts.means is None else parts.totals()
    if sums.residual_of_constant() > tolerance:
        return None
    return Diagnosis(
        "constant",
        f"{'the loss' if parts.means is None else 'the total of the Mean'} is a sum over the batch plus a term that does "
        "not depend on the batch (a penalty on the parameters): every micro-batch adds that term again.",
        "add the term and its gradient after accumulating, or return the mean over examples: there it is averaged, and "
        "counts once.",
    )


def _nonlinear(parts: _additive.Parts, tolerance: float) -> Diagnosis | None:
    if parts.residual_of_combinations() > tolerance:
        return None
    return Diagnosis(
        "nonlinear",
        "the gradient of two parts of the batch together combines theirs, but neither it nor the value is their mean: "
        "the loss is a function of a mean over examples (a root, a logarithm, a power), not a mean.",
        "accumulate the mean m itself, (grads, m) = accumulate_and_value(mean_fn)(params, batch), and apply the "
        "function f afterwards: its gradient is f'(m) * grads.",
    )


def _interaction(evidence: Evidence, measured: Probe, parts: _additive.Parts, tolerance: float) -> Diagnosis:
    probe = evidence.probe
    norms = [
        each.module for each in probe.before.modules if isinstance(each.module, _BatchNorm) and each.module.training
    ]
    exact_without = result_or_none(partial(_without, evidence, norms)) if norms else False
    if exact_without:
        kinds = ", ".join(sorted({type(norm).__name__ for norm in norms}))
        return Diagnosis(
            "interaction",
            f"examples see each other through {kinds} in training mode: in evaluation mode every split is exact.",
            "use GroupNorm or LayerNorm; or put BatchNorm alone in evaluation mode, on running statistics that are already "
            "trained; or keep its batches whole.",
        )
    weights = _additive.solve(parts)
    residual = math.inf if weights is None else parts.residual(weights)
    shaken = result_or_none(partial(_additive.interplay, measured))
    # What is left of rounding in two differences.
    depends = shaken is not None and shaken > (1e-9 if tolerance <= 1e-6 else 1e-2)
    if residual <= max(1e-2, 10 * tolerance) and not depends:
        if residual <= tolerance:
            return unknown(
                "parts of the batch do add up to the large batch, with the weights that accumulate uses. That should not be: "
                "please report it as a bug of gradacc."
            )
        return unknown(
            f"weights of its parts explain the large batch nearly, but not fully (off by {residual:.1e}). A sum of means over "
            "different things may look so (return them as a tuple of gradacc.Means), a product of means over the batch (a "
            "router's balance), and a ratio of sums (Dice, F1) of data that are whole numbers."
        )
    why = f"no weights make the large batch the weighted mean of its parts (the best are off by {residual:.1e})"
    if shaken is not None and not depends:
        return Diagnosis(
            "unknown",
            f"{why}, and yet what one half of the batch contributes does not depend on the data of the other half. The loss "
            "may add means over different things (one over tokens, one over examples), or choose among examples (a maximum, "
            "the k largest).",
            "return each mean as a gradacc.Mean(loss_sum, number), all of them in a tuple, list or dict: the loss is then the "
            "sum of their values (a factor goes before one: 5.0 * mean). What chooses among the examples of a batch needs the "
            "whole batch.",
        )
    evidence_for = []
    if shaken is not None:
        evidence_for.append("changing the data of one half of the batch changes what the other half contributes")
    repeated = result_or_none(partial(_repeated, evidence)) if probe.options.reduction == "mean" else None
    if repeated is not None and repeated > evidence.rtol:
        evidence_for.append(f"repeating every example once changes the result by {repeated:.1e}, as in no mean")
    return Diagnosis(
        "interaction",
        f"{why}: an example's part of the loss depends on which others are in its batch. "
        + (
            f"Confirmed: {'; '.join(evidence_for)}."
            if evidence_for
            else "That is by exclusion; what connects them is not known."
        ),
        "take away what connects examples: statistics over the batch (BatchNorm in training mode: use GroupNorm or "
        "evaluation mode), negatives or pairs from the batch (give the encoder of a contrastive loss to accumulate as "
        "through=), ratios of sums over the batch.",
    )


def _without(evidence: Evidence, norms: Sequence[nn.Module]) -> bool:
    """Whether every split is exact with these modules in evaluation mode."""
    probe = evidence.probe
    _sandbox.restore(probe.before)
    for norm in norms:
        norm.training = False  # the next restored state has it back
    kept = probe._replace(before=probe.before._replace(modules=[]))
    large = kept.evaluate()
    return all(errors(kept.accumulate(k), large, kept).largest <= evidence.rtol for k in evidence.counts)


def _repeated(evidence: Evidence) -> float:
    """How far the batch, every example twice, is from the batch."""
    probe = evidence.probe
    whole = (0, probe.examples)
    found = errors(
        probe.evaluate(probe.take(whole, whole)),
        evidence.large,
        probe._replace(options=probe.options._replace(has_aux=False, has_carry=False)),
    )
    return found.largest


def _close(a: list[float], b: list[float]) -> bool:
    return all(
        math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in itertools.zip_longest(a, b, fillvalue=math.inf)
    )
