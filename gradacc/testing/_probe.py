"""One loss on one batch, called in any number of ways, each from the same state: the large batch, splits, parts.

NOTE [the large batch]
    The oracle is ``torch.autograd.grad`` of one call of ``loss_fn`` on the whole batch. It is what `torch.func.grad`
    computes, works where `torch.func` refuses (activation checkpointing, saved-tensor hooks), and shares no line with the
    fold that is held against it, as ``accumulate(steps=1)`` would.

NOTE [no luck with random numbers]
    All calls start from the same random state. On a CPU, one dropout over a whole batch draws the same numbers as over its
    parts, one after the other: a loss with a single one would pass, with two it would not, nor on a GPU. So each
    micro-batch after the first starts from a state of its own, and a loss that draws is always found out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _accumulate, _loop, _loss, _tree
from gradacc._dtypes import is_inexact
from gradacc._mean import Mean, flatten, value_of
from gradacc._moments import Moments
from gradacc._options import Options
from gradacc.testing import _sandbox

FLOOR = 1e-2
"""A leaf smaller than this share of the whole gradient is measured against that share: it may be nothing but rounding."""


class Probe(NamedTuple):
    """A loss and its arguments. The parameters are our own copy; everything else is copied at every call."""

    loss_fn: Callable[..., Any]
    given: dict[str, Any]
    """Options for `accumulate_and_value`, without ``steps``."""
    options: Options
    args: tuple[Any, ...]
    differentiated: tuple[int, ...]
    dims: tuple[Any, ...]
    examples: int
    before: _sandbox.Snapshot
    carry: Any = None
    """What every call begins with, where there is one."""

    def evaluate(self, args: Sequence[Any] | None = None, *, modules: bool = True, seed: int | None = None) -> Result:
        """One call of the loss on the whole batch, or on ``args``; NOTE [the large batch].

        ``modules=False`` leaves modules as the last call left them; ``seed`` starts from another random state.
        """
        _sandbox.restore(self.before, modules=modules)
        if seed is not None:
            _sandbox.seed(seed)
        leaves, treedef = self.parameters()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        trees = dict(zip(self.differentiated, self._trees(_tree.unflatten(treedef, leaves)), strict=True))
        with torch.enable_grad():
            args = self._copied(self.args if args is None else args)
            value, beside = self.called([trees.get(n, arg) for n, arg in enumerate(args)])
            _loss.losses(self.options, value)
            number = value_of(value)
            _loop.check_dependence(self.options.name, number.requires_grad)
            grads = torch.autograd.grad(number, leaves, materialize_grads=True)
        weight = float(value.weight) if isinstance(value, Mean) else None
        return Result([_dense(grad) for grad in grads], number.detach(), weight, beside, (number.detach(),))

    def called(self, args: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The loss of these arguments, and what comes back beside it: leaves of aux, and of the carry what adds up."""
        usual, carry = self.loss_fn(*args, **self._beginning()), None
        if self.options.has_carry:
            usual, carry = _loss.with_carry(self.options, usual)
        value, aux = _loss.returned(self.options, usual)
        return value, [*_leaves(aux), *_added(carry)]

    def accumulate(self, steps: int, *, threaded: bool = True) -> Result:
        """The same through `gradacc.accumulate_and_value`; NOTE [no luck with random numbers].

        ``threaded=False``: every micro-batch gets the carry that the call begins with.
        """
        values: list[Tensor] = []

        @functools.wraps(self.loss_fn, updated=())
        def recorded(*args: Any, **carried: Any) -> Any:
            out = self.loss_fn(*args, **(carried if threaded else self._beginning()))
            usual = out[0] if self.options.has_carry else out
            value = usual[0] if self.options.has_aux else usual
            values.append(value_of(value).detach())
            _sandbox.seed(len(values))
            return out

        _sandbox.restore(self.before)
        grad_fn = _accumulate.accumulate_and_value(recorded, steps=steps, **self.given)
        try:
            results = grad_fn(*self._copied(self.args), **self._beginning())
        except Exception as error:
            error.add_note(f"check_accumulation: with steps={steps}; the large batch went through")
            raise
        (grads, value), carry = results if self.options.has_carry else (results, None)
        value, aux = value if self.options.has_aux else (value, None)
        beside = [*_leaves(aux), *_added(carry)]
        return Result(_tree.flatten(grads)[0], value_of(value), None, beside, tuple(values))

    def take(self, *ranges: tuple[int, int]) -> tuple[Any, ...]:
        """The arguments with these ranges of examples, one after the other, in place of all."""
        return self.replaced(lambda leaf, dim: [leaf.narrow(dim, low, high - low) for low, high in ranges])

    def replaced(self, func: Callable[[Tensor, int], list[Tensor]]) -> tuple[Any, ...]:
        """The arguments with the concatenation of ``func(leaf, dim)`` in place of every leaf that is split."""
        args = list(self.args)
        for n, dims in enumerate(self.dims):
            if dims is not None:
                leaves, treedef = _tree.flatten(args[n])
                spread = zip(leaves, _tree.broadcast_prefix(dims, args[n]), strict=True)
                args[n] = _tree.unflatten(
                    treedef,
                    [
                        torch.cat(func(leaf, dim), dim) if dim is not None and isinstance(leaf, Tensor) else leaf
                        for leaf, dim in spread
                    ],
                )
        return tuple(args)

    def double(self) -> Probe:
        """The same in float64: everything that is passed, not what the loss closes over."""
        return self._replace(
            args=tuple(_tree.map_tensors(_wider, arg) for arg in self.args),
            carry=_tree.map_tensors(_wider, self.carry),
            given=self.given | {"dtype": None},
            options=self.options._replace(dtype=None),
        )

    def of_term(self, place: int) -> Probe:
        """Of a loss that returns several means: one of them alone."""

        def alone(*args: Any) -> Any:
            value, _ = self.called(args)
            if isinstance(value, (Tensor, Mean)):
                raise ValueError("the loss is one mean")
            mean = flatten(value)[0][place]
            return (mean, None) if self.options.has_aux else mean

        return self._replace(loss_fn=alone, options=self.options._replace(has_carry=False))

    def parameters(self) -> tuple[list[Tensor], _tree.TreeDef]:
        """What is differentiated: leaves and structure."""
        single = isinstance(self.options.argnums, int)
        trees = tuple(self.args[n] for n in self.differentiated)
        return _tree.flatten(trees[0] if single else trees)

    def paths(self) -> list[str]:
        """Where each leaf of the gradient is."""
        roots = ["params" if n == 0 else f"args[{n}]" for n in self.differentiated]
        trees = [_tree.flatten(self.args[n])[1] for n in self.differentiated]
        return [path for root, tree in zip(roots, trees, strict=True) for path in _tree.paths(tree, root)]

    def _beginning(self) -> dict[str, Any]:
        """The keyword argument ``carry``, of our own."""
        return {"carry": _tree.map_tensors(copy, self.carry)} if self.options.has_carry else {}

    def _trees(self, tree: Any) -> tuple[Any, ...]:
        return (tree,) if isinstance(self.options.argnums, int) else tree

    def _copied(self, args: Sequence[Any]) -> list[Any]:
        """Copies of what is not differentiated, so that a loss that works in place does not reach the caller's."""
        return [arg if n in self.differentiated else _tree.map_tensors(copy, arg) for n, arg in enumerate(args)]


