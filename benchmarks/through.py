"""A loss over the whole batch on a real encoder: time against sentence-transformers' cached loss, memory, and two ranks.

    python -m benchmarks.through [--processes 2] [--rounds 16] [--batches 64 256 1024 4096] [--quick]

MiniLM on pairs of the standard library's source: the summary of a docstring, at most 16 tokens of it, and the body of its
function, 32 (`benchmarks._minilm`). The loss is a cross-entropy of scaled cosine similarities, 32 rows at a time;
micro-batches are of 32 texts: sentence-transformers' own defaults. Float32, one thread.

**Time.** All variants take turns in one process, once a round, in a balanced order (`benchmarks._measure`); several processes
do so. A ratio is to sentence-transformers' time *in the same round*; that runs twice a round, under two names: the second
row's distance from 1 is the noise. A batch of 64 has ``--rounds`` rounds, one of 256 a quarter of them, and so on, but one at
least. Gradients are freed inside the clock. Before anything is timed, each variant's are checked against those of one graph,
on 64 pairs.

**Memory.** What tensors take at the highest point, over what was there before the call, exact (torch.profiler's records), less
the gradients that are returned.

**Ranks.** Two processes with gloo, started by torchrun. The encoders are a single layer, so that what is seen is the loss: its
form that every rank evaluates for the union, and the one of a rank's own rows. Exact peaks, the flops of matrix products by
torch's FlopCounterMode, and the slower rank's time.

Writes `through.json` (to `--out`) and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradacc
from benchmarks import _minilm
from benchmarks._measure import allocated_peak, fresh, interleaved, machine, ran_task, times
from benchmarks._minilm import Batch
from benchmarks._through_report import AGAIN, OURS, THEIRS, WHOLE, tables

CPU = torch.device("cpu")


class Size(NamedTuple):
    """Of everything that is measured."""

    batches: tuple[int, ...]
    microbatch: int
    checked: int
    """Pairs on which gradients are compared."""
    whole: int
    """The largest batch that one graph is tried on."""
    unions: tuple[int, ...]
    """Pairs of all ranks together."""


FULL = Size((64, 256, 1024, 4096), 32, 64, 256, (1024, 2048, 4096))
QUICK = Size((8, 16), 4, 8, 16, (64, 128))


class Work(NamedTuple):
    """What every variant is given."""

    model: Any
    batch: Batch
    microbatch: int


def work_of(size: int, microbatch: int, model: Any = None) -> Work:
    """The same pairs in every process."""
    model = _minilm.load() if model is None else model
    return Work(model, _minilm.tokenized(model, _minilm.pairs()[:size]), microbatch)


Grads = dict[str, Tensor]
Run = Callable[[], Grads]


def whole(work: Work) -> Run:
    """One graph."""
    through, params = _minilm.encoders(work.model)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}

    def run() -> Grads:
        outputs = {side: encode(leaves, work.batch) for side, encode in through.items()}
        loss = _minilm.loss_fn(leaves, outputs, work.batch)
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    return run


def theirs(work: Work) -> Run:
    """sentence-transformers' cached loss."""
    return lambda: _minilm.theirs(work.model, work.batch, work.microbatch)[1]


def ours(work: Work) -> Run:
    """The loss by rows, as theirs is."""
    through, params = _minilm.encoders(work.model)
    loss = _minilm.by_rows(work.microbatch)
    grad_fn = gradacc.accumulate(loss, through=through, microbatch_size=work.microbatch)
    return lambda: grad_fn(params, work.batch)


VARIANTS: dict[str, Callable[[Work], Run]] = {THEIRS: theirs, AGAIN: theirs, OURS: ours, WHOLE: whole}


def names(size: Size, batch: int) -> list[str]:
    """Of what is run on such a batch."""
    return [name for name in VARIANTS if name != WHOLE or batch <= size.whole]


