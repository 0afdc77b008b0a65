"""`gradacc.microbatch`: what it does with a call, and the traps that others fell into."""

import functools
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import Mean, microbatch
from tests.helpers import PeakElements, living_tensors

WAYS = ("auto", "recompute", "forward")


def _double(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def _same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _head(hidden: Tensor, labels: Tensor, weight: Tensor) -> Mean:
    loss = F.cross_entropy(hidden @ weight.mT, labels, reduction="sum", ignore_index=-100)
    return Mean(loss, (labels != -100).sum())


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.tensor([-100, -100, 3, 1, 4, -100, 5, 9, 2, 6, 5, 3, 5])
    return _double(13, 6, grad=True), labels, _double(11, 6, seed=1, grad=True)


# What a loss is multiplied by, or divided by, reaches every gradient.


@pytest.mark.parametrize("backward", WAYS)
@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0, -3.0])
@pytest.mark.parametrize("size", [1, 4, 13, 50])
def test_a_factor_reaches_every_gradient(data, backward: str, factor: float, size: int) -> None:
    hidden, labels, weight = data
    loss = microbatch(_head, microbatch_size=size, in_dims=(0, 0, None), backward=backward)(
        hidden, labels, weight
    ).value
    expected = _head(hidden, labels, weight).value
    _same(
        torch.autograd.grad(factor * loss, (hidden, weight)), torch.autograd.grad(factor * expected, (hidden, weight))
    )


@pytest.mark.parametrize("backward", WAYS)
def test_an_infinite_cotangent_is_no_number_that_looks_right(data, backward: str) -> None:
    hidden, labels, weight = data
    loss = microbatch(_head, steps=3, in_dims=(0, 0, None), backward=backward)(hidden, labels, weight).total
    for grad in torch.autograd.grad(loss, (hidden, weight), torch.tensor(float("inf"), dtype=torch.float64)):
        assert not grad[grad != 0].isfinite().any()
        assert not grad.isfinite().all()


def test_outputs_of_each_token_with_cotangents_of_each_token(data) -> None:
    hidden, labels, weight = data

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.mT, labels, reduction="none", ignore_index=-100)

    of_each = _double(13, seed=5)
    for cotangent in (of_each, of_each[:1].expand(13), torch.stack([of_each, of_each], 1)[:, 0]):
        actual = torch.autograd.grad(microbatch(losses, microbatch_size=3)(hidden, labels), (hidden, weight), cotangent)
        _same(actual, torch.autograd.grad(losses(hidden, labels), (hidden, weight), cotangent))


def test_inputs_that_are_not_contiguous(data) -> None:
    _, _, weight = data
    batch = _double(3, 8, 6, seed=2, grad=True)
    labels = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))

    def whole(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.mT).flatten(0, 1), labels.flatten(), reduction="sum")

    tiled = microbatch(whole, microbatch_size=3, in_dims=(1, 1), out="sum")
    for hidden in (
        batch[:, :-1],
        batch.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1],
        batch[:1, :-1].expand(3, 7, 6),
    ):
        actual = torch.autograd.grad(tiled(hidden, labels[:, 1:]), (batch, weight))
        _same(actual, torch.autograd.grad(whole(hidden, labels[:, 1:]), (batch, weight)))


@pytest.mark.parametrize("backward", WAYS)
def test_a_tied_weight_gets_both_gradients(backward: str) -> None:
    weight = _double(11, 6, grad=True)
    tokens, labels = torch.arange(9), torch.arange(2, 11)

    def loss(weight: Tensor, head) -> Tensor:
        return head(F.embedding(tokens, weight).sin(), labels, weight).value

    by_pieces = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None), backward=backward)
    _same(torch.autograd.grad(loss(weight, by_pieces), weight), torch.autograd.grad(loss(weight, _head), weight))

    def closing(hidden: Tensor, labels: Tensor) -> Mean:
        return _head(hidden, labels, weight)

    closed = microbatch(closing, microbatch_size=4, backward=backward)

    def loss_closed(head) -> Tensor:
        return head(F.embedding(tokens, weight).sin(), labels).value

    (first,) = torch.autograd.grad(loss_closed(closed), weight, create_graph=True)
    (expected,) = torch.autograd.grad(loss_closed(closing), weight, create_graph=True)
    _same(first, expected)
    _same(torch.autograd.grad(first.square().sum(), weight), torch.autograd.grad(expected.square().sum(), weight))


@pytest.mark.parametrize("backward", ["recompute", "forward"])
def test_a_frozen_weight_has_no_gradient_and_no_buffer(data, backward: str, monkeypatch) -> None:
    hidden, labels, weight = data
    frozen = weight.detach()
    from gradacc._pieces.gradients import Gradients

    made: list[torch.Size] = []
    add = Gradients._sum
    monkeypatch.setattr(
        Gradients, "_sum", lambda self, key, leaf, grad: (made.append(leaf.shape), add(self, key, leaf, grad))
    )
    loss = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None), backward=backward)(hidden, labels, frozen).value
    _same(torch.autograd.grad(loss, hidden), torch.autograd.grad(_head(hidden, labels, frozen).value, hidden))
    assert made == []


