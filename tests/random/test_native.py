"""Torch's own kernels: used where they have our bits, and nothing else is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from gradacc import random
from gradacc.random import _native
from tests.random import oracle, strategies
from tests.random.test_distributions import assert_equal, every_draw


@pytest.fixture(autouse=True)
def _anew():
    """What has been found out about devices is forgotten, before and after."""
    _native._device_has_kernels.cache_clear()
    yield
    _native._device_has_kernels.cache_clear()


def everything(keys):
    return [
        *every_draw(keys),
        random.split(keys, 3),
        random.fold_in(keys, 5),
        random.dropout(torch.ones(6, 5), keys, 0.5),
    ]


KEYS = random.split(random.key(1), 6)


def test_they_are_used_where_they_are_and_give_the_same():
    expected = everything(KEYS)  # without: torch 2.13 has none for the CPU
    _native._device_has_kernels.cache_clear()
    with oracle.kernels() as calls:
        assert_equal(everything(KEYS), expected)
        asked = dict(calls)
        assert min(asked.values()) > 4  # more than to find out
        assert_equal(torch.vmap(every_draw)(KEYS), every_draw(KEYS))
        everything(KEYS)
        assert calls["split"] > asked["split"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=strategies.keys())
def test_the_same_for_any_keys(keys):
    expected = every_draw(keys), random.split(keys, 2)
    _native._device_has_kernels.cache_clear()
    with oracle.kernels():
        assert_equal(every_draw(keys), expected[0])
        assert torch.equal(random.split(keys, 2), expected[1])
    _native._device_has_kernels.cache_clear()


def test_they_are_asked_once():
    with oracle.kernels() as calls:
        random.split(KEYS, 2)
        first = calls["uniform"]
        random.split(KEYS, 2)
        assert calls["uniform"] == first


@pytest.mark.parametrize(
    "kernels",
    [{"flip": 1}, {"flip": 2**40}, {"error": RuntimeError("no")}, {"error": TypeError("another signature")}],
    ids=str,
)
def test_what_differs_or_raises_is_not_used(kernels):
    expected = everything(KEYS)
    _native._device_has_kernels.cache_clear()
    with oracle.kernels(**kernels) as calls:
        assert_equal(everything(KEYS), expected)
        assert calls["split"] == 1


@pytest.mark.parametrize("name", ["_philox_key_split", "_philox_uniform_"])
def test_a_torch_without_them(name, monkeypatch):
    expected = everything(KEYS)
    _native._device_has_kernels.cache_clear()
    with oracle.kernels() as calls:
        monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, name))
        assert_equal(everything(KEYS), expected)
        assert calls["uniform"] == 0


class Without:
    def __init__(self, aten, name):
        self.aten, self.name = aten, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.aten, name)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_not_in_a_graph(backend):
    with oracle.kernels() as calls:
        compiled = torch.compile(lambda keys: random.uniform(keys, (3,)), fullgraph=True, backend=backend)(KEYS)
        torch.func.grad(lambda x: x * random.uniform(KEYS[0]))(torch.ones(()))
        torch.vmap(random.uniform)(KEYS)
        assert calls == {"split": 0, "uniform": 0}
        assert torch.equal(compiled, random.uniform(KEYS, (3,)))
