"""One run of the demo, from the text to the report."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gradacc import TrainState
from gradacc.demo.batch import batch_at
from gradacc.demo.corpus import Corpus, describe, load
from gradacc.demo.interrupt import Interrupted
from gradacc.demo.proof import prove, table_head, table_row
from gradacc.demo.ranks import EndedError, Ranks, decide, exchange, find_device, hear, here, joined, listen, together
from gradacc.demo.record import Record
from gradacc.demo.report import describe_model, render
from gradacc.demo.resume import Progress, folder, forget, identity, keep, resume
from gradacc.demo.sample import samples
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import Metrics, Model, build, held_out_bits_per_byte, train

FINISHED, DIVERGED, INTERRUPTED = 0, 1, 130
HELD_OUT_TIMES = 5


class Job(NamedTuple):
    """What stays the same during a run.

    ``start`` is when it began, in `time.monotonic` seconds, less the time before a checkpoint that it went on from;
    ``resumed`` is what rank 0 knew then. ``identity`` says in a checkpoint which run it is of.
    """

    settings: Settings
    corpus: Corpus
    device: torch.device
    model: Model
    ranks: Ranks
    start: float
    interrupted: Interrupted
    identity: str = ""
    resumed: Progress | None = None


def run(settings: Settings, interrupted: Interrupted) -> int:
    """Runs the demo and writes its report; returns the exit code: 0, 1 (diverged) or 130 (Ctrl-C).

    The files of an earlier run in the same folder are replaced, unless it is to be resumed.

    Raises:
        DemoError: the text cannot be read, or the folder not written; a checkpoint is of another run.
        KeyboardInterrupt: Ctrl-C before there was anything to report.
    """
    start = time.monotonic()
    ranks = here()
    device = find_device(ranks)
    with joined(ranks, device), _one_thread():
        try:
            corpus = together(ranks, lambda: load(settings.data, settings.model.context, interrupted))
            together(ranks, lambda: _check_alike(settings, corpus, ranks))
            model, state = build(settings, device)
            job = Job(settings, corpus, device, model, ranks, start, interrupted, identity(settings, corpus, ranks))
            record = _record(job, state)
            if settings.resume:
                state, resumed = resume(settings, ranks, job.identity, state, record)
                if resumed is not None:
                    job = job._replace(start=start - resumed.seconds, resumed=resumed)
            return _lead(job, state, record) if ranks.first else _follow(job, state)
        except EndedError:
            return FINISHED


def _check_alike(settings: Settings, corpus: Corpus, ranks: Ranks) -> None:
    """All ranks must draw the same batches."""
    mine = settings._replace(data=None, out=Path()), identity(settings, corpus, ranks)
    alike = exchange(ranks, mine) if ranks.world > 1 else []
    for rank, (options, text) in enumerate(alike):
        if options != alike[0][0]:
            raise DemoError(f"rank {rank} was given other options than rank 0: {options}, {alike[0][0]}")
        if text != alike[0][1]:
            raise DemoError(
                f"rank {rank} read another text than rank 0; name the same one with --data on every machine"
            )


def _follow(job: Job, state: TrainState) -> int:
    """A run of another rank than 0: its part of every gradient. Returns 0: the exit code of the run is that of rank 0."""
    try:
        hear(job.ranks)  # the files are there
        hear(job.ranks)  # the table has been drawn
        training = train(job.settings, job.model.loss_fn, state, job.corpus.train, job.device, job.ranks)
        for state, _ in training:
            ends, saves = listen(job.ranks)
            if saves:
                keep(job.settings, job.ranks, job.identity, state)
            if ends:
                raise EndedError
    except KeyboardInterrupt:
        pass  # a second Ctrl-C
    except RuntimeError:  # rank 0 has left in the middle of a gradient
        if not job.interrupted():
            raise
    return FINISHED


def _lead(job: Job, state: TrainState, record: Record) -> int:
    """The run of rank 0."""
    settings = job.settings
    with ExitStack() as stack:
        files: list[FileIO] = []

        def create() -> None:
            if job.resumed is None:
                forget(settings)
            size = 0 if job.resumed is None else job.resumed.metrics
            for name, kept in (("metrics.jsonl", size), ("report.html", 0)):
                files.append(stack.enter_context(_create(settings.out, name, kept)))

        decide(job.ranks, create)
        metrics, page = files
        try:
            code = _prove_and_train(job, state, record, metrics)
        except KeyboardInterrupt:  # a second Ctrl-C: no last measurements any more, only the report
            code = INTERRUPTED
        except RuntimeError:  # another rank was faster to leave
            if job.ranks.world == 1 or not job.interrupted():
                raise
            code = INTERRUPTED
        if code == INTERRUPTED:
            record.note = f"Ended by Ctrl-C after {len(record.history)} of {settings.iterations} iterations."
        if record.note:
            print(f"\n{record.note}", flush=True)
        _write(page, render(record))
    print(f"\nreport:  {settings.out / 'report.html'}\nmetrics: {settings.out / 'metrics.jsonl'}", flush=True)
    return code


def _prove_and_train(job: Job, state: TrainState, record: Record, metrics: FileIO) -> int:
    """The run itself: prints, and fills ``record`` as it goes; returns the exit code."""
    settings, corpus = job.settings, job.corpus
    code = decide(job.ranks, lambda: _prove(job, state, record))
    if code is None:
        state, code = _train(job, state, record, metrics)
    if not record.history or code == DIVERGED:
        return code
    (_, before), *_, (iteration, after) = record.held_out
    print(f"\nHeld-out text: {before:.2f} bits per byte before, {after:.2f} after {iteration} iterations.", flush=True)
    record.samples = samples(
        lambda tokens: job.model.apply(state.params, tokens),
        corpus.held_out,
        settings.model.context,
        settings.seed,
        job.device,
    )
    for sample in record.samples:
        print(f"\n--- given {sample.prompt!r}, the model writes:\n{sample.prompt}{sample.text}", flush=True)
    return code


def _prove(job: Job, state: TrainState, record: Record) -> int | None:
    """Prints the table, or where the run goes on from; returns the exit code where the run ends with it."""
    settings = job.settings
    print(f"Text: {record.corpus}.\nModel: {describe_model(record)}.\nMachine: {record.machine}.\n", flush=True)
    if job.resumed is not None:
        print(
            f"Resumed after {state.step} of {settings.iterations} iterations, from {folder(settings)}.\n",
            flush=True,
        )
        if state.step < settings.iterations and _late(job):
            if record.held_out[-1][0] != state.step:
                _hold_out(job, state, record)
            record.note = (
                f"Ended after {state.step} of {settings.iterations} iterations: the time limit of "
                f"{settings.seconds:.0f} s had been reached before; with --iterations there is none."
            )
            return FINISHED
        return None
    if settings.resume:
        print(f"Nothing to resume at {folder(settings)}: started anew.\n", flush=True)
    batch = batch_at(job.corpus.train, settings.batch_size, settings.seed, 0, job.device)
    for proof in prove(job.model.loss_fn, state.params, batch):
        record.proof = proof
        print(table_row(proof.rows[-1]) if proof.rows else table_head(proof), flush=True)
        if job.interrupted():
            return INTERRUPTED
    if settings.iterations == 0:
        return FINISHED
    print(flush=True)
    _hold_out(job, state, record)
    return None


def _train(job: Job, state: TrainState, record: Record, file: FileIO) -> tuple[TrainState, int]:
    """Trains until the end, the time limit, Ctrl-C or divergence, measuring held-out text now and then."""
    settings, code = job.settings, None
    with tqdm(total=settings.iterations, initial=state.step, unit="it") as bar:

        def observe(state: TrainState, metrics: Metrics) -> int | None:
            record.history.append(metrics)
            _write(file, _json_line(metrics))
            bar.set_postfix_str(f"loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s", refresh=False)
            bar.update()
            code = _verdict(job, state, record)
            if saves(code):
                _flush(file)
            return code

        def saves(code: int | None) -> bool:
            done = len(record.history)
            if settings.checkpoint_every is None or code == DIVERGED:
                return False
            return code is not None or done == settings.iterations or done % settings.checkpoint_every == 0

        training = train(settings, job.model.loss_fn, state, job.corpus.train, job.device, job.ranks)
        for state, metrics in training:
            code = decide(job.ranks, functools.partial(observe, state, metrics), saves)
            if saves(code):
                progress = Progress(time.monotonic() - job.start, file.tell())
                keep(settings, job.ranks, job.identity, state, record, progress)
            if code is not None:
                break
    if code != DIVERGED and record.held_out[-1][0] != len(record.history):
        _hold_out(job, state, record)
    return state, FINISHED if code is None else code


def _verdict(job: Job, state: TrainState, record: Record) -> int | None:
    """After an iteration: the exit code where the run ends with it."""
    settings, metrics = job.settings, record.history[-1]
    if not math.isfinite(metrics.loss + metrics.grad_norm):
        record.note = f"Training diverged at iteration {metrics.iteration}: a smaller --lr may help."
        return DIVERGED
    if metrics.iteration % math.ceil(settings.iterations / HELD_OUT_TIMES) == 0:
        _hold_out(job, state, record)
    if job.interrupted():
        return INTERRUPTED
    if settings.seconds is not None and _late(job):
        record.note = (
            f"Ended after {metrics.iteration} of {settings.iterations} iterations, at the time limit of "
            f"{settings.seconds:.0f} s; with --iterations there is none."
        )
        return FINISHED
    return None


def _late(job: Job) -> bool:
    """Whether the time limit has been reached."""
    return job.settings.seconds is not None and time.monotonic() - job.start > job.settings.seconds


def _hold_out(job: Job, state: TrainState, record: Record) -> None:
    bits = held_out_bits_per_byte(job.model.loss_fn, state.params, job.corpus.held_out, job.device)
    record.held_out.append((len(record.history), bits))


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model gains little from a second thread, and loses tenfold where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _json_line(metrics: Metrics) -> str:
    """The iteration as a line of JSON, which knows no NaN or infinity: they become null."""
    values = {name: value if math.isfinite(value) else None for name, value in metrics._asdict().items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _create(folder: Path, name: str, kept: int) -> FileIO:
    """A file of which the first bytes are kept, unbuffered: what is written is there at once, and closing cannot fail."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = FileIO(folder / name, "r+" if kept else "w")
        if kept:
            file.truncate(kept)
            file.seek(kept)
        return file
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(f"--out {folder}: {name} cannot be written there: {reason}") from error


def _write(file: FileIO, text: str) -> None:
    content = text.encode("utf-8", errors="backslashreplace")  # paths may hold what is no UTF-8
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        raise DemoError(f"{file.name} cannot be written: {error.strerror}") from error


def _flush(file: FileIO) -> None:
    """Wait until what was written is on the disk."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise DemoError(f"{file.name} cannot be written: {error.strerror}") from error


def _record(job: Job, state: TrainState) -> Record:
    """Of nothing yet."""
    parameters = sum(parameter.numel() for parameter in state.params.values())
    return Record(job.settings, describe(job.corpus), _machine(job), parameters)


def _machine(job: Job) -> str:
    gpu = job.device.type == "cuda"
    name = torch.cuda.get_device_name(job.device) if gpu else f"{platform.machine()} CPU, one thread"
    several = f"{job.ranks.world} processes, each with: " if job.ranks.world > 1 else ""
    return f"{several}{name}, torch {torch.__version__}, Python {platform.python_version()}"
