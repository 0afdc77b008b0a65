"""The head of a language model by pieces of tokens: time and memory, forward and backward; and memory that pieces keep flat.

    python -m benchmarks.microbatch [--processes 2] [--rounds 5] [--device cuda] [--quick]

**Time.** Cross-entropy of 4096 tokens of width 512 over a vocabulary of 50,000 (``--quick``: 512, 64, 1,000), in float32 and in
bfloat16. All variants take turns in one process, once a round, in a balanced order (`benchmarks._measure`); several
processes do so. A ratio is to plain PyTorch's time *in the same round*; that runs twice a round, under two names: the second
row's distance from 1 is the noise. Gradients of hidden states and weight are freed inside the clock. Before anything is
timed, every variant's are checked against plain PyTorch's in float64 of the same numbers.

**Memory.** *Total*: what tensors take at the highest point, over what was there before the call, exact (torch.profiler's
records; on CUDA the caching allocator's maximum). *Over the floor*: less the gradients that are returned; hidden states and
weight were there before.

Half of the labels are ignored in one variant more, and dropped before the head in another.

Writes `microbatch.json` (to `--out`) and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradacc
from benchmarks import _memories
from benchmarks._measure import allocated_peak, fresh, interleaved, machine, ran_task, times
from benchmarks._microbatch_report import AGAIN, AT_OURS, DROPPED, FORWARD, HALF, PLAIN, RECOMPUTE, TORCHS, tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Size(NamedTuple):
    """Of a head, and its pieces."""

    tokens: int
    width: int
    vocabulary: int
    piece: int


FULL, QUICK = Size(4096, 512, 50_000, 256), Size(512, 64, 1_000, 32)


class Head(NamedTuple):
    """What every variant is given."""

    hidden: Tensor
    labels: Tensor
    weight: Tensor
    piece: int

    @property
    def floor(self) -> int:
        """Bytes of the gradients."""
        return sum(leaf.numel() * leaf.element_size() for leaf in (self.hidden, self.weight))


def head_of(dtype: torch.dtype, size: Size, device: torch.device) -> Head:
    """The same numbers in every process."""
    torch.manual_seed(0)
    hidden = torch.randn(size.tokens, size.width)
    weight = torch.randn(size.vocabulary, size.width) * size.width**-0.5
    labels = torch.randint(0, size.vocabulary, (size.tokens,))
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in (hidden, weight)]
    return Head(leaves[0], labels.to(device), leaves[1], size.piece)


def loss_sum(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def mean(hidden: Tensor, labels: Tensor, weight: Tensor) -> gradacc.Mean:
    """What a user of `microbatch` writes."""
    return gradacc.Mean(loss_sum(hidden, labels, weight), (labels != -100).sum())


def plain(head: Head) -> Tensor:
    return F.cross_entropy(head.hidden @ head.weight.T, head.labels)


def checkpointed(head: Head) -> Tensor:
    """`torch.utils.checkpoint` of each piece."""
    pieces = zip(torch.split(head.hidden, head.piece), torch.split(head.labels, head.piece), strict=True)
    terms = [checkpoint(loss_sum, hidden, labels, head.weight, use_reentrant=False) for hidden, labels in pieces]
    return torch.stack(terms).sum() / len(head.labels)


def torchs(head: Head) -> Tensor:
    """`F.linear_cross_entropy`, at its own piece size."""
    return _torchs(head, torch.nn.LinearCrossEntropyOptions())


def torchs_at_ours(head: Head) -> Tensor:
    """At ours."""
    return _torchs(head, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=head.piece))


def _torchs(head: Head, options: Any) -> Tensor:
    return F.linear_cross_entropy(head.hidden, head.weight, head.labels, options=options)


def forward(head: Head) -> Tensor:
    return _ours(head, "forward")


def recompute(head: Head) -> Tensor:
    return _ours(head, "recompute")


def _ours(head: Head, backward: gradacc.Backward) -> Tensor:
    by_pieces = gradacc.microbatch(mean, microbatch_size=head.piece, in_dims=(0, 0, None), backward=backward)
    return by_pieces(head.hidden, head.labels, head.weight).value  # type: ignore[no-any-return]  # by_pieces returns Any


def dropping(head: Head) -> Tensor:
    """Ignored tokens never reach the head."""
    real = head.labels != -100
    return forward(head._replace(hidden=head.hidden[real], labels=head.labels[real]))


Variant = Callable[[Head], Tensor]
VARIANTS: dict[str, Variant] = {
    PLAIN: plain,
    AGAIN: plain,
    "torch.utils.checkpoint, our pieces": checkpointed,
    TORCHS: torchs,
    AT_OURS: torchs_at_ours,
    FORWARD: forward,
    RECOMPUTE: recompute,
    HALF: forward,
    DROPPED: dropping,
}


def given(name: str, head: Head) -> Head:
    """With half of the labels ignored, where the variant's name says so."""
    if name not in (HALF, DROPPED):
        return head
    return head._replace(
        labels=torch.where(torch.arange(len(head.labels), device=head.labels.device) % 2 == 0, -100, head.labels)
    )


