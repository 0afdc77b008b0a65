"""What is not there, does not fit, is damaged, or was made by somebody else: an error, and nothing is executed."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gradacc.checkpoint import load, save
from tests.checkpoint.cases import blank, files, same

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
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 3'))
    for call in (load, save):
        with pytest.raises(
            ValueError, match="is a checkpoint of format 3, and this version of gradacc knows formats 1 to 2"
        ):
            call(tmp_path, 1)


DAMAGED = {"w": torch.arange(500.0), "b": torch.ones(3), "n": 3}


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
