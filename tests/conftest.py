"""Hypothesis without its clock (the machine may be busy) and without its random seed; one thread, since models are tiny."""

import gc
import os
import signal

import hypothesis
import pytest
import torch
from torch import Tensor

from tests.workers import Pool

# Collected for its docstrings, it would give every test process an accelerator, which tests are not of.
collect_ignore = ["device.py"]
hypothesis.settings.register_profile("gradacc", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("gradacc")
torch.set_num_threads(1)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes to compile in cost more than they save
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; tests send it to children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests of ranks go to one process of pytest-xdist, so that there is one pool."""
    for item in items:
        if "pool" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_collection_finish(session):
    """And what has been collected is not looked through again whenever Python looks for garbage."""
    ranks = [item for item in session.items if "pool" in item.fixturenames]
    if getattr(session.config.option, "loadgroup", False) and not all(item.nodeid.endswith("@ranks") for item in ranks):
        raise pytest.UsageError("pytest-xdist does not group tests: every process would start ranks of its own")
    gc.freeze()


@pytest.fixture(scope="session")
def pool():
    """Real ranks, `tests.workers`."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def params() -> dict[str, Tensor]:
    """Parameters of `tests.helpers.squares`."""
    return {"w": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """A batch of seven examples for them."""
    x = torch.arange(21, dtype=torch.float64).view(7, 3).sin()
    return {"x": x, "y": x.sum(1).cos()}