def run_of(name: str, head: Head) -> Callable[[], list[Tensor]]:
    """Forward and backward: the gradients of hidden states and weight."""
    own = given(name, head)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(VARIANTS[name](own), (own.hidden, own.weight)))

    return run


def check(head: Head) -> dict[str, float]:
    """Largest relative error (2-norm) of each variant's gradients from plain PyTorch's; nothing wrong is timed."""
    errors = {}
    limit = 1e-4 if head.hidden.dtype == torch.float32 else 5e-2
    oracles = {
        name: run_of(PLAIN, given(name, head)._replace(hidden=head.hidden, weight=head.weight))()
        for name in (PLAIN, HALF)
    }
    for name in VARIANTS:
        expected = oracles[HALF if name in (HALF, DROPPED) else PLAIN]
        pairs = zip(run_of(name, head)(), expected, strict=True)
        errors[name] = max(
            (torch.linalg.vector_norm(mine - other) / torch.linalg.vector_norm(other)).item() for mine, other in pairs
        )
        assert errors[name] <= limit, f"{name}: off plain PyTorch's gradient by {errors[name]:.1e}"
    return errors


def time_task(options: argparse.Namespace) -> dict[str, Any]:
    """Check all variants, then time them in turns."""
    device = torch.device(options.device)
    head = head_of(DTYPES[options.dtype], QUICK if options.quick else FULL, device)
    errors = check(head)
    runs = {name: run_of(name, head) for name in VARIANTS}
    return {
        "seconds": interleaved(runs, rounds=options.rounds, warmup=0, device=device),
        "errors": errors,
    }


def memory_task(options: argparse.Namespace) -> dict[str, Any]:
    """Exact peaks in bytes."""
    device = torch.device(options.device)
    head = head_of(DTYPES[options.dtype], QUICK if options.quick else FULL, device)
    found: dict[str, Any] = {"floor": head.floor}
    for name in VARIANTS:
        if name != AGAIN:
            found[name] = allocated_peak(run_of(name, head), device)
    return found


def growth_task(options: argparse.Namespace) -> dict[str, Any]:
    """What pieces keep flat."""
    device = torch.device(options.device)
    return {name: _memories.peaks(name, options.quick, device) for name in _memories.GROWTHS}


TASKS = {"time": time_task, "memory": memory_task, "growth": growth_task}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, each task in a fresh process, and write and print the results."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    size = QUICK if options.quick else FULL
    results: dict[str, Any] = {
        "machine": machine(torch.device(options.device)),
        "processes": options.processes,
        "rounds": options.rounds,
        "size": size._asdict(),
        "heads": {},
        "growth": _run("growth", options),
    }
    timed: dict[str, list[Any]] = {dtype: [] for dtype in options.dtypes}
    for _ in range(options.processes):
        for dtype in options.dtypes:
            timed[dtype].append(_run("time", options, dtype))
    for dtype in options.dtypes:
        results["heads"][dtype] = {
            "time": times(timed[dtype], list(VARIANTS), {"vs_plain": PLAIN, "vs_torchs": AT_OURS, "vs_half": HALF}),
            "memory": _run("memory", options, dtype),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "microbatch.json").write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    return 0


def _run(task: str, options: argparse.Namespace, dtype: str = "float32") -> Any:
    print(f"{task}: {dtype}", file=sys.stderr)
    passed = ["--task", task, "--dtype", dtype, "--device", options.device, "--rounds", str(options.rounds)]
    passed += ["--quick"] if options.quick else []
    passed += ["--threads", str(options.threads)] if options.threads is not None else []
    return fresh("benchmarks.microbatch", passed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2, help="that time everything, one after the other (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", choices=sorted(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a small head, for the test of this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.rounds = 1, min(options.rounds, 2)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