@pytest.mark.parametrize("backward", WAYS)
def test_nothing_to_learn_from(data, backward: str) -> None:
    hidden, labels, weight = data
    nothing = torch.full_like(labels, -100)
    mean = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None), backward=backward)(hidden, nothing, weight)
    assert mean.total == 0
    assert mean.weight == 0
    for grad in torch.autograd.grad(mean.total, (hidden, weight)):
        assert not grad.any()


@pytest.mark.parametrize("weight_of", [lambda kept: kept.sum(), lambda kept: int(kept.sum())], ids=["tensor", "number"])
@pytest.mark.parametrize("backward", WAYS)
def test_a_piece_of_weight_0_adds_nothing_whatever_it_is(backward: str, weight_of) -> None:
    x = _double(6, grad=True)
    kept = torch.tensor([False, False, True, True, True, False])

    def mean(x: Tensor, kept: Tensor) -> Mean:
        own = x[kept]
        return Mean(own.log1p().sum() if len(own) else (x.sum() * 0 / 0), weight_of(kept))

    actual = microbatch(mean, microbatch_size=2, backward=backward)(x.square(), kept)
    expected = x.square()[kept].log1p().sum() / 3
    _same(actual.value, expected)
    _same(torch.autograd.grad(actual.value, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("backward", WAYS)
def test_twice_through_one_graph(data, backward: str) -> None:
    hidden, labels, weight = data
    loss = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None), backward=backward)(hidden, labels, weight).value
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    _same(first, tuple(kept))
    _same(second, tuple(2 * grad for grad in kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


def test_pieces_of_pieces(data) -> None:
    hidden, labels, weight = data
    for backward, again in itertools.product(WAYS, repeat=2):
        inner = microbatch(_head, microbatch_size=2, in_dims=(0, 0, None), backward=again)
        loss = microbatch(inner, microbatch_size=5, in_dims=(0, 0, None), backward=backward)(
            hidden, labels, weight
        ).value
        expected = torch.autograd.grad(_head(hidden, labels, weight).value, (hidden, weight))
        _same(torch.autograd.grad(loss, (hidden, weight)), expected)


@pytest.mark.parametrize("backward", WAYS)
def test_inside_of_accumulate(data, backward: str) -> None:
    hidden, labels, weight = data

    def loss(weight: Tensor, batch: tuple[Tensor, Tensor], by_pieces: bool) -> Mean:
        head = microbatch(_head, microbatch_size=2, in_dims=(0, 0, None), backward=backward) if by_pieces else _head
        return head(batch[0].sin(), batch[1], weight)

    batch, own = (hidden.detach(), labels), weight.detach()
    expected = torch.func.grad(lambda w: loss(w, batch, False).value)(own)
    grad_fn = gradacc.accumulate(functools.partial(loss, by_pieces=True), steps=3)
    _same(grad_fn(own, batch), expected)
    doubled = torch.vmap(grad_fn, (0, None))(torch.stack([own, 2 * own]), batch)
    _same(doubled[0], expected)


def test_half_precision_is_summed_in_float32() -> None:
    ones = torch.ones(100_000, 1, dtype=torch.float16)
    total = microbatch(lambda x: x.sum(), microbatch_size=1000, out="sum", dtype=torch.float32)(ones)
    assert total.dtype == torch.float32
    assert total == 100_000
    halves = microbatch(lambda x: x.sum(), microbatch_size=1000, out="sum")(ones * 0.5)
    assert halves.dtype == torch.float16
    assert halves == 50_000  # 0.5 + ... + 0.5 in float16 stops at 1024
    mean = microbatch(lambda x: x.mean(), microbatch_size=1000, out="mean")(ones)
    assert mean == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", WAYS)
def test_a_weight_of_half_precision_is_rounded_once(dtype: torch.dtype, backward: str) -> None:
    weight = torch.ones(1, dtype=dtype, requires_grad=True)
    x = torch.tensor([256.0, 1.0, -256.0], dtype=dtype)
    loss = microbatch(lambda x, w: (x * w).sum(), microbatch_size=1, in_dims=(0, None), out="sum", backward=backward)
    (grad,) = torch.autograd.grad(loss(x, weight), weight)
    assert grad.dtype == dtype
    assert grad == 1


# What the function closes over.


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(6, 200, dtype=torch.float64)
        self.outside = nn.Linear(200, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(F.gelu(self.inside(x)))


def _grads(module: nn.Module) -> list[Tensor | None]:
    return [param.grad for param in module.parameters()]


@pytest.mark.parametrize("size", [1, 4, 13])
def test_a_module_whole_as_the_function(size: int) -> None:
    layer, x = _Layer(), _double(13, 6, grad=True)
    seen: list[str] = []
    for name, param in layer.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    layer(x).square().sum().backward()
    expected, mine = _grads(layer), x.grad
    layer.zero_grad()
    x.grad = None
    seen.clear()
    microbatch(layer, microbatch_size=size)(x).square().sum().backward()
    _same(_grads(layer), expected)
    _same(x.grad, mine)
    assert sorted(seen) == sorted(name for name, _ in layer.named_parameters())  # once each


def test_nothing_is_added_to_a_closed_over_parameter_before_its_time() -> None:
    layer, x = _Layer(), _double(13, 6)
    for backward in ("auto", "forward"):
        loss = microbatch(lambda x: layer(x).square().sum(), steps=3, out="sum", backward=backward)(x)
        assert _grads(layer) == [None] * 4
        loss.backward()
        assert None not in _grads(layer)
        layer.zero_grad()


@pytest.mark.parametrize("backward", WAYS)
def test_hidden_states_that_are_closed_over(backward: str) -> None:
    start, weight = _double(13, 6, grad=True), _double(5, 6, seed=3, grad=True)
    hidden, made = start.sin(), weight * 2

    def loss(index: Tensor) -> Tensor:
        return (hidden[index] @ made.mT + (hidden[index] @ weight.mT)).square().sum()

    by_pieces = microbatch(loss, microbatch_size=4, out="sum", backward=backward)
    index = torch.arange(13)
    expected = torch.autograd.grad(loss(index), (start, weight), retain_graph=True)
    _same(torch.autograd.grad(by_pieces(index), (start, weight), retain_graph=True), expected)
    (first,) = torch.autograd.grad(by_pieces(index), start, create_graph=True)
    (plain,) = torch.autograd.grad(loss(index), start, create_graph=True)
    _same(
        torch.autograd.grad(first.square().sum(), (start, weight), retain_graph=True),
        torch.autograd.grad(plain.square().sum(), (start, weight), retain_graph=True),
    )


def test_hooks_of_a_closed_over_tensor_run_once() -> None:
    leaf, x = _double(6, grad=True), _double(13, 6)
    made = leaf * 3
    for tensor in (leaf, made):
        seen: list[Tensor] = []
        handle = tensor.register_hook(seen.append)
        microbatch(lambda x: (x * tensor).sum(), microbatch_size=2, out="sum")(x).backward(retain_graph=True)  # noqa: B023
        assert len(seen) == 1
        _same(seen[0], x.sum(0))
        handle.remove()


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone().mul_(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_closed_over_tensor_that_no_mode_sees() -> None:
    leaf, x = _double(6, grad=True), _double(13, 6)
    by_pieces = microbatch(lambda x: (x * _Twice.apply(leaf)).sum(), microbatch_size=2, out="sum")
    _same(torch.autograd.grad(by_pieces(x), leaf), (2 * x.sum(0),))
    made = leaf * 3
    lost = microbatch(lambda x: (x * _Twice.apply(made)).sum(), microbatch_size=2, out="sum")
    with pytest.raises(ValueError, match=r"closes over a tensor that requires grad .* Pass it to func as an argument"):
        lost(x)
    # Under a transform it is right, by the plain composite.
    plain = torch.func.grad(lambda w: (x * 2 * w).sum())(leaf.detach())

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx, inputs, output) -> None: ...

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 2 * grad

    def loss(w: Tensor) -> Tensor:
        return microbatch(lambda x: (x * Twice.apply(w)).sum(), microbatch_size=2, out="sum")(x)

    _same(torch.func.grad(loss)(leaf.detach()), plain)


def test_another_branch_in_the_second_run_is_an_error() -> None:
    one, other, x = _double(6, grad=True), _double(6, seed=1, grad=True), _double(13, 6)
    chosen = [one]
    loss = microbatch(lambda x: (x * chosen[0]).sum(), microbatch_size=2, out="sum", backward="recompute")(x)
    chosen[0] = other
    with pytest.raises(RuntimeError, match="did not use in the forward pass"):
        loss.backward()
    assert one.grad is None
    assert other.grad is None


def test_different_pieces_may_close_over_different_tensors() -> None:
    experts = [_double(6, seed=n, grad=True) for n in range(3)]
    made = [expert * 2 for expert in experts]
    x, kind = _double(12, 6), torch.arange(12) // 4

    for weights in (experts, made):

        def loss(x: Tensor, kind: Tensor, weights=weights) -> Tensor:
            return sum(((x[kind == n] * weights[n]).square().sum() for n in kind.unique().tolist()), x.new_zeros(()))

        for backward in WAYS:
            actual = microbatch(loss, microbatch_size=3, out="sum", backward=backward)(x, kind)
            _same(
                torch.autograd.grad(actual, experts, retain_graph=True),
                torch.autograd.grad(loss(x, kind), experts, retain_graph=True),
            )


def test_changed_in_place_before_the_backward_pass() -> None:
    x, weight = _double(13, 6), _double(6, grad=True)
    loss = microbatch(lambda x: (x * weight).square().sum(), steps=3, out="sum", backward="recompute")(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# Random numbers, modes.


def test_random_numbers_are_drawn_again_and_left_as_one_pass_leaves_them() -> None:
    x, weight = torch.ones(10, 50), torch.ones(50, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return F.dropout(x * weight, 0.5).sum()

    torch.manual_seed(3)
    sum(loss(piece) for piece in x.split(3)).backward()
    expected, weight.grad = weight.grad, None
    after = torch.rand(())
    for backward in WAYS:
        torch.manual_seed(3)
        total = microbatch(loss, microbatch_size=3, out="sum", backward=backward)(x)
        assert torch.rand(()) == after
        state = torch.get_rng_state()
        total.backward()
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(weight.grad, expected)
        weight.grad = None
    torch.manual_seed(3)
    grad = torch.func.grad(lambda w: microbatch(lambda x: F.dropout(x * w, 0.5).sum(), microbatch_size=3, out="sum")(x))
    assert torch.equal(grad(weight.detach()), expected)
    assert torch.rand(()) == after


def test_under_no_grad_nothing_is_kept() -> None:
    layer, x = _Layer(), _double(13, 6)

    gc.collect()
    before = living_tensors()
    with torch.no_grad():
        y = microbatch(layer, microbatch_size=4)(x)
    assert not y.requires_grad
    gc.collect()
    assert living_tensors().keys() - before.keys() == {id(y)}
    with torch.inference_mode():
        z = microbatch(layer, microbatch_size=4)(x)
    assert torch.equal(y, z)
    # Inference tensors outside of the mode: plain autograd refuses them, copies do not.
    _same(microbatch(layer, microbatch_size=4)(z).sum(), layer(z.clone()).sum())


@pytest.mark.parametrize("early_stop", [True, False])
def test_inside_of_a_checkpoint(early_stop: bool) -> None:
    from torch.utils.checkpoint import set_checkpoint_early_stop

    layer, x = _Layer(), _double(13, 6, grad=True)
    layer(layer(x)).square().sum().backward()
    expected, mine = _grads(layer), x.grad
    layer.zero_grad()
    x.grad = None
    tiled = microbatch(layer, microbatch_size=4)
    with set_checkpoint_early_stop(early_stop):
        y = checkpoint(lambda x: layer(tiled(x)), x, use_reentrant=False)
        y.square().sum().backward()
    _same(_grads(layer), expected)
    _same(x.grad, mine)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
def test_vectorized_and_forward_mode_derivatives() -> None:
    layer, x = _Layer(), _double(5, 6)
    tiled = microbatch(layer, microbatch_size=2)
    expected = torch.autograd.functional.jacobian(layer, x)
    _same(torch.autograd.functional.jacobian(tiled, x), expected)
    _same(torch.autograd.functional.jacobian(tiled, x, vectorize=True), expected)
    _same(torch.autograd.functional.jacobian(tiled, x, vectorize=True, strategy="forward-mode"), expected)
    _same(
        torch.autograd.functional.hessian(lambda x: tiled(x).sin().sum(), x),
        torch.autograd.functional.hessian(lambda x: layer(x).sin().sum(), x),
    )
    assert torch.autograd.gradcheck(tiled, x.requires_grad_())
    assert torch.autograd.gradgradcheck(tiled, x)


def test_a_third_derivative() -> None:
    x = _double(5, grad=True)
    made = x * 2

    def cubes(y: Tensor) -> Tensor:
        return (y**5).sum()

    total = microbatch(cubes, steps=2, out="sum")(made)
    for n, expected in ((1, lambda x: 5 * 32 * x**4), (2, lambda x: 20 * 32 * x**3), (3, lambda x: 60 * 32 * x**2)):
        (total,) = torch.autograd.grad(total if n == 1 else total.sum(), x, create_graph=True)
        _same(total, expected(x))


# What a second run would find changed.


def test_an_argument_that_is_changed_in_place() -> None:
    weight, x = _double(6, grad=True), _double(6, 6)

    def doubling(x: Tensor) -> Tensor:
        return (x.mul_(2) * weight).sum()

    with pytest.raises(ValueError, match=r"changes its argument in place .* x = x.clone\(\)"):
        microbatch(doubling, steps=2, out="sum")(x.clone())
    with torch.no_grad():  # nothing is run again
        _same(microbatch(doubling, steps=2, out="sum")(x.clone()), (2 * x * weight).sum())


def test_running_statistics_are_not_updated_twice() -> None:
    block, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(8, 6)
    for steps in (1, 2):
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            microbatch(block, steps=steps)(x)
    block.eval()
    torch.testing.assert_close(microbatch(block, steps=2)(x), block(x))
    stateless = nn.InstanceNorm1d(3)
    torch.testing.assert_close(microbatch(stateless, steps=2)(x.view(8, 3, 2)), stateless(x.view(8, 3, 2)))


# Dynamo asks for its .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_compiled_function(data, backward: str, is_leaf: bool) -> None:
    hidden, labels, weight = data
    own = weight if is_leaf else weight * 1.5
    torch.compiler.reset()
    head = torch.compile(lambda hidden, labels: _head(hidden, labels, own), backend="aot_eager")
    loss = microbatch(head, microbatch_size=4, backward=backward)(hidden, labels).value
    expected = torch.autograd.grad(_head(hidden, labels, own).value, (hidden, weight), retain_graph=True)
    _same(torch.autograd.grad(loss, (hidden, weight)), expected)


def test_complex_numbers() -> None:
    x, w = _double(7, 3, 2, grad=True), _double(3, 4, 2, grad=True)
    c = torch.view_as_complex(_double(7, 4, 2, seed=1))

    def product(x: Tensor, w: Tensor) -> Tensor:
        return torch.view_as_complex(x) @ torch.view_as_complex(w)

    tiled = microbatch(product, steps=3, in_dims=(0, None))
    expected = torch.autograd.grad(product(x, w), (x, w), c)
    _same(torch.autograd.grad(tiled(x, w), (x, w), c), expected)
    _same(torch.func.vjp(tiled, x.detach(), w.detach())[1](c), expected)


def test_an_embedding_with_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    microbatch(lambda i: table(i).square(), steps=2)(torch.arange(9)).sum().backward()
    torch.testing.assert_close(table.weight.grad, 2 * table.weight.detach() * (torch.arange(10) < 9)[:, None])


def test_other_dims_than_the_first() -> None:
    rnn, x = nn.LSTM(4, 5, batch_first=True, dtype=torch.float64), _double(6, 3, 4)
    tiled = microbatch(rnn, microbatch_size=2, out_dims=(0, (1, 1)))
    _same(tiled(x), rnn(x))
    rnn(x)[0].sum().backward()
    expected = _grads(rnn)
    rnn.zero_grad()
    tiled(x)[0].sum().backward()
    _same(_grads(rnn), expected)


# Under torch.func.


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
@pytest.mark.parametrize("closes", [True, False])
def test_transforms(data, closes: bool) -> None:
    hidden, labels, weight = (tensor.detach() for tensor in data)

    def loss(hidden: Tensor, weight: Tensor, head=_head) -> Tensor:
        return head(hidden, labels, weight).value

    if closes:

        def by_pieces(hidden: Tensor, labels: Tensor, weight: Tensor) -> Mean:
            return microbatch(lambda h, y: _head(h, y, weight), microbatch_size=4)(hidden, labels)
    else:
        by_pieces = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None))

    tiled = functools.partial(loss, head=by_pieces)
    both = (hidden, weight)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(*both),
        lambda f: torch.func.hessian(f, (0, 1))(*both),
        lambda f: torch.func.jacrev(torch.func.jacrev(f, 1), 0)(*both),
        lambda f: torch.func.jvp(f, both, both),
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)), (None, 0))(hidden, torch.stack([weight, 2 * weight])),
        lambda f: torch.func.grad(lambda w: torch.vmap(f, (None, 0))(hidden, w).sum())(
            torch.stack([weight, 2 * weight])
        ),
        lambda f: torch.func.grad(lambda h: torch.func.grad(f, 1)(h, weight).square().sum())(hidden),
        lambda f: torch.func.jvp(torch.func.grad(f), both, both),
    ):
        _same(transform(tiled), transform(loss))


