"""The ``gradacc`` command: options to checked `Settings`, mistakes to one line and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gradacc.demo.interrupt import interrupts
from gradacc.demo.settings import DEFAULT_ITERATIONS, DEFAULT_SECONDS, DemoError, Settings

USAGE, INTERRUPTED = 2, 130
DEFAULTS = Settings()
MOST_PROCESSES = 64
EPILOG = """\
The files of an earlier run in the same folder are replaced, its checkpoint too, unless --resume goes on from it. Ctrl-C ends
the run with a report of what was reached; a second Ctrl-C skips its last measurements. Exit codes: 0, all done; 1, training
diverged; 2, wrong options, unreadable text, unwritable folder, or a checkpoint that is damaged or of another run; 130, ended
by Ctrl-C.
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with ``arguments`` (those of the process by default) and returns its exit code.

    Raises:
        SystemExit: after ``--help``, or with code 2 on wrong options, as argparse does.
    """
    _never_fail_to_print()
    settings = parse(arguments)
    return conduct(settings) if settings.nproc == 1 else _exit_code(lambda: _launch(settings))


def conduct(settings: Settings) -> int:
    """The run of this process, alone or as one of several ranks; returns the exit code."""
    _never_fail_to_print()
    return _exit_code(lambda: _run(settings))


def leave(code: int) -> NoReturn:
    """End this process.

    One of several ranks ends at once: while Python takes itself apart, a thread of the process group that still asks for it is
    ended, and takes the process down ("terminate called without an active exception"), and torchrun the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(settings: Settings) -> int:
    with interrupts() as interrupted:
        return _import_run()(settings, interrupted)


def _launch(settings: Settings) -> int:
    from gradacc.demo.launch import launch

    _import_run()  # what is missing is missing for all: said once
    return launch(settings, conduct)


def _exit_code(call: Callable[[], int]) -> int:
    """``call()``, where mistakes are one line."""
    try:
        return call()
    except DemoError as error:
        _complain(f"error: {_one_line(str(error))}")
        return USAGE
    except KeyboardInterrupt:
        _complain("ended by Ctrl-C before there was anything to report")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output went away; nothing may fail again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The options of ``gradacc demo`` as checked settings."""
    parser = _Parser(prog="gradacc", description="Exact gradient accumulation.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a byte-level GPT on real text, and prove on it that accumulation is exact",
        description="Trains a byte-level GPT on real text with exact gradient accumulation, after a table that proves "
        "the exactness on this very model and batch. The default run takes about two minutes on two cores.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    _add_training(demo.add_argument)
    _add_run(demo.add_argument)
    options = vars(parser.parse_args(arguments))
    del options["command"]
    if options["iterations"] is None:
        return Settings(**{**options, "iterations": DEFAULT_ITERATIONS})
    return Settings(**options, seconds=None)


def _add_training(add: Callable[..., object]) -> None:
    """Options of what is trained."""
    count = _whole(1, 1024)
    add(
        "--steps",
        type=count,
        default=DEFAULTS.steps,
        metavar="K",
        help="micro-batches per batch and process (%(default)s)",
    )
    add("--batch-size", type=count, default=DEFAULTS.batch_size, metavar="N", help="pieces of text (%(default)s)")
    add(
        "--iterations",
        type=_whole(0, 10**7),
        metavar="N",
        help=f"training steps; 0 for the table alone ({DEFAULT_ITERATIONS}, fewer on a slow machine: training then ends "
        f"{DEFAULT_SECONDS:.0f} s after the start)",
    )
    add(
        "--seed",
        type=_whole(0, 2**32 - 1),
        default=DEFAULTS.seed,
        metavar="S",
        help="of initial parameters, batches and sample (%(default)s)",
    )
    add("--lr", type=_learning_rate, default=DEFAULTS.lr, help="peak learning rate of AdamW (%(default)s)")


def _add_run(add: Callable[..., object]) -> None:
    """Options of where a run reads, writes, computes, and goes on."""
    add(
        "--data",
        type=Path,
        default=None,
        metavar="PATH",
        help="a UTF-8 text file, or a folder of them (the Python standard library's own source)",
    )
    add(
        "--out",
        type=Path,
        default=DEFAULTS.out,
        metavar="FOLDER",
        help="where report.html and metrics.jsonl go (%(default)s)",
    )
    add(
        "--nproc",
        type=_whole(1, MOST_PROCESSES),
        default=DEFAULTS.nproc,
        metavar="N",
        help="processes that share every batch, with a GPU each where there are GPUs (%(default)s); for several machines, "
        "torchrun ... -m gradacc demo",
    )
    add(
        "--shard",
        action="store_true",
        help="divide the optimizer's state among the processes (ZeRO-1: reduce_scatter and optim.sharded); --resume may "
        "then have another number of them",
    )
    add(
        "--checkpoint-every",
        type=_whole(1, 10**7),
        metavar="N",
        help="iterations between two checkpoints, which go to FOLDER/checkpoint; one more is written when training ends "
        "(no checkpoints)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from FOLDER/checkpoint as if the run had never ended, to the same last bit with as many processes; without "
        "one, start anew. Options are those that it was begun with, --iterations too: a run is not made longer. "
        "The time before counts for the time limit. With torchrun's --max-restarts on several machines, set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    )


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A converter of option values to integers from ``least`` to ``most``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is needed, not {text!r}")
        return value

    return convert


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 10:
        raise argparse.ArgumentTypeError(f"a positive number up to 10 is needed, not {text!r}")
    return value


def _import_run() -> Callable[..., int]:
    """`run`, which needs the ``demo`` extra."""
    try:
        from gradacc.demo.run import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"tqdm", "matplotlib"}:
            raise
        raise DemoError(f"the demo needs {error.name}, which is missing: pip install 'gradacc[demo]'") from error
    return run


def _complain(message: str) -> None:
    """Of all processes on a machine, the first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"gradacc demo: {message}", file=sys.stderr)


def _one_line(message: str) -> str:
    return message.replace("\n", "\\n").replace("\r", "\\r")


def _never_fail_to_print() -> None:
    """Text that the terminal's encoding lacks is replaced, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
