"""One process of a run that is killed again and again: started by torchrun, for ``test_resume.py``.

``torchrun ... -m tests.demo.killed DATA FOLDER KILLS``: in each of its first ``KILLS`` lives the run in ``FOLDER/killed`` loses
one of its processes by SIGKILL, at a moment drawn anew, wherever it is then: in its first second, or some milliseconds after
some iterations. Before that, "killed in life ...;" comes on stderr. The processes of the last life, which end it, then do the
run in ``FOLDER/undisturbed``, which nobody kills.
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

from gradacc.demo import cli, run
from gradacc.demo.model import GPTConfig
from gradacc.demo.settings import Settings
from tests.demo.quick import facts, hasten

MODEL = GPTConfig(layers=1, heads=2, width=16, context=48)


def settings(data: Path, out: Path, kills: int) -> Settings:
    """Of a run that saves after every iteration, of which a life may need four."""
    return Settings(
        batch_size=6,
        iterations=4 * kills,
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
    data, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    hasten(setattr)
    run.render = facts
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life < kills:
        doomed(life)
    code = cli.conduct(settings(data, folder / "killed", kills))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "undisturbed"  # the ranks of another life, to the store
    cli.leave(code or cli.conduct(settings(data, folder / "undisturbed", kills)))
