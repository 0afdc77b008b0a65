"""``load(path, tree)`` after ``save(path, tree)`` is ``tree``, bit for bit; whatever happens in between is told."""

import contextlib
import errno
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import gradacc
from gradacc import Mean, TrainState, _tree
from gradacc.checkpoint import load, save
from tests.helpers import assert_trees_equal
from tests.workers import SIZE


class Pair(NamedTuple):
    """A tree."""

    first: Any
    second: Any


@dataclass
class Node:
    """A tree that only torch's registry knows."""

    inside: Any


torch.utils._pytree.register_dataclass(Node)


def bits(leaf):
    """Equal for equal leaves only: type, dtype, shape and bits."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf
    plain = leaf.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return leaf.dtype, tuple(leaf.shape), bytes(plain.reshape(-1).view(torch.uint8).tolist())


def same(a, b):
    """Whether two trees are, bit for bit."""
    (leaves, treedef), (others, other) = _tree.flatten(a), _tree.flatten(b)
    return treedef == other and list(map(bits, leaves)) == list(map(bits, others))


def blank(tree):
    """A tree like this one, of other values."""

    def other(leaf):
        return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else type(leaf)()

    leaves, treedef = _tree.flatten(tree)
    return _tree.unflatten(treedef, map(other, leaves))


def entries(folder: Path) -> list[str]:
    """What is in a checkpoint's folder, but for the lock."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "checkpoint.lock")


NAN_WITH_PAYLOAD = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)
LEAVES = {
    **{str(dtype)[6:]: torch.tensor([0.0, -0.0, 1.5, -3, math.inf]).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64, torch.complex128,
    )},
    **{str(dtype)[6:]: torch.tensor([0, 1, 120]).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool, torch.uint16)},
    "nan": NAN_WITH_PAYLOAD, "0-dim": torch.tensor(3.0), "empty": torch.empty(0, 3), "conj": torch.tensor([1 + 2j]).conj(),
    "neg": torch.tensor([1 + 2j, 3j]).conj().imag, "overlapping": torch.arange(4.0).as_strided((3, 2), (1, 1)),
    "transposed": torch.arange(6.0).view(2, 3).t(), "slice": torch.arange(1000.0)[3:7], "expanded": torch.ones(1).expand(4),
    "channels last": torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "parameter": nn.Parameter(torch.ones(2)), "graph": torch.ones(2, requires_grad=True) * 2, "rng": torch.get_rng_state(),
    "int": 3, "large int": 3**200, "negative": -1, "float": 0.1, "-0.0": -0.0, "inf": math.inf, "float nan": math.nan,
    "smallest": 5e-324, "true": True, "false": False, "str": "naïve\n\"'\0\ud800", "no str": "",
}  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_every_leaf_comes_back(leaf, tmp_path):
    save(tmp_path / "c", leaf)
    like = blank(leaf)
    before = bits(like)
    found = load(tmp_path / "c", like)
    assert same(found, leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)
    assert bits(like) == before
    if isinstance(found, torch.Tensor):
        assert type(found) is torch.Tensor
        assert not found.requires_grad
        assert found.stride() == torch.empty_like(leaf).stride()


def optimized(optimizer):
    """A state after two steps."""
    params = {"w": torch.randn(3, 2), "b": [torch.randn(2), torch.randn(())]}
    state = TrainState(params, optimizer.init(params))
    step = gradacc.train_step(
        gradacc.accumulate_and_value(lambda p, x: (x @ p["w"] + p["b"][0]).square().mean() + p["b"][1] ** 2, steps=2),
        optimizer,
    )
    for _ in range(2):
        state, _ = step(state, torch.randn(4, 3))
    return state, step


@pytest.mark.parametrize(
    "optimizer",
    [
        gradacc.optim.sgd(lr=0.1),
        gradacc.optim.sgd(lr=0.1, momentum=0.9),
        gradacc.optim.adamw(lr=lambda step: 0.1 / (step + 1)),
        gradacc.optim.skip_nonfinite(gradacc.optim.clip_by_global_norm(gradacc.optim.adam(lr=0.1), 1.0)),
        gradacc.optim.from_torch(torch.optim.RMSprop, lr=0.1),
    ],
)
def test_training_goes_on_from_there(optimizer, tmp_path):
    state, step = optimized(optimizer)
    save(tmp_path, state)
    x = torch.randn(4, 3)
    loaded = load(tmp_path, blank(state))
    assert same(loaded, state)
    assert same(step(loaded, x), step(state, x))


