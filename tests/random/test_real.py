"""Real numbers of words: the corners, which no key can be asked for."""

import pytest
import torch

from gradacc.random import _real

ZERO, ONES = torch.tensor([0]), torch.tensor([2**32 - 1])


@pytest.mark.parametrize("dtype", _real.UNIFORM)
def test_uniform_is_at_least_0_and_below_1(dtype):
    for words in ((ZERO,) * 4, (ONES,) * 4):
        numbers = torch.stack(_real.UNIFORM[dtype](words)).flatten()
        assert len(numbers) == _real.per_block(dtype)
        assert ((numbers >= 0) & (numbers < 1)).all()
    assert numbers[0] == 1 - torch.finfo(dtype).eps / 2  # the largest below 1


@pytest.mark.parametrize("dtype", _real.UNIFORM)
def test_normal_is_finite(dtype):
    make = _real.normal(dtype)
    for first in (ZERO, ONES):
        for second in (ZERO, ONES):
            numbers = torch.stack(make((first, second, first, second)))
            assert numbers.dtype == dtype
            assert numbers.isfinite().all()
