"""What every benchmark measures with: interleaved times, paired ratios, peak memory, fresh processes, the machine.

Nothing here knows what is measured: a run is any function without arguments, and its result is dropped.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
Task = Callable[[argparse.Namespace], object]
PROC = Path("/proc/self")


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float


def spread(sample: Sequence[float]) -> Spread:
    """Median, first and third quartile (inclusive method)."""
    if len(sample) == 1:
        return Spread(sample[0], sample[0], sample[0])
    low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
    return Spread(median, low, high)


def order(count: int, turn: int) -> list[int]:
    """The order in which `count` contestants run in round `turn`: a Williams design, fixed and without chance.

    Over `count` rounds (twice as many when `count` is odd) everyone takes every place equally often and follows
    everyone else equally often, so that neither the place in the round nor what the predecessor left in the caches
    favours anyone.

    >>> [order(4, turn) for turn in range(4)]
    [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    row = [(step + turn) % count for step in zigzag]
    return row[::-1] if count % 2 and (turn // count) % 2 else row


def interleaved(
    runs: Mapping[str, Run], *, rounds: int, warmup: int, device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each run, one entry a round: every round times every run once, in the order of `order`.

    The first `warmup` rounds are dropped. A timing is the mean of `repeats` calls; garbage is collected before it and
    the collector is off during it; on an accelerator the clock waits for the device at both ends.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already need not be searched before every timing
    for turn in range(warmup + rounds):
        for index in order(len(names), turn):
            elapsed = _timed(runs[names[index]], device, repeats)
            if turn >= warmup:
                seconds[names[index]].append(elapsed)
    gc.unfreeze()
    return seconds


def _timed(run: Run, device: torch.device, repeats: int) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        _wait(device)
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


Seconds = Mapping[str, Sequence[float]]
"""Of every contestant in one process, an entry a round."""


def paired(seconds: Seconds, name: str, base: str) -> Spread:
    """Spread over the rounds of (time of `name` / time of `base`), both taken from the same round."""
    return spread([mine / other for mine, other in zip(seconds[name], seconds[base], strict=True)])


class Ratio(NamedTuple):
    """Time over another contestant's, both of the same round: within processes and between them."""

    median: float
    """Of the processes' medians."""
    low: float
    high: float
    """Quartiles of all rounds."""
    least: float
    most: float
    """The lowest and the highest median of a process."""


def ratio(processes: Sequence[Seconds], name: str, base: str) -> Ratio:
    """Of `name` to `base` in several processes, which ran at different times."""
    each = [paired(seconds, name, base).median for seconds in processes]
    rounds = paired(pooled(processes), name, base)
    return Ratio(statistics.median(each), rounds.low, rounds.high, min(each), max(each))


def pooled(processes: Sequence[Seconds]) -> dict[str, list[float]]:
    """The rounds of all processes."""
    return {name: [elapsed for seconds in processes for elapsed in seconds[name]] for name in processes[0]}


def times(found: Sequence[Mapping[str, Any]], names: Sequence[str], bases: Mapping[str, str]) -> dict[str, Any]:
    """What all processes found of every contestant; ``bases``: under which keys its ratios to which others are."""
    processes = [each["seconds"] for each in found]
    return {
        name: {
            **{key: ratio(processes, name, base)._asdict() for key, base in bases.items()},
            "seconds": spread(pooled(processes)[name])._asdict(),
            "gradient_error": max(each["errors"][name] for each in found),
            "rounds": [[round(elapsed, 7) for elapsed in seconds[name]] for seconds in processes],
        }
        for name in names
    }


def shown(measured: Mapping[str, float]) -> str:
    """A `Ratio` in a table: the median, the quartiles of rounds, the range of processes."""
    return (
        f"{measured['median']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}] "
        f"({measured['least']:.3f} to {measured['most']:.3f})"
    )


def said(rounds: int, processes: int) -> str:
    """What a table says of its figures."""
    return (
        f"Ratios within a round, of {rounds} interleaved rounds in each of {processes} processes that ran at different times: "
        "median of the processes' medians [quartiles of all rounds] (lowest to highest median of a process)"
    )


def allocated_peak(run: Run, device: torch.device) -> int:
    """Bytes of tensor memory at the highest point during `run`, over what was allocated before it: exact, no noise.

    On a CPU, the running sum over torch.profiler's records of every allocation and free; on CUDA, the caching
    allocator's own maximum. Memory that libraries take behind torch's back (BLAS packing buffers, say) is not in it. The
    profiler sees its own thread: what a thread of gloo frees seems to stay.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""An environment in which every tensor of 64 KiB has pages of its own, so that the resident set is what is held."""


def resident() -> int:
    """Bytes of this process's resident set, after unused heap was handed back (Linux)."""
    _tidy()
    return _proc_status("VmRSS")


def _tidy() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_peak(run: Run) -> int:
    """Bytes by which `run` raised this process's resident set at its highest point: what the machine must really have.

    The kernel's own peak (VmHWM), reset just before the run where /proc lets us, minus the resident set at that moment,
    after unused heap was handed back. Elsewhere the peak since the process began, so call it once a process.
    """
    _tidy()
    try:
        (PROC / "clear_refs").write_text("5")
        before = _proc_status("VmRSS")
        run()
        return _proc_status("VmHWM") - before
    except OSError:
        before = _maximum_resident()
        run()
        return _maximum_resident() - before


def _proc_status(field: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _maximum_resident() -> int:
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def ran_task(options: argparse.Namespace, tasks: Mapping[str, Task]) -> bool:
    """Whether this process is one that `fresh` started for a task: then the task has run, and its result is printed."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.task is None:
        return False
    warnings.simplefilter("ignore")
    print(json.dumps(tasks[options.task](options)))
    return True


def fresh(module: str, arguments: Sequence[str]) -> Any:
    """Run `python -m module arguments` in a new process and return the JSON that it printed on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def rounded(value: Any) -> Any:
    """Floats to six digits, as results are written."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def machine(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, versions. No host name, no paths."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
