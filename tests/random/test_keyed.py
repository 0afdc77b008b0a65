"""Torch's draws by keys: what is refused, and what is seen of it from outside."""

import random as python
import re
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import gradacc
from gradacc import random
from gradacc.random import _torch_draws
from tests.helpers import fingerprint

# torch's own forward mode scripts its decompositions
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

KEYS = random.split(random.key(3), 5)
SHARED = random.key(11)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_draws_are_numbered():
    with random.keyed(KEYS, SHARED):
        drawn = [torch.rand(5, 2), torch.rand(()), torch.rand(5, 2), torch.rand(3)]
    assert torch.equal(drawn[0], random.uniform(random.fold_in(KEYS, 0), (2,)))
    assert torch.equal(drawn[1], random.uniform(random.fold_in(SHARED, 1)))
    assert torch.equal(drawn[2], random.uniform(random.fold_in(KEYS, 2), (2,)))
    assert torch.equal(drawn[3], random.uniform(random.fold_in(SHARED, 3), (3,)))


def test_a_context_begins_at_0_and_the_inner_one_counts():
    with random.keyed(KEYS):
        first = torch.rand(5)
        with random.keyed(random.fold_in(KEYS, 7)):
            inner = torch.rand(5)
        second = torch.rand(5)
    with random.keyed(KEYS):
        assert torch.equal(torch.rand(5), first)
        assert torch.equal(torch.rand(5), second)
    assert torch.equal(inner, random.uniform(random.fold_in(random.fold_in(KEYS, 7), 0)))


def test_nothing_else_moves():
    torch.manual_seed(0)
    before, given = torch.get_rng_state(), fingerprint((KEYS, SHARED, X))
    with random.keyed(KEYS, SHARED):
        F.dropout(X)
        torch.rand(())
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint((KEYS, SHARED, X)) == given
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_an_error_inside_leaves_no_context():
    with pytest.raises(ValueError, match="keyed"), random.keyed(KEYS):
        torch.rand(10)
    assert torch.rand(3).shape == (3,)  # needs shared inside


@pytest.mark.parametrize(
    ("keys", "shared", "error", "match"),
    [
        (3, None, TypeError, "keys is 3 .int.; keys are uint64"),
        (KEYS.view(torch.int64), None, TypeError, "dtype torch.int64"),
        (KEYS[0], None, ValueError, r"it must be \(n, 2\).*split\(key, n\)"),
        (KEYS[None], None, ValueError, r"it must be \(n, 2\)"),
        (KEYS, KEYS, ValueError, r"one key, of shape \(2,\)"),
        (KEYS, 7, TypeError, r"keyed\(shared=\): keys is 7"),
    ],
)
def test_bad_keys(keys, shared, error, match):
    with pytest.raises(error, match=match):
        random.keyed(keys, shared)


def test_what_is_shared_needs_a_key():
    with (
        pytest.raises(ValueError, match=r"shape \(3,\), which are of no batch of 5.*keyed\(keys, shared="),
        random.keyed(KEYS),
    ):
        torch.rand(3)


def test_a_number_of_keys_that_is_not_the_batch_s():
    with pytest.raises(ValueError, match="shape \\(5, 4\\), which are of no batch of 3"), random.keyed(KEYS[:3]):
        F.dropout(X)
    with (
        pytest.raises(ValueError, match="no draw had 3 examples.*bernoulli_.float drew shape"),
        random.keyed(KEYS[:3], SHARED),
    ):
        F.dropout(X)
    with random.keyed(KEYS, SHARED):  # stochastic depth alone is no sign of another batch
        torch.rand(())


def test_an_empty_batch():
    with random.keyed(KEYS[:0], SHARED):
        assert F.dropout(X[:0]).shape == (0, 4)
        assert torch.randn(0, 4).shape == (0, 4)
        assert torch.rand(()) == random.uniform(random.fold_in(SHARED, 1))


