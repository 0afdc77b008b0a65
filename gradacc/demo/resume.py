"""Checkpoints of a run: all that it takes to go on as if nothing had happened, in ``<out>/checkpoint``."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradacc import TrainState, checkpoint
from gradacc.checkpoint._ranks import ElsewhereError
from gradacc.demo.corpus import Corpus
from gradacc.demo.proof import Measured, Proof, Row
from gradacc.demo.ranks import EndedError, Ranks, exchange, find_device, together
from gradacc.demo.record import Record
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import Metrics


class Progress(NamedTuple):
    """What rank 0 remembers of a run besides its `Record`: how long it took so far, and how many bytes of metrics it wrote."""

    seconds: float
    metrics: int


_SHARD_FIXES = {
    False: "add --shard, with which the number of processes may be another one",
    True: "leave --shard out",
}


def identity(settings: Settings, corpus: Corpus, ranks: Ranks) -> str:
    """What must be the same for a run to go on from a checkpoint, as JSON: options by name, and the text's SHA-256."""
    pieces = b"".join(b"%d %b" % (len(piece), piece) for piece in corpus.train + corpus.held_out)
    options = {
        "--steps": settings.steps,
        "--batch-size": settings.batch_size,
        "--iterations": settings.iterations,
        "--seed": settings.seed,
        "--lr": settings.lr,
        "--shard": settings.shard,
        "--nproc": ranks.world,
        "model": list(settings.model),
        "text (SHA-256)": hashlib.sha256(pieces).hexdigest()[:16],
    }
    return json.dumps(options)


def keep(
    settings: Settings,
    ranks: Ranks,
    run: str,
    state: TrainState,
    record: Record | None = None,
    progress: Progress | None = None,
) -> None:
    """Save the run, on all ranks; ``record`` and ``progress`` are rank 0's.

    Raises:
        DemoError: it cannot be written, on this rank or another one. (On another rank than 0, `EndedError`.)
        RuntimeError: another rank has ended, by a second Ctrl-C for instance.
    """
    tree = {
        "run": run,
        "record": _to_json(record, progress) if record and progress else None,
        "state": _tree(state, ranks),
    }
    try:
        checkpoint.save(folder(settings), tree)  # fails on all ranks, or on none
    except (OSError, ValueError, ElsewhereError) as error:
        if not ranks.first:
            raise EndedError from error
        raise DemoError(f"{folder(settings)} cannot be written: {error}") from error


def resume(
    settings: Settings, ranks: Ranks, run: str, state: TrainState, record: Record
) -> tuple[TrainState, Progress | None]:
    """The state to go on from: that of the checkpoint, or the given one and None where there is none.

    The random numbers go on where they were; on rank 0, ``record`` is filled.

    Raises:
        DemoError: the checkpoint is of another run, damaged, or not the same on all ranks.
    """

    def load() -> tuple[TrainState, Progress | None]:
        try:
            found = _load(settings, ranks, run, state, record)
        except FileNotFoundError:
            return state, None
        except (ValueError, OSError) as error:
            raise DemoError(f"--resume: {error}") from error
        return found

    resumed, progress = together(ranks, load)
    together(ranks, lambda: _check_same(settings, ranks, int(resumed.step)))
    return resumed, progress


def forget(settings: Settings) -> None:
    """Remove the checkpoint of an earlier run, whose metrics are being replaced.

    Raises:
        DemoError: something else is there, where checkpoints are to be written; or it cannot be removed.
    """
    place = folder(settings)
    try:
        checkpoint.load(place, {"run": "", "record": ..., "state": ...})
    except FileNotFoundError:
        return
    except (ValueError, OSError) as error:
        if settings.checkpoint_every is None:
            return
        raise DemoError(f"--checkpoint-every: {error}, or remove {place}") from error
    try:
        (place / "checkpoint.json").unlink()  # first: whatever is left when this is cut short is no checkpoint
        shutil.rmtree(place)
    except OSError as error:
        raise DemoError(f"{place} cannot be removed: {error}") from error


