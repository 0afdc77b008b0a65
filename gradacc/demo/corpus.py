"""Real text as ragged pieces: from a file, a folder, or the Python standard library's own source."""

from __future__ import annotations

import codecs
import os
import re
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from gradacc.demo.interrupt import Interrupted
from gradacc.demo.settings import DemoError

MAX_BYTES = 64 * 2**20
"""Reading stops here, so that a folder of any size can be named."""

HELD_OUT_EVERY = 20
"""One document in so many is held out; a corpus of fewer documents is first cut into this many sections."""

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
"""Not of the standard library, or its tests; ``encodings`` holds near copies, which would flatter the held-out text."""


class Document(NamedTuple):
    """One text: its path relative to the corpus, and its bytes."""

    name: str
    text: bytes


class Corpus(NamedTuple):
    """Pieces to train on and pieces held out (from other documents), every one of 2 to ``context`` bytes.

    ``source`` says in words what was read; ``documents`` counts the documents of either part, ``bytes`` their bytes.
    """

    source: str
    train: list[bytes]
    held_out: list[bytes]
    documents: tuple[int, int]
    bytes: int


def load(data: Path | None, context: int, interrupted: Interrupted = lambda: False) -> Corpus:
    """The corpus at ``data`` (a UTF-8 text file, or a folder of them), or the standard library's source for None.

    The order is that of the sorted paths, so that a path gives the same corpus every time. In a folder, hidden and
    binary files are passed over; reading stops after `MAX_BYTES`.

    Raises:
        DemoError: nothing there that can be read, or too little text to train on one part and hold out another.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = list(_folder(root, interrupted, suffix=".py", skipped=SKIPPED_FOLDERS))
        source = f"the source of Python {sysconfig.get_python_version()}'s standard library"
        if not documents:
            raise DemoError("the source of Python's standard library is not on this machine: name a text with --data")
    else:
        documents = _read(data, interrupted)
        source = str(data)
    train, held_out = split(documents, context)
    if not (train and held_out):
        size = sum(len(document.text) for document in documents)
        raise DemoError(f"--data {data}: {size} bytes of text are too few to train on one part and hold out another")
    return Corpus(
        source,
        [piece for document in train for piece in document if len(piece) > 1],
        [piece for document in held_out for piece in document if len(piece) > 1],
        (len(train), len(held_out)),
        sum(len(piece) for document in train + held_out for piece in document),
    )


def describe(corpus: Corpus) -> str:
    """What was read, in words."""
    train, held_out = corpus.documents
    size = f"{corpus.bytes:,} bytes in {train + held_out:,} documents, {held_out:,} of them held out"
    limit = f" (reading stopped at {MAX_BYTES // 2**20} MiB)" if corpus.bytes > MAX_BYTES - 4 else ""
    return f"{corpus.source}, {size}{limit}"


def split(documents: list[Document], context: int) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """Every document as its `pieces`, in two parts without a document in common: to train on, and held out."""
    cut = [pieces(document.text, context) for document in documents]
    if len(cut) < HELD_OUT_EVERY:
        everything = [piece for document in cut for piece in document]
        bounds = [len(everything) * index // HELD_OUT_EVERY for index in range(HELD_OUT_EVERY + 1)]
        cut = [everything[start:stop] for start, stop in pairwise(bounds)]
    cut = [document for document in cut if any(len(piece) > 1 for piece in document)]
    train = [document for index, document in enumerate(cut) if (index + 1) % HELD_OUT_EVERY]
    held_out = cut[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return (train, held_out) if held_out else (cut[:-1], cut[-1:])


def pieces(text: bytes, context: int) -> list[bytes]:
    r"""``text`` cut into pieces of 1 to ``context`` bytes: ``b"".join(pieces(text, context)) == text``.

    A piece is a paragraph, or as many of its lines as fit; only a line longer than ``context`` is cut inside. So the
    lengths are as ragged as the text is.

    >>> pieces(b"def f():\n    return 1\n\n\nx = f()\n", 16)
    [b'def f():\n', b'    return 1\n\n\n', b'x = f()\n']
    """
    found: list[bytes] = []
    for paragraph in re.split(rb"(?<=\n\n)(?=[^\n])", text):
        start = stop = 0
        for line in paragraph.splitlines(keepends=True):
            for offset in range(0, len(line), context):
                size = min(context, len(line) - offset)
                if stop + size - start > context:
                    found.append(paragraph[start:stop])
                    start = stop
                stop += size
        found.append(paragraph[start:stop])
    return [piece for piece in found if piece]


def _read(data: Path, interrupted: Interrupted) -> list[Document]:
    try:
        if data.is_dir():
            documents = list(_folder(data, interrupted))
            if not documents:
                raise DemoError(f"--data {data}: no text in this folder (UTF-8 files that are not empty)")
            return documents
        if not data.exists():
            raise DemoError(f"--data {data}: no such file or folder")
        if not data.is_file():
            raise DemoError(f"--data {data}: neither a file nor a folder")
        text = _text(data, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise DemoError(f"--data {data}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if text is None:
        raise DemoError(f"--data {data}: not a text in UTF-8, but binary or another encoding")
    if not text.strip():
        raise DemoError(f"--data {data}: this file is empty")
    return [Document(data.name, text)]


def _folder(
    root: Path, interrupted: Interrupted, suffix: str = "", skipped: frozenset[str] = frozenset()
) -> Iterator[Document]:
    """The texts below ``root`` in sorted order; what cannot be read, is hidden, binary or blank is passed over."""
    left = MAX_BYTES
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(files) if name.endswith(suffix) and name[0] != "."):
            if interrupted():
                raise KeyboardInterrupt
            if left <= 0:
                return
            try:
                text = _text(path, left) if path.is_file() else None
            except OSError:
                continue
            if text and text.strip():
                left -= len(text)
                yield Document(path.relative_to(root).as_posix(), text)


def _text(path: Path, limit: int) -> bytes | None:
    """The first ``limit`` bytes of a file, less a character cut in two at the end; None if they are no UTF-8 text."""
    with path.open("rb") as stream:
        content = stream.read(limit)
        whole = not stream.read(1)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(content, final=whole)
    except UnicodeDecodeError:
        return None
    unfinished = len(decoder.getstate()[0])
    return None if b"\0" in content else content[: len(content) - unfinished]
