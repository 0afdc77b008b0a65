"""Every test here runs on a CPU, which keeps it alive, and on a GPU where there is one."""

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where a test runs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return torch.device(request.param)
