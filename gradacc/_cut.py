"""How a tensor's elements are divided over ranks: each has a contiguous range of them, in row-major order.

NOTE [equal shares]
    Every tensor is divided, so that whatever is sent together is spread evenly. What does not divide evenly goes on where the
    tensor before it ended: of tensors of n elements together no rank has more than ``ceil(n / ranks)``, and none less than
    ``floor(n / ranks)``.

    That is what ranks keep. On the wire all have as many: each tensor's parts are padded to its widest one, which is at most
    ``ranks - 1`` elements a tensor (of 300 small ones on 1024 ranks about 1.2 MB in float32), and of whole rows (`of_rows`) as
    many rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor


class Run(NamedTuple):
    """Ranks that follow each other, each with as many elements."""

    first: int
    ranks: int
    length: int
    """Elements of each."""
    offset: int
    """Where those of the first one begin."""


class Cut(NamedTuple):
    """A tensor's elements, divided."""

    runs: tuple[Run, ...]
    """All ranks, in order."""

    def part(self, rank: int) -> tuple[int, int]:
        """Where a rank's elements begin, and how many they are."""
        run = [run for run in self.runs if run.first <= rank][-1]
        return run.offset + (rank - run.first) * run.length, run.length

    def rows(self, numbers: Tensor, width: int) -> list[tuple[Run, Tensor]]:
        """Of a tensor's numbers, flat, ``width`` for an element: those of each run, a row for each of its ranks."""
        found = []
        for run in self.runs:
            begin, length = run.offset * width, run.length * width
            found.append((run, numbers.narrow(0, begin, run.ranks * length).view(run.ranks, length)))
        return found

    @property
    def width(self) -> int:
        """The most that a rank has."""
        return max(run.length for run in self.runs)


def of(pairs: Sequence[tuple[int, int]]) -> Cut:
    """So many ranks with so many elements each, after so many others: ``[(count, length), ...]``."""
    runs, rank, offset = [], 0, 0
    for count, length in pairs:
        if count:
            runs.append(Run(rank, count, length, offset))
            rank, offset = rank + count, offset + count * length
    return Cut(tuple(runs))


def of_rows(shape: Sequence[int], world: int) -> Cut:
    """Of whole rows, as ``torch.chunk`` divides them: as many for each rank, fewer or none for the last ones."""
    rows, width = shape[0], math.prod(shape[1:])
    each = -(-rows // world)
    full, rest = divmod(rows, each) if each else (0, 0)
    ranks = min(1, rest)
    return of([(full, each * width), (ranks, rest * width), (world - full - ranks, 0)])


def cuts(numels: Sequence[int], kinds: Sequence[Hashable], world: int) -> list[Cut]:
    """Of tensors with so many elements: NOTE [equal shares], of those of each kind (dtype)."""
    starts: dict[Hashable, int] = {}
    found = []
    for numel, kind in zip(numels, kinds, strict=True):
        least, more = divmod(numel, world)
        start = starts.get(kind, 0)
        end = start + more
        starts[kind] = end % world
        # Which ranks have one more: a range of them, that may go round.
        bounds = [0, start, end, world] if end <= world else [0, end - world, start, world]
        ones = (0, 1, 0) if end <= world else (1, 0, 1)
        counts = [after - before for before, after in itertools.pairwise(bounds)]
        found.append(of([(count, least + one) for count, one in zip(counts, ones, strict=True)]))
    return found
