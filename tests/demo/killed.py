"""One process of a run that is killed again and again: started by torchrun, for ``test_resume.py``.

``torchrun ... -m tests.demo.killed DATA OUT KILLS``: in each of its first ``KILLS`` lives the run loses one of its processes by
SIGKILL, at a moment drawn anew, wherever it is then: in its first second, or some milliseconds after some iterations. Before
that, "killed in life ...;" comes on stderr.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradacc.demo import cli, run, sample
from gradacc.demo.model import GPTConfig
from gradacc.demo.settings import Settings

MODEL = GPTConfig(layers=1, heads=2, width=16, context=48)
ITERATIONS = 40


def settings(data: Path, out: Path) -> Settings:
    """Of a run that saves after every iteration."""
    return Settings(
        batch_size=6,
        iterations=ITERATIONS,
        data=data,
        out=out,
        seconds=None,
        model=MODEL,
        checkpoint_every=1,
        resume=True,
    )


def doomed(life: int) -> None:
    """Let this process, or the other one, end in SIGKILL."""
    chance = random.Random(life)
    victim, iterations = chance.randrange(2), chance.randrange(-3, 5)
    seconds = chance.uniform(0, 1 if iterations < 0 else 0.1)
    if os.environ["RANK"] != str(victim):
        return
    ordinary = run.train

    @functools.cache
    def kill() -> None:
        told = f"killed in life {life};"
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; echo '{told}' >&2; kill -KILL {os.getpid()}"])

    def train(*arguments: Any) -> Iterator[Any]:
        for number, found in enumerate(ordinary(*arguments)):
            if number == iterations:
                kill()
            yield found
        kill()  # where the end comes sooner
        time.sleep(60)

    run.train = train  # type: ignore[assignment]
    if iterations < 0:
        kill()


if __name__ == "__main__":
    data, out, kills = sys.argv[1:]
    sample.SAMPLE_BYTES = 40
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life < int(kills):
        doomed(life)
    cli.leave(cli.conduct(settings(Path(data), Path(out))))
