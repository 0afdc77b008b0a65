"""A model of the boundary's time, that links which are known may refute; then what it says of more ranks than there are here.

    T(W, n) = 2 (W - 1) (software + delays * delay) + 2 (W - 1) / W * n * overhead / rate + local(W)

of gloo's ring (Thakur, Rabenseifner and Gropp, 2005): messages, and bytes, of a rank. `software`, `delays` and `overhead` are
fitted to all-reduces over `FITTED` ranks, and predict those over `HELD`. `delays` is not 1: gloo's receiver first tells the
sender that it waits, so a message takes a link's delay twice. `local` is what `benchmarks._scale_cost` measures.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks._links import Link, hosts

FITTED, HELD = (2, 4), (3, 5, 6, 8)
SETTINGS = [
    *(
        [rate, delay, size]
        for rate in (100, 400)
        for delay in (0.0, 0.001, 0.005)
        for size in (200_000, 1_000_000, 4_000_000)
    ),
    [200, 0.002, 2_000_000],
]
"""Mbit/s, seconds, bytes."""
LIMIT = 300.0
"""Seconds after which ranks are ended."""


class Row(NamedTuple):
    """All-reduces of one setting."""

    world: int
    rate: float
    delay: float
    size: int
    seconds: list[float]


class Fit(NamedTuple):
    """What was fitted."""

    software: float
    """Seconds a message takes on a link without delay and of no bytes, on this machine."""
    delays: float
    """How many times a message takes a link's delay."""
    overhead: float
    """Bytes that a link carries for each of the tensor's, or as good as."""


def measure(*, quick: bool) -> dict[str, Any]:
    """Rows of every number of ranks. Raises `benchmarks._network.UnavailableError`."""
    worlds, settings, repeats = ((2, 3), SETTINGS[:3] + SETTINGS[7:9], 1) if quick else ((*FITTED, *HELD), SETTINGS, 3)
    rows = [row for world in worlds for row in _measured(world, settings, repeats)]
    return {"fitted": [world for world in FITTED if world in worlds], "rows": rows}


def _measured(world: int, settings: Sequence[list[float]], repeats: int) -> list[Row]:
    print(f"links: {world} ranks", file=sys.stderr)
    with hosts(world) as made:
        plan = json.dumps({"settings": settings, "repeats": repeats})
        command = [sys.executable, "-m", "benchmarks._ring_ranks", "--world", str(world), "--plan", plan]
        command += ["--control", made.control, "--names", *made.names]
        ran = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=LIMIT, check=False
        )
    if ran.returncode:
        raise RuntimeError(f"ranks on links ended with {ran.returncode}:\n{ran.stderr}")
    return [Row(world, rate, delay, size, seconds) for rate, delay, size, *seconds in json.loads(ran.stdout)]


def _terms(world: float, size: float, link: Link) -> list[float]:
    """What `Fit`'s three are multiplied by."""
    messages = 2 * (world - 1)
    return [messages, messages * link.delay, messages / world * size * 8e-6 / link.rate]


def fitted(rows: Sequence[Row]) -> Fit:
    """By least squares of relative errors, of the medians.

    >>> link = Link(100, 0.001)
    >>> exact = Fit(0.001, 2.0, 1.1)
    >>> rows = [Row(w, r, d, n, [predicted(exact, w, n, Link(r, d))]) for w in (2, 4) for r, d, n in SETTINGS]
    >>> [round(x, 6) for x in fitted(rows)]
    [0.001, 2.0, 1.1]
    """
    terms = torch.tensor([_terms(row.world, row.size, Link(row.rate, row.delay)) for row in rows], dtype=torch.float64)
    seconds = torch.tensor([median(row.seconds) for row in rows], dtype=torch.float64)
    found = torch.linalg.lstsq(terms / seconds[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution
    return Fit(*found.flatten().tolist())


def predicted(fit: Fit, world: float, size: float, link: Link) -> float:
    """Seconds of an all-reduce, without `local`.

    >>> predicted(Fit(0.0, 0.0, 1.0), 2, 1_000_000, Link(8.0, 0.0))
    1.0
    """
    return sum(x * term for x, term in zip(fit, _terms(world, size, link), strict=True))


def errors(fit: Fit, rows: Sequence[Row]) -> list[float]:
    """Prediction over measured median, less 1."""
    return [predicted(fit, row.world, row.size, Link(row.rate, row.delay)) / median(row.seconds) - 1 for row in rows]


def errors_outside(fit: Fit, rows: Sequence[Row], worlds: Sequence[int]) -> tuple[float, float]:
    """The least and the largest error where there are other numbers of ranks than ``worlds``, of which the fit is."""
    found = errors(fit, [row for row in rows if row.world not in worlds])
    return min(found), max(found)


def break_even(once: float, every: float, compute: float) -> int | None:
    """From how many micro-batches on one boundary at the end is faster than an all-reduce in each; None: never.

    ``once`` and ``every``: seconds of one; ``compute``: of a micro-batch. Every all-reduce is hidden behind the arithmetic of a
    whole micro-batch, as no implementation could better, and the one at the end behind none:
    ``k compute + once < k max(compute, every)``.

    >>> break_even(1.05, 1.0, 0.0), break_even(1.05, 1.0, 0.5), break_even(1.05, 1.0, 2.0)
    (2, 3, None)
    """
    exposed = every - compute
    return math.floor(once / exposed) + 1 if exposed > 0 else None