def test_under_a_transform_what_requires_grad_is_connected(data) -> None:
    hidden, labels, weight = data
    for closes in (True, False):

        def by_pieces(hidden: Tensor, closes=closes) -> Tensor:
            if closes:
                return microbatch(lambda h, y: _head(h, y, weight), microbatch_size=4)(hidden, labels).value
            return microbatch(_head, microbatch_size=4, in_dims=(0, 0, None))(hidden, labels, weight).value

        plain = torch.func.grad_and_value(lambda hidden: _head(hidden, labels, weight).value)(hidden.detach())
        tiled = torch.func.grad_and_value(by_pieces)(hidden.detach())
        _same(tiled, plain)
        for one, other in zip(tiled, plain, strict=True):
            _same(
                torch.autograd.grad(one.square().sum(), weight, retain_graph=True),
                torch.autograd.grad(other.square().sum(), weight, retain_graph=True),
            )


@pytest.mark.parametrize("depends", [True, False])
def test_a_piece_may_leave_an_input_unused_under_vmap(depends: bool) -> None:
    w, v, x = _double(3, 4), _double(3, 4, seed=1), _double(6, 4, seed=2)

    def func(x: Tensor, w: Tensor, v: Tensor, n: Tensor) -> Tensor:
        total = x.sum() * 0 if n[0] < 2 and not depends else (x * w).sum()
        return total + ((x * v).sum() if n[0] > 3 else 0)

    def loss(w: Tensor, v: Tensor, tiled: bool) -> Tensor:
        n = torch.arange(6)
        if tiled:
            return microbatch(func, microbatch_size=2, in_dims=(0, None, None, 0), out="sum")(x, w, v, n)
        return sum(func(x[i : i + 2], w, v, n[i : i + 2]) for i in (0, 2, 4))

    for tree in ((w, v), (w[0], v[0])):
        grad = torch.func.grad(loss, (0, 1))
        grad = torch.vmap(grad, (0, 0, None)) if tree[0].ndim == 2 else grad
        _same(grad(*tree, True), grad(*tree, False))


