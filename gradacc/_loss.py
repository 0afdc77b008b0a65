"""What ``loss_fn`` returned for one micro-batch: checked, and in the one shape that the rest knows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _aux, _where
from gradacc._aux import Aux
from gradacc._describe import describe
from gradacc._mean import SEVERAL_MEANS, Mean, are_means, with_plain_weight
from gradacc._options import Options


class Outcome(NamedTuple):
    """One micro-batch's loss."""

    target: Tensor
    """0-dim, floating: what is differentiated. The loss, or the total of a `Mean`."""

    value: Tensor | Mean
    """As ``loss_fn`` returned it."""

    weight: float | Tensor | None
    """What its mean is over: the number of examples, or the weight of a `Mean`. A tensor where its value cannot be read,
    None where nothing says it (then the loss is a sum)."""

    aux: Aux

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order in which `map` visits them."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def map(self, func: Callable[[Tensor], Tensor]) -> Outcome:
        """The same with ``func`` of every tensor."""
        aux = self.aux._replace(leaves=[_map(func, leaf) for leaf in self.aux.leaves])
        return Outcome(func(self.target), _map(func, self.value), _map(func, self.weight), aux)


def outcome(options: Options, out: Any, sizes: tuple[int, ...]) -> Outcome:
    """Of what ``loss_fn`` returned for a micro-batch whose tensors have these sizes along their split dimension."""
    value, aux = returned(options, out)
    target = target_of(options, value)
    if isinstance(value, Mean):
        value = with_plain_weight(value)
        weight: float | Tensor | None = _weight(options, value.weight, target)
        if isinstance(weight, Tensor) and not isinstance(value.weight, Tensor):
            value = Mean(value.total, weight)  # a float in a graph
    else:
        weight = _examples(options, sizes)
    return Outcome(target, value, weight, _aux.flatten(aux))


def returned(options: Options, out: Any) -> tuple[Any, Any]:
    """What ``loss_fn`` returned as ``(loss, aux)``, with aux None where there is none."""
    if not options.has_aux:
        if isinstance(out, tuple):
            raise TypeError(
                f"{options.name}: loss_fn returned {_pair(out)}; pass has_aux=True for (loss, aux), of which the loss alone is "
                f"differentiated{_several(out, '. Or are they several losses? Return their sum')}"
            )
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"{options.name}: with has_aux=True loss_fn must return (loss, aux), got {_pair(out)}{_several(out, '')}"
        )
    return out


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
        fix += _several(total, "")
        raise TypeError(f"{what}{_pair(total)}; it must return a 0-dim floating tensor, or a Mean of one{fix}")
    if total.ndim != 0:
        raise ValueError(
            f"{what}a tensor of shape {tuple(total.shape)}; it must be 0-dim. "
            "Take its mean, or return gradacc.Mean(loss.sum(), loss.numel())"
        )
    if not total.is_floating_point():
        raise TypeError(f"{what}a tensor of dtype {total.dtype}; it must be floating")
    return total


def _weight(options: Options, value: Any, like: Tensor) -> float | Tensor:
    """A Mean's weight: finite, ``>= 0``, from the data. NOTE [weights that are not read] in ``_sums.py``.

    A number where it can be read for nothing. Else a tensor, NaN where the weight is not what it must be.
    """
    name = options.name
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(
                f"{name}: loss_fn returned a Mean whose weight is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                "it must be a number or a 0-dim tensor"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name}: loss_fn returned a Mean whose weight depends on the parameters; the gradient of total / weight "
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
        raise TypeError(
            f"{name}: loss_fn returned a Mean whose weight is {describe(value)}; it must be a number or tensor"
        )
    if torch.compiler.is_compiling() and isinstance(value, float):
        # one that changes from call to call is symbolic, and its arithmetic beside tensors is guarded wrongly by torch 2.13
        return _nan_where_wrong(torch.zeros((), dtype=torch.float64, device=like.device) + value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: loss_fn returned a Mean whose weight is {value}; it must be finite and not negative")
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
    return func(leaf) if isinstance(leaf, Tensor) else leaf


def _pair(out: Any) -> str:
    if not isinstance(out, (tuple, list, dict)):
        return describe(out)
    return f"a {type(out).__name__} of {len(out)}" + (" Means" if are_means(out) else "")


def _several(out: Any, otherwise: str) -> str:
    """What a message about a container says of losses in it."""
    return f". {SEVERAL_MEANS}" if are_means(out) else otherwise


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # NumPy's scalars too
