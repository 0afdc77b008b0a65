"""Ctrl-C as a question that loops ask, so that no iteration is ever left half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

DEBOUNCE_SECONDS = 0.5
"""Wrappers (``make``, ``uv run``) may pass one Ctrl-C on twice: what comes sooner than this is the same one."""

Interrupted = Callable[[], bool]
"""Whether Ctrl-C was pressed: asked between documents, rows, batches and iterations."""


@contextmanager
def interrupts() -> Iterator[Interrupted]:
    """Within the context the first SIGINT only makes the yielded function true; a later one is a `KeyboardInterrupt`.

    Outside the main thread, where Python allows no signal handlers, the function is always false.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[float] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        pressed.append(now)
        if now - pressed[0] > DEBOUNCE_SECONDS:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