def test_the_functional_checkpoint_keeps_inputs_only() -> None:
    kept: list[int] = []

    layers = [_double(16, 16, seed=n) for n in range(8)]

    def block(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x @ w).sin()
        return x

    def loss(layers: list[Tensor], x: Tensor, checkpoints: bool) -> Tensor:
        for w in layers:
            x = microbatch(block, steps=1, in_dims=(None, 0))(w, x) if checkpoints else block(w, x)
        return x.sum()

    x, grads = _double(512, 16), []
    for checkpoints in (False, True):
        with PeakElements() as counter:
            grads.append(torch.func.grad(loss)(layers, x, checkpoints))
        kept.append(counter.peak)
    _same(grads[0], grads[1])
    assert kept[1] < kept[0] / 3


def test_matrix_products_add_into_the_gradient_themselves(monkeypatch) -> None:
    from gradacc._engines import fused

    added: list[str] = []
    add = fused.add
    monkeypatch.setattr(fused, "add", lambda use, buffer, grad: (added.append(use.node.name()), add(use, buffer, grad)))
    layer, x = nn.Linear(300, 400, dtype=torch.float64), _double(12, 300)
    layer(x).square().sum().backward()
    expected = _grads(layer)
    for backward, func, out in (("recompute", layer, "concat"), ("forward", lambda x: layer(x).square().sum(), "sum")):
        layer.zero_grad()
        added.clear()
        result = microbatch(func, steps=4, out=out, backward=backward)(x)
        (result.square().sum() if out == "concat" else result).backward()
        _same(_grads(layer), expected)
        assert added == ["AddmmBackward0"] * 3  # the first one's gradient is the memory