def test_structure(tmp_path):
    tree = {
        "a": (1, [torch.ones(2), None], {}),
        "b": Pair(Mean(torch.ones(()), 2.0), Node({"x": torch.zeros(1)})),
        3: {"3": ()},
    }
    save(str(tmp_path), tree)
    found = load(str(tmp_path), blank(tree))
    assert same(found, tree)
    assert isinstance(found["b"].second, Node)
    tied = torch.ones(2)
    save(tmp_path, [tied, tied])
    one, other = load(tmp_path, [tied, tied])
    assert one.data_ptr() != other.data_ptr()
    save(tmp_path, None)
    assert load(tmp_path, None) is None


def test_the_last_one_counts_and_is_alone(tmp_path):
    for number in range(3):
        save(tmp_path, {"a": torch.tensor(number), "only once": 1} if number == 0 else {"a": torch.tensor(number)})
    assert load(tmp_path, {"a": torch.tensor(0)})["a"] == 2
    assert len(entries(tmp_path)) == 2


def test_the_data_are_a_checkpoint_of_torch(tmp_path):
    """One that torch's own `load` reads."""
    save(tmp_path, {"a": {"w": torch.arange(3.0)}, "n": 1})
    (data,) = tmp_path.glob("data-*")
    found = {"['a']['w']": torch.zeros(3)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=data, no_dist=True)
    assert found["['a']['w']"].tolist() == [0, 1, 2]


# What is left out


def test_what_is_left_out_stays_dots(tmp_path):
    state, _ = optimized(gradacc.optim.adam(lr=0.1))
    save(tmp_path, {"train": state, "train2": 5})
    found = load(tmp_path, {"train": TrainState(blank(state.params), ..., ...), "train2": ...})
    assert same(found["train"].params, state.params)
    assert found["train"].opt_state is found["train2"] is ...
    assert load(tmp_path, {"train": ..., "train2": 0, "more": ...})["train2"] == 5
    with pytest.raises(ValueError, match=r"tree\['train2'\] \(int\) was saved, but is not in like"):
        load(tmp_path, {"train": ...})
    with pytest.raises(TypeError, match=r"tree\['x'\] is a .*ellipsis"):
        save(tmp_path, {"x": ...})


# Mistakes


class Whole(int):
    """Another type than int."""


BAD_LEAVES = {
    "bytes": (b"x", "is a bytes"),
    "an optimizer": (torch.optim.SGD([torch.ones(1)]), r"is a .*SGD; .*pass its state_dict"),
    "a module": (nn.Linear(1, 1), r"is a .*Linear; .*pass its state_dict"),
    "a subclass of int": (Whole(3), r"is 3 \(Whole\); .*not subclasses"),
    "complex": (1j, "is a complex"),
    "a set": ({1}, "is a set"),
    "a function": (len, "is a builtin"),
    "sparse": (torch.eye(2).to_sparse(), "is a sparse, nested or quantized tensor"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "is a "),
    "meta": (torch.ones(2, device="meta"), "is a meta tensor"),
}


@pytest.mark.parametrize(("leaf", "message"), BAD_LEAVES.values(), ids=BAD_LEAVES)
def test_a_leaf_that_cannot_be_saved(leaf, message, tmp_path):
    save(tmp_path / "c", {"x": torch.ones(1)})
    names = sorted((tmp_path / "c").iterdir())
    with pytest.raises(TypeError, match=rf"save: tree\['x'\]\[1\] {message}"):
        save(tmp_path / "c", {"x": [torch.ones(1), leaf]})
    with pytest.raises(TypeError, match=rf"load: like\['x'\]\[1\] {message}"):
        load(tmp_path / "c", {"x": [torch.ones(1), leaf]})
    assert sorted((tmp_path / "c").iterdir()) == names
    with pytest.raises(TypeError, match="save"):
        save(tmp_path / "new", leaf)
    assert not (tmp_path / "new").exists()


