"""Ranks save and load one checkpoint, and where they differ, all are told."""

import contextlib
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradacc import TrainState, _tree
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import blank, same
from tests.workers import SIZE

SAVED = {"w": torch.ones(2, 3), "n": 3, "s": {"x": torch.ones(2, dtype=torch.bfloat16)}}


def shared(rank: int, world: int = SIZE):
    """What a rank of four has: parameters as everybody, and numbers of its own."""
    state = TrainState({"w": torch.arange(100.0), "b": torch.ones(2, dtype=torch.bfloat16)}, {"m": torch.zeros(100)}, 7)
    mine = {"rng": torch.full((3,), rank, dtype=torch.uint8), "at": rank}
    tree = {"train": state, "ranks": {rank: mine}}
    if rank == 0:
        tree["note"] = "of rank 0"
    return tree, {"train": state, "ranks": {r: mine if r == rank else ... for r in range(world)}, "note": ...}


def save_on_ranks(group, path):
    tree, like = shared(dist.get_rank())
    for _ in range(2):
        save(path, tree)
    found = load(path, blank_like(like))
    return same(found["train"], tree["train"]), found["ranks"][dist.get_rank()]["at"]


def blank_like(like):
    leaves, treedef = _tree.flatten(like)
    return _tree.unflatten(treedef, [leaf if leaf is ... else blank(leaf) for leaf in leaves])


def test_ranks_save_the_union_of_their_trees(pool, tmp_path):
    """What all have is written once; one process reads all of it."""
    assert pool.run(SIZE, save_on_ranks, str(tmp_path)) == [(True, rank) for rank in range(SIZE)]
    like = {
        **shared(0)[0],
        "ranks": {rank: {"rng": torch.zeros(3, dtype=torch.uint8), "at": 0} for rank in range(SIZE)},
    }
    found = load(tmp_path, like)
    assert [found["ranks"][rank]["rng"].tolist() for rank in range(SIZE)] == [[rank] * 3 for rank in range(SIZE)]
    assert same(found["train"], shared(0)[0]["train"])
    assert found["note"] == "of rank 0"
    sizes = [path.stat().st_size for path in tmp_path.glob("data-*/*.distcp")]
    assert len(sizes) == SIZE
    tensors = 3 + SIZE
    assert sum(sizes) < 2 * 100 * 4 + tensors * 2000


def load_on_ranks(group, path):
    return load(path, blank(SAVED))


def test_ranks_load_what_one_process_has_saved(pool, tmp_path):
    save(tmp_path, SAVED)
    for found in pool.run(SIZE, load_on_ranks, str(tmp_path)):
        assert same(found, SAVED)


def save_badly(group, path, how):
    rank = dist.get_rank()
    tree = {"w": torch.ones(2), "n": 1}
    if rank == 2:
        match how:
            case "bits":
                tree["w"] = torch.tensor([1.0, 1.0 + 1e-7])
            case "dtype":
                tree["w"] = torch.ones(2, dtype=torch.float64)
            case "value":
                tree["n"] = 2
            case "type":
                tree["n"] = 1.0
            case "leaf":
                tree["n"] = {1}
            case "path":
                path += "2"
            case "none":
                path = None
    try:
        save(path, tree)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


RANKS_DIFFER = r"ValueError: save: tree\['{}'\] is not the same on ranks 0 and 2: {}"


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        (
            "bits",
            [RANKS_DIFFER.format("w", r"both float32 \(2,\), but of other values. Parameters stay .* Put what belongs")]
            * SIZE,
        ),
        ("dtype", [RANKS_DIFFER.format("w", r"float32 \(2,\) and float64 \(2,\)")] * SIZE),
        ("value", [RANKS_DIFFER.format("n", "both int, but of other values")] * SIZE),
        ("type", [RANKS_DIFFER.format("n", "int and float")] * SIZE),
        (
            "leaf",
            ["ElsewhereError: save: failed because of rank 2: TypeError: save: tree"] * 2 + ["TypeError: save: tree"],
        ),
        ("path", ["ElsewhereError: .* because of rank 2: ValueError: save: rank 2 does not see the folder"] * 2),
        (
            "none",
            ["ElsewhereError: .* because of rank 2: TypeError: save: the path"] * 2 + ["TypeError: save: the path"],
        ),
    ],
)
def test_ranks_that_differ(pool, how, messages, tmp_path):
    """An error on every rank, and the checkpoint that was there; and the pool goes on."""
    path = str(tmp_path / "c")
    save(path, {"w": torch.zeros(2), "n": 0})
    before = sorted((tmp_path / "c").rglob("*"))
    answers = pool.run(SIZE, save_badly, path, how)
    for answer, message in zip(answers, messages, strict=False):
        assert re.match(message, answer)
    assert sorted((tmp_path / "c").rglob("*")) == before
    assert pool.run(SIZE, save_badly, path, "not at all") == [None] * SIZE
    assert load(path, {"w": torch.zeros(2), "n": 0})["n"] == 1


def save_beside(group, path):
    try:
        save(path, {"n": 1})
    except (BlockingIOError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_beside_another_job(pool, tmp_path):
    """All are told."""
    from gradacc.checkpoint import _lock

    save(tmp_path, {"n": 0})
    with _lock.locked("save", tmp_path / "checkpoint.lock"):
        first, *others = pool.run(SIZE, save_beside, str(tmp_path))
    assert first.startswith(f"BlockingIOError: save: process {os.getpid()} on ")
    assert all(
        re.match("ElsewhereError: .* because of rank 0: BlockingIOError: save: process", other) for other in others
    )
    assert load(tmp_path, {"n": 1})["n"] == 0
    assert pool.run(SIZE, save_beside, str(tmp_path)) == [None] * SIZE
    assert load(tmp_path, {"n": 0})["n"] == 1


@pytest.mark.parametrize("how", ["bits", "leaf", "none"])
def test_ranks_that_differ_make_no_folder(pool, how, tmp_path):
    pool.run(SIZE, save_badly, str(tmp_path / "new" / "c"), how)
    assert not (tmp_path / "new").exists()


def test_the_own_error_is_raised_where_another_rank_has_ended(monkeypatch):
    from gradacc.checkpoint import _ranks

    def gather(*_, **__):
        raise RuntimeError("connection reset")

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(_ranks.groups, "explaining_errors", lambda *_: contextlib.nullcontext())
    group: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(OSError, match="No space left"):
        _ranks.on_all_ranks("save", group, full)
    with pytest.raises(RuntimeError, match="connection reset"):
        _ranks.on_all_ranks("save", group, lambda: (None, None))


def test_ranks_without_a_group(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"save: WORLD_SIZE is 2, but no process group .*init_process_group\(\) first"
    ):
        save(tmp_path, 1)
