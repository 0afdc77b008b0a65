"""A run that was ended anywhere and resumed is the run that was not: parameters bit for bit, metrics line for line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import gradacc
from gradacc import checkpoint
from gradacc.demo import cli
from gradacc.demo import run as running
from gradacc.demo import train as training
from gradacc.demo.corpus import load
from gradacc.demo.proof import Params
from gradacc.demo.ranks import Ranks
from gradacc.demo.resume import identity, keep
from gradacc.demo.run import run
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import Model, build
from tests.demo import killed
from tests.workers import SIZE, Pool

from .conftest import TINY
from .quick import facts, hasten
from .test_cli import check_one_line
from .test_process import start
from .test_run import exploding, never, read

CPU = torch.device("cpu")
MEASURED = {"seconds", "tokens_per_second"}
"""In a line of metrics, what no two runs have in common."""


@pytest.fixture
def saving(settings: Settings) -> Settings:
    return settings._replace(checkpoint_every=2)


def reached(settings: Settings, world: int = 1) -> dict[str, Any]:
    """All tensors and numbers of the run's checkpoint."""
    _, state = build(settings, CPU)
    tree = {
        "train": state,
        "ranks": {rank: {"cpu": torch.get_rng_state(), "gpu": None} for rank in range(world)},
    }
    like = {"run": ..., "record": ..., "state": tree}
    found: dict[str, Any] = checkpoint.load(settings.out / "checkpoint", like)["state"]
    return found


def reached_iteration(settings: Settings, world: int = 1) -> int:
    return int(reached(settings, world)["train"].step)


def check_same(settings: Settings, other: Settings, world: int = 1) -> None:
    """The same checkpoint to the last bit, the same metrics, the same facts in the report."""
    leaves = [torch.utils._pytree.tree_leaves(reached(each, world)) for each in (settings, other)]
    for ours, theirs in zip(*leaves, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    pages, lines = zip(*map(read, (settings, other)), strict=True)
    for ours, theirs in zip(*lines, strict=True):
        assert {**ours, **dict.fromkeys(MEASURED)} == {**theirs, **dict.fromkeys(MEASURED)}
    facts = [re.findall(r"[^>]+ → [^<]+", page) for page in pages]
    assert facts[0]
    assert facts[0] == facts[1]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "render", facts)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> Settings:
    """A run that saves as `saving` does, and was left alone."""
    data = tmp_path_factory.mktemp("undisturbed") / "text.txt"
    data.write_bytes(text)
    settings = Settings(
        batch_size=8, iterations=6, data=data, out=data.parent / "out", seconds=None, model=TINY, checkpoint_every=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "render", facts)
        hasten(patch.setattr)
        assert run(settings, never) == 0
    return settings


def after(iterations: int) -> Callable[[], bool]:
    """Ctrl-C after so many iterations of this process: it is asked twice in the table, then after each of them."""
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) >= 2 + iterations

    return interrupted


def begun(settings: Settings, iterations: int) -> None:
    assert run(settings, after(iterations)) == running.INTERRUPTED