class Result(NamedTuple):
    """What one call gave."""

    grads: list[Tensor]
    value: Tensor
    """The loss; ``total / weight`` of a `Mean`, and the sum of them of several."""
    weight: float | None
    """The weight of a `Mean`."""
    aux: list[Any]
    """Its leaves, and what adds up of the carry."""
    values: tuple[Tensor, ...]
    """The loss of each micro-batch."""


class Errors(NamedTuple):
    """How far one result is from another."""

    grad: float
    worst: int
    value: float
    aux: float | None

    @property
    def largest(self) -> float:
        """The largest of the three; infinite for NaN."""
        return max(math.inf if math.isnan(error) else error for error in (self.grad, self.value, self.aux or 0.0))


def errors(result: Result, large: Result, probe: Probe) -> Errors:
    """Relative errors of ``result``; `check_accumulation` has the equations."""
    norms = [_norm(grad) for grad in large.grads]
    whole = math.hypot(*norms)
    grads = [
        _ratio(distance(a, b), max(norm, FLOOR * whole))
        for a, b, norm in zip(result.grads, large.grads, norms, strict=True)
    ]
    worst = max(range(len(grads)), key=lambda i: math.inf if math.isnan(grads[i]) else grads[i])
    sizes = [abs(value.item()) for value in result.values if math.isfinite(value.item())]
    typical = sum(sizes) / (1 if probe.options.reduction == "sum" else len(sizes) or 1)
    value = _ratio(distance(result.value, large.value), max(abs(large.value.item()), typical))
    beside = probe.options.has_aux or (probe.options.has_carry and bool(large.aux))
    return Errors(grads[worst], worst, value, _aux_error(result.aux, large.aux) if beside else None)


def distance(a: Tensor, b: Tensor) -> float:
    """The Euclidean norm of ``a - b``, computed in float64; what is the same NaN or infinity in both is no difference."""
    a, b = _double(a), _double(b)
    return _norm(torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b))


def copy(tensor: Tensor) -> Tensor:
    """A tensor of our own that needs a gradient where the original does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _aux_error(a: list[Any], b: list[Any]) -> float:
    worst = 0.0
    for left, right in zip(map(torch.as_tensor, a), map(torch.as_tensor, b), strict=True):
        same_shape = left.shape == right.shape
        error = _ratio(distance(left, right), _norm(right)) if same_shape else math.inf
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _ratio(difference: float, size: float) -> float:
    return 0.0 if difference == 0.0 else difference / size if size else math.inf


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(_double(tensor)))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _wider(tensor: Tensor) -> Tensor:
    """Floats in float64 or complex128, anything else as it is."""
    if not is_inexact(tensor):
        return tensor
    return _double(tensor).requires_grad_(tensor.requires_grad)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


def _leaves(aux: Any) -> list[Any]:
    return _tree.flatten(aux)[0]


def _added(carry: Any) -> list[Tensor]:
    """Of a carry what adds up to the large batch's: values of `Mean`s, means and variances of `Moments`."""
    found: list[Tensor] = []
    for leaf in _tree.flatten(carry, lambda node: isinstance(node, (Mean, Moments)))[0]:
        if isinstance(leaf, Mean):
            found.append(torch.as_tensor(value_of(leaf)))
        elif isinstance(leaf, Moments):
            found += [leaf.mean, leaf.variance()]
    return found
