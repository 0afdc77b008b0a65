"""`microbatch` on a device: what the CPU returns, no operation mixes devices, and nothing waits."""

import pytest
import torch
import torch.nn.functional as F

from gradacc import Mean, accumulate, microbatch
from gradacc.data import token_budget
from tests.device import to_cpu, to_device


def _head(hidden, labels, weight):
    loss = F.cross_entropy(hidden @ weight.mT, labels, reduction="sum", ignore_index=-100)
    return Mean(loss, (labels != -100).sum())


def _data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    return hidden, torch.tensor([-100, -100, 3, 1, 4, -100, 5, 9, 2, 6, 5, 3, 5]), weight


@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_a_sum_and_its_gradients_are_the_cpu_s_and_nothing_waits(backward, size, waits):
    hidden, labels, weight = _data()
    by_pieces = microbatch(_head, microbatch_size=size, in_dims=(0, 0, None), backward=backward)
    own = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(_head(own[0], labels, own[1]).value, own)
    there = [to_device(hidden).requires_grad_(), to_device(weight).requires_grad_()]
    labels = to_device(labels)
    waits.clear()
    actual = torch.autograd.grad(by_pieces(there[0], labels, there[1]).value, there)
    assert not waits
    torch.testing.assert_close([to_cpu(grad) for grad in actual], list(expected))


def test_outputs_are_put_together_there_and_nothing_waits(waits):
    hidden, _, weight = _data()
    there, closed = to_device(hidden).requires_grad_(), to_device(weight).requires_grad_()
    waits.clear()
    out = {"rows": "concat", "mean": "mean", "max": "max", "each": "stack"}

    def func(x):
        y = (x @ closed.mT).sin()
        return {"rows": y, "mean": y.mean(0), "max": y.amax(0), "each": y.sum()}

    result = microbatch(func, microbatch_size=4, out=out)(there)
    grads = torch.autograd.grad(sum(leaf.square().sum() for leaf in result.values()), [there, closed])
    assert not waits
    own, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    y = (own @ weight.mT).sin()
    expected = {"rows": y, "mean": y.mean(0), "max": y.amax(0), "each": torch.stack([p.sum() for p in y.split(4)])}
    torch.testing.assert_close({key: to_cpu(leaf.detach()) for key, leaf in result.items()}, expected, check_dtype=True)
    wanted = torch.autograd.grad(sum(leaf.square().sum() for leaf in expected.values()), [own, weight])
    torch.testing.assert_close([to_cpu(grad) for grad in grads], list(wanted))


def test_random_numbers_of_the_device_are_drawn_again():
    weight = to_device(torch.ones(50)).requires_grad_()
    x = to_device(torch.ones(10, 50))

    def noisy(x):
        return (x * weight * torch.rand(x.shape, device=x.device)).sum()

    torch.acc.manual_seed_all(3)
    sum(noisy(piece) for piece in x.split(3)).backward()
    expected, after = to_cpu(weight.grad), torch.acc.get_rng_state()
    for backward in ("recompute", "forward"):
        weight.grad = None
        torch.acc.manual_seed_all(3)
        total = microbatch(noisy, microbatch_size=3, out="sum", backward=backward)(x)
        assert torch.equal(torch.acc.get_rng_state(), after)
        total.backward()
        assert torch.equal(torch.acc.get_rng_state(), after)
        torch.testing.assert_close(to_cpu(weight.grad), expected, rtol=1e-6, atol=1e-6)


def test_random_numbers_of_the_device_are_drawn_again_where_the_arguments_are_elsewhere():
    weight, x = to_device(torch.ones(50)).requires_grad_(), torch.ones(10, 50)

    def noisy(x):
        there = to_device(x)
        return there * weight * torch.rand(x.shape, device=there.device)

    y = microbatch(noisy, microbatch_size=3)(x)
    y.sum().backward()
    torch.testing.assert_close(to_cpu(weight.grad), to_cpu(y.detach()).sum(0))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
def test_under_a_transform_the_device_s_random_numbers_are_drawn_again():
    hidden, labels, weight = _data()

    def loss(weight, hidden, head):
        return head(hidden, labels, weight).value

    by_pieces = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None))
    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f, 1), 0)):
        # On the CPU, in a process that has used a device.
        expected = transform(loss)(weight, hidden, _head)
        torch.testing.assert_close(transform(loss)(weight, hidden, by_pieces), expected)


def test_micro_batches_by_cost_are_made_there_and_wait_twice_for_the_lengths(waits):
    lengths = torch.tensor([3, 9, 1, 4, 9, 2])
    mask = (torch.arange(9) < lengths[:, None]).double()
    batch = {"mask": mask, "x": torch.arange(54, dtype=torch.float64).view(6, 9).sin() * mask}
    split = token_budget(12, lambda batch: batch["mask"].sum(1).long())

    def loss_fn(w, batch):
        own = (w * batch["x"]).sin().sum(1)
        return Mean(own.sum(), batch["mask"].sum()), own

    def of(w, batch):
        grads, aux = accumulate(loss_fn, split=split, has_aux=True)(w, batch)
        return grads, aux, microbatch(lambda batch: batch["x"].sum(1), split=split)(batch)

    w = torch.ones((), dtype=torch.float64)
    expected, there = of(w, batch), {name: to_device(leaf) for name, leaf in batch.items()}
    waits.clear()
    actual = of(to_device(w), there)
    assert waits == {"to the CPU": 2, "item": 2}  # of two calls
    torch.testing.assert_close([to_cpu(leaf) for leaf in actual], list(expected))
    torch.testing.assert_close(expected[1], loss_fn(w, batch)[1])
