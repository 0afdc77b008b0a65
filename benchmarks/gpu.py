"""What a GPU waits for: one accumulated gradient of a `Mean`, whose weight is counted on the device.

    python -m benchmarks.gpu [--device cuda] [--rounds 31] [--workloads gpt mlp tiny] [--quick]

The weight is the number of targets of a micro-batch, counted where they are. Three ways, in turns, in one process:

- *hand-written loop*: divides by the whole batch's count, which it knows beforehand, and reads nothing;
- *weight on the device*: ``Mean(total, count)``, which gradacc does not read;
- *weight read*: ``Mean(total, count.item())``, which waits for every micro-batch's forward pass before its backward pass is
  queued: what the second one saves.

The table has medians over the rounds of the ratio to the loop's time in the same round, with the quartiles, the peak of
allocated memory over module and batch, and how often a call waited (`torch.cuda.set_sync_debug_mode`; "-" on a CPU, where the
figures say only that the code runs). Before anything is timed, gradients are checked against the large batch's. Prints a
Markdown table and, with ``--out FILE``, writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradacc
from benchmarks._measure import Run, allocated_peak, interleaved, machine, paired, spread
from benchmarks._variants import microbatches, twin
from benchmarks._workloads import WORKLOADS, Workload

LOOP, OURS, READ = "hand-written loop", "weight on the device", "weight read"
Grads = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every workload and print the table."""
    options = _parse(arguments)
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(device), "rounds": options.rounds, "workloads": {}}
    for name in options.workloads:
        print(name, file=sys.stderr)
        results["workloads"][name] = measure(WORKLOADS[name](device), device, options.rounds, options.warmup)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))
    return 0


def measure(work: Workload, device: torch.device, rounds: int, warmup: int) -> dict[str, Any]:
    """Of one workload: times, peaks and waits of every way, once their gradients are right."""
    runs = {name: build(work) for name, build in WAYS.items()}
    expected = loop(work._replace(steps=1))()
    for run in runs.values():
        for leaf, grad in run().items():
            torch.testing.assert_close(grad, expected[leaf], rtol=1e-3, atol=1e-5)
    timed: dict[str, Run] = dict(runs)
    seconds = interleaved(timed, rounds=rounds, warmup=warmup, device=device)
    return {
        "title": work.title,
        "ways": {
            name: {
                "vs_loop": paired(seconds, name, LOOP)._asdict(),
                "seconds": spread(seconds[name])._asdict(),
                "peak": allocated_peak(run, device),
                "waits": waits(run, device),
            }
            for name, run in timed.items()
        },
    }


def waits(run: Run, device: torch.device) -> int | None:
    """How often a call waits for the device; None where nobody can tell."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in found)


def summed(work: Workload, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the loss's terms, and their number, counted on the device."""
    if target.is_floating_point():
        return F.mse_loss(output, target, reduction="sum"), torch.ones_like(target).sum()
    logits, labels = output.flatten(0, 1), target.flatten()
    return F.cross_entropy(logits, labels, reduction="sum"), (labels >= 0).sum()


def loop(work: Workload) -> Callable[[], Grads]:
    """The whole count first, then a backward pass for each micro-batch."""
    module, count = twin(work.module), work.targets.numel()

    def run() -> Grads:
        for inputs, targets in microbatches(work, work.steps):
            (summed(work, module(inputs), targets)[0] / count).backward()  # type: ignore[no-untyped-call]  # torch's
        grads = {name: leaf.grad for name, leaf in module.named_parameters() if leaf.grad is not None}
        module.zero_grad()
        return grads

    return run


def ours(work: Workload, read: bool = False) -> Callable[[], Grads]:
    """`gradacc.accumulate` of a `Mean`, whose weight is read by the loss or by nobody."""
    apply, params, _ = gradacc.functional(twin(work.module))

    def loss(params: Grads, batch: tuple[Tensor, Tensor]) -> gradacc.Mean:
        inputs, targets = batch
        total, count = summed(work, apply(params, inputs), targets)
        return gradacc.Mean(total, count.item() if read else count)

    grad_fn = gradacc.accumulate(loss, steps=work.steps)

    def run() -> Grads:
        grads: Grads = grad_fn(params, (work.inputs, work.targets))
        return grads

    return run


WAYS: dict[str, Callable[[Workload], Callable[[], Grads]]] = {
    LOOP: loop,
    OURS: ours,
    READ: lambda work: ours(work, read=True),
}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for work in results["workloads"].values():
        lines += [f"| {work['title']} | time / loop | ms | peak, MB | waits |", "|---|--:|--:|--:|--:|"]
        for name, way in work["ways"].items():
            ratio, counted = way["vs_loop"], "-" if way["waits"] is None else way["waits"]
            lines.append(
                f"| {name} | {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] "
                f"| {way['seconds']['median'] * 1e3:.1f} | {way['peak'] / 1e6:.0f} | {counted} |"
            )
        lines.append("")
    where = results["machine"]
    lines.append(f"{where.get('device', where['processor'])}, torch {where['torch']}, {results['rounds']} rounds.")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to see that it runs")
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds (31)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them that are dropped (3)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which (all)")
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it work?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.warmup = 2, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
