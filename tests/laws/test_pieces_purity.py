"""Law 5 for pieces: inputs are bit-identical afterwards, outputs fresh, nothing grows, and what is kept is freed."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradacc import Mean, microbatch
from tests.helpers import fingerprint, living_tensors, some_slow
from tests.laws.programs import all_splits, inputs, programs
from tests.laws.test_pieces import by_pieces, numbers, score, seeds

D = torch.float64
BACKWARDS = ("auto", "recompute", "forward")


def _head(hidden: Tensor, labels: Tensor, weight: Tensor) -> Mean:
    loss = F.cross_entropy(hidden @ weight.mT, labels, reduction="sum", ignore_index=-100)
    return Mean(loss, (labels != -100).sum())


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=D) for shape in ((7, 4), (9, 4)))
    labels = torch.tensor([-100, 3, 1, -100, 8, 0, 2])
    return hidden.requires_grad_(), labels, weight.requires_grad_()


def _loss(data: Any, backward: str, **options: Any) -> Tensor:
    return microbatch(_head, in_dims=(0, 0, None), backward=backward, **(options or {"steps": 3}))(*data).value


# Inputs.


@settings(max_examples=25)
@given(data=st.data())
def test_inputs_are_unchanged_and_outputs_fresh(data):
    draw = data.draw
    program = draw(programs())
    size = draw(st.integers(1, 5))
    split = draw(all_splits(size, empty=program.of_nothing))
    x, label, w, b, closed = given_ = inputs(size, draw(seeds))
    for tensor in (x, w):
        tensor.grad = torch.ones_like(tensor)
    before, grads = fingerprint(given_), fingerprint([x.grad, w.grad])
    for backward in program.backwards:
        output = by_pieces(program, split, backward, closed)({"x": x, "label": label}, w, b)
        torch.autograd.grad(score(output), [x, w, b, closed], allow_unused=True, retain_graph=True)
        assert fingerprint(given_) == before
        assert fingerprint([x.grad, w.grad]) == grads
        with torch.no_grad():
            for value in numbers(output):
                if value.is_leaf or value._base is None:
                    value.zero_()
        assert fingerprint(given_) == before


CONSTANT = torch.arange(4, dtype=D)
RETURNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the input": lambda x, w: x,
    "a view of it": lambda x, w: x.view(-1),
    "a row of it": lambda x, w: x[:1],
    "the input, detached": lambda x, w: x.detach(),
    "what is passed whole": lambda x, w: w,
    "a view of that": lambda x, w: w.mT,
    "a constant": lambda x, w: CONSTANT,
    "a part of a constant": lambda x, w: CONSTANT[1:],
}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "constants", "func"])
@pytest.mark.parametrize("out", ["concat", "sum", "mean", "max", "stack"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RETURNS)
def test_an_output_never_shares_memory(name: str, steps: int, out: str, mode: str) -> None:
    x, w = torch.ones(3, 4, dtype=D), 2 * torch.ones(4, 4, dtype=D)
    if mode in ("grad", "no_grad"):
        x.requires_grad_()
        w.requires_grad_()
    run = microbatch(RETURNS[name], steps=steps, in_dims=(0, None), out=out)
    before = fingerprint([x, w, CONSTANT])
    if mode == "func":
        y = torch.func.vjp(run, x, w)[0]
    else:
        with torch.no_grad() if mode == "no_grad" else torch.enable_grad():
            y = run(x, w)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, w, CONSTANT)}
    assert y.untyped_storage().data_ptr() not in own
    with torch.no_grad():
        y.add_(1)
    assert fingerprint([x, w, CONSTANT]) == before


@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_two_outputs_share_no_memory(backward: str) -> None:
    x = torch.ones(3, 4, dtype=D, requires_grad=True)

    def func(x: Tensor) -> Any:
        y = x.sin()
        return y, y, y[:, :2], y.detach()

    for steps in (1, 2):
        outputs = microbatch(func, steps=steps, backward=backward)(x)
        assert len({y.untyped_storage().data_ptr() for y in outputs}) == 4


def test_changing_gradients_changes_nothing_else(data) -> None:
    """Those of two backward passes, too."""
    for backward in BACKWARDS:
        loss = _loss(data, backward)
        first = torch.autograd.grad(loss, (data[0], data[2]), retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.zero_()
        second = torch.autograd.grad(loss, (data[0], data[2]))
        assert all(torch.equal(a, b) for a, b in zip(second, kept, strict=True))
        storages = [grad.untyped_storage().data_ptr() for grad in (*first, *second)]
        assert len(set(storages)) == 4


# Leaks.


def _plain(backward: str) -> Callable[[Any], Any]:
    def call(data: Any) -> None:
        torch.autograd.grad(_loss(data, backward), (data[0], data[2]))

    return call


def _second(data: Any) -> None:
    (first,) = torch.autograd.grad(_loss(data, "recompute"), data[0], create_graph=True)
    torch.autograd.grad(first.square().sum(), (data[0], data[2]))


def _forgotten(data: Any) -> None:
    """No backward pass at all."""
    _loss(data, "auto")
    _loss(data, "recompute")


def _closing(data: Any) -> None:
    hidden, labels, weight = data
    made = weight * 2
    run = microbatch(lambda h, y: _head(h, y, made), steps=3)
    torch.autograd.grad(run(hidden, labels).value, (hidden, weight))


def _of_func(data: Any) -> None:
    hidden, labels, weight = (tensor.detach() for tensor in data)
    torch.func.grad(lambda w: _loss((hidden, labels, w), "auto"))(weight)
    torch.func.hessian(lambda w: _loss((hidden, labels, w), "auto"))(weight)


def _of_vmap(data: Any) -> None:
    hidden, labels, weight = (tensor.detach() for tensor in data)
    torch.vmap(torch.func.grad(lambda w: _loss((hidden, labels, w), "auto")))(torch.stack([weight, weight]))


def _of_a_failure(data: Any) -> None:
    hidden, _, _ = data
    count: list[None] = []

    def fails(x: Tensor) -> Tensor:
        count.append(None)
        if len(count) == 2:
            raise KeyError
        return x.sin()

    with pytest.raises(KeyError):
        microbatch(fails, steps=3)(hidden)


CALLS = {
    "auto": _plain("auto"),
    "recompute": _plain("recompute"),
    "forward": _plain("forward"),
    "second derivative": _second,
    "forgotten": _forgotten,
    "closing": _closing,
    "func": _of_func,
    "vmap": _of_vmap,
    "failure": _of_a_failure,
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward mode


@pytest.mark.parametrize("name", some_slow(CALLS, "auto"))
def test_nothing_grows_over_200_calls(data, name: str) -> None:
    def call(times: int) -> tuple[int, dict[int, Tensor]]:
        for _ in range(times):
            CALLS[name](data)
        gc.collect()
        return len(gc.get_objects()), living_tensors()

    call(5)
    (objects, tensors), (more, more_tensors) = call(5), call(200)
    assert not more_tensors.keys() - tensors.keys()
    assert more - objects < 50


@pytest.mark.parametrize("name", ["auto", "recompute", "forward", "closing", "forgotten"])
def test_references_die_without_the_garbage_collector(data, name: str) -> None:
    CALLS[name](data)
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        for _ in range(3):
            CALLS[name](data)
        assert not living_tensors().keys() - before.keys()
    finally:
        gc.enable()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_what_is_kept_is_freed_by_the_backward_pass(data, backward: str) -> None:
    hidden, labels, weight = data
    made = hidden.sin()
    gone = weakref.ref(made)
    loss = _loss((made, labels, weight), backward)
    del made
    assert gone() is not None
    torch.autograd.grad(loss, weight, retain_graph=True)
    assert gone() is not None
    torch.autograd.grad(loss, weight)
    assert gone() is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


# What has changed since.


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_an_input_that_has_changed_in_place_is_an_error(data, backward: str, which: int) -> None:
    loss = _loss(data, backward)
    with torch.no_grad():
        data[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (data[0], data[2]))


def test_a_parameter_that_has_changed_in_place_is_an_error() -> None:
    layer, x = nn.Linear(4, 4, dtype=D), torch.ones(5, 4, dtype=D)
    y = microbatch(layer, steps=2)(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert layer.weight.grad is None


# Random numbers, autocast, no_grad.


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_generator_after_forward_and_backward(backward: str) -> None:
    x, w = torch.ones(7, 5, dtype=D), torch.ones(5, dtype=D, requires_grad=True)

    def func(x: Tensor) -> Tensor:
        return (F.dropout(x * w, 0.5) * torch.rand(5, dtype=D)).sum()

    torch.manual_seed(1)
    torch.stack([func(piece) for piece in x.split([3, 2, 2])]).sum().backward()
    expected, w.grad = w.grad, None
    after = torch.get_rng_state()
    torch.manual_seed(1)
    total = microbatch(func, steps=3, out="sum", backward=backward)(x)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(99)
    between = torch.get_rng_state()
    total.backward()
    assert torch.equal(torch.get_rng_state(), between)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_generator_after_an_error_in_the_second_run() -> None:
    x, w, fails = torch.ones(4, 5), torch.ones(5, requires_grad=True), []

    def func(x: Tensor) -> Tensor:
        if fails:
            raise KeyError("second run")
        return F.dropout(x * w, 0.5)

    y = microbatch(func, steps=2)(x)
    fails.append(True)
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="second run"):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_entered_again(inside: bool) -> None:
    """As it was: not as it is in the backward pass."""
    layer, x = nn.Linear(4, 4), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    kinds: list[torch.dtype] = []

    def func(x: Tensor) -> Tensor:
        y = layer(x)
        kinds.append(y.dtype)
        return y.float().square()

    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        for piece in x.split(3):
            layer(piece).float().square().sum().backward()
        expected = [param.grad for param in layer.parameters()]
        layer.zero_grad()
        y = microbatch(func, steps=2)(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        y.sum().backward()
    assert kinds == [torch.bfloat16 if inside else torch.float32] * 4
    actual = [param.grad for param in layer.parameters()]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept(data, mode: Any) -> None:
    hidden, labels, weight = data
    made: list[weakref.ref[Tensor]] = []

    def func(x: Tensor, y: Tensor) -> Tensor:
        logits = x @ weight.mT
        made.append(weakref.ref(logits))
        assert sum(ref() is not None for ref in made) == 1  # of one piece at a time
        return logits.gather(1, y.clamp(min=0)[:, None])

    with mode():
        output = microbatch(func, microbatch_size=2)(hidden, labels)
    assert not output.requires_grad
    assert output.grad_fn is None
    assert not [ref for ref in made if ref() is not None]


@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_the_graph_of_one_piece_at_a_time(data, backward: str) -> None:
    """In the forward pass and in the backward pass."""
    hidden, labels, weight = data
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def func(x: Tensor, y: Tensor) -> Mean:
        logits = (x @ weight.mT).sin()
        made.append(weakref.ref(logits))
        alive.append(sum(ref() is not None for ref in made))
        return Mean(F.cross_entropy(logits, y, reduction="sum", ignore_index=-100), (y != -100).sum())

    microbatch(func, microbatch_size=1, backward=backward)(hidden, labels).value.backward()
    assert len(alive) == (7 if backward == "auto" else 14)
    assert max(alive) <= 2
    assert not [ref for ref in made if ref() is not None]
