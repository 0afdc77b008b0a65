"""Folds that are not gradacc's, as docs/cross.md has them, on real ranks: each the gradient of the large batch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from tests import recipes

PAGE = (Path(__file__).parent.parent / "docs" / "cross.md").read_text()
LOOP, PIPELINE, SHARDED = recipes.blocks(PAGE)
RANKS = 4


def of_block(group, block, dtype):
    """What the names in a block of the page are when it has run, as far as it can be sent; in ``dtype``."""
    scope = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        code = block.replace("torch.distributed.init_process_group()", "pass")  # the pool has done it
        assert code != block
        exec(compile(code, "cross.md", "exec"), scope)
    finally:
        torch.set_default_dtype(before)
    grads = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in scope["grads"].items()}
    kept = {name: scope[name] for name in ("value", "microbatches", "x", "y", "replica", "index") if name in scope}
    return kept | {"grads": grads, "sharded": [isinstance(x, DTensor) for x in scope["grads"].values()]}


def large(modules, batches):
    """Gradients and the mean loss of everything together, by plain autograd; and the number of tokens."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = F.cross_entropy(torch.nn.Sequential(*modules)(x), y, ignore_index=-100)
    loss.backward()
    return loss.detach(), (y != -100).sum()


def seeded(*makers):
    """Modules with the parameters that the page's have."""
    torch.manual_seed(0)
    return [make() for make in makers]


def check(answer, module, loss, tokens, tolerance):
    torch.testing.assert_close(
        answer["value"].value, loss.to(answer["value"].total.dtype), rtol=tolerance, atol=tolerance
    )
    assert answer["value"].weight == tokens
    expected = {name: param.grad for name, param in module.named_parameters() if param.requires_grad}
    assert answer["grads"].keys() == expected.keys()
    for name, grad in answer["grads"].items():
        torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=tolerance)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_a_loop_of_backward_passes(pool, float64):
    """Ranks with 4, 3, 2 and 1 micro-batches, the first one without tokens."""
    answers = pool.run(RANKS, of_block, LOOP, torch.float64)
    linear = torch.nn.Linear
    modules = seeded(lambda: linear(8, 16), torch.nn.Tanh, lambda: linear(16, 5), lambda: linear(5, 5))
    modules[3].requires_grad_(False)
    loss, tokens = large(modules, [part for answer in answers for part in answer["microbatches"]])
    assert not any((y != -100).any() for _, y in answers[0]["microbatches"])
    for answer in answers:
        check(answer, torch.nn.Sequential(*modules), loss, tokens, 1e-10)


def test_a_pipeline(pool, float64):
    """Two stages, two replicas, of 3 and 11 tokens."""
    answers = pool.run(RANKS, of_block, PIPELINE, torch.float64)
    linear = torch.nn.Linear
    stages = seeded(lambda: torch.nn.Sequential(linear(8, 16), torch.nn.Tanh()), lambda: linear(16, 5))
    loss, tokens = large(stages, [(answer["x"], answer["y"]) for answer in answers if answer["index"] == 1])
    assert tokens == 14
    assert sorted((answer["replica"], answer["index"]) for answer in answers) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for answer in answers:
        check(answer, stages[answer["index"]], loss, tokens, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_fsdp2(pool, float64, dtype, tolerance):
    """Ranks of 0, 6, 12 and 18 tokens."""
    answers = pool.run(RANKS, of_block, SHARDED, dtype)
    torch.set_default_dtype(dtype)
    linear = torch.nn.Linear
    modules = seeded(lambda: linear(8, 16), torch.nn.Tanh, lambda: linear(16, 5))
    loss, tokens = large(modules, [part for answer in answers for part in answer["microbatches"]])
    assert tokens == 36
    for answer in answers:
        assert all(answer["sharded"])
        check(answer, torch.nn.Sequential(*modules), loss, tokens, tolerance)
