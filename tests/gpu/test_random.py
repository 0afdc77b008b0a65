"""Keys and their numbers on a GPU, where torch has kernels for them: the CPU's bits."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc import random
from gradacc.random import _native
from tests.gpu.cases import move, nothing_waits
from tests.helpers import ENGINES, assert_trees_close
from tests.laws import test_keys as keyed
from tests.random import strategies

few = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_torch_s_kernels_are_used_on_a_gpu(device):
    assert _native.takes(random.key(0, device=device)) or device.type == "cpu"


@few
@given(keys=strategies.keys(), shape=strategies.shapes, dtype=st.sampled_from(DTYPES), index=strategies.integers)
def test_the_same_bits(device, keys, shape, dtype, index):
    there = keys.to(device)
    for make in (
        lambda keys: random.uniform(keys, shape, dtype=dtype),
        lambda keys: random.bernoulli(keys, 0.3, shape),
        lambda keys: random.split(keys, 3),
        lambda keys: random.fold_in(keys, index),
    ):
        assert torch.equal(make(there).cpu(), make(keys))
        assert torch.equal(torch.vmap(make)(there[None]).cpu()[0], make(keys))
    numbers = random.normal(there, shape, dtype=dtype)
    torch.testing.assert_close(numbers.cpu(), random.normal(keys, shape, dtype=dtype))
    assert torch.equal(numbers, torch.vmap(lambda keys: random.normal(keys, shape, dtype=dtype))(there[None])[0])


def test_every_split_is_the_large_batch_and_nothing_waits(device):
    params, batch = move(keyed.parameters(), device), move(keyed.batch(8), device)
    expected = keyed.of_the_large_batch(keyed.mean, keyed.batch(8))[0]
    for engine in ENGINES.values():
        for split in keyed.SPLITS:
            grad_fn = gradacc.accumulate(keyed.mean, **split)
            engine(lambda grad_fn=grad_fn: grad_fn(params, batch))  # what is loaded and compared at first use
            with nothing_waits(device):
                grads = engine(lambda grad_fn=grad_fn: grad_fn(params, batch))
            assert_trees_close(move(grads, "cpu"), expected)
