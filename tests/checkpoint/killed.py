"""Processes that are killed while they save: started by ``test_save.py``, which has threads and so must not fork.

``python -m tests.checkpoint.killed everywhere FOLDER`` kills one process before each thing that `save` does to the folder, in
turn; ``... ranks FOLDER`` the same with each of two ranks, of which the other one must raise; ``... anytime FOLDER ROUNDS``
kills processes that save without end, at random moments after each one's first save. After each death the folder must hold the
last checkpoint that was complete, or the one after it.

``... held FOLDER`` stops one process at each place in a `save`, in turn: until it is killed, another one is told, then saves.

``... rivals FOLDER SECONDS`` lets two processes save into one folder as often as they can.

``... window FOLDER CARRIED`` kills processes that train, and save after every micro-batch, until one comes to the end, of the
same state, bit for bit, as one that was left alone; with 1 for CARRIED a hidden state and `Moments` are threaded, too.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

import gradacc
from gradacc import TrainState
from gradacc.checkpoint import load, save

EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "tests.loss"}
TOLD = 3


def tree(number: int) -> dict[str, Any]:
    """Every leaf of which tells the number."""
    return {
        "large": torch.full((200_000,), float(number)),
        "small": [torch.tensor(number), torch.full((3,), number, dtype=torch.uint8)],
        "number": number,
    }


def read(folder: Path) -> int:
    """The number of the checkpoint that is there, all of it; 0 for none."""
    try:
        found = load(folder, tree(0))
    except FileNotFoundError:
        return 0
    number: int = found["number"]
    assert bool((found["large"] == number).all())
    assert found["small"][0] == number
    assert found["small"][1].tolist() == [number] * 3
    return number


def doom(folder: Path, place: int, how: signal.Signals = signal.SIGKILL) -> None:
    """This process is killed (or stopped) before the ``place``-th thing that it does to the folder."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(folder) in f"{args[0]}":
            seen.append(event)
            if len(seen) == place:
                os.kill(os.getpid(), how)

    sys.addaudithook(hook)


def everywhere(folder: Path) -> int:
    """How many places there are in which a `save` can be killed."""
    before = 0
    for place in itertools.count(1):
        child = os.fork()
        if child == 0:
            doom(folder, place)
            save(folder, tree(before + 1))
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        after = read(folder)
        assert after in (before, before + 1), (place, before, after)
        if not killed:
            assert after == before + 1
            break
        before = after
    return place - 1


def held(folder: Path) -> int:
    """At how many places a process that is stopped has the lock."""
    before = refused = 0
    for place in itertools.count(1):
        child = os.fork()
        if child == 0:
            doom(folder, place, signal.SIGSTOP)
            save(folder, tree(before + 1))
            os._exit(0)
        stopped = os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        found = read(folder)
        assert found in (before, before + 1), (place, before, found)
        told = ""
        try:
            save(folder, tree(before + 2))
        except BlockingIOError as error:
            told = str(error)
        if told:
            assert stopped, told
            assert f"save: process {child} on " in told or "save: another process is saving" in told, told
            assert read(folder) == found
            refused += 1
        if not stopped:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        save(folder, tree(before + 2))
        before = read(folder)
    return refused


def rivals(folder: Path, seconds: int) -> str:
    """How often the first saved, was told of the other, and found its checkpoint replaced; and the same of the other."""
    save(folder, tree(1))
    told, children = [], []
    for own in range(2):
        reading, writing = os.pipe()
        told.append(reading)
        children.append(os.fork())
        if children[-1] == 0:
            saved = refused = replaced = 0
            chance = random.Random(own)
            end = time.monotonic() + seconds
            while time.monotonic() < end or not (saved and refused):
                number = 2 * (saved % 100) + 2 + own
                try:
                    save(folder, tree(number))
                    saved += 1
                except BlockingIOError:
                    refused += 1
                found = read(folder)
                assert found > 0
                replaced += found % 2 != own
                time.sleep(chance.uniform(0, 0.02))  # or the one that is refused may come too early every time
                assert time.monotonic() < end + 60, (saved, refused)
            os.write(writing, f"{saved} {refused} {replaced} ".encode())
            os._exit(0)
        os.close(writing)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], codes
    assert read(folder) > 0
    assert len(list(folder.iterdir())) == 3
    return "".join(os.read(end, 100).decode() for end in told)


