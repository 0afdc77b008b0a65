"""What a run has reached so far: everything that the report is written from."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradacc.demo.proof import Proof
from gradacc.demo.sample import Sample
from gradacc.demo.settings import Settings
from gradacc.demo.train import Metrics


@dataclass
class Record:
    """Filled in as the run goes; at any moment a report can be written from it.

    ``held_out`` has pairs of an iteration and the bits per byte of the held-out text after it; ``note`` says why the
    run ended before its time, if it did.
    """

    settings: Settings
    corpus: str = ""
    machine: str = ""
    parameters: int = 0
    proof: Proof | None = None
    history: list[Metrics] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    note: str = ""
