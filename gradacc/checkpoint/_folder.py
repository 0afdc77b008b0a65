"""The folder on disk: what is in it, and how one checkpoint takes the place of another.

NOTE [atomic]
A checkpoint is ``checkpoint.json``, which names its data folder. `save` writes all data into a new folder beside the old
one, waits (fsync) until they are on the disk, with the names of all files and folders on the way to them, and then puts the
new ``checkpoint.json`` in the place of the old one with `os.replace`, which is atomic. Until that call the folder is the old
checkpoint, from then on the new one, wherever a process is killed. Only when that, too, is on the disk the old data are
removed. What is left over (a data folder that no ``checkpoint.json`` names) the next `save` removes; so two of them at once
would remove each other's data, and the second is refused (``_lock.py``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from gradacc._describe import describe
from gradacc.checkpoint import _lock

MANIFEST = "checkpoint.json"
LOCK = "checkpoint.lock"
VERSION = 2
"""The latest format: 2 has tensors that are divided over ranks. What has none is written as 1, as it was before."""

_FORMAT = "gradacc.checkpoint"
_UNFINISHED = MANIFEST + ".tmp"
_DATA = re.compile(r"data-[0-9a-f]{32}")
_FILE = re.compile(r"[0-9A-Za-z_.]+")
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}


def named(name: str, path: str | os.PathLike[str]) -> Path:
    """The folder at ``path``."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name}: the path must be a str or a pathlib.Path, got {describe(path)}")
    return Path(path)


def begin(name: str, folder: Path, held: contextlib.ExitStack) -> str:
    """Make room for a new checkpoint; returns the name of its data folder, which is empty. Nobody else saves while ``held``.

    Raises:
        ValueError: there is something else at ``folder``.
        BlockingIOError: another job saves there.
    """
    with contextlib.suppress(FileNotFoundError):
        read(name, folder)
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync(made.parent)
    held.enter_context(_lock.locked(name, folder / LOCK))
    remove_unused(folder)
    data = f"data-{uuid.uuid4().hex}"
    (folder / data).mkdir()
    return data


def publish(folder: Path, body: dict[str, Any]) -> None:
    """Make ``body``, and the data that it names, the checkpoint. See NOTE [atomic].

    Raises:
        OSError: it is not known to be on the disk: `read` may find it, or the one before.
    """
    text = json.dumps(body, separators=(",", ":")).encode()
    header = {
        "format": _FORMAT,
        "version": VERSION if body["chunks"] else 1,
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    with (folder / _UNFINISHED).open("wb") as stream:
        stream.write(json.dumps(header).encode() + b"\n" + text)
        stream.flush()
        os.fsync(stream.fileno())
    for names in (folder / body["data"], folder, folder.parent):
        _sync(names)
    os.replace(folder / _UNFINISHED, folder / MANIFEST)
    _sync(folder)


def read(name: str, folder: Path) -> dict[str, Any]:
    """What `publish` wrote.

    Raises:
        FileNotFoundError: there is no checkpoint yet.
        ValueError: it is damaged, or something else.
    """
    fix = "Name the folder of a checkpoint, or one that is new"
    try:
        content = (folder / MANIFEST).read_bytes()
    except NotADirectoryError:
        raise ValueError(f"{name}: {folder} is a file, not a checkpoint of gradacc. {fix}") from None
    except IsADirectoryError:
        raise ValueError(
            f"{name}: {folder} is not a checkpoint of gradacc: its {MANIFEST} is a folder. {fix}"
        ) from None
    except FileNotFoundError:
        others = _others(folder)
        if others:
            raise ValueError(
                f"{name}: {folder} is not a checkpoint of gradacc: it has no {MANIFEST}, but {others[0]}. {fix}"
            ) from None
        there = "only what an interrupted save left" if folder.is_dir() else "nothing"
        raise FileNotFoundError(f"{name}: no checkpoint at {folder}: {there} is there. Save one first") from None
    header, _, text = content.partition(b"\n")
    try:
        said = json.loads(header)
        written_by, version, digest = said["format"], said["version"], said["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        written_by = None
    if written_by != _FORMAT:
        raise ValueError(f"{name}: {folder / MANIFEST} is damaged, or not of a checkpoint of gradacc. {fix}")
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"{name}: {folder} is a checkpoint of format {version}, and this version of gradacc knows formats 1 to {VERSION}. "
            f"{fix}"
        )
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"{name}: {folder / MANIFEST} is damaged (truncated or changed). {fix}")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not _is_body(body):
        raise ValueError(f"{name}: {folder / MANIFEST} was not written by gradacc, though it says so. {fix}")
    found: dict[str, Any] = body
    return found


def remove_unused(folder: Path) -> None:
    """Remove what a killed `save` has left, and the checkpoint before this one."""
    used = _used(folder)
    for entry in folder.iterdir():
        if entry.name == _UNFINISHED:
            entry.unlink()
        elif _DATA.fullmatch(entry.name) and entry.name != used:
            shutil.rmtree(entry, ignore_errors=True)


def discard(folder: Path, data: str) -> None:
    """Remove the data of a `save` that has failed, unless they are the checkpoint already."""
    if _used(folder) != data:
        (folder / _UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(folder / data, ignore_errors=True)


def _used(folder: Path) -> Any:
    """The data folder of the checkpoint that is there; None where there is none."""
    try:
        return read("save", folder)["data"]
    except FileNotFoundError:
        return None


def _is_body(body: Any) -> bool:
    """Whether this is what `publish` is given, and names no file outside the data folder."""
    if not isinstance(body, dict):
        return False
    leaves, values, places = (body.get(name) for name in ("leaves", "values", "places"))
    chunks = body.setdefault("chunks", {})  # there are none in what was written before there could be
    return (
        isinstance(body.get("data"), str)
        and _DATA.fullmatch(body["data"]) is not None
        and isinstance(leaves, dict)
        and isinstance(values, dict)
        and isinstance(places, dict)
        and isinstance(chunks, dict)
        and leaves.keys() == values.keys() | places.keys() | chunks.keys()
        and all(isinstance(title, str) for title in leaves.values())
        and all(type(value).__name__ == leaves[key] for key, value in values.items())
        and all(_is_place(place) for place in (body.get("metadata"), *places.values()))
        and all(_are_chunks(found) for found in chunks.values())
    )


def _are_chunks(chunks: Any) -> bool:
    """Whether these are the chunks of a tensor, without a hole between them."""
    end = 0
    for chunk in chunks if isinstance(chunks, list) else [None]:
        if not isinstance(chunk, list) or len(chunk) != 3 or [type(item) for item in chunk[:2]] != [int, int]:
            return False
        offset, length, place = chunk
        if offset != end or length < 0 or not _is_place(place):
            return False
        end += length
    return True


def _is_place(place: Any) -> bool:
    if not isinstance(place, list) or [type(item) for item in place] != [str, int, int, str]:
        return False
    return _FILE.fullmatch(place[0]) is not None and min(place[1:3]) >= 0


def _others(folder: Path) -> list[str]:
    """What does not come from `save`."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name not in (_UNFINISHED, LOCK) and not _DATA.fullmatch(name)]


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can do that for folders.

    Raises:
        OSError: it can, but failed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
