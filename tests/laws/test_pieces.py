"""Law 10: `microbatch(f, any split)` equals `f`, with its first and second derivatives, in both ways back."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import gradacc
from gradacc import microbatch
from tests.helpers import ENGINES, everything_fused, some_slow
from tests.laws.programs import (
    LIGHT,
    OUTPUTS,
    SCALARS,
    Program,
    Split,
    all_splits,
    by_hand,
    inputs,
    pieces_of,
    programs,
    sizes_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward mode
DIMS = (0, None, None)
seeds = st.integers(0, 2**16)


def close(actual: Any, expected: Any) -> None:
    """Of one structure, and equal up to rounding, which is relative to the largest number of all."""
    leaves, treedef = optree.tree_flatten(actual, namespace="gradacc", none_is_leaf=True)
    others, other = optree.tree_flatten(expected, namespace="gradacc", none_is_leaf=True)
    assert treedef == other
    sizes = [float(leaf.detach().double().abs().max()) for leaf in others if isinstance(leaf, Tensor) and leaf.numel()]
    for a, b in zip(leaves, others, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * max(1.0, *sizes))
        else:
            assert type(a) is type(b)
            assert a == b


def numbers(output: Any) -> list[Tensor]:
    """What has a derivative: floating leaves, and a Mean divided."""
    leaves = optree.tree_leaves(output, is_leaf=lambda node: isinstance(node, gradacc.Mean), namespace="gradacc")
    values = [leaf.value if isinstance(leaf, gradacc.Mean) else leaf for leaf in leaves]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def score(output: Any) -> Tensor:
    """One number of all, with another cotangent for each entry."""
    return sum(
        (
            (torch.arange(value.numel(), dtype=value.dtype) + i + 1).sin().view(value.shape) * (value + value.square())
        ).sum()
        for i, value in enumerate(numbers(output))
    )


def gradients(total: Tensor, tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(total, tensors, allow_unused=True, **options)
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(found, tensors, strict=True)]


def derivatives(output: Any, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """First ones, and the gradient of a function of those and of the tensors."""
    first = gradients(score(output), tensors, create_graph=True)
    mixed = sum((grad.square() + grad * t.sin()).sum() for grad, t in zip(first, tensors, strict=True))
    return first, gradients(mixed, tensors)


def cases(draw: Callable[..., Any], outputs: Sequence[str] = tuple(OUTPUTS), **grammar: Any) -> Any:
    """A program, how many examples, and a way to split them."""
    program = draw(programs(outputs=outputs, **grammar))
    size = draw(st.sampled_from((4, 5, 6, 3, 2, 1)))
    return program, size, draw(all_splits(size, empty=program.of_nothing))


def expected_of(program: Program, split: Split, batch: dict[str, Tensor], w: Tensor, b: Tensor, closed: Tensor) -> Any:
    """The function of the whole; where there is none, the loop over pieces."""
    function = program.closing(closed)
    if program.of_the_whole:
        return function(batch, w, b)
    return by_hand(program, [function(piece, w, b) for piece in pieces_of(batch, split.sizes)], split.sizes)


def by_pieces(program: Program, split: Split, backward: str, closed: Tensor) -> Callable[..., Any]:
    """With the batch as this split wants it."""
    run = microbatch(program.closing(closed), in_dims=DIMS, backward=backward, **program.options, **split.options)
    return lambda batch, w, b: run(split.argument(batch), w, b)


# Plain autograd.


def check_plain(draw: Callable[..., Any], **grammar: Any) -> None:
    program, size, split = cases(draw, **grammar)
    x, label, w, b, closed = inputs(size, draw(seeds))
    batch = {"x": x, "label": label}
    expected = expected_of(program, split, batch, w, b, closed)
    wanted = derivatives(expected, [x, w, b, closed])
    for backward in program.backwards:
        actual = by_pieces(program, split, backward, closed)(batch, w, b)
        close(actual, expected)
        close(gradients(score(actual), [x, w, b, closed], retain_graph=True), wanted[0])
        close(derivatives(actual, [x, w, b, closed]), wanted)
    with torch.no_grad():
        quiet = by_pieces(program, split, "auto", closed)(batch, w, b)
    assert not any(value.requires_grad for value in numbers(quiet))
    close(
        quiet,
        optree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf,
            expected,
            none_is_leaf=True,
            namespace="gradacc",
        ),
    )


@settings(max_examples=100)
@given(data=st.data())
def test_any_split_of_any_function_is_the_function(data):
    check_plain(data.draw)


@settings(max_examples=40)
@given(data=st.data())
def test_gradients_taken_with_the_forward_pass(data):
    check_plain(data.draw, outputs=(data.draw(st.sampled_from(SCALARS)), "labels", "count", "constants"))


# torch.func's transforms.


def as_function(program: Program, split: Split, label: Tensor) -> Callable[..., Any]:
    """Of ``x, w, b, closed``, by pieces."""
    return lambda x, w, b, closed: by_pieces(program, split, "auto", closed)({"x": x, "label": label}, w, b)


def plainly(program: Program, split: Split, label: Tensor) -> Callable[..., Any]:
    return lambda x, w, b, closed: expected_of(program, split, {"x": x, "label": label}, w, b, closed)


def check_func(draw: Callable[..., Any], transform: Callable[[Callable[..., Any], list[Tensor]], Any]) -> None:
    program, size, split = cases(draw)
    x, label, w, b, closed = inputs(size, draw(seeds), grad=False)
    actual = transform(as_function(program, split, label), [x, w, b, closed])
    close(actual, transform(plainly(program, split, label), [x, w, b, closed]))


def scored(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *tensors: score(function(*tensors))


def numbered(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    return lambda *tensors: numbers(function(*tensors))


def of_grad(function, tensors):
    return torch.func.grad_and_value(scored(function), argnums=(0, 1, 2, 3))(*tensors)


def of_grad_of_a_weight(function, tensors):
    x, *rest = tensors
    return torch.func.grad(lambda *rest: score(function(x, *rest)), argnums=(0, 2))(*rest)


def of_grad_of_grad(function, tensors):
    first = torch.func.grad(scored(function), argnums=(0, 1, 2, 3))
    return torch.func.grad(lambda *tensors: sum(g.square().sum() for g in first(*tensors)), argnums=(0, 1, 2, 3))(
        *tensors
    )


def of_jvp(function, tensors):
    return torch.func.jvp(numbered(function), tuple(tensors), tuple(t.cos() for t in tensors))


def of_jvp_of_grad(function, tensors):
    first = torch.func.grad(scored(function), argnums=(0, 1, 2, 3))
    return torch.func.jvp(first, tuple(tensors), tuple(t.cos() for t in tensors))


def of_hessian(function, tensors):
    return torch.func.hessian(lambda w, closed: score(function(tensors[0], w, tensors[2], closed)), (0, 1))(
        tensors[1], tensors[3]
    )


def of_vmap(function, tensors):
    x, w, b, closed = tensors
    many = torch.stack([w, w.sin(), 2 * w], 1)
    return torch.vmap(numbered(function), (None, 1, None, None))(x, many, b, closed)


def of_vmap_of_grad(function, tensors):
    x, w, b, closed = tensors
    many = torch.stack([x, x.sin()]), w, b, torch.stack([closed, 2 * closed])
    return torch.vmap(torch.func.grad(scored(function), argnums=(0, 1, 2, 3)), (0, None, None, 0))(*many)


def of_grad_of_vmap(function, tensors):
    x, w, b, closed = tensors

    def total(w, closed):
        many = torch.vmap(scored(function), (0, None, None, None))(torch.stack([x, x.sin()]), w, b, closed)
        return many.square().sum()

    return torch.func.grad(total, argnums=(0, 1))(w, closed)


TRANSFORMS = {
    function.__name__[3:]: function
    for function in (
        of_grad,
        of_grad_of_a_weight,
        of_grad_of_grad,
        of_jvp,
        of_jvp_of_grad,
        of_hessian,
        of_vmap,
        of_vmap_of_grad,
        of_grad_of_vmap,
    )
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@settings(max_examples=12)
@given(data=st.data())
def test_transforms_of_any_function(transform, data):
    check_func(data.draw, TRANSFORMS[transform])


# Random numbers: the loop over the same pieces, written by hand, is what is promised.


def check_dropout(draw: Callable[..., Any], backward: str) -> None:
    program, size, split = cases(draw, steps=(*LIGHT, "dropout"), last="dropout")
    x, label, w, b, closed = inputs(size, draw(seeds))
    batch, function = {"x": x, "label": label}, program.closing(closed)
    torch.manual_seed(7)
    outputs = [function(piece, w, b) for piece in pieces_of(batch, split.sizes)]
    after = torch.get_rng_state()
    expected = by_hand(program, outputs, split.sizes)
    wanted = derivatives(expected, [x, w, b, closed])
    torch.manual_seed(7)
    actual = by_pieces(program, split, backward, closed)(batch, w, b)
    close(actual, expected)
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(5)
    moved = torch.get_rng_state()
    close(derivatives(actual, [x, w, b, closed]), wanted)
    assert torch.equal(torch.get_rng_state(), moved)


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@settings(max_examples=25)
@given(data=st.data())
def test_random_numbers_are_the_hand_written_loops(backward, data):
    check_dropout(data.draw, backward)


@settings(max_examples=25)
@given(data=st.data())
def test_random_numbers_under_grad_are_the_hand_written_loops(data):
    program, size, split = cases(data.draw, steps=(*LIGHT, "dropout"), last="dropout")
    x, label, *rest = inputs(size, data.draw(seeds), grad=False)

    def loop(x: Tensor, w: Tensor, b: Tensor, closed: Tensor) -> Tensor:
        pieces, function = pieces_of({"x": x, "label": label}, split.sizes), program.closing(closed)
        return score(by_hand(program, [function(piece, w, b) for piece in pieces], split.sizes))

    states, found = [], []
    for function in (loop, scored(as_function(program, split, label))):
        torch.manual_seed(7)
        found.append(torch.func.grad_and_value(function, argnums=(0, 1, 2, 3))(x, *rest))
        states.append(torch.get_rng_state())
    close(found[1], found[0])
    assert torch.equal(*states)


# Inside of accumulate: pieces of micro-batches.


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20)
@given(data=st.data())
def test_inside_of_accumulate(engine, data):
    draw = data.draw
    program = draw(programs(outputs=SCALARS, last="matmul, closed over"))._replace(outputs=("Mean",))
    size, steps = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    own = draw(st.sampled_from([{"steps": 1}, {"steps": 2}, {"microbatch_size": 1}, {"microbatch_size": 2}]))
    x, label, w, b, closed = inputs(size, draw(seeds), grad=False)
    params, batch = {"w": w, "b": b, "closed": closed}, {"x": x, "label": label}

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor], backward: str | None) -> gradacc.Mean:
        function = program.closing(params["closed"])
        if backward is not None:
            function = microbatch(function, in_dims=DIMS, backward=backward, **program.options, **own)
        return function(batch, params["w"], params["b"])

    expected = torch.func.grad_and_value(lambda params: loss(params, batch, None).value)(params)
    for backward in program.backwards:
        grads, mean = ENGINES[engine](
            lambda backward=backward: gradacc.accumulate_and_value(loss, steps=steps, in_dims=(None, 0, None))(
                params, batch, backward
            )
        )
        close((grads, mean.value), expected)


# Compiled.

COMPILED = {
    "each": (Program(("matmul", "tanh", "cumsum"), ("each",)), {"microbatch_size": 2}),
    "Mean": (Program(("matmul, closed over", "softmax", "lookup"), ("Mean",)), {"steps": 2}),
    "several": (Program(("residual", "gate"), ("a number each", "mean", "max", "labels")), {"steps": 3}),
    "stack and along dim 1": (Program(("sin",), ("stack", "along dim 1")), {"steps": 2}),
}


@pytest.mark.parametrize("name", some_slow(COMPILED, "Mean"))
def test_compiled(name):
    torch._dynamo.reset()
    program, options = COMPILED[name]
    split = Split(options, sizes_of(6, options))
    x, label, w, b, closed = inputs(6, 0)
    run = torch.compile(by_pieces(program, split, "auto", closed), backend="aot_eager", fullgraph=True)
    expected = expected_of(program, split, {"x": x, "label": label}, w, b, closed)
    actual = run({"x": x, "label": label}, w, b)
    close(actual, expected)
    close(gradients(score(actual), [x, w, b, closed]), gradients(score(expected), [x, w, b, closed]))
    func = torch.compile(
        torch.func.grad(
            lambda w: score(
                by_pieces(program, split, "auto", closed.detach())({"x": x.detach(), "label": label}, w, b.detach())
            )
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    close(
        func(w.detach()), gradients(score(expected_of(program, split, {"x": x, "label": label}, w, b, closed)), [w])[0]
    )


# Products that add into a gradient, at any size.


@settings(max_examples=25)
@given(data=st.data())
def test_with_every_weight_fused(data):
    everything_fused(lambda: check_plain(data.draw))


# Plain autograd through a transform's result.


def check_plain_of_func(draw: Callable[..., Any]) -> None:
    program, size, split = cases(draw)
    x, label, w, b, closed = inputs(size, draw(seeds))

    def found(make: Callable[..., Callable[..., Any]]) -> Any:
        function = make(program, split, label)
        first = torch.func.grad(lambda w: score(function(x, w, b, closed)))(w)
        tensors = [x, w, b, closed]
        mixed = first.square().sum() + sum((t.sin().sum() for t in tensors), torch.zeros((), dtype=x.dtype))
        return first, gradients(mixed, tensors)

    close(found(as_function), found(plainly))


@settings(max_examples=20)
@given(data=st.data())
def test_plain_autograd_of_what_grad_returned(data):
    check_plain_of_func(data.draw)


# Forward mode of plain autograd.


@settings(max_examples=15)
@given(data=st.data())
def test_dual_numbers(data):
    program, size, split = cases(data.draw)
    x, label, w, b, closed = inputs(size, data.draw(seeds), grad=False)
    found = []
    for make in (as_function, plainly):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.cos()) for t in (x, w, b, closed)]
            values = [forward_ad.unpack_dual(value) for value in numbers(make(program, split, label)(*duals))]
            found.append([(v.primal, torch.zeros_like(v.primal) if v.tangent is None else v.tangent) for v in values])
    close(*found)


# `.backward()` adds into `.grad`, once.


@settings(max_examples=15)
@given(data=st.data())
def test_backward_adds_into_grad(data):
    program, size, split = cases(data.draw)
    x, label, *rest = tensors = inputs(size, data.draw(seeds))
    leaves = [x, *rest]
    expected = gradients(score(expected_of(program, split, {"x": x, "label": label}, *rest)), leaves)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    score(by_pieces(program, split, "auto", rest[2])({"x": x, "label": label}, *rest[:2])).backward()
    close([leaf.grad for leaf in leaves], [1 + grad for grad in expected])
    assert tensors[1].grad is None


# The same, longer.


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["plain", "forward", "dropout", *TRANSFORMS])
def test_many_more(transform):
    @settings(max_examples=400)
    @given(data=st.data())
    def law(data: Any) -> None:
        if transform == "plain":
            check_plain(data.draw)
        elif transform == "forward":
            check_plain(data.draw, outputs=(data.draw(st.sampled_from(SCALARS)), "labels", "count", "constants"))
        elif transform == "dropout":
            check_dropout(data.draw, "recompute")
        else:
            check_func(data.draw, TRANSFORMS[transform])

    law()
