"""Is the large batch a weighted mean of its parts? A small least-squares problem.

NOTE [unions of parts]
    Cut the batch into k consecutive parts, and measure ``v(S) = (gradient, value)`` for every union S of neighbouring
    parts. If the loss is a mean over anything at all (examples, tokens, pixels), each part has one weight, whatever its
    company, and for every S

    .. code-block:: text

        sum over i in S of  w_i (v_i - v(S)) = 0,    w >= 0,    sum_i w_i = 1

    With k = 4 these are six vector equations for three unknowns, so that a loss which is no such mean does not pass by
    having few parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradacc._dtypes import as_real
from gradacc.testing._probe import Probe, Result

Span = tuple[int, int]
_COORDINATES = 1 << 18


class Parts(NamedTuple):
    """``v(S)`` of every union S of neighbouring parts ``i .. j - 1``, under the key ``(i, j)``."""

    number: int
    vectors: dict[Span, Tensor]
    """Gradient (some coordinates of it, where there are many) and value, last; both scaled to be of order 1."""
    shares: list[float]
    """Of the examples."""
    weights: dict[Span, float] | None
    """Where the loss is a `Mean`."""

    @property
    def means(self) -> list[float] | None:
        """Shares of the `Mean`'s weights."""
        if self.weights is None:
            return None
        own = [self.weights[i, i + 1] for i in range(self.number)]
        return [weight / sum(own) for weight in own] if sum(own) else None

    def totals(self) -> Parts:
        """The same for the totals of the `Mean`s."""
        assert self.weights is not None
        return self._replace(vectors={span: vector * self.weights[span] for span, vector in self.vectors.items()})

    def unions(self) -> list[Span]:
        """Those of at least two parts."""
        return [(i, j) for i, j in self.vectors if j - i > 1]

    def residual(self, weights: Sequence[float]) -> float:
        """How far the unions are from being their parts' weighted means: the largest relative error."""
        return max(self._of_mean(span, weights) for span in self.unions())

    def residual_of_sum(self) -> float:
        """The same for sums."""
        return max(self._relative((i, j), sum(self.vectors[n, n + 1] for n in range(i, j))) for i, j in self.unions())

    def residual_of_constant(self) -> float:
        """The same for sums of which every part holds the same constant term; infinite where two parts say nothing."""
        own = self.vectors
        # The unions of n parts lack n - 1 of it.
        lacking = {(i, j): sum(own[n, n + 1] for n in range(i, j)) - own[i, j] for i, j in self.unions()}
        if len(lacking) < 2:
            return math.inf
        constant = lacking[0, self.number] / (self.number - 1)
        return max(self._relative((i, j), own[i, j] + lacking[i, j] - (j - i - 1) * constant) for i, j in lacking)

    def residual_of_combinations(self) -> float:
        """The same for combinations of two neighbours' gradients with any factors > 0; infinite where it says nothing."""
        if any(vector.numel() < 5 for vector in self.vectors.values()):
            return math.inf
        found = 0.0
        for i in range(self.number - 1):
            pair = torch.stack([self.vectors[n, n + 1][:-1] for n in (i, i + 1)], dim=1)
            union = self.vectors[i, i + 2][:-1]
            if not bool(pair.isfinite().all() and union.isfinite().all()):
                return math.inf
            factors = torch.linalg.lstsq(pair, union.unsqueeze(1), driver="gelsd").solution
            if not bool((factors > 0).all()):
                return math.inf
            found = max(found, float((pair @ factors - union.unsqueeze(1)).norm() / union.norm()))
        return found

    def _relative(self, span: Span, predicted: Tensor | int) -> float:
        actual = self.vectors[span]
        own = [float(self.vectors[n, n + 1].norm()) for n in range(*span)]
        size = max([float(actual.norm()), *filter(math.isfinite, own)])
        error = float((predicted - actual).norm())
        return math.inf if math.isnan(error) else error / size if size else 0.0

    def _of_mean(self, span: Span, weights: Sequence[float]) -> float:
        """How far a union is from the weighted mean; a part of weight 0 counts nothing, NaN or not."""
        used = [n for n in range(*span) if weights[n] > 0]
        if not used:  # the mean of nothing is NaN, or nothing
            nothing = not bool(self.vectors[span].isfinite().all()) or not bool(self.vectors[span].any())
            return 0.0 if nothing else math.inf
        total = sum(weights[n] for n in used)
        return self._relative(span, sum(self.vectors[n, n + 1] * (weights[n] / total) for n in used))


class Sizes(NamedTuple):
    """How large the parts' gradients and values are, before they cancel."""

    grad: float
    value: float


def measure(probe: Probe, count: int) -> Parts:
    """Call the loss on every union of ``count`` parts; NOTE [unions of parts].

    Raises:
        ValueError: there are fewer examples than parts.
    """
    results, edges = _results(probe, count)
    grads = {span: _coordinates(result) for span, result in results.items()}
    values = {span: result.value.double().reshape(1) for span, result in results.items()}
    scale, unit = _typical(grads), _typical(values)
    return Parts(
        count,
        {span: torch.cat([grads[span] / scale, values[span] / unit]) for span in results},
        [(high - low) / probe.examples for low, high in itertools.pairwise(edges)],
        {span: result.weight for span, result in results.items() if result.weight is not None} or None,
    )


