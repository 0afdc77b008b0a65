"""What ``loss_fn`` returned for one micro-batch: checked, and in the one shape that the rest knows."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _carry, _mean, _tree, _where
from gradacc._aux import Aux
from gradacc._carry import Given
from gradacc._describe import describe
from gradacc._mean import SEVERAL_MEANS, Mean, are_means, with_plain_weight
from gradacc._moments import Moments
from gradacc._options import Options


class Terms(NamedTuple):
    """Several means: the loss is the sum of their values. NOTE [several means] in ``_sums.py``."""

    means: list[Mean]
    weights: list[float | Tensor]
    """Of each: a number where it can be read for nothing."""
    treedef: _tree.TreeDef


class Divisors(NamedTuple):
    """What several means are divided by, where it was counted beforehand: of each, in the structure of the loss."""

    weights: list[float | Tensor]
    treedef: _tree.TreeDef


class Outcome(NamedTuple):
    """One micro-batch's loss."""

    targets: list[Tensor]
    """0-dim, floating: what is differentiated, each into gradients of its own. The loss, or the total of a `Mean`."""

    value: Tensor | Mean | Terms
    """As ``loss_fn`` returned it."""

    weight: float | Tensor | None
    """What its mean is over: the number of examples, or the weight of a `Mean`. A tensor where its value cannot be read,
    None where nothing says it (then the loss is a sum, of examples or of several means)."""

    aux: Aux

    carry: Sequence[Any] = ()
    """Leaves of the carry that it returned: tensors, `Mean`s, `Moments`."""

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order in which `map` visits them."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def map(self, func: Callable[[Tensor], Tensor]) -> Outcome:
        """The same with ``func`` of every tensor."""
        aux = self.aux._replace(leaves=[_map(func, leaf) for leaf in self.aux.leaves])
        carry = [_map(func, leaf) for leaf in self.carry] if self.carry else self.carry
        targets = [func(target) for target in self.targets]
        return Outcome(targets, _map(func, self.value), _map(func, self.weight), aux, carry)


def outcome(options: Options, out: Any, sizes: tuple[int, ...], carry: Given | None = None) -> Outcome:
    """Of what ``loss_fn`` returned for a micro-batch whose tensors have these sizes along their split dimension.

    ``carry``: what the call was given, where there is one.
    """
    if carry is not None:
        usual, new = with_carry(options, out)
        return outcome(options, usual, sizes)._replace(carry=_carry.returned(options.name, carry, new))
    value, aux = returned(options, out)
    if options.weights is not None or are_means(value, some=True):
        terms = _terms(options, value)
        targets = [mean.total for mean in terms.means]
        return Outcome(targets, terms, sizes[0] if len(sizes) == 1 else None, _aux.flatten(aux))
    target = target_of(options, value)
    if isinstance(value, Mean):
        value, weight = with_weight(options, value, target)
        return Outcome([target], value, weight, _aux.flatten(aux))
    return Outcome([target], value, _examples(options, sizes), _aux.flatten(aux))


def with_weight(
    options: Options, mean: Mean, total: Tensor, what: str = "loss_fn returned a Mean whose weight is"
) -> tuple[Mean, float | Tensor]:
    """A `Mean` with its weight as a number or tensor, and that weight, checked; ``what`` begins a message about it."""
    mean = with_plain_weight(mean)
    own = weight(options, mean.weight, total, what)
    if isinstance(own, Tensor) and not isinstance(mean.weight, Tensor):
        mean = Mean(mean.total, own)  # a float in a graph
    return mean, own


def _terms(options: Options, value: Any) -> Terms:
    """Several means, each checked as a loss of its own."""
    name = options.name
    if are_means(value, some=True) and not are_means(value):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        key, item = next((key, item) for key, item in items if not isinstance(item, Mean))
        raise TypeError(
            f"{name}: loss_fn returned several means, and loss[{key!r}] is {describe(item)}, which is none. Return "
            "gradacc.Mean(total, number) for it (a mean over n examples is Mean(mean * n, n)); what is not to be "
            "differentiated goes into the aux"
        )
    if not are_means(value):
        raise TypeError(
            f"{name}: loss_fn returned {_pair(value)}, and weights= counts what several means are divided by; return a tuple, "
            "list or dict of gradacc.Means, in the structure of what weights returns. One Mean needs no weights="
        )
    leaves, treedef = _mean.flatten(value)
    pairs = [with_weight(options, mean, target_of(options, mean)) for mean in leaves]
    return Terms([mean for mean, _ in pairs], [weight for _, weight in pairs], treedef)


