"""The stand-in device itself: what it counts, refuses and shares."""

import pytest
import torch

from tests.device import ACC, OnDevice, to_cpu, to_device


def test_what_waits_is_counted(waits):
    x = to_device(torch.tensor([1.0, 0.0, 2.0]))
    assert x.device == ACC
    (x * 2).add_(1).sum()
    assert not waits
    assert x.sum().item() == 3
    assert bool(x[0] > 0)
    assert waits == {"item": 2}
    waits.clear()
    x.nonzero()
    x[x > 0]
    x.cpu()
    torch.ones(3).to("acc")
    torch.ones(3).to("acc", non_blocking=True)
    x.copy_(torch.ones(3))
    assert waits == {"nonzero": 2, "to the CPU": 1, "from the CPU": 2} or waits == {
        "nonzero": 1,
        "index": 1,
        "to the CPU": 1,
        "from the CPU": 2,
    }


def test_devices_do_not_mix(waits):
    x = to_device(torch.ones(3))
    with pytest.raises(RuntimeError, match="a tensor on the CPU among tensors on acc"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="a tensor on the CPU among tensors on acc"):
        torch._foreach_add_([x], [torch.ones(3)])
    assert to_cpu(x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number
    assert not waits


def test_views_share_storage_and_writes():
    x = torch.zeros(4, device="acc")
    row = x.view(2, 2)[1]
    assert isinstance(row, OnDevice)
    assert (
        row.untyped_storage()._cdata
        == x.untyped_storage()._cdata
        != torch.zeros(4, device="acc").untyped_storage()._cdata
    )
    row.add_(1)
    assert to_cpu(x).tolist() == [0, 0, 1, 1]
    torch.mul(x, 2, out=x)
    assert to_cpu(row).tolist() == [2, 2]
    assert x._version == 2


def test_random_numbers_are_its_own():
    torch.manual_seed(1)
    there, here = torch.rand(2, device="acc"), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), here)  # a draw there moves nothing here
    assert torch.equal(to_cpu(torch.rand(2, device="acc")), to_cpu(there))
    state = torch.acc.get_rng_state()
    once = torch.nn.functional.dropout(torch.ones(8, device="acc"))
    torch.acc.set_rng_state(state)
    assert torch.equal(to_cpu(torch.nn.functional.dropout(torch.ones(8, device="acc"))), to_cpu(once))


def test_autocast():
    x = torch.ones(2, 2, device="acc", requires_grad=True)
    with torch.autocast("acc", dtype=torch.bfloat16):
        y = x @ x
        assert y.dtype == torch.bfloat16
        assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
