"""`accumulate(through=)` on a device: what the CPU returns; nothing mixes devices, or waits but for a first look."""

import itertools

import pytest
import torch

import gradacc
from gradacc import Mean
from tests.device import to_cpu, to_device


def _encode(params, batch):
    return {"a": torch.tanh(batch["x"] @ params["w"]), "b": torch.tanh(batch["y"] @ params["w"])}


def _loss(params, outputs, batch):
    logits = outputs["a"] @ outputs["b"].T * params["t"].exp()
    return Mean((logits.logsumexp(1) - logits.diagonal()).sum(), batch["n"].sum())


def _data():
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(5, 4, generator=generator), "t": torch.tensor(0.3)}
    batch = {key: torch.randn(7, 5, generator=generator) for key in "xy"}
    return params, {**batch, "n": torch.tensor([1, 0, 1, 1, 1, 1, 1])}


def _there(tree):
    return {key: to_device(leaf) for key, leaf in tree.items()}


def test_the_cpu_s_gradients_and_nothing_waits(waits):
    params, batch = _data()
    expected = torch.func.grad(lambda p: _loss(p, _encode(p, batch), batch).value)(params)
    grad_fn = gradacc.accumulate(_loss, through=_encode, microbatch_size=3)
    params, batch = _there(params), _there(batch)
    first = grad_fn(params, batch)
    waits.clear()
    again = grad_fn(params, batch)
    assert not waits
    for grads in (first, again):
        torch.testing.assert_close({key: to_cpu(grad) for key, grad in grads.items()}, expected)


def test_random_numbers_of_the_device_are_drawn_again():
    params, batch = (_there(tree) for tree in _data())

    def noisy(params, batch):
        out = _encode(params, batch)
        return {key: leaf * torch.rand(leaf.shape, device=leaf.device) for key, leaf in out.items()}

    def whole(params):
        pieces = [{key: leaf.split(3)[n] for key, leaf in batch.items()} for n in range(3)]
        parts = [noisy(params, piece) for piece in pieces]
        return _loss(params, {key: torch.cat([part[key] for part in parts]) for key in "ab"}, batch).value

    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    torch.acc.manual_seed_all(3)
    expected = torch.autograd.grad(whole(leaves), list(leaves.values()))
    after = torch.acc.get_rng_state()
    torch.acc.manual_seed_all(3)
    grads = gradacc.accumulate(_loss, through=noisy, microbatch_size=3)(params, batch)
    assert torch.equal(torch.acc.get_rng_state(), after)
    torch.testing.assert_close([to_cpu(grad) for grad in grads.values()], [to_cpu(grad) for grad in expected])


def test_a_second_run_that_differs_is_an_error_at_first_and_nan_later():
    params, batch = (_there(tree) for tree in _data())
    number, differs = itertools.count(), [True]

    def counting(params, batch):
        n = next(number) if differs[0] else 0
        return {key: leaf * (1 + 0.01 * n) for key, leaf in _encode(params, batch).items()}

    with pytest.raises(RuntimeError, match=r"returned another outputs\['a'\]"):
        gradacc.accumulate(_loss, through=counting, microbatch_size=3)(params, batch)
    differs[0] = False
    grad_fn = gradacc.accumulate(_loss, through=counting, microbatch_size=3)
    assert to_cpu(grad_fn(params, batch)["w"]).isfinite().all()
    differs[0] = True
    assert to_cpu(grad_fn(params, batch)["w"]).isnan().all()
