"""What ranks find alike at first use: time, bytes and memory of one rank, against the number of ranks.

    python -m benchmarks.agreement [--rounds 5] [--quick]

300 parameters. A fake process group, whose collectives do nothing, has any number of ranks: what is measured is what one rank
computes and holds itself, and what its collectives would have carried to it. *Everyone's description* is what was done before:
every rank gathers, reads and compares every rank's description; where ranks differ it still is.

Writes `agreement.json` and `agreement.png` (to `--out`) and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from benchmarks._measure import machine
from benchmarks._report import describe
from gradacc import _options, _tree
from gradacc._parts import Average
from gradacc._sums import Sums
from gradacc._sync import agreement, layout
from gradacc._sync import bound as bounds

WORLDS = (2, 16, 128, 1024, 16384)
NAMES = ("fingerprints", "everyone's description")
PARAMS = {f"layers.{n // 4}.part{n % 4}.weight": torch.ones(4, 4) for n in range(300)}


def fingerprints(mine: agreement.Description, caller: agreement.Caller) -> None:
    """What is done now."""
    assert isinstance(caller.exchange(mine), agreement.Alike)


def descriptions(mine: agreement.Description, caller: agreement.Caller) -> None:
    """What was done before, and is where ranks differ."""
    coded = pickle.dumps((caller.number, caller.call_name, mine))
    answers = [pickle.loads(coded) for _ in range(caller.group.size())]
    assert len({answer[:2] for answer in answers}) == 1
    agreement._check_alike(caller.name, caller.group, [each for _, _, each in answers])


RUNS: tuple[Callable[[agreement.Description, agreement.Caller], None], ...] = (fingerprints, descriptions)


class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts what all-reduces and broadcasts bring to a rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d."):
            self.count += sum(leaf.nbytes for leaf in _tree.flatten(args)[0] if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


def measure(world: int, rounds: int) -> dict[str, Any]:
    """Of both ways, in turns."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        options = _options.options("accumulate", sum, sync=gradacc.all_reduce())
        leaves, treedef = _tree.flatten(PARAMS)
        value = Average(torch.ones(()), torch.float32)
        here = layout.of(Sums(value=value, aux=None, weight=1.0, unit=1.0, differentiated=True))
        assert dist.group.WORLD is not None
        bound = bounds.bound(options, dist.group.WORLD, leaves, treedef, [leaf.dtype for leaf in leaves])
        mine = agreement.describe(options, bound, here, 8.0, ())
        caller = agreement.Caller("accumulate", dist.group.WORLD, 1, "accumulate(train.loss_fn:12)")
        found: dict[str, Any] = {name: {"seconds": []} for name in NAMES}
        for turn in range(rounds + 1):
            for name, run in list(zip(NAMES, RUNS, strict=True))[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                run(mine, caller)
                if turn:
                    found[name]["seconds"].append(time.perf_counter() - start)
        for name, run in zip(NAMES, RUNS, strict=True):
            tracemalloc.start()
            run(mine, caller)
            found[name]["memory"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        with Bytes() as counted:
            fingerprints(mine, caller)
        found[NAMES[0]]["bytes"] = counted.count
        found[NAMES[1]]["bytes"] = world * len(pickle.dumps((1, caller.call_name, mine)))
        return found
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure at every number of ranks, write and print."""
    options = _parse(arguments)
    worlds = [world for world in WORLDS if world <= 128 or not options.quick]
    results = {
        "machine": machine(torch.device("cpu"), ()),
        "settings": {"rounds": options.rounds, "parameters": len(PARAMS)},
        "ranks": {str(world): measure(world, options.rounds) for world in worlds},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "agreement.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "agreement.png")
    print(table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| ranks | way | ms | KB received | KB held |", "|--:|---|--:|--:|--:|"]
    for world, ways in results["ranks"].items():
        for name, found in ways.items():
            cells = median(found["seconds"]) * 1e3, found["bytes"] / 1e3, found["memory"] / 1e3
            lines.append(f"| {world} | {name} | " + " | ".join(f"{cell:,.1f}" for cell in cells) + " |")
    settings = results["settings"]
    lines += [
        "",
        f"Medians of {settings['rounds']} runs in turns, {settings['parameters']} parameters; a fake process group, whose "
        f"collectives take no time. {describe(results['machine'])}.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for time, bytes and memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    worlds = [int(world) for world in results["ranks"]]
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, kind, unit in zip(
        panels, ("seconds", "bytes", "memory"), ("s", "bytes received", "bytes held"), strict=True
    ):
        for name, colour in zip(NAMES, ("#1a73e8", "#202124"), strict=True):
            found = [results["ranks"][str(world)][name][kind] for world in worlds]
            axes.plot(worlds, [median(x) if kind == "seconds" else x for x in found], "o-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="up to 128 ranks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