def interplay(probe: Probe) -> float | None:
    """How much what one half of the batch contributes depends on the data of the other half; None where they do nothing.

    It is the mixed second difference over the larger of the first ones, where each half's floating data are changed by up
    to a tenth:

    .. code-block:: text

        |v(a', b') - v(a', b) - v(a, b') + v(a, b)| / max(|v(a', b) - v(a, b)|, |v(a, b') - v(a, b)|)

    Zero for every sum and every mean, and for sums of means over different things.
    """
    half = probe.examples // 2

    def measured(*shaken: bool) -> Result:
        def halves(leaf: Tensor, dim: int) -> list[Tensor]:
            pair = leaf, _perturbed(leaf)
            first, second = (pair[which] for which in shaken)
            return [first.narrow(dim, 0, half), second.narrow(dim, half, probe.examples - half)]

        return probe.evaluate(probe.replaced(halves))

    results = [measured(*shaken) for shaken in ((False, False), (True, False), (False, True), (True, True))]
    grads = [_coordinates(result) for result in results]
    values = [result.value.double().reshape(1).cpu() for result in results]
    scale, unit = grads[0].norm() or 1.0, values[0].abs() or 1.0
    none, left, right, both = (torch.cat([g / scale, v / unit]) for g, v in zip(grads, values, strict=True))
    size = max(float((left - none).norm()), float((right - none).norm()))
    return float((both - left - right + none).norm()) / size if size > 1e-4 else None


def _perturbed(leaf: Tensor) -> Tensor:
    """Other data; a mask in disguise, of zeros and ones, stays."""
    if not leaf.is_floating_point() or bool(((leaf == 0) | (leaf == 1)).all()):
        return leaf
    waves = torch.arange(leaf.numel(), device=leaf.device, dtype=torch.float32).cos().reshape(leaf.shape)
    return leaf * (1 + 0.1 * waves).to(leaf.dtype)


def sizes(probe: Probe) -> Sizes:
    """The largest gradient and value among parts."""
    results, _ = _results(probe, min(4, probe.examples), unions=False)
    grads = [math.hypot(*(float(grad.norm()) for grad in result.grads)) for result in results.values()]
    return Sizes(max(grads), max(abs(float(result.value)) for result in results.values()))


def solve(parts: Parts) -> list[float] | None:
    """The weights of sum 1 that come nearest, negative ones made 0; None where nothing can be said."""
    alive = [n for n in range(parts.number) if bool(parts.vectors[n, n + 1].isfinite().all())]
    rows = []
    for i, j in parts.unions():
        inside = [n for n in alive if i <= n < j]
        if not inside:
            continue
        if not bool(parts.vectors[i, j].isfinite().all()):
            return None
        columns = torch.zeros(len(parts.vectors[i, j]), parts.number, dtype=torch.float64)
        for n in inside:
            columns[:, n] = parts.vectors[n, n + 1] - parts.vectors[i, j]
        rows.append(torch.linalg.qr(columns, mode="r").R)  # few rows that have the same products
    if not rows:
        return None
    weights = torch.full((len(alive),), 1 / len(alive), dtype=torch.float64)
    if len(alive) > 1:
        system = torch.cat(rows)[:, alive]
        # Differences to the first: the directions that keep the sum.
        size = len(alive) - 1
        basis = torch.cat([-torch.ones(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)])
        step = torch.linalg.lstsq(system @ basis, -(system @ weights).unsqueeze(1), driver="gelsd").solution
        weights = weights + (basis @ step).squeeze(1)
    spread = torch.zeros(parts.number, dtype=torch.float64)
    spread[alive] = weights.clamp(min=0.0)
    return spread.tolist()


def _results(probe: Probe, count: int, *, unions: bool = True) -> tuple[dict[Span, Result], list[int]]:
    if probe.examples < count:
        raise ValueError(f"{probe.examples} examples make no {count} parts")
    edges = [probe.examples * n // count for n in range(count + 1)]
    spans = [(i, j) for i in range(count) for j in range(i + 1, count + 1) if unions or j == i + 1]
    return {(i, j): probe.evaluate(probe.take((edges[i], edges[j]))) for i, j in spans}, edges


def _coordinates(result: Result) -> Tensor:
    """The gradient as one vector of at most about `_COORDINATES` numbers, evenly spread over each leaf."""
    total = sum(grad.numel() for grad in result.grads)
    stride = -(-total // _COORDINATES) or 1
    flat = [as_real(grad).flatten() for grad in result.grads]
    return torch.cat([each[::stride].double().cpu() for each in flat])


def _typical(vectors: dict[Span, Tensor]) -> float:
    norms = [float(vector.norm()) for vector in vectors.values()]
    finite = [norm for norm in norms if math.isfinite(norm)]
    return (sum(finite) / len(finite) if finite else 0.0) or 1.0
