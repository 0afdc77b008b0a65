"""What `gradacc.optim.sharded` has divided is saved as whole tensors: for any other number of ranks, and for none."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import gradacc
from gradacc import Shard, TrainState, _tree, optim
from gradacc._shard import ShardFacts
from gradacc.checkpoint import _folder, _ranks, load, save
from gradacc.optim._sharded import ShardedState
from tests.checkpoint.cases import blank, same
from tests.helpers import some_slow
from tests.workers import SIZE

PARAMS = {
    "w": torch.empty(5, 3),
    "layers": [torch.empty(7, 11).T, torch.empty(2)],  # the latter of fewer elements than there are ranks
    "scalar": torch.empty((), dtype=torch.float64),
    "complex": torch.empty(3, 2, dtype=torch.complex64),
    "empty": torch.empty(0, 2),
}
HALF = {"w": torch.empty(5, 3, dtype=torch.bfloat16), "b": torch.empty(3, dtype=torch.bfloat16)}


def torchopt_adam() -> optim.Optimizer:
    return optim.from_torchopt(pytest.importorskip("torchopt").adam(0.1))


def groups() -> optim.Optimizer:
    return optim.by_path(optim.adam(0.1), (lambda path, leaf: leaf.ndim == 2, optim.sgd(0.1, momentum=0.9)))


INSIDE: dict[str, Callable[[], optim.Optimizer]] = {
    "adam": lambda: optim.adam(0.1),
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "from_torch": lambda: optim.from_torch(torch.optim.AdamW, lr=0.1, amsgrad=True),
    "from_torchopt": torchopt_adam,
    "by_path": groups,
    "skip inside": lambda: optim.skip_nonfinite(optim.adam(0.1)),
}
WORLDS: list[Any] = ["no group", 1, 2, 3, 4]


def like(group: Any) -> dict[str, TrainState]:
    """The states of all optimizers on this rank, of no particular values; not divided where ``group`` is None."""

    def sharded(optimizer: optim.Optimizer, **options: Any) -> optim.Optimizer:
        return (
            optimizer if group is None else optim.sharded(optimizer, group if group != "no group" else None, **options)
        )

    states = {name: TrainState(PARAMS, sharded(inside()).init(PARAMS)) for name, inside in INSIDE.items()}
    around = optim.skip_nonfinite(sharded(optim.adam(0.1)))
    states["skip around"] = TrainState(PARAMS, around.init(PARAMS))
    if group is None:
        masters = _tree.map_tensors(lambda leaf: leaf.float(), HALF)
        states["masters"] = TrainState(HALF, ShardedState(masters, optim.adam(0.1).init(masters)))
    else:
        state = sharded(optim.adam(0.1), master_dtype=torch.float32).init(HALF)
        states["masters"] = TrainState(HALF, state)
    return states


def whole() -> dict[str, TrainState]:
    """The states, not divided, of values that differ in every place."""
    generator = torch.Generator().manual_seed(0)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf + 7
        numbers = torch.randint(-1000, 1000, leaf.shape, generator=generator, dtype=torch.int64)
        return torch.empty_like(leaf).copy_(numbers / 8 if leaf.is_floating_point() else numbers)

    leaves, treedef = _tree.flatten(like(None))
    return _tree.unflatten(treedef, map(other, leaves))


def divided(group: Any) -> dict[str, TrainState]:
    """The same, this rank's parts."""
    leaves, treedef = _tree.flatten(whole())
    values = dict(zip(_tree.paths(treedef), leaves, strict=True))

    def part(path: str, node: Any) -> Any:
        if not isinstance(node, Shard):
            return values[path]
        inside, structure = _tree.flatten(node.values)
        own = [values[path + name] for name in _tree.paths(structure)]
        cut = slice(node.offset, node.offset + node.length)
        own = [leaf.reshape(-1)[cut].clone() if old.dim() else leaf for leaf, old in zip(own, inside, strict=True)]
        return Shard(_tree.unflatten(structure, own), node.facts)

    nodes, outer = _tree.flatten(like(group), lambda node: isinstance(node, Shard))
    return _tree.unflatten(outer, [part(path, node) for path, node in zip(_tree.paths(outer), nodes, strict=True)])


def among(group: Any) -> Any:
    """As if the default group were this one: the pool's has more ranks."""
    return mock.patch.object(_ranks, "world", return_value=group if group.size() > 1 else None)


def save_divided(group: Any, path: str) -> None:
    with among(group):
        save(path, divided(group))


def load_divided(group: Any, path: str) -> bool:
    return same(load(path, blank(divided(group))), divided(group))