# Found by attacking it.


def test_float16_anywhere_recomputes() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (F.linear(x, weight).float().tanh() * 1e-9).sum()

    with torch.autocast("cpu", torch.float16):
        total, expected = microbatch(loss, steps=2, in_dims=(0, None), out="sum")(x, weight), loss(x, weight)
    (actual,) = torch.autograd.grad(total * 65536.0, weight)
    (wanted,) = torch.autograd.grad(expected * 65536.0, weight)
    assert actual.abs().sum() > 0
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=1e-6)
    half = x.half().requires_grad_()
    (actual,) = torch.autograd.grad(
        microbatch(lambda x: ((x * 1e-4).float() * 1e-5).sum(), steps=2, out="sum")(half) * 65536.0, half
    )
    assert actual.isfinite().all()
    assert actual.all()


@pytest.mark.parametrize("out", ["sum", "concat", "stack"])
def test_a_closed_over_tensor_that_is_returned(out: str) -> None:
    start, x = _double(3), _double(6, 3)

    def of(weight: Tensor, tiled: bool) -> Tensor:
        if not tiled:
            many = weight * 2 if out == "sum" else torch.cat([weight, weight])
            return (many.sin()).sum() + (x * weight).sum()
        rows, own = microbatch(lambda x: (x * weight, weight), steps=2, out=("concat", out))(x)
        return own.sin().sum() + rows.sum()

    expected = torch.func.grad(of)(start, False)
    _same(torch.func.grad(of)(start, True), expected)
    leaf = start.clone().requires_grad_()
    _same(torch.autograd.grad(of(leaf, True), leaf), (expected,))
    _same(torch.autograd.grad(of(leaf * 1, True), leaf), (expected,))
    only = torch.func.grad(lambda w: microbatch(lambda x: w, steps=2, out="sum")(x).sum())(start)
    _same(only, torch.full_like(start, 2))