def divided(options: Options, outcome: Outcome, divisors: Divisors | None) -> Outcome:
    """Of several means whose weights were counted: the totals over them, summed, are one target.

    A total of weight 0 is left out, where that is read.
    """
    terms = outcome.value
    if options.through is not None and isinstance(terms, Terms):
        # One loss, of the whole batch.
        divisors = Divisors(terms.weights, terms.treedef)
    if divisors is None or not isinstance(terms, Terms):
        return outcome
    if terms.treedef != divisors.treedef:
        raise ValueError(
            f"{options.name}: loss_fn returned {terms.treedef}, and weights returned {divisors.treedef}; return a weight for "
            "each Mean, in the same structure"
        )
    parts = []
    for mean, weight, divisor in zip(terms.means, terms.weights, divisors.weights, strict=True):
        if isinstance(weight, Tensor) or isinstance(divisor, Tensor):
            quotient = (mean.total / divisor).to(mean.total.dtype)
            parts.append(torch.where(torch.as_tensor(weight, device=quotient.device) > 0, quotient, 0.0))
        elif weight:
            # What was counted wrongly is an error in the end; dividing by 0 would be one of another kind.
            parts.append(mean.total / (divisor or math.nan))
    return outcome._replace(targets=[functools.reduce(operator.add, parts) if parts else terms.means[0].total])


def with_carry(options: Options, out: Any) -> tuple[Any, Any]:
    """What ``loss_fn`` returned as ``(usual, carry)``."""
    if not (isinstance(out, tuple) and len(out) == 2):
        usual = "(loss, aux)" if options.has_aux else "loss"
        raise TypeError(
            f"{options.name}: with has_carry=True loss_fn must return (usual, carry), here ({usual}, carry), got {_pair(out)}"
        )
    return out


def returned(options: Options, out: Any) -> tuple[Any, Any]:
    """What ``loss_fn`` returned as ``(loss, aux)``, with aux None where there is none."""
    if not options.has_aux:
        if isinstance(out, tuple) and not are_means(out):
            raise TypeError(
                f"{options.name}: loss_fn returned {_pair(out)}; pass has_aux=True for (loss, aux), of which the loss alone is "
                "differentiated, or has_carry=True for (loss, carry), of a call with carry=. Or are they several losses? "
                f"{_sum_of(out)}"
            )
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        several = "; several means are one loss: (means, aux)" if are_means(out) else ""
        raise TypeError(f"{options.name}: with has_aux=True loss_fn must return (loss, aux), got {_pair(out)}{several}")
    return out


def losses(options: Options, value: Any) -> tuple[list[Any], _tree.TreeDef]:
    """What a loss is the sum of, checked: a tensor, a `Mean`, or several; and their structure."""
    if are_means(value, some=True):
        terms = _terms(options, value)
        return list(terms.means), terms.treedef
    target_of(options, value)
    return _mean.flatten(value)


def target_of(options: Options, value: Any) -> Tensor:
    """The tensor to differentiate: the loss itself, or the total of a `Mean`."""
    total = value.total if isinstance(value, Mean) else value
    what = f"{options.name}: loss_fn returned " + ("a Mean whose total is " if isinstance(value, Mean) else "")
    if isinstance(value, Mean) and value._pooled:
        raise ValueError(
            f"{options.name}: loss_fn returned a sum of Means. `a + b` is the mean of both together, (a.total + b.total) / "
            "(a.weight + b.weight), and not a.value + b.value. Where it is meant, for one mean that is computed in chunks, "
            f"return gradacc.Mean(pooled.total, pooled.weight) of it, pooled = a + b. {SEVERAL_MEANS}"
        )
    if isinstance(value, Mean) and options.reduction == "sum":
        raise ValueError(
            f"{options.name}: loss_fn returned a Mean, which says by itself what to divide by; "
            "leave reduction='sum' out, or return the total alone"
        )
    if total is None:
        raise TypeError(f"{what}None; is a return statement missing?")
    if not isinstance(total, Tensor):
        is_number = isinstance(total, numbers.Real)
        fix = "; a loss turned into a number (.item(), float()) cannot be differentiated" if is_number else ""
        raise TypeError(f"{what}{_pair(total)}; it must return a 0-dim floating tensor, or a Mean of one{fix}")
    if total.ndim != 0:
        raise ValueError(
            f"{what}a tensor of shape {tuple(total.shape)}; it must be 0-dim. "
            "Take its mean, or return gradacc.Mean(loss.sum(), loss.numel())"
        )
    if not total.is_floating_point():
        raise TypeError(f"{what}a tensor of dtype {total.dtype}; it must be floating")
    return total