def test_resumed_is_as_if_nothing_had_happened(
    saving: Settings, undisturbed: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(saving, 3)
    assert len(read(saving)[1]) == reached_iteration(saving) == 3
    capsys.readouterr()
    assert run(saving._replace(resume=True), never) == 0
    output = capsys.readouterr().out
    assert f"Resumed after 3 of 6 iterations, from {saving.out / 'checkpoint'}.\n" in output
    assert "The large batch:" not in output
    check_same(saving, undisturbed)
    assert reached_iteration(saving) == 6


def test_random_numbers_go_on(saving: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a model that draws some."""

    def build_with_dropout(settings: Settings, device: torch.device) -> tuple[Model, gradacc.TrainState]:
        model, state = build(settings, device)

        def loss_fn(params: Params, tokens: torch.Tensor) -> gradacc.Mean:
            head = torch.nn.functional.dropout(params["head.weight"], 0.2)
            return model.loss_fn({**params, "head.weight": head}, tokens)

        return model._replace(loss_fn=loss_fn), state

    monkeypatch.setattr(running, "build", build_with_dropout)
    other = saving._replace(out=saving.out.parent / "other")
    assert run(other, never) == 0
    check_ended_and_resumed(saving, other, 3)


def check_ended_and_resumed(saving: Settings, undisturbed: Settings, iterations: int) -> None:
    begun(saving, iterations)
    torch.manual_seed(1234)
    assert run(saving._replace(resume=True), never) == 0
    check_same(saving, undisturbed)


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_wherever_it_was_ended(saving: Settings, undisturbed: Settings, iterations: int) -> None:
    check_ended_and_resumed(saving, undisturbed, iterations)


def test_what_came_after_the_checkpoint_is_done_again(saving: Settings, undisturbed: Settings) -> None:
    """Killed some iterations after it: their lines are there, and are replaced, also half a line."""
    begun(saving, 3)
    with (saving.out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 4, "loss": 0.0, "bits_per_byte": 0.0}\n{"iterat')
    assert run(saving._replace(resume=True), never) == 0
    check_same(saving, undisturbed)


def test_a_finished_run_has_nothing_left_to_do(saving: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(saving, never) == 0
    before = read(saving)
    capsys.readouterr()
    assert run(saving._replace(resume=True), never) == 0
    assert read(saving) == before
    assert "Resumed after 6 of 6 iterations" in capsys.readouterr().out


def test_nothing_to_resume(saving: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(saving._replace(resume=True), never) == 0
    assert f"Nothing to resume at {saving.out / 'checkpoint'}: started anew.\n" in capsys.readouterr().out
    assert len(read(saving)[1]) == 6


def test_a_new_run_takes_the_place_of_the_old_one(settings: Settings, saving: Settings) -> None:
    """Its checkpoint too: no --resume may mix the two."""
    begun(saving, 3)
    assert run(settings._replace(iterations=2), never) == 0
    assert not (settings.out / "checkpoint").exists()


def test_without_checkpoints_there_are_none(settings: Settings) -> None:
    assert run(settings, never) == 0
    assert not (settings.out / "checkpoint").exists()


def test_divergence_is_not_kept(saving: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it is."""
    monkeypatch.setattr(training, "lr_share", exploding)
    assert run(saving, never) == running.DIVERGED
    assert reached_iteration(saving) == 2


def test_the_time_before_counts(saving: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    limited = saving._replace(seconds=0.0)
    assert run(limited, never) == 0
    assert reached_iteration(saving) == 1
    assert run(limited._replace(resume=True), never) == 0
    output = capsys.readouterr().out
    assert "Ended after 1 of 6 iterations: the time limit of 0 s had been reached before; with --iterations" in output
    assert reached_iteration(saving) == 1
    assert run(saving._replace(resume=True), never) == 0  # --iterations 6
    assert len(read(saving)[1]) == 6


# Mistakes


def refused(settings: Settings, *told: str) -> None:
    files = {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()}
    with pytest.raises(DemoError) as error:
        run(settings, never)
    for text in told:
        assert text in str(error.value)
    assert {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()} == files


def test_a_checkpoint_of_another_run(saving: Settings, data: Path) -> None:
    begun(saving, 1)
    other = data.with_name("other")
    other.write_bytes(data.read_bytes().replace(b"return", b"yield"))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 3}, "--steps 4, and this one has 3"),
        ({"batch_size": 7}, "--batch-size 8, and this one has 7"),
        ({"iterations": 7}, "--iterations 6, and this one has 7"),
        ({"seed": 1}, "--seed 0, and this one has 1"),
        ({"lr": 0.1}, "--lr 0.003, and this one has 0.1"),
        ({"model": killed.MODEL}, "model [2, 2, 32, 48, 257], and this one has [1, 2, 16, 48, 257]"),
        ({"data": other}, "text (SHA-256) "),
        ({"shard": True}, "--shard False, and this one has True; leave --shard out, or leave --resume out"),
    ]
    for change, told in changes:
        refused(saving._replace(resume=True, **change), "--resume: the checkpoint", "is of a run with " + told)


def test_one_that_was_divided_is_resumed_divided(saving: Settings) -> None:
    saving = saving._replace(shard=True)
    begun(saving, 1)
    told = "--shard True, and this one has False; add --shard, with which the number of processes may be another one"
    refused(saving._replace(resume=True, shard=False), "--resume: the checkpoint", "is of a run with " + told)
    corpus = load(saving.data, saving.model.context)
    names = [*json.loads(identity(saving, corpus, Ranks()))]
    assert names.index("--shard") < names.index("--nproc")  # which it makes right


def test_one_of_other_processes(saving: Settings) -> None:
    begun(saving, 1)
    corpus = load(saving.data, saving.model.context)
    mine, other = (json.loads(identity(saving, corpus, Ranks(0, world))) for world in (1, 2))
    assert {name for name in mine if mine[name] != other[name]} == {"--nproc"}


