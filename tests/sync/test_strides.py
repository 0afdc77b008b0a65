"""Gradients that have crossed have their parameters' strides, where those are dense."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradacc
from tests.helpers import assert_trees_close

FORMS = ("accumulate", "overlap", "accumulator")


def parameters():
    made = torch.Generator().manual_seed(0)
    conv = torch.randn(6, 4, 3, 3, generator=made, dtype=torch.float64)
    square = torch.randn(5, 4, generator=made, dtype=torch.float64)
    return {
        "channels last": conv.to(memory_format=torch.channels_last),
        "transposed": square.t(),
        "half": square.half().t(),
        "complex": torch.complex(square, square).t(),
        "contiguous": conv.clone(),
        "a part": torch.cat([square, square])[::2],
        "one by one": torch.randn(1, 1, generator=made, dtype=torch.float64).as_strided((1, 1), (7, 0)),
    }


def loss(params, x):
    y = torch.nn.functional.conv2d(x, params["channels last"]) + torch.nn.functional.conv2d(x, params["contiguous"])
    rest = sum(params[name].square().sum() for name in ("transposed", "half", "a part", "one by one"))
    return (y.square().mean((1, 2, 3)) * (rest + params["complex"].abs().sum())).mean()


def images():
    return torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def crossed(group, form):
    """Of two calls: gradients, their strides, and how many tensors they are views of."""
    params, sync = parameters(), gradacc.all_reduce(group, overlap=form == "overlap")
    x = images().tensor_split(group.size())[group.rank()]
    if form == "accumulator":
        acc = gradacc.accumulator(loss, sync=sync)
        grads = [acc.finalize(acc.update(acc.init(params), params, x))[0] for _ in range(2)]
    else:
        grad_fn = gradacc.accumulate(loss, steps=2, sync=sync)
        if form == "compiled":
            grad_fn = torch.compile(grad_fn, fullgraph=True, backend="aot_eager")
        grads = [grad_fn(params, x) for _ in range(2)]
    memory = [each["contiguous"].untyped_storage().nbytes() for each in grads]
    return [({name: grad.contiguous() for name, grad in each.items()}, strides_of(each)) for each in grads], memory


def strides_of(tensors):
    return {name: tensor.stride() for name, tensor in tensors.items() if name not in ("a part", "one by one")}


@pytest.mark.parametrize("form", [*FORMS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_strides_are_the_parameters(pool, form):
    params = parameters()
    expected = gradacc.accumulate(loss, steps=1)(params, images())
    for calls, memory in pool.run(2, crossed, form):
        for grads, strides in calls:
            half = grads.pop("half"), expected["half"]
            torch.testing.assert_close(*half, rtol=2**-10, atol=0)
            assert_trees_close(grads, {name: grad for name, grad in expected.items() if name != "half"})
            assert strides == strides_of(params)
        # What is contiguous was not copied: it is a view of everything that crossed in its dtype.
        assert min(memory) > 8 * sum(p.numel() for name, p in params.items() if name != "half") or form == "compiled"


def trained(group):
    """Three steps of torch's fused kernel, which pairs parameters and gradients by address."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(8, 8, 3, bias=False).to(memory_format=torch.channels_last), torch.randn(4, 8, 5, 5)
    apply, params, _ = gradacc.functional(module)
    found = []
    for sync, part in ((None, x), (gradacc.all_reduce(group), x.tensor_split(2)[dist.get_rank(group)])):
        grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=2, sync=sync)
        weights = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=0.01, fused=True)
        for _ in range(3):
            with torch.no_grad():
                grads = grad_fn(weights, part)
            for name, weight in weights.items():
                weight.grad = grads[name]
            optimizer.step()
        found.append(weights["weight"].detach().contiguous())
    return found


def test_a_fused_optimizer_is_right_on_ranks_too(pool):
    for alone, together in pool.run(2, trained):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
