"""What is run again in the backward pass draws what it drew."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gradacc import _where, random
from tests.helpers import assert_trees_close

D = torch.float64
W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=D)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D)
KEYS = random.split(random.key(3), 6)
plain = functools.partial(checkpoint, use_reentrant=False)


def straight(function, *args):
    return function(*args)


def block(x, w):
    return F.dropout(torch.tanh(F.dropout(x, 0.5) @ w), 0.2)


def two(x, w, run):
    """Blocks that are checkpointed, and draws before, between and after."""
    x = run(block, F.dropout(x @ w, 0.3), w)
    return F.dropout(run(block, F.dropout(x, 0.1), w), 0.1)


def gradient(run, model=two, around=None):
    """Of a loss whose backward pass runs when the context is left."""
    w = W.clone().requires_grad_()
    with around() if around is not None else torch.enable_grad(), random.keyed(KEYS, random.key(1)):
        loss = model(X, w, run).square().sum()
    loss.backward()
    return w.grad


@pytest.mark.parametrize(
    "options", [{}, {"preserve_rng_state": False}, {"early_stop": False}, {"determinism_check": "none"}], ids=str
)
def test_a_checkpoint(options):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert_trees_close(gradient(functools.partial(plain, **options)), gradient(straight))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_backward_pass_inside_of_the_context():
    w = W.clone().requires_grad_()
    with random.keyed(KEYS):
        two(X, w, plain).square().sum().backward()
        after = torch.rand(6)
    assert_trees_close(w.grad, gradient(straight))
    with random.keyed(KEYS):
        two(X, W, straight)
        assert torch.equal(torch.rand(6), after)


def nested(x, w, run):
    return run(lambda x, w: run(block, F.dropout(run(block, x, w) @ w, 0.1), w), x, w)


def first_draw_inside(x, w, run):
    """The outer checkpoint's first draw is in the inner one."""
    return run(lambda x, w: run(block, torch.tanh(x @ w), w) @ w, x, w)


def with_hooks_between(x, w, run):
    """Other saved-tensor hooks are on the stack, above and below."""

    def hooked(x, w):
        with saved_tensors_hooks(torch.clone, torch.clone):
            return block(x, w) @ w

    return run(hooked, x, w)


def with_a_shared_draw(x, w, run):
    return run(lambda x, w: block(x, w) * torch.rand((), dtype=D), x, w) * torch.rand((), dtype=D)


@pytest.mark.parametrize("model", [nested, first_draw_inside, with_hooks_between, with_a_shared_draw])
@pytest.mark.parametrize("around", [None, save_on_cpu])
def test_checkpoints(model, around):
    assert_trees_close(gradient(plain, model, around), gradient(straight, model))


def test_two_backward_passes():
    w = W.clone().requires_grad_()
    with random.keyed(KEYS):
        loss = two(X, w, plain).square().sum()
    first = torch.autograd.grad(loss, w, retain_graph=True)[0]
    assert_trees_close(torch.autograd.grad(loss, w)[0], first)
    assert_trees_close(first, gradient(straight))


def test_the_context_inside_of_the_checkpoint():
    def inside(x, w):
        with random.keyed(KEYS):
            return block(x, w)

    def grad(run):
        w = W.clone().requires_grad_()
        run(inside, X, w).square().sum().backward()
        return w.grad

    assert_trees_close(grad(plain), grad(straight))
    x = X.clone().requires_grad_()
    w = W.clone().requires_grad_()
    checkpoint(inside, x, w, use_reentrant=True).square().sum().backward()
    assert_trees_close(w.grad, grad(straight))


def test_draws_that_are_not_keyed_stay_torch_s():
    """Of a checkpoint that is around the context."""

    def partly(x, w):
        x = F.dropout(x @ w, 0.5)
        with random.keyed(KEYS):
            return block(x, w)

    def grad(run):
        torch.manual_seed(0)
        w = W.clone().requires_grad_()
        run(partly, X, w).square().sum().backward()
        return w.grad

    assert_trees_close(grad(plain), grad(straight))


def test_a_backward_pass_in_another_thread():
    """Where nothing is known of the call whose micro-batch it was."""
    w = W.clone().requires_grad_()
    with _where.dividing(), random.keyed(KEYS):
        loss = two(X, w, plain).square().sum()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert_trees_close(w.grad, gradient(straight))


def test_contexts_in_contexts():
    def model(x, w, run):
        x = run(block, x, w)
        with random.keyed(random.fold_in(KEYS, 5)):
            x = run(block, x, w)
        return run(block, x, w)

    assert_trees_close(gradient(plain, model), gradient(straight, model))


@pytest.mark.parametrize("grad", [True, False])
def test_a_reentrant_checkpoint(grad):
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="use_reentrant=True.*pass use_reentrant=False"), random.keyed(KEYS):
        checkpoint(block, x, W.clone().requires_grad_(grad), use_reentrant=True)
    with random.keyed(KEYS):  # without draws
        checkpoint(torch.tanh, x, use_reentrant=True)
    with random.keyed(KEYS), torch.no_grad():  # a draw that is in no checkpoint
        F.dropout(x, 0.5)


def test_a_checkpoint_with_contexts_of_its_own():
    policy = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    with pytest.raises(NotImplementedError, match="context_fn"):
        gradient(functools.partial(plain, context_fn=policy))


def test_a_reentrant_checkpoint_that_enables_gradients():
    def func(x):
        with torch.enable_grad():
            return F.dropout(x, 0.5)

    with pytest.raises(NotImplementedError, match="pass use_reentrant=False"), random.keyed(KEYS):
        checkpoint(func, X.clone().requires_grad_(), use_reentrant=True)


def test_keys_that_are_written_over():
    keys = KEYS.clone()
    w = W.clone().requires_grad_()
    with random.keyed(keys):
        loss = two(X, w, plain).square().sum()
    keys.view(torch.int64).zero_()
    loss.backward()
    assert_trees_close(w.grad, gradient(straight))


def test_hooks_are_as_they_were():
    packed = []
    x = X.clone().requires_grad_()
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t), random.keyed(KEYS):
        F.dropout(x, 0.5)
        before = len(packed)
        x.sin()
    assert before
    assert len(packed) == before + 1
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"), random.keyed(KEYS):
        F.dropout(x, 0.5)