SAVED = {"w": torch.ones(2, 3), "n": 3, "s": {"x": torch.ones(2, dtype=torch.bfloat16)}}
MISFITS = {
    "missing": ({**SAVED, "more": 1}, r"like\['more'\] was not saved"),
    "extra": ({"w": SAVED["w"], "n": 3, "s": {}}, r"tree\['s'\]\['x'\] \(bfloat16 \(2,\)\) was saved, but is not in like"),
    "none": ({**SAVED, "w": None}, r"tree\['w'\] \(float32 \(2, 3\)\) was saved"),
    "shape": ({**SAVED, "w": torch.ones(3, 2)}, r"like\['w'\] is float32 \(3, 2\), but float32 \(2, 3\) was saved"),
    "broadcast": ({**SAVED, "w": torch.ones(1, 3)}, r"like\['w'\] is float32 \(1, 3\), but float32 \(2, 3\) was saved"),
    "dtype": ({**SAVED, "s": {"x": torch.ones(2)}}, r"like\['s'\]\['x'\] is float32 \(2,\), but bfloat16 \(2,\) was saved"),
    "type": ({**SAVED, "n": 3.0}, r"like\['n'\] is float, but int was saved"),
    "bool": ({**SAVED, "n": True}, r"like\['n'\] is bool, but int was saved"),
    "tensor": ({**SAVED, "n": torch.tensor(3)}, r"like\['n'\] is int64 \(\), but int was saved"),
    "number": ({**SAVED, "w": 1.0}, r"like\['w'\] is float, but float32 \(2, 3\) was saved"),
    "all": ([1], r"like\[0\] was not saved, and 3 more"),
}  # fmt: skip


@pytest.mark.parametrize(("like", "message"), MISFITS.values(), ids=MISFITS)
def test_a_tree_that_does_not_fit(like, message, tmp_path):
    save(tmp_path, SAVED)
    with pytest.raises(ValueError, match=f"load: the checkpoint {tmp_path} does not fit: {message}"):
        load(tmp_path, like)


def test_there_is_no_checkpoint(tmp_path):
    for path in (tmp_path / "missing", tmp_path / "missing" / "below", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"load: no checkpoint at {path}: "):
            load(path, 1)
    (tmp_path / f"data-{'0' * 32}").mkdir()
    with pytest.raises(FileNotFoundError, match="only what an interrupted save left"):
        load(tmp_path, 1)
    save(tmp_path, 1)
    assert [entry.name for entry in tmp_path.glob("data-*")] != [f"data-{'0' * 32}"]
    for path in (b"bytes", 3, None):
        with pytest.raises(TypeError, match="save: the path must be a str"):
            save(path, 1)
        with pytest.raises(TypeError, match="load: the path must be a str"):
            load(path, 1)


def test_something_else_is_there(tmp_path):
    """Which is neither read nor changed."""
    file = tmp_path / "file.pt"
    torch.save({"w": torch.ones(2)}, file)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"cat")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    named = tmp_path / "named"
    named.mkdir()
    (named / "checkpoint.json").write_text('{"model": "other"}')
    inside = tmp_path / "inside"
    (inside / "checkpoint.json").mkdir(parents=True)
    for path in (file, file / "below", folder, tmp_path / "dcp", named, inside):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"load: .*{path.name if path != file / 'below' else file.name}"):
            load(path, {"w": torch.ones(2)})
        with pytest.raises(
            ValueError, match="save: .*not.* a checkpoint of gradacc.*. Name the folder of a checkpoint, or one"
        ):
            save(path, {"w": torch.ones(2)})
        assert sorted(tmp_path.rglob("*")) == before


def test_a_later_format(tmp_path):
    save(tmp_path, 1)
    manifest = tmp_path / "checkpoint.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2'))
    for call in (load, save):
        with pytest.raises(ValueError, match="is a checkpoint of format 2, and this version of gradacc knows format 1"):
            call(tmp_path, 1)


