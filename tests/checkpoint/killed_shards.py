"""Ranks that train with a divided state and are killed, and go on as another number of ranks; started by ``test_shards.py``.

``python -m tests.checkpoint.killed_shards FOLDER LIVES`` prints, of each life, its ranks, after which step it began, and how it
ended.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradacc
from gradacc import Shard, TrainState, _tree
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import same
from tests.checkpoint.killed import TOLD, doom

LIVES = [3, 3, 2, 3, 1, 2, 3, 1, 2, 3, 2, 1]
"""How many ranks each has; of 1, there is no process group."""
STEPS = 24
GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {
    "w": torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64),
    "b": torch.zeros(3, dtype=torch.float64),
    "scale": torch.ones((), dtype=torch.float64),
}
BATCHES = torch.randn(STEPS, 12, 5, generator=GENERATOR, dtype=torch.float64)
INSIDE = gradacc.optim.adamw(0.05)


def loss_fn(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    return ((batch @ params["w"] + params["b"]).tanh() * params["scale"] - 1).square().mean()


def undivided() -> TrainState:
    return TrainState(PARAMS, INSIDE.init(PARAMS))


def paths(state: TrainState) -> dict[str, Any]:
    """Leaves by path; a `Shard` as one."""
    leaves, treedef = _tree.flatten(state, lambda node: isinstance(node, Shard))
    return dict(zip(_tree.paths(treedef), leaves, strict=True))


def part(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    return whole.reshape(-1)[shard.offset : shard.offset + shard.length]


def train(rank: int, world: int, folder: Path, place: int | None) -> None:
    """From the checkpoint that is there, to the end; a checkpoint after each step, and beside it what is in it.

    The process is killed before the ``place``-th thing that it does to the folder after it has loaded.
    """
    optimizer = gradacc.optim.sharded(INSIDE)
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, steps=2, sync=gradacc.reduce_scatter()), optimizer)
    state = TrainState(PARAMS, optimizer.init(PARAMS))
    if (folder / "checkpoint.json").exists():
        state, whole = load(folder, state), paths(load(folder, undivided()))
        for path, leaf in paths(state).items():
            own = part(whole[path], leaf) if isinstance(leaf, Shard) else whole[path]
            assert same(leaf.values if isinstance(leaf, Shard) else leaf, own), path
    if place is not None:
        doom(folder, place)
    rows = 12 // world
    for batch in BATCHES[state.step :]:
        state, _ = step(state, batch[rank * rows : (rank + 1) * rows])
        torch.save(paths(state), told(folder, state.step, rank, world))
        save(folder, state)


def told(folder: Path, step: int, rank: int, world: int) -> Path:
    return folder.with_name(f"step {step}, rank {rank} of {world}")


def live(rank: int, world: int, life: int, folder: Path, place: int | None) -> None:
    """A process of a life."""
    try:
        if world > 1:
            store = dist.FileStore(str(folder.with_name(f"store {life}")), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        train(rank, world, folder, place)
    except BaseException as error:
        if isinstance(error, RuntimeError) and "another rank has ended" in str(error):
            os._exit(TOLD)
        print(f"rank {rank} of {world}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def check(folder: Path, world: int) -> TrainState:
    """What is in the checkpoint is what these ranks had when they saved it, bit for bit."""
    state = load(folder, undivided())
    ranks = [torch.load(told(folder, state.step, rank, world), weights_only=False) for rank in range(world)]
    for path, leaf in paths(state).items():
        found = [each[path] for each in ranks]
        if isinstance(found[0], Shard):
            assert sum(shard.length for shard in found) == leaf.numel()
            assert all(same(shard.values, part(leaf, shard)) for shard in found), path
        else:
            assert all(same(other, leaf) for other in found), path
    return state


def conduct(folder: Path, lives: int) -> None:
    """Some lives that end in SIGKILL, of one rank or of all, and one that comes to the end."""
    chance = random.Random(0)
    state = undivided()
    for life, world in enumerate([*LIVES[:lives], 2]):
        last = life == lives
        victim, all_die = chance.randrange(world), life % 3 == 0
        place = chance.randrange(20, 100) if victim == 0 else chance.randrange(5, 20)
        codes = deaths(folder, life, world, {} if last else {victim: place}, all_die)
        if last:
            assert set(codes.values()) == {0}, codes
        else:
            assert codes[victim] == -signal.SIGKILL, codes
            assert all(code in (TOLD, -signal.SIGKILL) for code in codes.values()), codes
        began, found = state.step, load(folder, undivided()) if (folder / "checkpoint.json").exists() else state
        assert found.step >= began
        if found.step > began:
            state = check(folder, world)
        else:
            assert same(found, state)
        print(world, began, "ended" if last else "all killed" if all_die else f"{victim} killed", flush=True)
    compare(state)


def deaths(folder: Path, life: int, world: int, places: dict[int, int], all_die: bool) -> dict[int, int]:
    """How the ranks of a life ended; with ``all_die``, those that are left when one is killed are killed too."""
    left, codes = {}, {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            live(rank, world, life, folder, places.get(rank))
        left[child] = rank
    while left:
        child, status = os.wait()
        codes[left.pop(child)] = code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL and all_die:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes


def compare(state: TrainState) -> None:
    """The end is that of one process which took each batch as a whole."""
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, steps=1), INSIDE)
    expected = undivided()
    for batch in BATCHES:
        expected, _ = step(expected, batch)
    assert state.step == expected.step == STEPS
    leaves, treedef = _tree.flatten(state)
    others, other = _tree.flatten(expected)
    assert treedef == other
    for leaf, right in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf, right, rtol=1e-10, atol=1e-13)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save(f"{sys.argv[1]}-first", undivided())  # what a first time takes, imports above all
    conduct(Path(sys.argv[1]), int(sys.argv[2]))
