"""Many models of transformers, and of timm where it is installed, against the loop by hand; `tests.sweep` runs more."""

import pytest

from tests import sweep, vision


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_architectures_of_transformers():
    tally = sweep.main("transformers")
    assert tally["different"] == 0
    assert tally["equal"] >= 40


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not vision.has("timm"), reason="timm is not installed: `make test-slow` does it")
def test_models_of_timm():
    tally = sweep.main("timm")
    assert tally["different"] == 0
    assert tally["equal"] >= 5


def test_the_sweep_sees_a_difference(monkeypatch):
    make, inputs = sweep.of_transformers("llama")
    ours = sweep.models.ours

    def wrong(module, loss, batches):
        module.left = 1
        return ours(module, loss, batches[:2])

    assert sweep.compare(make, inputs).good
    monkeypatch.setattr(sweep.models, "ours", wrong)
    outcome = sweep.compare(make, inputs)
    assert outcome.difference > 1e-3
    assert not outcome.unchanged
