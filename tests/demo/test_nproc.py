"""Several processes: the same training as one process alone, and one end for all. Real ranks, real launchers."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist

from gradacc.demo import cli, launch, run
from gradacc.demo.batch import batch_at
from gradacc.demo.corpus import load
from gradacc.demo.model import PAD
from gradacc.demo.ranks import EndedError, Ranks, decide, hear, here, together
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import build, train
from tests.workers import SIZE, Failed, Pool

from .quick import hasten
from .test_cli import check_one_line
from .test_process import ROOT, start
from .test_run import Page, check_is_complete_by_itself, read

CPU = torch.device("cpu")


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), SIZE, dist.get_rank())


# On ranks that are there already


def trained(settings: Settings, ranks: Ranks, iterations: int | None = None) -> list[tuple[float, float, int]]:
    """Loss, norm and tokens of the first ``iterations``, or of all."""
    model, state = build(settings, CPU)
    pieces = load(settings.data, settings.model.context).train
    found = itertools.islice(train(settings, model.loss_fn, state, pieces, CPU, ranks), iterations)
    return [(metrics.loss, metrics.grad_norm, metrics.tokens) for _, metrics in found]


def trained_on_ranks(group: dist.ProcessGroup, settings: Settings) -> list[tuple[float, float, int]]:
    return trained(settings, this_rank())


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("batch_size", [8, 6, 3])  # with 3, one of the ranks has nothing
def test_the_loss_curve_of_several_processes_is_that_of_one(
    pool: Pool, settings: Settings, batch_size: int, shard: bool
) -> None:
    settings = settings._replace(batch_size=batch_size, iterations=8, shard=shard)
    alone = trained(settings, Ranks())
    answers = pool.run(SIZE, trained_on_ranks, settings)
    assert answers == [answers[0]] * SIZE
    for ours, theirs in zip(answers[0], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
        assert ours[2] == theirs[2]


@pytest.mark.parametrize(("size", "world"), [(16, 2), (7, 3), (2, 3), (1, 4)])
def test_ranks_share_one_batch(size: int, world: int, cpu: torch.device) -> None:
    pieces = [bytes([65 + index]) * (2 + index) for index in range(20)]
    shares = [batch_at(pieces, size, 3, 5, cpu, Ranks(rank, world)) for rank in range(world)]
    rows = [bytes(row[row != PAD].tolist()) for share in shares for row in share]
    assert rows == [bytes(row[row != PAD].tolist()) for row in batch_at(pieces, size, 3, 5, cpu)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def say(ranks: Ranks, ends: list[object]) -> tuple[int, str | None]:
    """How often the run went on, and what ended it; the list's last entry is what rank 0 decides or raises at last."""

    def call(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    count = 0
    try:
        for value in ends:
            found = decide(ranks, lambda value=value: call(value)) if ranks.first else hear(ranks)  # type: ignore[misc]
            if found is not None:
                return count, "told"
            count += 1
    except Exception as error:
        return count, type(error).__name__
    return count, None


def say_on_ranks(group: dist.ProcessGroup, ends: list[object]) -> tuple[int, str | None]:
    return say(Ranks(dist.get_rank(), SIZE), ends)


@pytest.mark.parametrize(
    ("end", "first", "others"), [(None, None, None), (0, "told", "EndedError"), (OSError(), "OSError", "EndedError")]
)
def test_all_end_when_rank_0_does(pool: Pool, end: object, first: str | None, others: str | None) -> None:
    went_on = 3 if end is None else 2
    assert pool.run(SIZE, say_on_ranks, [None, None, end]) == [(went_on, first)] + [(went_on, others)] * (SIZE - 1)


def load_on_ranks(group: dist.ProcessGroup, settings: Settings, change: str) -> str:
    ranks = this_rank()
    if change == "missing" and ranks.rank == 2:
        settings = settings._replace(data=Path("missing"))
    if change == "options" and ranks.rank == 1:
        settings = settings._replace(seed=7)
    try:
        corpus = together(ranks, lambda: load(settings.data, settings.model.context))
        if change == "text" and ranks.rank == 3:
            corpus = corpus._replace(train=corpus.train[1:])
        together(ranks, lambda: run._check_alike(settings, corpus, ranks))
    except EndedError:
        return "ended"
    except DemoError as error:
        return str(error)
    return "alike"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("nothing", ""),
        ("missing", "rank 2: --data missing: no such file or folder"),
        ("text", "rank 3 read another text than rank 0"),
        ("options", "rank 1 was given other options than rank 0"),
    ],
)
def test_ranks_that_differ_end_with_what_rank_0_says(pool: Pool, settings: Settings, change: str, told: str) -> None:
    first, *others = pool.run(SIZE, load_on_ranks, settings, change)
    assert others == ["ended" if told else "alike"] * (SIZE - 1)
    assert first.startswith(told or "alike")