NOT_COVERED = {
    "aten.randint.default": lambda: torch.randint(3, (5,)),
    "aten.randperm.default": lambda: torch.randperm(5),
    "aten.multinomial.default": lambda: torch.multinomial(torch.ones(5, 3), 1),
    "aten.exponential_.default": lambda: F.gumbel_softmax(X),
    "aten.rrelu_with_noise.default": lambda: F.rrelu(X, training=True),
    "aten._standard_gamma.default": lambda: torch.distributions.Gamma(torch.ones(5), 1.0).sample(),
    "aten.rand.generator": lambda: torch.rand(5, generator=torch.Generator()),
    "aten.uniform_.default": lambda: torch.empty(5).uniform_(generator=torch.Generator()),
    "aten.rand.out": lambda: torch.rand(5, out=torch.empty(5)),
    "aten._fused_dropout.default": lambda: torch._fused_dropout(X, 0.5),
    "aten._scaled_dot_product_flash_attention.default": lambda: torch.ops.aten._scaled_dot_product_flash_attention(
        X[:, None, None], X[:, None, None], X[:, None, None], 0.5
    ),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered(name):
    with (
        pytest.raises(NotImplementedError, match=f"keyed: {name} draws numbers, and has no keyed counterpart"),
        random.keyed(KEYS, SHARED),
    ):
        NOT_COVERED[name]()


def test_whatever_torch_says_draws_is_covered_or_refused():
    """Whatever operator there is in this version of torch, it does not pass silently."""
    with random.keyed(KEYS):
        mode = _get_current_dispatch_mode()
    training = {"dropout": 0.5, "dropout_p": 0.5, "train": True, "training": True}
    refused = 0
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith(("aten::", "prims::")):
            continue
        namespace, packet, overload = re.fullmatch(r"(\w+)::(\w+)\.?(\w*)", name).groups()
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        made_of_others = op.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
        if torch.Tag.nondeterministic_seeded not in op.tags or op in _torch_draws.DRAWS or made_of_others:
            continue
        if op is torch.ops.aten._fused_sdp_choice.default:
            continue  # draws nothing
        refused += 1
        names = {argument.name for argument in op._schema.arguments}
        with pytest.raises(NotImplementedError, match=f"keyed: {re.escape(str(op))} draws numbers"):
            mode.__torch_dispatch__(op, (), (), {name: training[name] for name in names & set(training)})
    assert refused > 100


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_recurrent_networks_with_dropout(make, packed, inference):
    """As many time steps as examples: by its shape their dropout would be of examples."""
    x = torch.ones(5, 5, 4)
    given = nn.utils.rnn.pack_padded_sequence(x, [5] * 5, batch_first=True) if packed else x
    module, plain = make(4, 4, 2, dropout=0.5, batch_first=True), make(4, 4, 2, batch_first=True)
    with (
        pytest.raises(NotImplementedError, match="with dropout=0.5.*one module a layer"),
        torch.inference_mode(inference),
        random.keyed(KEYS),
    ):
        module(given)
    module.eval()
    with torch.inference_mode(inference), random.keyed(KEYS):
        module(given)
        plain(given)


def test_attention_modules():
    x = torch.ones(5, 3, 4)
    mha = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    layer = nn.TransformerEncoderLayer(4, 2, dropout=0.5)  # time first
    outs = []
    for _ in range(2):
        with random.keyed(KEYS):
            outs.append(mha(x, x, x, need_weights=False)[0])
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match="10 is 2 times the number of examples"), random.keyed(KEYS):
        mha(x, x, x)
    with pytest.raises(ValueError, match="5 is the number of examples, but not at dim 0"), random.keyed(KEYS):
        layer(x.transpose(0, 1))


def test_attention_with_dropout_goes_by_the_math_path():
    """Where another kernel is the first choice, too."""
    q, asked = X.reshape(5, 1, 2, 2), []

    class Backends(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
            return func(*args, **(kwargs or {}))

    mha = nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True)
    for call in (
        lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda: F.scaled_dot_product_attention(q, q, q, None, 0.5),
        lambda: mha(X[:, None], X[:, None], X[:, None], need_weights=False),
    ):
        asked.clear()
        with Backends(), random.keyed(KEYS):
            call()
        assert (False, False) in asked
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_choice_of_a_kernel_is_no_draw():
    q = X.reshape(5, 1, 2, 2)
    with random.keyed(KEYS):
        assert isinstance(torch.ops.aten._fused_sdp_choice(q, q, q, None, 0.5), int)


