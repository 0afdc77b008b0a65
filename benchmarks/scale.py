"""Evidence of scale, each claim by the cheapest method that could refute it.

    python -m benchmarks.scale [--part exactness cost bytes model] [--quick]

*exactness*: up to 1024 ranks as threads with real sums between them, against one large batch in float64: uneven shares, ranks
without examples, a rank that fails (`benchmarks._scale_exact`). *cost*: what one rank does itself against 2 to 16384 ranks, of
which the others are not there (`benchmarks._scale_cost`). *bytes*: collectives and bytes of a step, counted between two real
ranks, beside DDP's and FSDP2's (`benchmarks._scale_bytes`). *model*: the time of gloo's ring over links of known rate and
delay, fitted to 2 and 4 ranks, tested on 3, 5, 6 and 8, and only then asked for 1024 (`benchmarks._scale_model`).

*bytes* and *model* need Linux, root and iproute2 for network namespaces; elsewhere the former counts on loopback, and the
latter is left out with a message. Parts that are not measured keep the figures that are in ``scale.json`` (in `--out`). Writes
it and ``scale.png``, and prints Markdown tables. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _scale_bytes, _scale_cost, _scale_exact, _scale_model
from benchmarks._measure import machine
from benchmarks._network import UnavailableError
from benchmarks._scale_figure import draw
from benchmarks._scale_report import tables

PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "exactness": _scale_exact.measure,
    "cost": _scale_cost.measure,
    "bytes": _scale_bytes.measure,
    "model": _scale_model.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts that were asked for, write and print all there are."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # an exception, so that all is cleaned up
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "scale.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for part in options.part:
        where = {"machine": machine(torch.device("cpu"), ()), "load": round(os.getloadavg()[0], 1)}
        try:
            results["parts"][part] = {**where, **PARTS[part](quick=options.quick)}
        except UnavailableError as reason:
            print(f"{part}: left out, {reason}", file=sys.stderr)
        path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "scale.png")
    print("\n\n".join(f"{part}\n\n{text}" for part, text in tables(results).items()))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which (all)")
    parser.add_argument("--quick", action="store_true", help="few ranks, small models: does it work?")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder (benchmarks/results)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