def run_on_ranks(group: dist.ProcessGroup, settings: Settings, ending: str) -> int | str:
    """A whole run, but for the process group, which is there."""
    ranks, asked = this_rank(), [0]

    def interrupted() -> bool:
        asked[0] += 1
        if ending == "again" and asked[0] == 4:
            raise KeyboardInterrupt
        return asked[0] >= {"table": 2, "training": 4}.get(ending, 99)  # in the table twice, then after iterations

    if ending == "full" and ranks.first:
        (settings.out / "metrics.jsonl").symlink_to("/dev/full")
    corpus = load(settings.data, settings.model.context)
    model, state = build(settings, CPU)
    job = run.Job(settings, corpus, CPU, model, ranks, time.monotonic(), interrupted)
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch.setattr)
        try:
            return run._lead(job, state, run._record(job, state)) if ranks.first else run._follow(job, state)
        except EndedError:
            return "ended"
        except DemoError as error:
            return str(error)


@pytest.mark.parametrize(
    ("ending", "code", "others", "iterations", "note"),
    [
        ("itself", 0, 0, 6, "before and after 6 iterations"),
        ("limit", 0, "ended", 1, "Ended after 1 of 6 iterations, at the time limit of 0 s"),
        ("table", 130, "ended", 0, "Ended by Ctrl-C after 0 of 6 iterations."),
        ("training", 130, "ended", 2, "Ended by Ctrl-C after 2 of 6 iterations."),
        ("again", 130, "ended", 2, "Ended by Ctrl-C after 2 of 6 iterations."),
        ("full", "metrics.jsonl cannot be written", "ended", None, ""),
    ],
)
def test_every_end_is_rank_0s(
    pool: Pool, settings: Settings, ending: str, code: object, others: object, iterations: int | None, note: str
) -> None:
    """Of the others nobody was told of Ctrl-C, nor has a clock: they hear of it."""
    settings.out.mkdir()
    if ending == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    settings = settings._replace(seconds=0.0 if ending == "limit" else None)
    first, *rest = pool.run(SIZE, run_on_ranks, settings, ending)
    assert rest == [others] * (SIZE - 1)
    if iterations is None:
        assert str(code) in str(first)
        return
    html, metrics = read(settings)
    assert first == code
    assert len(metrics) == iterations
    assert note in check_is_complete_by_itself(html).text


# Started as a user does


class Ended(NamedTuple):
    """A run of real processes that is over."""

    settings: Settings
    code: int
    output: str
    errors: str


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> Ended:
    """``gradacc demo --nproc 2``, with Ctrl-C in the midst of its training."""
    data = tmp_path_factory.mktemp("interrupted") / "text.txt"
    data.write_bytes(text)
    settings = Settings(steps=2, batch_size=5, iterations=200, data=data, out=data.parent / "out")
    process = start_two(settings)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    return Ended(settings, process.returncode, output, errors)


def start_two(settings: Settings) -> subprocess.Popen[str]:
    """A run in two processes, after some iterations."""
    options = ("steps", "batch_size", "iterations", "data", "out")
    told = [(f"--{name.replace('_', '-')}", str(getattr(settings, name))) for name in options]
    process = start(*itertools.chain.from_iterable(told), "--nproc", "2")
    metrics, deadline = settings.out / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_nproc_trains_as_one_process_does(interrupted_run: Ended) -> None:
    """Through ``gradacc demo --nproc``, with the one bar, table and report of rank 0."""
    assert check_one_run(interrupted_run) >= 3