@pytest.mark.parametrize("world", some_slow([None, *WORLDS], None, 3))
def test_any_number_of_ranks_loads_what_any_other_has_saved(pool, world, tmp_path):
    """Bit for bit, whichever optimizer; with and without `sharded`, with and without a process group."""
    path = str(tmp_path)
    if world is None:
        save(path, whole())
    elif world == "no group":
        save(path, divided(world))
    else:
        pool.run(world, save_divided, path)
    assert same(load(path, blank(whole())), whole())
    assert load_divided("no group", path)
    for other in range(1, SIZE + 1):
        assert pool.run(other, load_divided, path) == [True] * other


def test_the_keys_are_those_of_a_state_that_is_not_divided(pool, tmp_path):
    """And every divided leaf is one tensor of one dimension to DCP, in a chunk for each rank that has some of it."""
    pool.run(SIZE, save_divided, str(tmp_path / "c"))
    save(tmp_path / "whole", whole())
    body, other = (_folder.read("load", tmp_path / name) for name in ("c", "whole"))
    assert body["leaves"] == other["leaves"]
    assert other["chunks"] == {}
    key = "['sgd'].opt_state.momentum_buffer['w']"
    assert [length for _, length, _ in body["chunks"][key]] == [4, 4, 3, 4]
    assert [chunk[0] for chunk in body["chunks"]["['sgd'].opt_state.momentum_buffer['layers'][1]"]] == [0, 1]
    (data,) = (tmp_path / "c").glob("data-*")
    dcp_to_torch_save(data, tmp_path / "torch.pt")
    found = torch.load(tmp_path / "torch.pt")
    leaves, treedef = _tree.flatten(whole())
    for path, leaf in zip(_tree.paths(treedef), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert same(found[path].reshape(leaf.shape), leaf), path
            assert found[path].dim() == (1 if path in body["chunks"] else leaf.dim())


def test_a_checkpoint_without_parts_is_as_it_was(tmp_path):
    """An earlier version reads what it could have written, and says of the rest that it is of a later format."""
    for number, tree in ((1, whole()), (2, divided("no group"))):
        save(tmp_path, tree)
        header = (tmp_path / "checkpoint.json").read_bytes().split(b"\n")[0]
        assert json.loads(header)["version"] == number
    save(tmp_path, whole())
    body = _folder.read("load", tmp_path)
    publish_as_before(tmp_path, body)
    assert same(load(tmp_path, blank(whole())), whole())


def publish_as_before(folder: Any, body: dict[str, Any]) -> None:
    """With no word of chunks."""
    _folder.publish(folder, body)
    header, text = (folder / "checkpoint.json").read_bytes().split(b"\n")
    old = json.loads(text)
    del old["chunks"]
    content = json.dumps(old).encode()
    said = {**json.loads(header), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checkpoint.json").write_bytes(json.dumps(said).encode() + b"\n" + content)


def save_large(group: Any, path: str) -> None:
    params = {"w": torch.ones(40_000)}
    optimizer = optim.sharded(optim.sgd(0.1, momentum=0.9), group)
    with among(group):
        save(path, optimizer.init(params))


def test_each_rank_writes_its_own_parts(pool, tmp_path):
    pool.run(SIZE, save_large, str(tmp_path))
    sizes = [path.stat().st_size for path in tmp_path.glob("data-*/*.distcp")]
    assert len(sizes) == SIZE
    assert 40_000 <= min(sizes) <= max(sizes) < 44_000
    for key, chunks in _folder.read("load", tmp_path)["chunks"].items():
        assert [chunk[2][0] for chunk in chunks] == [f"__{rank}_0.distcp" for rank in range(SIZE)], key


def save_on_one(group: Any, path: str, owner: int) -> None:
    """One rank has all elements, and the others none, wherever that nothing begins."""

    def own(numel: int, nothing: int) -> Shard:
        offset, length = (0, numel) if group.rank() == owner else (nothing, 0)
        place = facts((numel,), offset, length, group.rank(), group.size(), group.group_name)
        return Shard(torch.arange(1.0, numel + 1)[:length], place)

    with among(group):
        save(path, {"more": own(1000, 0), "first": own(2, 0), "last": own(2, 2)})


@pytest.mark.parametrize("owner", range(3))
def test_ranks_without_elements(pool, owner, tmp_path):
    """They write no chunk: it would take the place of the one that begins there, too."""
    pool.run(3, save_on_one, str(tmp_path), owner)
    for name, leaf in load(
        tmp_path, {"more": torch.zeros(1000), "first": torch.zeros(2), "last": torch.zeros(2)}
    ).items():
        assert leaf.tolist() == list(range(1, len(leaf) + 1)), name
    assert {len(chunks) for chunks in _folder.read("load", tmp_path)["chunks"].values()} == {1}


def save_replicas(group: Any, path: str) -> None:
    """Two pairs of ranks, each of which has all; as views of something larger."""
    half = group.rank() % 2
    place = facts((40, 1000), 20_000 * half, 20_000, half, 2, f"pair {group.rank() // 2}")
    with among(group):
        save(path, {"w": Shard(torch.arange(40_000.0)[place.offset :][:20_000], place)})


def test_groups_that_have_the_same_parts_write_them_once(pool, tmp_path):
    pool.run(SIZE, save_replicas, str(tmp_path))
    assert same(load(tmp_path, {"w": torch.zeros(40, 1000)})["w"], torch.arange(40_000.0).view(40, 1000))
    assert 160_000 <= sum(path.stat().st_size for path in tmp_path.glob("data-*/*.distcp")) < 165_000


# What does not fit


def facts(
    shape: tuple[int, ...], offset: int, length: int, rank: int = 0, world: int = 1, group: str = ""
) -> ShardFacts:
    return ShardFacts(shape, offset, length, rank, world, group)


def save_badly(group: Any, path: str, how: str) -> str | None:
    rank, world = group.rank(), group.size()
    begin, length = {"overlap": (2 * rank, 3), "hole": (3 * rank, 2)}.get(how, (2 * rank, 2))
    length = min(length, 6 - begin) if how == "overlap" else length
    shape = (9,) if how == "hole" else (2, 3)
    if how == "shape" and rank == 1:
        shape = (6,)
    place = facts(shape, begin, length, rank, world, group.group_name)
    tree: Any = {"w": Shard(torch.full((length,), float(rank)), place)}
    match how:
        case "a rank has another tree" if rank == 1:
            tree = {}
        case "whole" if rank == 1:
            tree = {"w": torch.ones(2, 3)}
        case "values" if rank == 1:
            tree = {"w": Shard(torch.ones(1), place)}
        case "the same, of other values":
            tree = {"w": Shard(torch.full((6,), float(rank)), facts((2, 3), 0, 6))}
        case "step":
            tree = {"w": Shard({"m": torch.ones(2), "step": torch.tensor(rank)}, place)}
    try:
        with among(group):
            save(path, tree)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


BAD = {
    "overlap": r"ValueError: save: ranks 0 and 1 both have elements 2 to 3 of tree\['w'\], a tensor of shape \(2, 3\); parts",
    "hole": r"ValueError: save: elements 2 to 3 of tree\['w'\], .* over 3 ranks \(process group '.*'\), are on none .*: 3, all",
    "a rank has another tree": r"ValueError: save: elements 2 to 4 of tree\['w'\], .* All ranks that .*sharded has divided",
    "shape": r"ValueError: save: tree\['w'\] is not the same on ranks 0 and 1: float32 \(2, 3\) and float32 \(6,\)",
    "whole": r"ValueError: save: tree\['w'\] is not the same on ranks 0 and 1: a Shard and a leaf",
    "values": r".*ValueError: save: tree\['w'\] is a tensor of shape \(1,\) in a gradacc.Shard of elements 2 to 4 of a tensor",
    "the same, of other values": r"ValueError: save: tree\['w'\] from 0 to 6 is not the same on ranks 0 and 1: both float32",
    "step": r"ValueError: save: tree\['w'\]\['step'\] is not the same on ranks 0 and 1: both int64 \(\), but of other values",
}


@pytest.mark.parametrize("how", BAD)
def test_parts_that_are_not_those_of_a_tensor(pool, how, tmp_path):
    """Every rank raises, and nothing is written."""
    answers = pool.run(3, save_badly, str(tmp_path / "c"), how)
    assert all(re.match(BAD[how], answer or "") for answer in answers), answers
    assert not (tmp_path / "c").exists()
    assert pool.run(3, save_badly, str(tmp_path / "c"), "not at all") == [None] * 3


def test_parts_of_ranks_that_do_not_save(tmp_path):
    """A group of ranks that is not there any more, for instance."""
    state = {"w": Shard(torch.ones(3), facts((2, 3), 0, 3, 0, 2, "gone"))}
    with pytest.raises(
        ValueError, match=r"elements 3 to 6 of tree\['w'\], .* 2 ranks \(process group 'gone'\), are on none"
    ):
        save(tmp_path / "c", state)
    assert not (tmp_path / "c").exists()


def load_badly(group: Any, path: str, how: str) -> str:
    rank, world = group.rank(), group.size()
    place = facts((2, 3), 2 * rank, 2, rank, world, group.group_name)
    match how:
        case "shape":
            place = place._replace(shape=(6,))
        case "elements":
            place = place._replace(shape=(3, 3))
        case "gone":
            place = place._replace(group="gone")
        case "other ranks":
            place = place._replace(world=2)
        case "beyond":
            place = place._replace(offset=5)
    dtype = torch.float64 if how == "dtype" else torch.float32
    try:
        load(path, {"w": Shard(torch.ones(2, dtype=dtype), place)})
    except ValueError as error:
        return str(error)
    return ""


UNLIKE = {
    "shape": r"load: .* does not fit: like\['w'\] is float32 \(6,\), but float32 \(2, 3\) was saved",
    "elements": r"load: .* does not fit: like\['w'\] is float32 \(3, 3\), but float32 \(2, 3\) was saved",
    "dtype": r"load: .* does not fit: like\['w'\] is float64 \(2, 3\), but float32 \(2, 3\) was saved",
    "gone": r"load: like\['w'\] is for rank \d of 3, but there is no process group 'gone'. Pass .* init\(params\) returns now",
    "other ranks": r"load: like\['w'\] is for rank \d of 2, but this process is rank \d of 3 of process group",
    "beyond": r"load: like\['w'\] is a tensor of shape \(2,\) in a gradacc.Shard of elements 5 to 7 of a tensor of",
}


@pytest.mark.parametrize("how", UNLIKE)
@pytest.mark.parametrize("saved", ["whole", "divided"])
def test_like_is_another_tensor_or_for_other_ranks(pool, saved, how, tmp_path):
    path = str(tmp_path / "c")
    save(path, {"w": torch.ones(2, 3) if saved == "whole" else Shard(torch.ones(6), facts((2, 3), 0, 6))})
    answers = pool.run(3, load_badly, path, how)
    assert all(re.match(UNLIKE[how], answer) for answer in answers), answers
    assert pool.run(3, load_badly, path, "not at all") == [""] * 3


def test_no_byte_of_a_part_is_read_unverified(pool, tmp_path):
    """And what is not asked for does not matter."""
    assert pool.run(3, save_badly, str(tmp_path), "not at all") == [None] * 3
    body = _folder.read("load", tmp_path)
    name, offset, length, _ = body["chunks"]["['w']"][1][2]
    file = tmp_path / body["data"] / name
    content = bytearray(file.read_bytes())
    content[offset + length // 2] ^= 1
    file.write_bytes(content)
    for target in (torch.ones(2, 3), Shard(torch.ones(2), facts((2, 3), 1, 2))):
        with pytest.raises(ValueError, match=r"is damaged at like\['w'\]: .*__1_0.distcp has been changed"):
            load(tmp_path, {"w": target})
    assert load(tmp_path, {"w": Shard(torch.ones(2), facts((2, 3), 0, 2))})["w"].values.tolist() == [0, 0]
    assert load(tmp_path, {"w": Shard(torch.ones(0), facts((2, 3), 3, 0))})["w"].values.tolist() == []


CRAFTED = {
    "no list": lambda chunks: {},
    "no chunk": lambda chunks: [3],
    "a hole": lambda chunks: [chunks[0], [5, *chunks[1][1:]]],
    "a file elsewhere": lambda chunks: [chunks[0], [*chunks[1][:2], ["../x", *chunks[1][2][1:]]]],
    "a negative length": lambda chunks: [[0, -1, chunks[0][2]]],
}


@pytest.mark.parametrize("change", [*CRAFTED.values(), lambda chunks: chunks[:1]], ids=[*CRAFTED, "too few"])
def test_chunks_that_somebody_made(pool, change, tmp_path):
    pool.run(2, save_divided, str(tmp_path))
    body = _folder.read("load", tmp_path)
    key = "['sgd'].opt_state.momentum_buffer['w']"
    body["chunks"][key] = change(body["chunks"][key])
    _folder.publish(tmp_path, body)
    for target in (blank(whole()), divided("no group")):
        with pytest.raises(ValueError, match="was not written by gradacc|has not all elements of float32"):
            load(tmp_path, target)


def test_gradients_are_saved_too(tmp_path):
    grad_fn = gradacc.accumulate(lambda w, x: (x @ w).mean(), steps=2, sync=gradacc.reduce_scatter())
    grads = grad_fn(torch.ones(3), torch.arange(12.0).view(4, 3))
    save(tmp_path, {"grads": grads})
    assert same(load(tmp_path, {"grads": torch.zeros(3)})["grads"], grads.values)
    assert load(tmp_path, {"grads": ...}) == {"grads": ...}
    assert load(tmp_path, {"grads": Shard(..., grads.facts)})["grads"].values is ...


# Death


@pytest.mark.slow
@pytest.mark.parametrize("lives", [5, 12])
def test_ranks_are_killed_and_others_go_on(tmp_path, lives):
    """On 3, 2 and 1 ranks in turn, from whichever checkpoint is whole, to the end of the run that was left alone."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.checkpoint.killed_shards", str(tmp_path / "c"), str(lives)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    told = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    assert {int(world) for world, *_ in told} == {1, 2, 3}
    assert len({began for _, began, _ in told}) > lives // 2
    assert [how for *_, how in told].index("ended") == lives
