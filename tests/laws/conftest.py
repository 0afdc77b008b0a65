"""The losses, made once, as a fixture."""

import pytest

from tests.laws.losses import CASES

_made = {}


@pytest.fixture(params=CASES)
def case(request):
    """One loss with parameters and batches."""
    if request.param not in _made:
        _made[request.param] = CASES[request.param]()._replace(name=request.param)
    return _made[request.param]