@pytest.mark.slow
def test_ctrl_c_ends_all_with_the_report(interrupted_run: Ended) -> None:
    settings, code, output, errors = interrupted_run
    assert code == 130, errors
    assert "Traceback" not in errors
    html, metrics = read(settings)
    note = f"Ended by Ctrl-C after {len(metrics)} of 200 iterations."
    assert note in output
    assert note in Page(html).text


@pytest.mark.slow
def test_torchrun_is_the_same(data: Path, settings: Settings) -> None:
    """With a batch of one, so that a rank has nothing to do, and without the launcher of ours."""
    settings = settings._replace(iterations=2, batch_size=1, model=Settings().model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gradacc"]
    options = ["--data", str(data), "--iterations", "2", "--batch-size", "1", "--out", str(settings.out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*command, "demo", *options], env=environment, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert check_one_run(Ended(settings, found.returncode, found.stdout, found.stderr)) == 2


def check_one_run(ended: Ended) -> int:
    """Returns the number of its iterations, which (the first eight are compared) are those of one process."""
    html, metrics = read(ended.settings)
    expected = trained(ended.settings, Ranks(), min(len(metrics), 8))
    for line, theirs in zip(metrics[:8], expected, strict=True):
        assert (line["loss"], line["grad_norm"], line["tokens"]) == pytest.approx(theirs, rel=2e-4)
    assert "2 processes, each with" in check_is_complete_by_itself(html).text
    assert ended.output.count("report:") == ended.output.count("The large batch:") == ended.errors.count(" 0/") == 1
    assert "Warning" not in ended.errors
    return len(metrics)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(data: Path, tmp_path: Path) -> None:
    process = start_two(Settings(batch_size=1, steps=1, iterations=100000, data=data, out=tmp_path / "out"))
    ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    max(ranks, key=lambda child: child.pid).kill()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "gradacc demo: error: rank 1 ended with exit code -9, see above\n" in errors
    assert not any(child.is_running() for child in ranks)


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody(data: Path, tmp_path: Path) -> None:
    process = start_two(Settings(batch_size=1, steps=1, iterations=100000, data=data, out=tmp_path / "out"))
    ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for child in alive:
        child.kill()
    process.communicate(timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_mistake_is_one_line_from_all_processes(tmp_path: Path) -> None:
    process = start("--data", str(tmp_path / "missing"), "--nproc", "2")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == ""
    assert errors == f"gradacc demo: error: --data {tmp_path / 'missing'}: no such file or folder\n"


def test_the_exit_code_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: lambda *_: {1: 0, 0: 7})
    assert launch.launch(Settings(nproc=2), cli.conduct) == 7


# Mistakes


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "", "1000", "auto"])
def test_a_number_of_processes_that_cannot_be(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--nproc", value])
    assert ended.value.code == 2
    check_one_line(capsys, "--nproc")


def test_nproc_within_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["demo", "--nproc", "2"]) == 2
    check_one_line(capsys, "torchrun has started this process already")


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["demo", "--nproc", "2"]) == 2
    check_one_line(capsys, "2 processes need a GPU each, but this machine has 1")


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_an_environment_that_is_no_rank(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["demo"]) == 2
    check_one_line(capsys, f"WORLD_SIZE='{environment['WORLD_SIZE']}'")


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here() == Ranks(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert here() == Ranks(5, 8, 1)


def test_a_rank_that_fails_is_told_by_the_others(pool: Pool, settings: Settings) -> None:
    with pytest.raises(Failed, match=r"another rank has ended|raised on rank 1"):
        pool.run(SIZE, fail_on_a_rank, settings)


def fail_on_a_rank(group: dist.ProcessGroup, settings: Settings) -> None:
    ranks = this_rank()
    model, state = build(settings, CPU)
    pieces = load(settings.data, settings.model.context).train

    def loss_fn(params, tokens):  # type: ignore[no-untyped-def]
        if ranks.rank == 1:
            raise ValueError("no loss here")
        return model.loss_fn(params, tokens)

    list(train(settings, loss_fn, state, pieces, CPU, ranks))
