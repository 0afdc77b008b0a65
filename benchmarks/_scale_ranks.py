"""What one of two ranks of `benchmarks._scale_bytes` does: counts collectives and bytes of a step; started by torchrun.

torchrun … -m benchmarks._scale_ranks --workload gpt --steps 8 --result FILE
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks._measure import Run
from benchmarks._ranks import collectives, wire_bytes
from benchmarks._scale_ways import WAYS, Way, whole
from benchmarks._synced import EXACT, rank_share
from benchmarks._variants import Grads, Variant, large_batch
from benchmarks._workloads import WORKLOADS, Workload


def main() -> None:
    """Check each, then count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    work = WORKLOADS[options.workload](torch.device("cpu")).resized(2 * options.steps)
    expected = large_batch(work)
    result = {
        "steps": options.steps,
        "parameter_bytes": work.parameter_bytes,
        "ways": {
            name: {"gathered": way.gathered, **_counted(way, work, options.steps, expected)}
            for name, way in WAYS.items()
        },
    }
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _counted(way: Way, work: Workload, steps: int, expected: Grads) -> dict[str, Any]:
    """Of calls after the second: by then DDP has regrouped its buckets, and ranks have agreed."""
    variant = way.build(rank_share(work, dist.get_rank(), dist.get_world_size()), steps)
    error, interface = _error(expected, variant), os.environ["GLOO_SOCKET_IFNAME"]
    variant()
    return {
        "error": error,
        "counts": collectives(variant)["counts"],
        "transport": _transported(variant),
        "bytes": wire_bytes(variant, interface),
    }


def _error(expected: Grads, variant: Variant) -> float:
    """Largest relative error (2-norm, leaf by leaf) from the large batch's gradient. What is wrong is not counted."""
    found = whole(variant.compute())
    variant.release()
    assert found.keys() == expected.keys(), "other parameters than the large batch's"
    norm = torch.linalg.vector_norm
    error: float = max((norm(found[leaf] - expected[leaf]) / norm(expected[leaf])).item() for leaf in expected)
    assert error <= EXACT, f"off the large batch's gradient by {error:.1e}"
    return error


def _transported(run: Run) -> dict[str, int]:
    """What gloo itself says that it did, whoever asked for it (Python, or C++ behind its back), by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as recorded:
        run()
    return dict(Counter(event.name for event in recorded.events() or () if event.name.startswith("gloo:")))


if __name__ == "__main__":
    main()
