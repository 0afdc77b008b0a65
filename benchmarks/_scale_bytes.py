"""Collectives and bytes of a step, counted: two real ranks, on two hosts where namespaces can be made.

Collectives three ways, which must agree: by torch's dispatcher (what Python and C++ ask of a process group), by the profiler's
records of what gloo did, and by the bytes that the kernel's own counter of the interface saw, headers included.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._network import UnavailableError, launch, loopback, two_hosts

STEPS = 8
RATE = 4000
"""Mbit/s: nothing is timed."""
LIMIT = 560.0
"""Seconds after which ranks are ended."""


def measure(*, quick: bool) -> dict[str, Any]:
    """Of every way."""
    words = ["--workload", "tiny" if quick else "gpt", "--steps", str(STEPS)]
    print("collectives: 2 ranks", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        words += ["--result", str(result)]
        try:
            with two_hosts(RATE) as hosts:
                launch(hosts, "benchmarks._scale_ranks", words, timeout=LIMIT)
                where = "two namespaces"
        except UnavailableError as reason:
            print(f"no namespaces, so loopback: {reason}", file=sys.stderr)
            with loopback() as hosts:
                launch(hosts, "benchmarks._scale_ranks", words, timeout=LIMIT)
                where = "loopback, whose bytes are halved"
        found: dict[str, Any] = json.loads(result.read_text())
        return {"where": where, **found}
