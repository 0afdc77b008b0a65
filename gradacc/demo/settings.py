"""What a run of the demo may be told, and the one exception for what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gradacc.demo.model import GPTConfig

MODEL = GPTConfig(layers=2, heads=4, width=128, context=128)
"""The demo's model: small enough to learn something within two minutes on two cores."""

DEFAULT_ITERATIONS = 500
DEFAULT_SECONDS = 120.0
"""Without ``--iterations``, training ends after `DEFAULT_ITERATIONS` or so long after the start, whichever is first."""


class DemoError(Exception):
    """A user's mistake, or a fact of the machine, told in one line: the demo prints it and exits with code 2."""


class Settings(NamedTuple):
    """The options of ``gradacc demo``, checked.

    ``seconds`` is None where the number of iterations was asked for, ``checkpoint_every`` (iterations) where no checkpoints
    were. ``shard``: the optimizer's state is divided over the processes.
    """

    steps: int = 4
    batch_size: int = 16
    iterations: int = DEFAULT_ITERATIONS
    seed: int = 0
    lr: float = 3e-3
    data: Path | None = None
    out: Path = Path("gradacc-demo")
    seconds: float | None = DEFAULT_SECONDS
    model: GPTConfig = MODEL
    nproc: int = 1
    checkpoint_every: int | None = None
    resume: bool = False
    shard: bool = False
