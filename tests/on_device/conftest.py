"""Only in a process of its own: ``GRADACC_STAND_IN=1 python -m pytest tests/on_device`` (``tests/test_device.py`` does it)."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("GRADACC_STAND_IN") else ["*.py"]


@pytest.fixture
def waits():
    """What has waited for the device since the test began."""
    from tests.device import WAITS

    WAITS.clear()
    return WAITS