def test_metrics_of_another_run(saving: Settings) -> None:
    begun(saving, 3)
    metrics = saving.out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    others = [
        lines[:0],
        lines[:1],
        lines[:2],
        [lines[0], lines[2], lines[1]],
        [b"nonsense", *lines],
        [b"[1]\n", *lines[1:]],
    ]
    for kept in others:
        metrics.write_bytes(b"".join(kept))
        refused(
            saving._replace(resume=True),
            "--resume: ",
            f"{metrics} has not the 3 iterations of the checkpoint beside it",
        )


def test_a_damaged_checkpoint(saving: Settings) -> None:
    begun(saving, 1)
    for name in ("checkpoint.json", "data-*/__0_0.distcp", "data-*/.metadata"):
        (file,) = (saving.out / "checkpoint").glob(name)
        content = file.read_bytes()
        file.write_bytes(content[:-20])
        refused(saving._replace(resume=True), "--resume: load: ", "is damaged", str(file))
        if name != "data-*/__0_0.distcp":  # (of which no more is read than who it belongs to)
            refused(saving, "--checkpoint-every: load: ", str(file), f"or remove {saving.out / 'checkpoint'}")
        file.write_bytes(content)


def test_a_checkpoint_that_cannot_be_removed(saving: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(saving, 1)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(running.forget.__globals__["shutil"], "rmtree", fail)
        with pytest.raises(DemoError, match=r"checkpoint cannot be removed: .*Permission denied"):
            run(saving, never)
    begun(saving._replace(resume=True), 1)  # what is left is no checkpoint


def test_something_else_in_its_place(settings: Settings) -> None:
    place = settings.out / "checkpoint"
    place.mkdir(parents=True)
    (place / "cat.png").write_bytes(b"cat")
    refused(settings._replace(resume=True), f"--resume: load: {place} is not a checkpoint of gradacc")
    refused(settings._replace(checkpoint_every=1), f"--checkpoint-every: load: {place} is not a checkpoint of gradacc")
    assert run(settings, never) == 0
    assert (place / "cat.png").read_bytes() == b"cat"
    checkpoint.save(settings.out / "c", {"w": 1})
    (place / "cat.png").unlink()
    place.rmdir()
    (settings.out / "c").rename(place)
    refused(settings._replace(resume=True), "like['run'] was not saved")
    refused(settings._replace(checkpoint_every=1), "like['run'] was not saved")


def test_a_full_disk(saving: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DemoError, match=r"checkpoint cannot be written: .*No space left on device"):
        run(saving, never)


def test_a_disk_that_fails(saving: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the metrics are put on it, before a checkpoint."""

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DemoError, match=r"metrics.jsonl cannot be written: Input/output error"):
        run(saving, never)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("a rank has ended"), RuntimeError)],
)
def test_what_a_rank_tells_nobody(
    saving: Settings, monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException]
) -> None:
    """A second Ctrl-C in a save, where others wait in another collective; and that a rank is gone, which is no mistake."""

    def fail(*_: object) -> None:
        raise raised

    def collective(*_: object) -> None:
        pytest.fail("paired with the others' collective")

    monkeypatch.setattr(checkpoint, "save", fail)
    monkeypatch.setattr(dist, "all_gather_object", collective)
    _, state = build(saving, CPU)
    with pytest.raises(expected):
        keep(saving, Ranks(0, 2), "run", state)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "", "nan", str(10**8)])
def test_nonsense(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--checkpoint-every", value])
    assert ended.value.code == 2
    check_one_line(capsys, "--checkpoint-every")


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    settings = cli.parse(["demo", "--checkpoint-every", "7", "--resume"])
    assert settings == Settings(checkpoint_every=7, resume=True)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--resume", "now"])
    check_one_line(capsys, "now")
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    assert "--checkpoint-every" in text
    assert "--resume" in text
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text


def test_a_mistake_is_one_line(saving: Settings, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(saving, 1)
    capsys.readouterr()
    assert cli.main(["demo", "--data", str(data), "--out", str(saving.out), "--resume"]) == 2
    check_one_line(capsys, "is of a run with --batch-size 8, and this one has 16")


# Several processes


def run_on_ranks(group: dist.ProcessGroup, settings: Settings, iterations: int) -> int | str:
    """A whole run, but for the process group, which is there; on rank 0, Ctrl-C after so many iterations."""
    ranks = Ranks(dist.get_rank(), SIZE, dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "here", lambda: ranks)
        patch.setattr(running, "joined", lambda *_: contextlib.nullcontext())
        hasten(patch.setattr)
        patch.setattr(running, "render", facts)
        try:
            return run(settings, after(iterations) if ranks.first and iterations else never)
        except DemoError as error:
            return str(error)


def test_ranks_go_on_together(pool: Pool, saving: Settings) -> None:
    other = saving._replace(out=saving.out.parent / "other")
    assert pool.run(SIZE, run_on_ranks, other, 0) == [0] * SIZE
    assert pool.run(SIZE, run_on_ranks, saving, 3) == [running.INTERRUPTED] + [0] * (SIZE - 1)
    assert reached_iteration(saving, SIZE) == 3
    resuming = saving._replace(resume=True)
    code, *others = pool.run(SIZE, run_on_ranks, resuming._replace(seed=1), 0)
    assert "is of a run with --seed 0, and this one has 1" in str(code)
    assert others == [0] * (SIZE - 1)
    assert pool.run(SIZE, run_on_ranks, resuming, 0) == [0] * SIZE
    check_same(saving, other, SIZE)


def test_ranks_that_do_not_see_the_same_folder(pool: Pool, saving: Settings) -> None:
    assert pool.run(SIZE, run_on_ranks, saving, 3)[0] == running.INTERRUPTED
    elsewhere = saving._replace(out=saving.out.parent / "elsewhere", resume=True)
    settings = [(elsewhere if rank == 2 else saving._replace(resume=True), 0) for rank in range(SIZE)]
    first, *_ = pool.run_each(SIZE, run_on_ranks, settings)
    assert "--out must be on a file system that all share" in str(first)


def test_ranks_that_do_not_save_into_the_same_folder(pool: Pool, saving: Settings) -> None:
    """What one of them cannot do, rank 0 tells in one line."""
    elsewhere = saving._replace(out=saving.out.parent / "elsewhere")
    settings = [(elsewhere if rank == 2 else saving, 0) for rank in range(SIZE)]
    first, *others = pool.run_each(SIZE, run_on_ranks, settings)
    assert "cannot be written: save: failed because of rank 2: ValueError: save: rank 2 does not see" in str(first)
    assert others == [0] * (SIZE - 1)


# Death


def divided(settings: Settings, processes: int, *more: str) -> subprocess.Popen[str]:
    """``gradacc demo --shard`` in so many processes."""
    options = ("steps", "batch_size", "iterations", "data", "out")
    told = [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    return start(*told, "--checkpoint-every", "1", "--shard", "--nproc", str(processes), *more)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [3, 1])
def test_a_divided_run_that_is_killed_goes_on_with_other_processes(data: Path, tmp_path: Path, processes: int) -> None:
    """SIGKILL of all two while they train; the curve is that of one process that nobody killed."""
    settings = Settings(steps=2, batch_size=5, iterations=12, data=data, out=tmp_path / "killed", seconds=None)
    process = divided(settings, 2)
    metrics, deadline = settings.out / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()
    output, errors = divided(settings, processes, "--resume").communicate(timeout=300)
    (reached,) = map(int, re.findall(r"^Resumed after (\d+) of 12", output, re.M))
    assert 3 <= reached < 12, errors
    alone = settings._replace(out=tmp_path / "alone", model=Settings().model)
    assert run(alone, never) == 0
    ours, theirs = (read(each)[1] for each in (settings, alone))
    assert [line["iteration"] for line in ours] == list(range(1, 13))
    for line, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=2e-3)


def torchrun(data: Path, folder: Path, kills: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "10",
    ]
    return subprocess.Popen(
        [*command, "-m", "tests.demo.killed", str(data), str(folder), str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def end(process: subprocess.Popen[str]) -> None:
    """torchrun, and its workers: SIGTERM is what it passes on to them."""
    process.terminate()
    try:
        process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "places"), [(2, 1), (10, 4)])
def test_killed_under_torchrun(data: Path, tmp_path: Path, kills: int, places: int) -> None:
    """SIGKILL of one of two ranks at random moments: what comes out is the undisturbed run, bit for bit.

    Some come while it starts or resumes; the others in a gradient, in an update, in a save. It goes on from ``places`` or more.
    """
    process = torchrun(data, tmp_path, kills)
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        end(process)
    assert process.returncode == 0, errors
    assert re.findall(r"killed in life (\d+);", errors) == [str(life) for life in range(kills)], errors
    began = [int(number) for number in re.findall(r"^Resumed after (\d+) of", output, re.M)]
    assert began == sorted(began)
    assert len(set(began)) >= places
    runs = (killed.settings(data, tmp_path / name, kills) for name in ("killed", "undisturbed"))
    check_same(*runs, world=2)