def test_a_list_of_a_class_of_its_own_under_a_transform() -> None:
    class Items(list):
        pass

    x, w = _double(6, 3), _double(3)
    grad = torch.func.grad(lambda w: microbatch(lambda x: x * torch.stack(Items([w, w])).sum(0), steps=2)(x).sum())(w)
    _same(grad, 2 * x.sum(0))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
def test_forward_over_forward() -> None:
    x, w = _double(6, 3), _double(3)

    def loss(w: Tensor, tiled: bool) -> Tensor:
        func = microbatch(lambda x, w: (x * w).sin().sum(), steps=2, in_dims=(0, None), out="sum") if tiled else None
        return (x * w).sin().sum() if func is None else func(x, w)

    for twice in (
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
        lambda f: torch.func.jacfwd(torch.func.grad(lambda w: torch.func.jvp(f, (w,), (w,))[1])),
    ):
        _same(twice(functools.partial(loss, tiled=True))(w), twice(functools.partial(loss, tiled=False))(w))


def test_what_func_leaves_elsewhere_is_an_error_of_the_backward_pass() -> None:
    left: list[Tensor] = []

    def func(h: Tensor) -> Tensor:
        y = h.sin()
        left.append(y.pow(2).mean())
        return y

    x = _double(6, 3, grad=True)
    y = microbatch(func, steps=1)(x * 2)
    with pytest.raises(RuntimeError, match="a tensor that func left in another place"):
        (y.sum() + left[0]).backward()


