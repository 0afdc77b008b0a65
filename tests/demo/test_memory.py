"""Peak memory: known sizes, whatever was there before."""

from __future__ import annotations

import os

import pytest
import torch

from gradacc.demo.memory import peak_memory

KILO = 256  # float32 numbers in a KiB


def test_the_peak_is_what_was_held_at_once(cpu: torch.device) -> None:
    def call() -> float:
        for size in (8, 32, 16):
            held = torch.empty(size * KILO)
            kept = torch.empty(size * KILO)
            del held, kept
        return 1.0

    assert peak_memory(call, cpu) == (1.0, 64 * 1024)


def test_what_was_there_before_does_not_count(cpu: torch.device) -> None:
    before = torch.ones(1000 * KILO)
    assert peak_memory(lambda: before[: 8 * KILO].exp(), cpu)[1] == 8 * 1024


def test_temporaries_inside_one_operation_count(cpu: torch.device) -> None:
    x = torch.ones(64, 64, requires_grad=True)
    _, peak = peak_memory(lambda: torch.autograd.grad((x.exp() @ x.sin()).sum(), x), cpu)
    assert peak >= 4 * 64 * 64 * 4


def test_nothing_is_said_on_stderr_but_by_the_call(cpu: torch.device, capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory(lambda: os.write(2, b"kept"), cpu)
    assert capfd.readouterr().err == "kept"


def test_an_error_comes_through(cpu: torch.device) -> None:
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, cpu)
    assert peak_memory(lambda: torch.empty(KILO), cpu)[1] == 1024