def test_inference_mode():
    q = X.reshape(5, 1, 2, 2)
    run = lambda: (F.dropout(X), F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))  # noqa: E731
    with random.keyed(KEYS):
        expected = run()
    with torch.inference_mode(), random.keyed(KEYS):
        assert all(map(torch.equal, run(), expected))


def test_generators_that_keys_do_not_replace():
    @torch.library.custom_op("gradacc_tests::draws", mutates_args=())
    def custom(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())

    def in_a_thread():
        thread = threading.Thread(target=torch.rand, args=(3,))
        thread.start()
        thread.join()

    for name, draw in {
        "Python's random": python.random,
        "NumPy's random": np.random.rand,
        "torch's generator": in_a_thread,
    }.items():
        with (
            pytest.raises(NotImplementedError, match=f"drew from, or set, {name}, which keys do not replace"),
            random.keyed(KEYS),
        ):
            draw()
    with pytest.raises(NotImplementedError, match="torch's generator"), random.keyed(KEYS):
        custom(X)
    with random.keyed(KEYS):
        python.Random(0).random()
        np.random.default_rng(0).random()


def test_functions_of_their_own():
    with pytest.raises(NotImplementedError, match="cond runs a function of its own"), random.keyed(KEYS):
        torch.cond(torch.tensor(True), F.dropout, torch.sin, (X,))


@pytest.mark.parametrize("shared", [None, SHARED])
@pytest.mark.parametrize(
    "around",
    [
        lambda loss: gradacc.accumulate(loss, steps=2),
        lambda loss: gradacc.accumulate(loss, steps=1),
        lambda loss: lambda w, x: gradacc.accumulate(loss)(w, list(x.split(2))),
        lambda loss: (
            lambda w, x: gradacc.accumulate(
                lambda w, z, x: z.square().mean(), through=lambda w, x: F.dropout(x * w), steps=2
            )(w, x)
        ),
        lambda loss: lambda w, x: gradacc.microbatch(F.dropout, microbatch_size=2)(x),
        lambda loss: lambda w, x: gradacc.microbatch(F.dropout, microbatch_size=2)(x.requires_grad_()),
        lambda loss: lambda w, x: torch.func.grad(lambda x: gradacc.microbatch(F.dropout, steps=2)(x).sum())(x),
        lambda loss: torch.vmap(gradacc.accumulate(loss, steps=2), in_dims=(0, None), randomness="same"),
    ],
)
def test_around_a_call_that_splits_the_batch(around, shared):
    """With a shared key the pieces' draws would be of it, which no shape tells."""
    run = around(lambda w, x: F.dropout(x * w).square().mean())
    with (
        pytest.raises(RuntimeError, match='batch\\["keys"\\] = gradacc.random.split(.|\n)*with gradacc.random.keyed'),
        random.keyed(KEYS, shared),
    ):
        run(torch.ones(4), X.clone())


def of_a_rank(group):
    total = lambda x: F.dropout(x).sum()  # noqa: E731
    with random.keyed(KEYS, SHARED):
        return gradacc.microbatch(total, microbatch_size=2, out="sum", sync=gradacc.all_reduce(group))(X)


def test_around_pieces_of_ranks(pool):
    with pytest.raises(Exception, match="keyed: bernoulli_.float draws in a micro-batch of accumulate or microbatch"):
        pool.run_each(1, of_a_rank, [()])


def test_around_a_call_that_splits_something_without_draws():
    head = gradacc.microbatch(lambda h, w: (h @ w).square().sum(), microbatch_size=2, in_dims=(0, None), out="sum")
    w = torch.ones(4, 3, requires_grad=True)
    with random.keyed(KEYS):
        dropped = F.dropout(X)
        loss = head(dropped, w)
    torch.testing.assert_close(loss, (dropped @ w).square().sum())