def test_an_int_that_is_too_long_to_be_written(tmp_path):
    save(tmp_path / "c", {"n": 10**4000})
    assert load(tmp_path / "c", {"n": 0})["n"] == 10**4000
    with pytest.raises(ValueError, match=r"save: tree\['n'\] is an int of 16610 bits, .*; pass hex\(\) of it"):
        save(tmp_path / "new", {"n": 10**5000})
    assert not (tmp_path / "new").exists()


# Damage

DAMAGED = {"w": torch.arange(500.0), "b": torch.ones(3), "n": 3}


def files(folder: Path) -> list[Path]:
    """What a checkpoint is made of."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.lock")


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["removed", "emptied", "truncated", "garbled", "replaced"])
def test_a_damaged_file(which, how, tmp_path):
    """Every file, a hundred bytes of it: nothing wrong is ever returned, and the error says where."""
    save(tmp_path, DAMAGED)
    file = files(tmp_path)[which]
    assert len(files(tmp_path)) == 3
    content = file.read_bytes()
    chance = random.Random(which)
    last = len(content) - 1
    places = {0, 1, last, *(chance.randint(0, last) for _ in range(100))} if how in ("truncated", "garbled") else {0}
    for place in places:
        match how:
            case "removed":
                file.unlink()
            case "emptied":
                file.write_bytes(b"")
            case "truncated":
                file.write_bytes(content[:place])
            case "replaced":
                file.unlink()
                file.mkdir()
            case "garbled":
                file.write_bytes(
                    content[:place] + bytes([content[place] ^ chance.randint(1, 255)]) + content[place + 1 :]
                )
        with pytest.raises((ValueError, FileNotFoundError), match="load: .*") as told:
            load(tmp_path, blank(DAMAGED))
        assert str(file.parent if file.name == "checkpoint.json" else file) in str(told.value)
        if file.suffix == ".distcp":
            assert "like['w']" in str(told.value) or "like['b']" in str(told.value)


def test_what_is_whole_is_read(tmp_path):
    save(tmp_path, DAMAGED)
    (data,) = tmp_path.glob("data-*/*.distcp")
    place = json.loads((tmp_path / "checkpoint.json").read_text().splitlines()[1])["places"]["['w']"]
    with data.open("r+b") as stream:
        stream.seek(place[1] + place[2] // 2)
        stream.write(b"garbage")
    with pytest.raises(ValueError, match=r"is damaged at like\['w'\]: .* has been changed"):
        load(tmp_path, blank(DAMAGED))
    assert load(tmp_path, {**blank(DAMAGED), "w": ...})["b"].tolist() == [1, 1, 1]


class Attack:
    """What a pickle could run."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    """Of a checkpoint that somebody made, with the right checksums."""
    from gradacc.checkpoint import _dcp, _folder

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "c"
    save(folder, DAMAGED)
    body = _folder.read("load", folder)
    data = folder / body["data"]
    for file in data.iterdir():
        if file.suffix == ".distcp":
            torch.save(Attack(), file)
        else:
            file.write_bytes(pickle.dumps(Attack()))
    shutil.copy(next(data.glob("*.distcp")), data / "copy")
    length = (data / "copy").stat().st_size
    place = ("copy", 0, length, _dcp.sha256(data / "copy", 0, length))
    length = (data / ".metadata").stat().st_size
    body["metadata"] = (".metadata", 0, length, _dcp.sha256(data / ".metadata", 0, length))
    body["places"] = dict.fromkeys(body["places"], place)
    _folder.publish(folder, body)
    with pytest.raises(ValueError, match=r"like\['b'\] in .*copy is not float32 .*safe to read"):
        load(folder, blank(DAMAGED))
    assert not (tmp_path / "attacked").exists()


CRAFTED = {
    "no dict": lambda body: [body],
    "a data folder elsewhere": lambda body: {**body, "data": "../c"},
    "a file elsewhere": lambda body: {
        **body,
        "places": {key: ["../x", *place[1:]] for key, place in body["places"].items()},
    },
    "a file at the root": lambda body: {**body, "metadata": ["/etc/passwd", 0, 1, ""]},
    "a negative offset": lambda body: {**body, "metadata": [".metadata", -1, 1, ""]},
    "a place that is none": lambda body: {**body, "metadata": None},
    "a leaf without a place": lambda body: {**body, "places": {}},
    "a value without a type": lambda body: {**body, "values": {**body["values"], "['more']": 1}},
    "a value of another type": lambda body: {**body, "values": {"['n']": [3]}},
    "a type that is none": lambda body: {**body, "leaves": dict.fromkeys(body["leaves"], 3)},
    **{f"no {name}": lambda body, name=name: {**body, name: None} for name in ("data", "leaves", "values", "places")},
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_description_that_somebody_made(change, tmp_path):
    """With the right checksum: it can name nothing outside the data folder, and is told as what it is."""
    import hashlib

    folder = tmp_path / "c"
    save(folder, DAMAGED)
    header, text = (folder / "checkpoint.json").read_text().splitlines()

    def write(content):
        said = {**json.loads(header), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "checkpoint.json").write_bytes(json.dumps(said).encode() + b"\n" + content)

    write(json.dumps(json.loads(text)).encode())
    assert same(load(folder, blank(DAMAGED)), DAMAGED)
    for content in (json.dumps(change(json.loads(text))).encode(), b"[" * 100_000, b"9" * 5000):
        write(content)
        for call in (load, save):
            with pytest.raises(ValueError, match=r"checkpoint.json was not written by gradacc, though it says so"):
                call(folder, blank(DAMAGED))


# Death


def run(*arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.killed", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_stopped_between_micro_batches(tmp_path):
    """SIGKILL anywhere in windows of micro-batches, in a loss, in a save: what comes out is the run that was left alone."""
    first, *began, deaths = map(int, run("window", str(tmp_path / "c")).split())
    assert first == began[0] == 0
    assert began == sorted(began)
    assert len(began) == deaths + 1 > 10
    assert {seen % 4 for seen in began} == {0, 1, 2, 3}


def test_a_process_killed_anywhere_in_a_save(tmp_path):
    """SIGKILL before each thing that it does to the folder: the old checkpoint is there, or the new one."""
    assert int(run("everywhere", str(tmp_path / "c"))) >= 15


def test_a_rank_killed_anywhere_in_a_save(tmp_path):
    """The same with each of two ranks; the other one is told."""
    assert int(run("ranks", str(tmp_path / "c"))) >= 20


def test_processes_killed_at_random_moments(tmp_path):
    """The same at 25 moments of the clock, after a first save each: no checkpoint that was complete is lost."""
    assert int(run("anytime", str(tmp_path / "c"), "25")) >= 25


def test_a_process_that_is_stopped_in_a_save(tmp_path):
    """Another one is told who saves, and nothing changes; when the first has been killed, its lock is gone."""
    assert int(run("held", str(tmp_path / "c"))) >= 10


def test_two_jobs_that_save_into_one_folder(tmp_path):
    """Each saves, or is told of the other; what is there is always one of theirs, all of it."""
    saved, refused, replaced, *other = map(int, run("rivals", str(tmp_path / "c"), "3").split())
    assert min(saved, refused, other[0], other[1]) > 0
    assert replaced + other[2] > 0


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


def test_a_reader_beside_a_writer(tmp_path):
    """One that comes between finds the next checkpoint, not an error."""
    save(tmp_path, [torch.full((5000,), 0.0), 0])
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            save(tmp_path, [torch.full((5000,), float(number)), number])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 200
        while len(seen) < 100 or len(set(seen)) < 4:
            assert time.monotonic() < deadline
            tensor, number = load(tmp_path, [torch.zeros(5000), 0])
            assert bool((tensor == number).all())
            seen.append(number)
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen)


# Ranks


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
        ("bits", [RANKS_DIFFER.format("w", r"both float32 \(2,\), but of other values. Put what belongs")] * SIZE),
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
    monkeypatch.setattr(_ranks.groups, "speaking", lambda *_: contextlib.nullcontext())
    group: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(OSError, match="No space left"):
        _ranks.together("save", group, full)
    with pytest.raises(RuntimeError, match="connection reset"):
        _ranks.together("save", group, lambda: (None, None))


def test_ranks_without_a_group(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"save: WORLD_SIZE is 2, but no process group .*init_process_group\(\) first"
    ):
        save(tmp_path, 1)
