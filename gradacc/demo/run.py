"""One run of the demo, from the text to the report."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gradacc.demo.batch import batch_at
from gradacc.demo.corpus import Corpus, describe, load
from gradacc.demo.interrupt import Interrupted
from gradacc.demo.proof import prove, table_head, table_row
from gradacc.demo.record import Record
from gradacc.demo.report import describe_model, render
from gradacc.demo.sample import samples
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import Metrics, Model, State, build, held_out_bits_per_byte, train

FINISHED, DIVERGED, INTERRUPTED = 0, 1, 130
HELD_OUT_TIMES = 5


class Job(NamedTuple):
    """What stays the same during a run; ``start`` is when it began, in `time.monotonic` seconds."""

    settings: Settings
    corpus: Corpus
    device: torch.device
    model: Model
    metrics: FileIO
    start: float
    interrupted: Interrupted


def run(settings: Settings, interrupted: Interrupted) -> int:
    """Runs the demo and writes its report; returns the exit code: 0, 1 (diverged) or 130 (Ctrl-C).

    The files of an earlier run in the same folder are replaced.

    Raises:
        DemoError: the text cannot be read, or the folder not written.
        KeyboardInterrupt: Ctrl-C before there was anything to report.
    """
    start = time.monotonic()
    corpus = load(settings.data, settings.model.context, interrupted)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record(settings, describe(corpus), _machine(device))
    with _create(settings.out, "metrics.jsonl") as metrics, _create(settings.out, "report.html") as page:
        model, state = build(settings, device)
        record.parameters = sum(parameter.numel() for parameter in state.params.values())
        job = Job(settings, corpus, device, model, metrics, start, interrupted)
        try:
            with _one_thread():
                code = _prove_and_train(job, state, record)
        except KeyboardInterrupt:  # a second Ctrl-C: no last measurements any more, only the report
            code = INTERRUPTED
        if code == INTERRUPTED:
            record.note = f"Ended by Ctrl-C after {len(record.history)} of {settings.iterations} iterations."
        if record.note:
            print(f"\n{record.note}", flush=True)
        _write(page, render(record))
    print(f"\nreport:  {settings.out / 'report.html'}\nmetrics: {settings.out / 'metrics.jsonl'}", flush=True)
    return code


def _prove_and_train(job: Job, state: State, record: Record) -> int:
    """The run itself: prints, and fills ``record`` as it goes; returns the exit code."""
    settings, corpus = job.settings, job.corpus
    print(f"Text: {record.corpus}.\nModel: {describe_model(record)}.\nMachine: {record.machine}.\n", flush=True)
    batch = batch_at(corpus.train, settings.batch_size, settings.seed, 0, job.device)
    for proof in prove(job.model.loss_fn, state.params, batch):
        record.proof = proof
        print(table_row(proof.rows[-1]) if proof.rows else table_head(proof), flush=True)
        if job.interrupted():
            return INTERRUPTED
    if settings.iterations == 0:
        return FINISHED
    print(flush=True)
    code = _train(job, state, record)
    if code == DIVERGED:
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


def _train(job: Job, state: State, record: Record) -> int:
    """Trains until the end, the time limit, Ctrl-C or divergence, measuring held-out text now and then."""
    settings, loss_fn, params = job.settings, job.model.loss_fn, state.params
    every = math.ceil(settings.iterations / HELD_OUT_TIMES)

    def hold_out(iteration: int) -> None:
        bits = held_out_bits_per_byte(loss_fn, params, job.corpus.held_out, job.device)
        record.held_out.append((iteration, bits))

    hold_out(0)
    code = FINISHED
    with tqdm(total=settings.iterations, unit="it") as bar:
        for _, metrics in train(settings, loss_fn, state, job.corpus.train, job.device):
            record.history.append(metrics)
            _write(job.metrics, _json_line(metrics))
            bar.set_postfix_str(f"loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s", refresh=False)
            bar.update()
            if not math.isfinite(metrics.loss + metrics.grad_norm):
                record.note = f"Training diverged at iteration {metrics.iteration}: a smaller --lr may help."
                return DIVERGED
            if job.interrupted():
                code = INTERRUPTED
                break
            if settings.seconds is not None and time.monotonic() - job.start > settings.seconds:
                record.note = (
                    f"Ended after {metrics.iteration} of {settings.iterations} iterations, at the time limit of "
                    f"{settings.seconds:.0f} s; with --iterations there is none."
                )
                break
            if metrics.iteration % every == 0:
                hold_out(metrics.iteration)
    if record.held_out[-1][0] != len(record.history):
        hold_out(len(record.history))
    return code


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


def _create(folder: Path, name: str) -> FileIO:
    """An empty file, unbuffered: what is written is there at once, and closing cannot fail."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileIO(folder / name, "w")
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


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, one thread"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