@pytest.mark.parametrize("backward", ["recompute", "forward"])
def test_inside_of_pieces(backward):
    def func(x, keys, w):
        with random.keyed(keys):
            return F.dropout(torch.tanh(F.dropout(x, 0.3) @ w), 0.5).square().sum()

    def gradient(f):
        w = torch.eye(4, dtype=torch.float64).requires_grad_()
        f(X.double(), KEYS, w).backward()
        return w.grad

    pieces = gradacc.microbatch(func, microbatch_size=2, in_dims=(0, 0, None), out="sum", backward=backward)
    torch.testing.assert_close(gradient(pieces), gradient(func))


@FORWARD_MODE
def test_under_transforms():
    def loss(w, x, keys):
        with random.keyed(keys):
            return (F.dropout(x, 0.5) * w).square().sum()

    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([2 * each * masked().square().sum(0) for each in w])
    grads = torch.vmap(torch.func.grad(loss), in_dims=(0, None, None), randomness="same")(w, X, KEYS)
    torch.testing.assert_close(grads, expected)
    _, tangent = torch.func.jvp(lambda w: loss(w, X, KEYS), (w[0],), (torch.ones(4),))
    torch.testing.assert_close(tangent, expected[0].sum())
    with pytest.raises(NotImplementedError, match='randomness="different"'):
        torch.vmap(loss, in_dims=(0, None, None), randomness="different")(w, X, KEYS)
    with pytest.raises(NotImplementedError, match="keys differ between the elements of a vmap"):
        torch.vmap(loss, in_dims=(None, 0, 0), randomness="same")(w[0], X[:, None], KEYS[:, None])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(loss, in_dims=(0, None, None))(w, X, KEYS)


def masked():
    return X * random.bernoulli(random.fold_in(KEYS, 0), 0.5, (4,)) * 2


def test_keys_that_are_made_inside_of_a_transform():
    def loss(w, x, keys):
        with random.keyed(random.fold_in(keys, 7), random.fold_in(SHARED, 7)):
            return (F.dropout(x, 0.5) * w * torch.rand(())).square().sum()

    w = torch.ones(4, requires_grad=True)
    loss(w, X, KEYS).backward()
    torch.testing.assert_close(torch.func.grad(loss)(w.detach(), X, KEYS), w.grad)
    hessian = torch.func.jacrev(torch.func.grad(loss))(w.detach(), X, KEYS)
    torch.testing.assert_close(hessian, w.grad.diag())
    torch.testing.assert_close(torch.func.functionalize(loss)(w.detach(), X, KEYS), loss(w, X, KEYS).detach())


def compiled_loss(w, x, keys):
    with random.keyed(keys):
        return (F.dropout(x, 0.5) * w).square().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    w = torch.ones(4)
    grad = torch.func.grad(compiled_loss)
    with pytest.raises(Exception, match="keyed: not available inside of torch.compile"):
        torch.compile(grad, fullgraph=True, backend=backend)(w, X, KEYS)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(grad, backend=backend)(w, X, KEYS), grad(w, X, KEYS))
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_function_inside_runs_as_it_is(before):
    compiled = torch.compile(lambda x: F.dropout(x.sin(), 0.5), backend="aot_eager")
    if before:
        compiled(X)
    with random.keyed(KEYS):
        inside = compiled(X)
    torch.testing.assert_close(inside, X.sin() * random.bernoulli(random.fold_in(KEYS, 0), 0.5, (4,)) * 2)
    torch._dynamo.reset()


def test_autocast():
    w = torch.ones(4, 4)
    with torch.autocast("cpu"), random.keyed(KEYS):
        out = F.dropout(X @ w, 0.5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out != 0, random.bernoulli(random.fold_in(KEYS, 0), 0.5, (4,)))


def test_the_check_of_a_loss_knows_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    apply, params, _ = gradacc.functional(model)

    def loss_fn(params, batch):
        with random.keyed(batch["keys"]):
            return apply(params, batch["x"]).square().mean()

    assert gradacc.testing.check_accumulation(loss_fn, params, {"x": X.double(), "keys": KEYS})