def save_as(rank: int, folder: Path, number: int, place: int, victim: int) -> None:
    """A process of two that save together. Its exit code is `TOLD` where that raised what it should."""
    store = dist.FileStore(f"{folder.parent}/store {number} {victim} {place}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    if rank == victim:
        doom(folder, place)
    try:
        save(folder, {**tree(number), "ranks": {rank: torch.full((5,), number)}})
    except RuntimeError as error:
        os._exit(TOLD if "another rank has ended" in str(error) else 1)
    os._exit(0)


def read_union(folder: Path) -> int:
    """The number of the checkpoint of two ranks that is there; 0 for none."""
    try:
        found = load(
            folder, {**tree(0), "ranks": {0: torch.ones(5, dtype=torch.int64), 1: torch.ones(5, dtype=torch.int64)}}
        )
    except FileNotFoundError:
        return 0
    number: int = found["number"]
    assert bool((found["large"] == number).all())
    assert [numbers.tolist() for numbers in found["ranks"].values()] == [[number] * 5] * 2
    return number


def ranks(folder: Path) -> int:
    """How many places there are, on both ranks, in which a `save` can be killed."""
    before = places = 0
    for victim in range(2):
        for place in itertools.count(1):
            children = []
            for rank in range(2):
                children.append(os.fork())
                if children[-1] == 0:
                    save_as(rank, folder, before + 1, place, victim)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            after = read_union(folder)
            assert after in (before, before + 1), (victim, place, before, after)
            if codes == [0, 0]:
                assert after == before + 1
                break
            assert codes[victim] == -signal.SIGKILL, (victim, place, codes)
            assert codes[1 - victim] in (0, TOLD), (victim, place, codes)
            before, places = after, places + 1
        before = after
    return places


def anytime(folder: Path, rounds: int) -> int:
    """The number of the checkpoint that was reached."""
    chance = random.Random(0)
    number = 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for following in itertools.count(number + 1):
                save(folder, tree(following % 256))
                os.write(writing, bytes([following % 256]))
        os.close(writing)
        first = os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = number + len(first)
        with os.fdopen(reading, "rb") as stream:
            done += len(stream.read())
        found = read(folder)
        assert found in (done % 256, (done + 1) % 256), (done, found)
        number = done + (found != done % 256)
    save(folder, tree(0))
    assert sorted(entry.name[:15] for entry in folder.iterdir())[:2] == ["checkpoint.json", "checkpoint.lock"]
    assert len(list(folder.iterdir())) == 3
    return number


WINDOW = 4
MICROBATCHES = [torch.randn(size, 6, generator=torch.Generator().manual_seed(size)) for size in (3, 1, 5, 2) * 4]


def train(folder: Path, carried: int) -> dict[str, Any]:
    """Four updates of four micro-batches each, a checkpoint after each micro-batch; goes on from the one in ``folder``."""
    schedule = gradacc.optim.schedule(torch.optim.lr_scheduler.ExponentialLR, 0.1, gamma=0.5)
    optimizer = gradacc.optim.adamw(schedule)

    def loss_fn(params: dict[str, torch.Tensor], x: torch.Tensor, hidden: Any = 0.0) -> torch.Tensor:
        sys.audit("tests.loss", folder)
        return (F.dropout(x, 0.3) @ params["w"] + params["b"] + hidden).square().mean()

    def with_carry(params: dict[str, torch.Tensor], x: torch.Tensor, carry: dict[str, Any]) -> Any:
        loss = loss_fn(params, x, carry["hidden"])
        return loss, {"hidden": (carry["hidden"] + loss).tanh(), "moments": gradacc.Moments.of(x, 0)}

    torch.manual_seed(0)
    params = {"w": torch.randn(6), "b": torch.zeros(())}
    state, seen = TrainState(params, optimizer.init(params)), 0
    if carried:
        start = {"hidden": torch.zeros(()), "moments": gradacc.Moments(torch.tensor(0), *torch.zeros(2, 6))}
        state = state._replace(carry=start)
    init, update, _, finalize = gradacc.accumulator(with_carry if carried else loss_fn, has_carry=bool(carried))
    window = init(params, carry=state.carry) if carried else init(params)

    def everything() -> dict[str, Any]:
        return {"seen": seen, "train": state, "window": window, "rng": torch.get_rng_state()}

    try:
        found = load(folder, everything())  # whether a window was open, or not
    except FileNotFoundError:
        pass
    else:
        seen, state, window = found["seen"], found["train"], found["window"]
        torch.set_rng_state(found["rng"])
    print(seen, flush=True)

    for microbatch in MICROBATCHES[seen:]:
        window = update(window, state.params, microbatch)
        seen += 1
        if seen % WINDOW == 0:
            (grads, _), carry = finalize(window) if carried else (finalize(window), ())
            new, opt_state = optimizer.step(state.params, grads, state.opt_state)
            state = TrainState(new, opt_state, state.step + 1, carry)
            window = init(new, carry=carry) if carried else init(new)
        save(folder, everything())
    return everything()


def window(folder: Path, carried: int) -> int:
    """How many processes were killed; each prints how many micro-batches were done when it began."""
    chance = random.Random(0)
    alone = train(folder.with_name("alone"), carried)
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        place = chance.randrange(30, 90) * (1 + carried)
        child = os.fork()
        if child == 0:
            doom(folder, place)
            train(folder, carried)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert codes[-1] in (0, -signal.SIGKILL), codes
    found = load(folder, alone)
    for ours, theirs in zip(*map(torch.utils._pytree.tree_leaves, (found, alone)), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert found["train"].step == len(MICROBATCHES) // WINDOW
    return len(codes) - 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    save(f"{sys.argv[2]}-first", tree(7))  # what a first time takes, imports above all
    assert read(Path(f"{sys.argv[2]}-first")) == 7
    how: Any = {
        "everywhere": everywhere,
        "ranks": ranks,
        "anytime": anytime,
        "held": held,
        "rivals": rivals,
        "window": window,
    }[sys.argv[1]]
    print(how(Path(sys.argv[2]), *map(int, sys.argv[3:])))