def check(work: Work) -> dict[str, float]:
    """Relative error (2-norm of all) of each variant's gradients from one graph's; nothing wrong is timed."""
    expected = whole(work)()
    errors = {}
    for name, build in VARIANTS.items():
        found = build(work)()
        off = [found[key] - leaf for key, leaf in expected.items() if key in found]
        assert not any(leaf.any() for key, leaf in expected.items() if key not in found)
        errors[name] = _norm(off) / _norm(expected.values())
        assert errors[name] <= 1e-4, f"{name}: off the whole batch's gradient by {errors[name]:.1e}"
    return errors


def _norm(leaves: Iterable[Tensor]) -> float:
    return float(torch.cat([leaf.flatten() for leaf in leaves]).norm(dim=0))


def rounds_of(options: argparse.Namespace, batch: int) -> int:
    """Larger batches have fewer."""
    return min(int(options.rounds), max(1, int(options.rounds) * 64 // batch))


def time_task(options: argparse.Namespace) -> dict[str, Any]:
    """Check all variants, then time them in turns."""
    size = _size(options)
    work = work_of(options.batch, size.microbatch)
    errors = check(work_of(size.checked, size.microbatch, work.model))
    runs = {name: VARIANTS[name](work) for name in names(size, options.batch)}
    return {
        "seconds": interleaved(runs, rounds=rounds_of(options, options.batch), warmup=0, device=CPU),
        "errors": errors,
    }


def memory_task(options: argparse.Namespace) -> dict[str, int]:
    """Exact peaks in bytes, less the gradients'."""
    size = _size(options)
    work = work_of(options.batch, size.microbatch)
    gradients = sum(leaf.nbytes for leaf in work.model.parameters())
    return {
        name: allocated_peak(VARIANTS[name](work), CPU) - gradients
        for name in names(size, options.batch)
        if name != AGAIN
    }


TASKS = {"time": time_task, "memory": memory_task}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, each task in a fresh process, and write and print the results."""
    options = _parse(arguments)
    if ran_task(options, TASKS):
        return 0
    size = _size(options)
    results: dict[str, Any] = {
        "machine": machine(CPU, ("sentence-transformers", "transformers")),
        "processes": options.processes,
        "microbatch": size.microbatch,
        "tokens": _minilm.LENGTHS,
        "batches": {},
        "ranks": {union: _ranks(union, options) for union in size.unions},
    }
    for batch in options.batches or size.batches:
        timed = [_run("time", batch, options) for _ in range(options.processes)]
        results["batches"][batch] = {
            "rounds": rounds_of(options, batch),
            "time": times(timed, names(size, batch), {"vs_theirs": THEIRS}),
            "memory": _run("memory", batch, options),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "through.json").write_text(json.dumps(results, indent=1) + "\n")
    print(tables(json.loads(json.dumps(results))))
    return 0


def _size(options: argparse.Namespace) -> Size:
    return QUICK if options.quick else FULL


def _run(task: str, batch: int, options: argparse.Namespace) -> Any:
    print(f"{task}: {batch} pairs", file=sys.stderr)
    passed = ["--task", task, "--batch", str(batch), "--rounds", str(options.rounds), "--threads", "1"]
    return fresh("benchmarks.through", passed + (["--quick"] if options.quick else []))


def _ranks(union: int, options: argparse.Namespace) -> Any:
    """Of two ranks that hold so many pairs together."""
    print(f"ranks: {union} pairs", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "benchmarks._through_ranks", "--union", str(union), "--result", str(result)]
        command += ["--rounds", str(max(2, options.rounds // 2))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stdout}{done.stderr}")
        return json.loads(result.read_text())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2, help="that time everything, one after the other (2)")
    parser.add_argument("--rounds", type=int, default=16, help="of a batch of 64 (16)")
    parser.add_argument("--batches", type=int, nargs="*", help=f"{FULL.batches}")
    parser.add_argument("--quick", action="store_true", help="small batches, for the test of this file")
    for hidden in ("--task", "--batch", "--threads"):
        parser.add_argument(hidden, type=str if hidden == "--task" else int, help=argparse.SUPPRESS)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.rounds = 1, min(options.rounds, 2)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
