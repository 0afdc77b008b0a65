"""One `save` at a time into one folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HAS_NONE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}
"""What a file system without locks says."""


@contextmanager
def locked(name: str, file: Path) -> Iterator[None]:
    """Nobody else has this while this has it; the system takes it back from a process that has ended, however it ended.

    The file stays: whoever removed it would take it from under the next one, who waits for it.

    Raises:
        BlockingIOError: another one has it.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _taken(descriptor):
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                f"{name}: {holder} is saving into {file.parent} at this moment; nothing was changed. Give each job a folder "
                "of its own, or save when that one has ended"
            )
        with suppress(OSError):  # it is for the message alone, and the disk may be full
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            _give_back(descriptor)
    finally:
        os.close(descriptor)


def _give_back(descriptor: int) -> None:
    """What closing alone would not do where a process that was forked meanwhile has the descriptor too."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _taken(descriptor: int) -> bool:
    """Whether another one has it; if not, this one has it now, where the file system has locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HAS_NONE:
            return False
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    return False
