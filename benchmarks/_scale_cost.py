"""What one rank does itself at the boundary, against the number of ranks: time and memory beside the collectives.

A fake process group, whose collectives do nothing, has any number of ranks. Where a sum would arrive, this rank's record is put
into every rank's slot, outside of the clock: all ranks then have sent what it has. Measured is everything between the last
micro-batch and the result: packing gradients, records, reading them, unpacking. First use is `benchmarks.agreement`'s.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradacc
from benchmarks._measure import allocated_peak
from gradacc._sync.crossing import Crossing
from gradacc._sync.link import Link

WORLDS = (2, 8, 64, 512, 2048, 16384)
LEAVES, NUMEL = 300, 16_667
"""20 MB of float32."""

Cross = Callable[[], Any]


class Line(NamedTuple):
    """Of a straight line through points of worlds and what was measured."""

    fixed: float
    per_rank: float
    off: float
    """How far from the line a point is at most, in parts of it."""


def line(worlds: Sequence[int], found: Sequence[float]) -> Line:
    """By least squares of relative errors.

    >>> line([2, 8, 64], [12.0, 18.0, 74.0])
    Line(fixed=10.0, per_rank=1.0, off=0.0)
    """
    measured = torch.tensor(found, dtype=torch.float64)
    terms = torch.stack([torch.ones(len(worlds), dtype=torch.float64), torch.tensor(worlds, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(terms / measured[:, None], torch.ones(len(worlds), 1, dtype=torch.float64)).solution
    off = ((terms @ solved).flatten() / measured - 1).abs().max().item()
    fixed, per_rank = (round(x, 12) for x in solved.flatten().tolist())
    return Line(fixed, per_rank, round(off, 6))


class _Fake:
    """All-reduces of which every rank has sent the same record; how long they took to fake, and how large they were."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.count = 0.0, 0, 0
        self.fill: Callable[[Tensor], None] = lambda flat: None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In place of the ones that `gradacc._sync.crossing` starts."""
        start, reduce = Crossing.start, dist.all_reduce

        def started(crossing: Crossing, group: dist.ProcessGroup, record: Tensor | None) -> None:
            def fill(flat: Tensor) -> None:
                if record is not None:
                    slots = flat[len(flat) - group.size() * crossing.flat.digits :].view(group.size(), -1)
                    slots.copy_(record.expand_as(slots))

            self.fill = fill
            start(crossing, group, record)

        def reduced(flat: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.fill(flat)
            self.bytes, self.count = self.bytes + flat.nbytes, self.count + 1
            work = reduce(flat, *args, **kwargs)
            self.seconds += time.perf_counter() - start
            return work

        with mock.patch.object(Crossing, "start", started), mock.patch.object(dist, "all_reduce", reduced):
            yield


def measure(*, quick: bool) -> dict[str, Any]:
    """At every number of ranks."""
    worlds, rounds = (WORLDS[:4], 3) if quick else (WORLDS, 15)
    return {
        "leaves": LEAVES,
        "gradient_bytes": LEAVES * NUMEL * 4,
        "rounds": rounds,
        "ranks": {str(world): _at(world, rounds) for world in worlds},
    }


def _at(world: int, rounds: int) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        fake = _Fake()
        params = {str(n): torch.ones(NUMEL) for n in range(LEAVES)}
        grad_fn = gradacc.accumulate_and_value(_loss, steps=1, sync=gradacc.all_reduce())
        with fake.installed():
            grad_fn(params, torch.ones(1))  # first use

            def call(around: Callable[[Cross], Any], keep: bool = False) -> None:
                cross = Link.cross

                def crossed(self: Link, grads: list[Tensor | None], *args: Any) -> Any:
                    kept = [*grads] if keep else []
                    result = around(lambda: cross(self, grads, *args))
                    del kept
                    return result

                with mock.patch.object(Link, "cross", crossed):
                    grads, _ = grad_fn(params, torch.ones(1))
                assert torch.equal(grads["0"], torch.full((NUMEL,), 2.0 / world)), "gradients of one rank of many"

            seconds = [_timed(call, fake) for _ in range(rounds + 1)][1:]
            fake.bytes = fake.count = 0
            call(lambda cross: cross())
            crossed = {"collectives": fake.count, "wire_bytes": fake.bytes}
            python, tensors = _held(call)
            return {"seconds": seconds, "python_bytes": python, "tensor_bytes": tensors, **crossed}
    finally:
        dist.destroy_process_group()


def _loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in params.values()]).sum() * batch.mean()


def _timed(call: Callable[[Callable[[Cross], Any]], None], fake: _Fake) -> float:
    found = [0.0]

    def around(cross: Cross) -> Any:
        fake.seconds, start = 0.0, time.perf_counter()
        result = cross()
        found[0] = time.perf_counter() - start - fake.seconds
        return result

    call(around)
    return round(found[0], 7)


def _held(call: Callable[[Callable[[Cross], Any], bool], None]) -> tuple[int, int]:
    """The most that Python's objects take inside, and tensors, over what there is before."""
    python, tensors = [0], [0]

    def objects(cross: Cross) -> Any:
        tracemalloc.start()
        result = cross()
        python[0] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    def allocated(cross: Cross) -> Any:
        results: list[Any] = []
        tensors[0] = allocated_peak(lambda: results.append(cross()), torch.device("cpu"))
        return results[0]

    # Gradients are let go as they are packed; that is not to be taken from what comes later.
    call(objects, True)
    call(allocated, True)
    return python[0], tensors[0]


def lines_of(found: dict[str, Any]) -> dict[str, Line]:
    """Time, memory and bytes on the wire, each as a line: of the calls in which gradients crossed once."""
    once = {int(world): each for world, each in found["ranks"].items() if each["collectives"] == 1}
    worlds, ranks = list(once), list(once.values())
    return {
        "seconds": line(worlds, [median(each["seconds"]) for each in ranks]),
        "held": line(worlds, [each["python_bytes"] + each["tensor_bytes"] for each in ranks]),
        "wire": line(worlds, [each["wire_bytes"] for each in ranks]),
    }
