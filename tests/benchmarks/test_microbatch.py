"""The benchmark of the head by pieces runs, and its peaks, which are exact, are what pieces promise."""

import json

import pytest
import torch
from torch.func import grad

import gradacc
from benchmarks import _memories, _microbatch_report, microbatch
from gradacc._pieces import gradients
from tests.helpers import some_slow

CPU = torch.device("cpu")


@pytest.mark.slow
def test_it_runs_and_writes_what_it_says(tmp_path, capsys):
    assert microbatch.main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "microbatch.json").read_text())
    for found in results["heads"].values():
        assert found["time"][_microbatch_report.PLAIN]["vs_plain"]["median"] == 1.0
        assert found["time"].keys() == set(microbatch.VARIANTS)
    assert _microbatch_report.RECOMPUTE in capsys.readouterr().out


@pytest.mark.parametrize("dtype", some_slow(microbatch.DTYPES, "float32"))
def test_peaks_of_the_head(dtype):
    head = microbatch.head_of(microbatch.DTYPES[dtype], microbatch.QUICK, CPU)

    def over(name):
        return microbatch.allocated_peak(microbatch.run_of(name, head), CPU) - head.floor

    share = {"float32": 1 / 8, "bfloat16": 1 / 5}[dtype]
    for name in (_microbatch_report.FORWARD, _microbatch_report.RECOMPUTE):
        assert over(name) <= share * over(_microbatch_report.PLAIN)


@pytest.mark.parametrize("name", some_slow(_memories.GROWTHS, "tokens"))
def test_memory_that_is_flat(name):
    peaks = _memories.peaks(name, True, CPU)
    small, large = (list(way.values()) for way in (peaks["plain"], peaks["by pieces"]))
    assert small[1] > 1.8 * small[0]
    growth = {"tokens": 0.05, "examples": 0.0, "layers": 0.25}[name]
    assert large[1] - large[0] <= growth * (small[1] - small[0])


def test_peak_of_the_head_under_torch_func():
    """Which runs its backward pass so that it could be differentiated again."""
    head = microbatch.head_of(torch.float32, microbatch.QUICK, CPU)
    hidden, weight = head.hidden.detach(), head.weight.detach()
    by_pieces = gradacc.microbatch(microbatch.mean, microbatch_size=head.piece, in_dims=(0, 0, None))

    def over(function):
        def run():
            return grad(lambda hidden, weight: function(hidden, head.labels, weight).value, (0, 1))(hidden, weight)

        return microbatch.allocated_peak(run, CPU) - head.floor

    assert over(by_pieces) <= over(microbatch.mean) / 4


def test_a_gradient_of_bfloat16_is_not_cast_as_a_whole(monkeypatch):
    """Before it is added to the sum in float32."""
    head = microbatch.head_of(torch.bfloat16, microbatch.QUICK, CPU)
    run = microbatch.run_of(_microbatch_report.FORWARD, head._replace(piece=4))
    monkeypatch.setattr(gradients, "_BLOCK", head.weight.numel())
    at_once = microbatch.allocated_peak(run, CPU)
    monkeypatch.setattr(gradients, "_BLOCK", head.weight.numel() // 8)
    assert at_once - microbatch.allocated_peak(run, CPU) > head.weight.numel()
