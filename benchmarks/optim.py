"""Time and memory of one optimizer step, eager: gradacc.optim against torch.optim on a model's parameters.

    python -m benchmarks.optim [--processes 5] [--rounds 9] [--device cuda] [--workload gpt] [--out benchmarks/results]

Every contestant has its own copies of the parameters, gradients and state of `benchmarks._workloads`' model, and they
take turns in one process, once a round, in a balanced order (`benchmarks._measure`); several processes do so. What is
reported is the ratio to torch.optim's own `foreach` step of the same rule (AdamW, or SGD with momentum) *in the same
round*: the median of the processes' medians, the quartiles of all rounds, the range of the processes; AdamW's runs
twice a round, under two names: the second row's distance from 1 is the noise. Before anything is timed, five steps of
each are checked against torch's: to the last bit on a CPU, to float32's rounding elsewhere.

*Peak memory* is what a step allocates at its highest point over what was there before, in sizes of the parameters.

Writes `optim.json` (to `--out`) and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import (
    allocated_peak,
    fresh,
    interleaved,
    machine,
    pooled,
    ran_task,
    ratio,
    said,
    shown,
    spread,
)
from benchmarks._report import describe
from benchmarks._workloads import WORKLOADS
from gradacc import optim

Tree = dict[str, Tensor]
BASE = "torch.optim.AdamW(foreach=True)"
SGD = "torch.optim.SGD(momentum=0.9, foreach=True)"
LR = 1e-3
MAX_NORM = 1.0
IMPERATIVE: dict[str, dict[str, Any]] = {
    BASE: {"foreach": True},
    "the same again": {"foreach": True},
    "torch.optim.AdamW(foreach=False)": {"foreach": False},
    "torch.optim.AdamW(fused=True)": {"fused": True},
    "clip_grad_norm_, torch.optim.AdamW(foreach=True)": {"foreach": True, "clip": True},
    SGD: {"cls": torch.optim.SGD, "momentum": 0.9, "foreach": True},
}
FUNCTIONAL: dict[str, tuple[Callable[[], optim.Optimizer], bool]] = {
    "adamw, donate=True": (lambda: optim.adamw(LR), True),
    "adamw": (lambda: optim.adamw(LR), False),
    "from_torch(AdamW, foreach=True), donate=True": (lambda: _from_torch(foreach=True), True),
    "from_torch(AdamW, foreach=True)": (lambda: _from_torch(foreach=True), False),
    "from_torch(AdamW, fused=True), donate=True": (lambda: _from_torch(fused=True), True),
    "by_path of two adamw, donate=True": (lambda: _groups(), True),
    "clip_by_global_norm(adamw), donate=True": (lambda: optim.clip_by_global_norm(optim.adamw(LR), MAX_NORM), True),
    "skip_nonfinite(adamw), donate=True": (lambda: optim.skip_nonfinite(optim.adamw(LR)), True),
    "sgd(momentum=0.9), donate=True": (lambda: optim.sgd(LR, momentum=0.9), True),
    "from_torch(SGD, momentum=0.9, foreach=True), donate=True": (
        lambda: optim.from_torch(torch.optim.SGD, lr=LR, momentum=0.9, foreach=True),
        True,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the figures, and print them as a Markdown table."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    passed = [word for name in _PASSED for word in (f"--{name}", str(getattr(options, name)))]
    passed += ["--threads", str(options.threads)] if options.threads is not None else []
    found = [fresh("benchmarks.optim", ["--task", "time", *passed]) for _ in range(options.processes)]
    processes = [each["seconds"] for each in found]
    results = {
        "machine": machine(torch.device(options.device)),
        "title": found[0]["title"],
        "processes": options.processes,
        "rounds": options.rounds,
        "steps": {
            name: {
                "seconds": spread(pooled(processes)[name])._asdict(),
                "vs_foreach": ratio(processes, name, base(name))._asdict(),
                "peak": found[0]["peaks"][name],
            }
            for name in processes[0]
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "optim.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def time_task(options: argparse.Namespace) -> dict[str, Any]:
    """Check all contestants, then time them in turns."""
    device = torch.device(options.device)
    work = WORKLOADS[options.workload](device)
    params = {name: leaf.detach() for name, leaf in sorted(work.module.named_parameters())}  # the order of our leaves
    grads = {name: 1e-3 * torch.randn_like(leaf) for name, leaf in params.items()}
    size = sum(leaf.numel() * leaf.element_size() for leaf in params.values())
    check(params, grads)
    runs = {name: imperative(params, grads, **kwargs)[0] for name, kwargs in IMPERATIVE.items()}
    runs |= {name: functional(make(), params, grads, donate)[0] for name, (make, donate) in FUNCTIONAL.items()}
    seconds = interleaved(runs, rounds=options.rounds, warmup=3, device=device, repeats=options.repeats)
    peaks = {name: allocated_peak(run, device) / size for name, run in runs.items()}
    return {"title": work.title, "seconds": seconds, "peaks": peaks}


TASKS = {"time": time_task}
_PASSED = ("rounds", "repeats", "workload", "device")


def base(name: str) -> str:
    """What a contestant is compared with."""
    return SGD if "sgd" in name.lower() else BASE


def imperative(
    params: Tree, grads: Tree, *, cls: Any = torch.optim.AdamW, clip: bool = False, **kwargs: Any
) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """A step of an optimizer of torch, and what its parameters are."""
    leaves = [leaf.clone() for leaf in params.values()]
    optimizer = cls(leaves, lr=LR, **kwargs)
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(leaves, MAX_NORM)
        optimizer.step()

    return step, lambda: leaves


def functional(
    optimizer: optim.Optimizer, params: Tree, grads: Tree, donate: bool
) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """A step of ours, which keeps its result, and what its parameters are."""
    held: list[Any] = [{name: leaf.clone() for name, leaf in params.items()}, None]
    held[1] = optimizer.init(held[0])
    slopes = {name: grad.clone() for name, grad in grads.items()}

    def step() -> None:
        given = {name: grad.detach() for name, grad in slopes.items()} if donate else slopes  # given away, too
        held[:] = optimizer.step(held[0], given, held[1], donate=donate)

    return step, lambda: list(held[0].values())


def check(params: Tree, grads: Tree) -> None:
    """Five steps of every contestant against torch's own, clipped where it clips."""
    exact = next(iter(params.values())).is_cpu
    for name, (make, donate) in FUNCTIONAL.items():
        theirs, expected = imperative(params, grads, **IMPERATIVE[base(name)], clip="clip" in name)
        ours, actual = functional(make(), params, grads, donate)
        for _ in range(5):
            theirs()
            ours()
        rtol, atol = (0.0, 0.0) if exact and "fused" not in name else (1e-5, 1e-6)
        for mine, other in zip(actual(), expected(), strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| {results['title']}: one step | ms | time / foreach | peak memory / parameters |", "|---|--:|--:|--:|"]
    for name, row in results["steps"].items():
        over = shown(row["vs_foreach"])
        lines.append(f"| {name} | {row['seconds']['median'] * 1e3:.2f} | {over} | {row['peak']:.2f} x |")
    return "\n".join([*lines, "", f"{said(results['rounds'], results['processes'])}. {describe(results['machine'])}."])


def _from_torch(**kwargs: Any) -> optim.Optimizer:
    return optim.from_torch(torch.optim.AdamW, lr=LR, **kwargs)


def _groups() -> optim.Optimizer:
    return optim.by_path(optim.adamw(LR), (lambda path, leaf: leaf.ndim < 2, optim.adamw(LR)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=5, help="that time everything, one after the other (5)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1, help="steps a timing")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="gpt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