def weight(options: Options, value: Any, like: Tensor, what: str) -> float | Tensor:
    """A Mean's weight: finite, ``>= 0``, from the data. NOTE [weights that are not read] in ``_sums.py``.

    A number where it can be read for nothing. Else a tensor, NaN where the weight is not what it must be. ``what`` begins a
    message about it.
    """
    name = options.name
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(
                f"{name}: {what} a {value.dtype} tensor of shape {tuple(value.shape)}; "
                "it must be a number or a 0-dim tensor"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name}: {what} a tensor and depends on the parameters; the gradient of total / weight "
                "is then not additive. Count the weight from the data, or detach() it"
            )
        if value.is_meta:
            return 1.0  # nothing is computed from it
        transformed = _where.transforming() and (value.is_floating_point() or not _where.is_readable(value))
        if transformed or not (value.is_cpu or like.is_cpu):
            # float64 counts to more than 2 ** 24; Apple's GPUs have none
            dtype = torch.float64 if like.device.type != "mps" else torch.float32
            return _nan_where_wrong(value.to(device=like.device, dtype=dtype))
        value = value.item()  # a count: it carries no derivative
    if not _is_number(value):
        raise TypeError(f"{name}: {what} {describe(value)}; it must be a number or tensor")
    if torch.compiler.is_compiling() and isinstance(value, float):
        # one that changes from call to call is symbolic, and its arithmetic beside tensors is guarded wrongly by torch 2.13
        return _nan_where_wrong(torch.zeros((), dtype=torch.float64, device=like.device) + value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {what} {value}; it must be finite and not negative")
    return value if torch.compiler.is_compiling() else float(value)  # of a symbolic number Dynamo makes none


def _nan_where_wrong(weight: Tensor) -> Tensor:
    return torch.where((weight >= 0) & (weight < math.inf), weight, math.nan)


def _examples(options: Options, sizes: tuple[int, ...]) -> int | None:
    """The number of examples a plain loss is the mean of; a sum needs none."""
    count = sizes[0] if len(sizes) == 1 else None
    if count is None and options.reduction == "mean":
        found, fix = "it holds no tensor to count", ""
        if sizes:
            found = f"its tensors have sizes {sorted(sizes)} along their split dimension"
            fix = ", or say with in_dims which dimension counts"
        raise TypeError(
            f"{options.name}: loss_fn returned the mean over a micro-batch whose number of examples cannot be told: {found}. "
            f"Return gradacc.Mean(loss_sum, number) instead{fix}"
        )
    return count


def _map(func: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    """``func`` of a tensor, of those in a `Mean`; NOTE [parts without their trees] in ``_parts.py``."""
    if isinstance(leaf, Mean):
        return Mean(_map(func, leaf.total), _map(func, leaf.weight))
    if isinstance(leaf, Terms):
        means = [_map(func, mean) for mean in leaf.means]
        return Terms(means, [_map(func, weight) for weight in leaf.weights], leaf.treedef)
    if isinstance(leaf, Moments):
        return Moments(_map(func, leaf.count), func(leaf.mean), func(leaf.m2))
    return func(leaf) if isinstance(leaf, Tensor) else leaf


def _pair(out: Any) -> str:
    if not isinstance(out, (tuple, list, dict)):
        return describe(out)
    return f"a {type(out).__name__} of {len(out)}" + (" Means" if are_means(out) else "")


def _sum_of(losses: tuple[Any, ...]) -> str:
    """How to return several losses."""
    if are_means(losses, some=True):
        return "Return a tuple of nothing but gradacc.Means, for the sum of their values"
    return (
        "Return each as a gradacc.Mean(total, number), in a tuple, list or dict; or their sum, where each is a mean over the "
        "same examples"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # NumPy's scalars too
