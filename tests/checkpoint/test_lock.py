"""Two who save into one folder: one is told, and a lock ends with its save."""

import errno
import os
import sys

import pytest
import torch

import gradacc
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import files
from tests.helpers import assert_trees_equal


def test_two_saves_at_once(tmp_path):
    """Of one process, too; and what is there stays, whatever is said of who has the lock."""
    from gradacc.checkpoint import _lock

    save(tmp_path, {"n": 1})
    before = files(tmp_path)
    with _lock.locked("save", tmp_path / "checkpoint.lock"):
        with pytest.raises(
            BlockingIOError, match=rf"save: process {os.getpid()} on .* is saving into {tmp_path} at this"
        ):
            save(tmp_path, {"n": 2})
        (tmp_path / "checkpoint.lock").write_bytes(b"\xff")
        with pytest.raises(BlockingIOError, match="save: .* is saving into"):
            save(tmp_path, {"n": 2})
        assert load(tmp_path, {"n": 0})["n"] == 1
        assert files(tmp_path) == before
    save(tmp_path, {"n": 2})
    assert load(tmp_path, {"n": 0})["n"] == 2


def test_a_lock_ends_with_its_save_and_says_nothing_afterwards(tmp_path):
    """Also where a process that was forked meanwhile (a loader's worker) lives on; nobody's name stays in the folder."""
    from gradacc.checkpoint import _lock

    file = tmp_path / "checkpoint.lock"
    reading, writing = os.pipe()
    with _lock.locked("save", file):
        assert file.read_text().startswith(f"process {os.getpid()} on ")
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        assert file.read_bytes() == b""
        with _lock.locked("save", file):
            pass
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


@pytest.mark.parametrize("missing", ["pread", "pwrite"])
def test_saving_needs_nothing_that_windows_lacks(missing, tmp_path, monkeypatch):
    """The whole of it, where the system has no locks of this kind: the module `fcntl`, and what reads and writes at a place."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, missing)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    gradacc.checkpoint.save(tmp_path / "saved", {"w": torch.ones(2)})
    assert_trees_equal(gradacc.checkpoint.load(tmp_path / "saved", {"w": torch.zeros(2)}), {"w": torch.ones(2)})


def test_a_save_that_fails_keeps_no_lock(tmp_path, monkeypatch):
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, 1)
        save(tmp_path, 2)
    assert load(tmp_path, 0) == 2


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(code, tmp_path, monkeypatch):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            save(tmp_path, 1)
    else:
        save(tmp_path, 1)
        assert load(tmp_path, 0) == 1
