"""`batch_norm`: the large batch's running statistics, in every way of calling. Over ranks: `tests/laws/test_carry_ranks.py`."""

import copy

import pytest
import torch
from torch import nn

import gradacc
from tests.helpers import assert_trees_close, assert_trees_equal, some_slow


def of_batch_norm(module):
    """A loss, and what `batch_norm` returned."""
    found = gradacc.batch_norm(module)

    def loss_fn(params, batch, carry):
        output, carry = found.apply(params, batch, carry=carry)
        return output.square().mean(), carry

    return loss_fn, found


def norm_net():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.parametrize("size", some_slow([4, 1], 1))  # an unrolled loop, and a scan
def test_batch_norm_compiled(size):
    loss_fn, (_, params, carry, step) = of_batch_norm(norm_net())
    batch = torch.arange(36.0).view(12, 3).sin()
    if size == 1:
        batch = torch.stack([batch, batch + 1, batch * 2], dim=2)
        loss_fn, (_, params, carry, step) = of_batch_norm(nn.BatchNorm1d(3))

    grad_fn = gradacc.accumulate(loss_fn, microbatch_size=size, has_carry=True)

    def call(params, batch, carry):
        grads, carry = grad_fn(params, batch, carry=carry)
        return grads, step(carry)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_trees_close(compiled(params, batch, carry), call(params, batch, carry), rtol=1e-5, atol=1e-6)


def test_batch_norm_under_vmap():
    """Of an ensemble: every member has its own carry."""
    loss_fn, (_, params, carry, step) = of_batch_norm(norm_net())
    batch = torch.arange(72.0).view(2, 12, 3).sin()

    def call(params, batch, carry):
        grads, carry = gradacc.accumulate(loss_fn, steps=3, has_carry=True)(params, batch, carry=carry)
        return grads, step(carry)

    two = torch.utils._pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), (params, carry))
    together = torch.vmap(call)(two[0], batch, two[1])
    for n in range(2):
        one = torch.utils._pytree.tree_map(lambda leaf, n=n: leaf[n], together)
        assert_trees_close(one, call(params, batch[n], carry), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """One layer, run twice."""

    def __init__(self, checkpointed):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.checkpointed = checkpointed

    def both(self, x):
        return self.norm(self.norm(x) * 3 + 1)

    def forward(self, x):
        if not self.checkpointed:
            return self.both(x)
        return torch.utils.checkpoint.checkpoint(self.both, x, use_reentrant=False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_batch_norm_counts_a_layer_that_runs_twice_twice_and_one_that_is_recomputed_once(checkpointed):
    module = Twice(checkpointed)
    loss_fn, (_, params, carry, step) = of_batch_norm(module)

    batch = torch.arange(36.0).view(12, 3).sin()
    _, new = gradacc.accumulate(loss_fn, steps=3, has_carry=True)(params, batch, carry=carry)
    norm = copy.deepcopy(module.norm)
    seen = torch.cat([torch.cat([part, norm(part) * 3 + 1]) for part in batch.split(4)]).detach()
    moments = new["moments"]["norm"]
    assert moments.count == 24
    assert_trees_close((moments.mean, moments.variance(1)), (seen.mean(0), seen.var(0)), rtol=1e-5, atol=1e-6)
    assert_trees_close(step(new)["buffers"]["norm.running_mean"], 0.1 * seen.mean(0), rtol=1e-5, atol=1e-6)


def test_batch_norm_follows_the_module_s_mode():
    module = norm_net()
    _, (apply, params, carry, step) = of_batch_norm(module)
    batch = torch.arange(36.0).view(12, 3).sin()
    _, new = apply(params, batch, carry=carry)
    assert new["moments"]["0"].count == 12
    module.eval()
    output, new = apply(params, batch, carry=carry)
    assert_trees_equal(output, module(batch))
    assert_trees_equal(new, carry)
    assert_trees_equal(step(new), carry)
    module.train()
    module[2].eval()
    _, new = apply(params, batch, carry=carry)
    assert (new["moments"]["0"].count, new["moments"]["2"].count) == (12, 0)
    assert_trees_equal(step(new)["buffers"]["2.running_mean"], carry["buffers"]["2.running_mean"])


def test_batch_norm_says_what_its_carry_is():
    _, (apply, params, carry, step) = of_batch_norm(norm_net())
    for wrong in (carry["buffers"], None):
        with pytest.raises(TypeError, match="the carry must be like the one that batch_norm returned"):
            apply(params, torch.ones(4, 3), carry=wrong)
        with pytest.raises(TypeError, match="the carry must be like the one that batch_norm returned"):
            step(wrong)


def test_batch_norm_of_what_is_no_module():
    with pytest.raises(TypeError, match="expected an nn.Module, got int"):
        gradacc.batch_norm(3)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_moves_once_a_call_to_the_large_batchs_statistics(steps, momentum):
    module = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 1))
    whole = copy.deepcopy(module)
    apply, params, carry, step = gradacc.batch_norm(module)

    def loss_fn(params, batch, carry):
        output, carry = apply(params, batch, carry=carry)
        return output.square().mean(), carry

    grad_fn = gradacc.accumulate(loss_fn, steps=steps, has_carry=True)
    for n in range(2):
        batch = torch.arange(36.0).view(12, 3).add(n).sin()
        _, carry = grad_fn(params, batch, carry=carry)
        carry = step(carry)
        whole(batch)
    assert_trees_close(carry["buffers"], dict(whole.named_buffers()), rtol=1e-5, atol=1e-7)
    assert not module[0].running_mean.any()
    for other in (nn.Linear(2, 2), nn.LazyLinear(2)):  # of which `functional` would say something else
        with pytest.raises(ValueError, match="no BatchNorm layer"):
            gradacc.batch_norm(other)


def test_moments_that_were_not_moved_are_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    apply, params, carry, move = gradacc.batch_norm(module)

    def loss(params, x, carry):
        output, carry = apply(params, x, carry=carry)
        return output.square().mean(), carry

    grad_fn = gradacc.accumulate(loss, steps=2, has_carry=True)
    x = torch.randn(8, 3)
    _, after = grad_fn(params, x, carry=carry)
    with pytest.raises(ValueError, match=r"the moments of 8 numbers of layer '1', .* carry = step\(carry\)"):
        grad_fn(params, x, carry=after)
    grad_fn(params, x, carry=move(after))