def folder(settings: Settings) -> Path:
    """Where the run's checkpoint is."""
    return settings.out / "checkpoint"


def _load(
    settings: Settings, ranks: Ranks, run: str, state: TrainState, record: Record
) -> tuple[TrainState, Progress | None]:
    """On one rank."""
    place = folder(settings)
    processes = _check_identity(place, checkpoint.load(place, {"run": "", "record": ..., "state": ...})["run"], run)
    like = _tree(state, ranks)
    like["ranks"] = {rank: like["ranks"].get(rank, ...) for rank in range(processes)}
    found = checkpoint.load(place, {"run": ..., "record": "" if ranks.first else ..., "state": like})
    saved: TrainState = found["state"]["train"]
    progress = _from_json(found["record"], settings, int(saved.step), record) if ranks.first else None
    if ranks.rank < processes:
        _set_random(found["state"]["ranks"][ranks.rank])
    return saved, progress


def _tree(state: TrainState, ranks: Ranks) -> dict[str, Any]:
    """What each rank saves: all but the random numbers are the same on all."""
    return {"train": state, "ranks": {ranks.rank: _random(ranks)}}


def _random(ranks: Ranks) -> dict[str, Any]:
    device = find_device(ranks)
    return {
        "cpu": torch.get_rng_state(),
        "gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if states["gpu"] is not None:
        torch.cuda.set_rng_state(states["gpu"])


def _check_identity(place: Path, saved: str, run: str) -> int:
    """How many processes a checkpoint is of; a DemoError where it is of another run."""
    theirs, ours = json.loads(saved), json.loads(run)
    for name, value in ours.items():
        if theirs.get(name) != value and not (name == "--nproc" and ours["--shard"] and theirs.get("--shard")):
            fix = _SHARD_FIXES[value] if name == "--shard" else "give the options that it was begun with"
            raise DemoError(
                f"--resume: the checkpoint {place} is of a run with {name} {theirs.get(name)}, and this one has {value}; "
                f"{fix}, or leave --resume out"
            )
    return int(theirs["--nproc"])


def _check_same(settings: Settings, ranks: Ranks, iteration: int) -> None:
    for rank, other in enumerate(exchange(ranks, iteration) if ranks.world > 1 else []):
        if other != iteration:
            raise DemoError(
                f"--resume: rank {ranks.rank} found iteration {iteration} in {folder(settings)}, rank {rank} {other}; "
                "--out must be on a file system that all share"
            )


def _to_json(record: Record, progress: Progress) -> str:
    return json.dumps({"proof": record.proof, "held_out": record.held_out, **progress._asdict()})


def _from_json(text: str, settings: Settings, iteration: int, record: Record) -> Progress:
    """Fills ``record`` with what was reached: the inverse of `_to_json`, and the lines of ``metrics.jsonl``."""
    saved = json.loads(text)
    file = settings.out / "metrics.jsonl"
    lines = file.read_bytes()[: saved["metrics"]].splitlines() if file.exists() else []
    try:
        history = [_metrics(line) for line in lines]
    except (ValueError, AttributeError, TypeError):
        history = []
    if [metrics.iteration for metrics in history] != list(range(1, iteration + 1)):
        raise DemoError(
            f"--resume: {file} has not the {iteration} iterations of the checkpoint beside it; leave --resume out to start anew"
        )
    record.history = history
    record.held_out = [(at, bits) for at, bits in saved["held_out"]]
    if saved["proof"] is not None:
        shape, tokens, loss, peak, rows = saved["proof"]
        table = (Row(steps, tuple(sizes), Measured(*exact), Measured(*naive)) for steps, sizes, exact, naive in rows)
        record.proof = Proof(tuple(shape), tokens, loss, peak, tuple(table))
    return Progress(saved["seconds"], saved["metrics"])


def _metrics(line: bytes) -> Metrics:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
    return Metrics(**values)
