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
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                f"{name}: {holder} is saving into {file.parent} at this moment; nothing was changed. Give each job a folder "
                "of its own, or save when that one has ended"
            )
        with suppress(OSError):  # it is for the message alone, and the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


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
