"""Everything is on the disk before it counts; and disks that are full or fail."""

import errno
import os
import re
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from gradacc.checkpoint import load, save
from tests.checkpoint.cases import entries, files


def named_in(descriptor: int) -> Any:
    """What a power cut after an fsync of this leaves: a file's size, or a folder's names."""
    found = os.fstat(descriptor)
    return sorted(os.listdir(descriptor)) if stat.S_ISDIR(found.st_mode) else found.st_size


def test_all_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """A power cut keeps what was synced: every file at its last size, and every name on the way to it."""
    synced: dict[int, Any] = {}
    replace, published = os.replace, []
    folder = tmp_path / "new" / "below" / "c"

    def fsync(descriptor):
        synced[os.fstat(descriptor).st_ino] = named_in(descriptor)

    def check(source, target):
        if Path(target).name == "checkpoint.json":
            above = [folder, *folder.parents[:3]]
            assert tmp_path in above
            for entry in [*above[:-1], *folder.rglob("*")]:
                assert entry.name in synced.get(entry.parent.stat().st_ino, []), entry
            for file in files(folder):
                assert synced.get(file.stat().st_ino) == file.stat().st_size > 0, file
            published.append(len(files(folder)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", check)
    for _ in range(2):
        save(folder, {"w": torch.ones(1000), "b": torch.ones(3), "n": 1})
        assert "checkpoint.json" in synced[folder.stat().st_ino]
        assert "checkpoint.json.tmp" not in synced[folder.stat().st_ino]
    assert published == [3, 6]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("published", [False, True])
def test_a_folder_that_cannot_be_put_on_the_disk(code, published, tmp_path, monkeypatch):
    """The one before is there, or the new one; where that may not be on the disk, the data of both are."""
    save(tmp_path, {"w": torch.zeros(2)})
    (before,) = tmp_path.glob("data-*")
    fsync, replace, replaced = os.fsync, os.replace, []

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and bool(replaced) == published:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    def note(source, target):
        replace(source, target)
        replaced.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "replace", note)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            save(tmp_path, {"w": torch.ones(2)})
    assert load(tmp_path, {"w": torch.zeros(2)})["w"].tolist() == [published] * 2
    assert before.exists()
    assert len(entries(tmp_path)) == 2 + published
    save(tmp_path, {"w": torch.ones(2)})
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_where_folders_cannot_be_synced(code, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save(tmp_path / "c", 3)
    assert load(tmp_path / "c", 0) == 3


def test_what_cannot_be_removed_is_left(tmp_path, monkeypatch):
    """By a save that has already done all that it was called for; the next one tries again."""
    save(tmp_path, 1)
    replace, patches = os.replace, []

    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    def then_fail(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint.json":
            patches.append(monkeypatch.setattr(Path, "iterdir", fail))

    monkeypatch.setattr(os, "replace", then_fail)
    save(tmp_path, 2)
    assert patches
    monkeypatch.undo()
    assert load(tmp_path, 0) == 2
    assert len(entries(tmp_path)) == 3
    save(tmp_path, 3)
    assert len(entries(tmp_path)) == 2


def test_a_full_disk(tmp_path):
    """Of a limit for files: some bytes after the last save fitted it, whatever they are of."""
    save(tmp_path, {"w": torch.ones(50_000)})
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 1000, 50_000, 199_000, 201_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=rf"File too large: '{tmp_path}"):
                save(tmp_path, {"w": torch.zeros(50_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.rglob("*")) == before
    assert load(tmp_path, {"w": torch.zeros(50_000)})["w"].all()
    save(tmp_path, {"w": torch.zeros(50_000)})
    assert not load(tmp_path, {"w": torch.zeros(50_000)})["w"].any()


def test_a_disk_that_fails_at_the_last_moment(tmp_path, monkeypatch):
    save(tmp_path, {"w": torch.ones(2)})
    before = sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, {"w": torch.zeros(2)})
        assert sorted(tmp_path.rglob("*")) == before
    assert load(tmp_path, {"w": torch.zeros(2)})["w"].tolist() == [1, 1]
