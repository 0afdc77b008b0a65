"""Small texts and a model that trains in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradacc.demo.model import GPTConfig
from gradacc.demo.settings import Settings

from .quick import hasten

TINY = GPTConfig(layers=2, heads=2, width=32, context=48)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So tiny a model gains nothing from a second thread, and loses much where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(scope="session")
def text() -> bytes:
    """Paragraphs of 1 to 6 lines of 1 to 12 words: ragged."""
    rng = random.Random(0)
    words = ["def", "return", "self", "naïve", "x", "=", "lambda", "'quoted'", "<b>", "import", "yield", "0", "\t"]

    def line() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))

    paragraphs = ("\n".join(line() for _ in range(rng.randint(1, 6))) for _ in range(200))
    return ("\n\n".join(paragraphs) + "\n").encode()


@pytest.fixture
def data(tmp_path: Path, text: bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    return path


@pytest.fixture
def settings(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    hasten(monkeypatch.setattr)
    return Settings(batch_size=8, iterations=6, data=data, out=tmp_path / "out", seconds=None, model=TINY)
