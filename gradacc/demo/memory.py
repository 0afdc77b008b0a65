"""Peak memory of a call, in bytes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_memory(call: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """``call()`` and the most bytes of tensors that it held at one time, over what there was before.

    On a CPU these are the bytes that torch's allocator was asked for, from the profiler's record of every allocation:
    exact and the same every time, but without what a library (oneDNN) allocates behind torch's back; what was allocated
    before and is freed by ``call`` is not subtracted. On a GPU it is `torch.cuda.max_memory_allocated`.

    >>> _, peak = peak_memory(lambda: torch.ones(1000, dtype=torch.float64).exp(), torch.device("cpu"))
    >>> peak
    16000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        result = call()
    finally:
        with _silent_stderr():
            profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    return result, _peak([(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"])


def _peak(changes: list[tuple[float, int]]) -> int:
    """The largest running sum of ``(time, bytes)``; bytes are negative where memory was given back."""
    held = peak = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what the profiler's C++ side says when it starts and stops; its log level is fixed once torch is imported."""
    try:
        stderr = os.dup(2)
    except OSError:  # the process has none
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