def test_an_iterable_that_draws_random_numbers() -> None:
    weight, x = torch.ones(3, requires_grad=True), torch.ones(6, 3)

    def pieces():
        for part in x.split(2):
            torch.rand(3)
            yield part

    for batch in (torch.utils.data.DataLoader(x, batch_size=2), pieces()):
        y = microbatch(lambda x: F.dropout(x * weight, 0.5))(batch)
        (grad,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
        torch.testing.assert_close(grad, y.sum(0))


def test_an_iterable_that_gives_the_same_memory_again() -> None:
    weight, data, memory = _double(3, grad=True), _double(4, 2, 3), torch.empty(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="gives the same memory again"):
        microbatch(lambda x: (x * weight).square())(memory.copy_(part) for part in data)


def test_state_that_func_writes_or_that_changes_before_the_second_run() -> None:
    x, weight, sums = _double(6, 3), _double(3, grad=True), torch.zeros((), dtype=torch.float64)
    norm, head = nn.BatchNorm1d(3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

    def counting(x: Tensor) -> Tensor:
        sums.add_(x.sum())
        return x * weight

    def normalizing(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = norm(x)
        return head(z)

    for func, name in ((counting, "sums"), (normalizing, r"norm\.")):
        with pytest.raises(ValueError, match=rf"func has changed {name}"):
            microbatch(func, steps=2)(x)
    spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"func has changed func\.parametrizations"):
        microbatch(spectral, steps=1)(x)
    # A closed-over module may be more than what runs: its buffers may change afterwards.
    norm.eval()
    y = microbatch(lambda x: head(norm(x)), steps=2)(x)
    norm.train()(x)
    y.sum().backward()
    factor = torch.ones((), dtype=torch.float64)
    y = microbatch(lambda x: x * factor * weight, steps=2)(x)
    factor.zero_()
    with pytest.raises(RuntimeError, match="factor, which func closes over, has changed in place"):
        y.sum().backward()


def test_a_sharded_module_is_an_error() -> None:
    class FSDPModule(nn.Linear):
        """What a name stands for."""

    inside = FSDPModule(3, 3, dtype=torch.float64)
    for func in (inside, nn.Sequential(inside), lambda x: inside(x)):
        with pytest.raises(ValueError, match="a module that FSDP shards"):
            microbatch(func, steps=2)(_double(6, 3))


def test_pieces_of_pieces_that_close_over_what_was_made_before() -> None:
    weight, x = _double(3, grad=True), _double(8, 3)
    made = weight.sin()
    for backward in ("recompute", "auto"):
        inner = microbatch(lambda x: x * made, steps=2, backward=backward)
        for outer in (microbatch(inner, steps=2), microbatch(lambda x: inner(x).square().sum(), steps=2, out="sum")):  # noqa: B023
            (first,) = torch.autograd.grad(outer(x).square().sum(), weight, retain_graph=True)
            power = 2 if outer(x).ndim else 4
            plain = (x * made).square().sum() if power == 2 else (x * made).square().sum().square()
            _same(first, *torch.autograd.grad(plain, weight, retain_graph=True))


def test_numbers_beside_tensors_that_are_kept() -> None:
    x = _double(6, 3, grad=True)
    total, most = microbatch(lambda x: (x.sum(), len(x)), steps=2, out=("sum", "max"))(x)
    assert most == 3
    _same(torch.autograd.grad(total, x), (torch.ones_like(x),))


def test_a_result_that_was_kept_may_be_changed_in_place() -> None:
    x = _double(6, 3, grad=True)
    y = microbatch(lambda x: (x * 2).sum(0, keepdim=True), steps=1, out="max")(x)
    y.mul_(3)
    _same(torch.autograd.grad(y.sum(), x), (torch.full_like(x, 6),))


def test_a_reducer_that_returns_no_tensor() -> None:
    class Pair:
        init, update = staticmethod(lambda leaf: 0 * leaf), staticmethod(lambda state, leaf: state + leaf)
        finalize = staticmethod(lambda state: (state,))

    with pytest.raises(TypeError, match="finalize of output returned a tuple; it must be a tensor or a number"):
        microbatch(lambda x: x.sum(), steps=2, out=Pair)(_double(6, 3, grad=True))


def test_leaves_that_func_makes_itself() -> None:
    weight, x, late = _double(3, grad=True), _double(12, 3), []

    def func(x: Tensor) -> Tensor:
        own = x.clone().requires_grad_()
        if len(x) == 5:
            late.append(_double(3, seed=9, grad=True))
        return (own * weight).sum() + sum((x * each).sum() for each in late)

    for _ in range(20):
        late.clear()
        total = microbatch(func, out="sum", backward="forward")(list(x.split([2, 3, 2, 5])))
        _same(torch.autograd.grad(total, (weight, late[0])), (x.sum(0), x[7:].sum(0)))


def test_a_reducer_that_closes_over_what_requires_grad() -> None:
    scale = _double(1, grad=True)

    class Scaled:
        init, finalize = staticmethod(lambda leaf: 0 * leaf), staticmethod(lambda state: state)
        update = staticmethod(lambda state, leaf: state + leaf * scale)

    with pytest.raises(ValueError, match="the reducer of output closes over a tensor that requires grad"):
        microbatch(lambda x: x.sum(0), steps=2, out=Scaled)(_double(6, 3))


def test_weight_0_under_a_transform() -> None:
    def mean(x: Tensor) -> Mean:
        kept = (x[:, 0] > 0).sum()
        return Mean(x.sum() * (torch.nan if kept == 0 else 1.0), kept)

    x = torch.tensor([[1.0], [2.0], [-1.0], [-1.0]])
    grad = torch.func.grad(lambda x: microbatch(mean, microbatch_size=2)(x).value)(x)
    torch.testing.assert_close(grad, torch.tensor([[0.5], [0.5], [0.0], [0.0]]))


def test_tensors_of_the_caller_are_not_marked() -> None:
    constant = torch.ones(3)
    torch.func.grad(lambda w: microbatch(lambda x: x * constant.contiguous() * w, steps=2)(torch.ones(4, 3)).sum())(
        constant
    )
    assert not vars(constant)


def test_pieces_of_an_iterable_are_not_kept_without_grad() -> None:
    alive: list[int] = []
    given: list[StorageWeakRef] = []

    def piece(n: int) -> Tensor:
        made = torch.full((3, 77), float(n))
        given.append(StorageWeakRef(made.untyped_storage()))
        return made

    def pieces():
        for n in range(5):
            alive.append(sum(not each.expired() for each in given))
            yield piece(n)

    with torch.no_grad():
        microbatch(lambda x: x.sum(), out="sum")(pieces())
    assert max(alive) <= 1


# What else is promised.


def test_negative_dims(data) -> None:
    _, _, weight = data
    batch = _double(3, 8, 6, seed=2, grad=True)

    def mlp(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.mT).sin() @ weight

    tiled = microbatch(mlp, microbatch_size=3, in_dims=(-2, None), out_dims=-2)
    _same(tiled(batch, weight), mlp(batch, weight))
    expected = torch.autograd.grad(mlp(batch, weight).square().sum(), (batch, weight))
    _same(torch.autograd.grad(tiled(batch, weight).square().sum(), (batch, weight)), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_examples_have_gradients_of_zero(data, steps: int) -> None:
    hidden, labels, weight = data
    loss = microbatch(_head, steps=steps, in_dims=(0, 0, None))(hidden[:0], labels[:0], weight).total
    rows = microbatch(lambda h, w: h @ w.mT, steps=steps, in_dims=(0, None))(hidden[:0], weight)
    assert rows.shape == (0, 11)
    for value in (loss, rows.sum()):
        for grad in torch.autograd.grad(value, (hidden, weight)):
            assert not grad.any()


@pytest.mark.parametrize("backward", WAYS)
def test_a_sum_inside_of_a_checkpoint(data, backward: str) -> None:
    hidden, labels, weight = data
    head = microbatch(_head, microbatch_size=4, in_dims=(0, 0, None), backward=backward)
    loss = checkpoint(lambda h, w: head(h.sin(), labels, w).value, hidden, weight, use_reentrant=False)
    expected = torch.autograd.grad(_head(hidden.sin(), labels, weight).value, (hidden, weight))
    _same(torch.autograd.grad(loss, (hidden, weight)), expected)


def test_a_sum_of_half_precision_over_100_000_rows_and_its_gradient() -> None:
    weight = torch.ones(1, dtype=torch.float16, requires_grad=True)
    rows = torch.full((100_000, 1), 0.25, dtype=torch.float16)
    total = microbatch(lambda x, w: (x * w).sum(), microbatch_size=500, in_dims=(0, None), out="sum")(rows, weight)
    assert total == 25_000  # 0.25 + ... in float16 stops at 512
    (grad,) = torch.autograd.grad(total, weight)
    assert grad == 25_000


def test_a_weight_is_rounded_once_under_a_transform() -> None:
    x = torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16)
    loss = microbatch(lambda x, w: (x * w).sum(), microbatch_size=1, in_dims=(0, None), out="sum")
    assert torch.func.grad(lambda w: loss(x, w)[None].sum())(torch.ones(1, dtype=torch.bfloat16)) == 1
