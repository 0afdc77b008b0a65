"""The table "What composes with what" of `docs/transforms.md`, cell by cell.

Where it says yes, a small example equals the same one over `torch.func.grad` of the whole batch; where it says no, it raises.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import gradacc
from tests.helpers import assert_trees_close
from tests.workers import Failed

# torch's own forward mode scripts its decompositions
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

X = torch.arange(10, dtype=torch.float64).view(5, 2).sin()
XS = torch.stack([X, X.cos(), -X])
W = torch.tensor([0.3, -0.7], dtype=torch.float64)
WS = torch.stack([W, 2 * W.cos(), -W])
PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
COLUMNS = ("alone", "in a transform", "compiled")


def table() -> dict[tuple[str, str], str]:
    """``(row, column) -> cell``, read from the page."""
    _, _, section = PAGE.read_text().partition("## What composes with what")
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert tuple(head) == ("composition", *COLUMNS)
    return {(row[0], column): cell for row in rows for column, cell in zip(COLUMNS, row[1:], strict=True)}


TABLE = table()


def f(w, x):
    return torch.tanh(x @ w).square().mean()


def checkpointed(w, x):
    return checkpoint(f, w, x, use_reentrant=False)


def hooked(w, x):
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return f(w, x)


def autocast(w, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return f(w, x).to(w.dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="eager")


def accumulated(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Any]:
    return gradacc.accumulate(loss, **{"steps": 2, **options})


Gradient = Callable[[Tensor, Tensor], Any]

# A transform of a gradient is a function of the same two arguments, so that there can be another one around it.
TRANSFORMS: dict[str, list[Callable[[Gradient], Gradient]]] = {
    "`vmap` over params": [lambda g: lambda w, x: vmap(lambda a: g(a * w, x))(WS)],
    "`vmap` over the batch": [lambda g: lambda w, x: vmap(lambda b: g(w, b * x))(XS)],
    "`vmap` over both": [lambda g: lambda w, x: vmap(lambda a, b: g(a * w, b * x))(WS, XS)],
    "`grad`, `jacrev`, `hessian`": [
        lambda g: grad(lambda w, x: g(w, x).square().sum()),
        lambda g: jacrev(g),
        lambda g: hessian(lambda w, x: g(w, x).square().sum()),
    ],
    "`jvp`, `jacfwd`": [
        lambda g: lambda w, x: jvp(lambda w: g(w, x), (w,), (W.cos(),))[1],
        lambda g: jacfwd(g),
    ],
}
PLAIN = {  # row -> accumulated gradient, the loss that the whole batch's is taken of, relative tolerance
    "`torch.compile(g)`": (lambda: compiled(accumulated(f)), f, 1e-10),
    "`accumulate(torch.compile(f))`": (lambda: accumulated(compiled(f)), f, 1e-10),
    "`torch.autocast`": (lambda: accumulated(autocast), autocast, 2e-2),
    "activation checkpointing": (lambda: accumulated(checkpointed), f, 1e-10),
    "saved-tensor hooks": (lambda: accumulated(hooked), f, 1e-10),
}
BACKWARD = "`backward()` through `g`"


def vmapped(g: Gradient) -> Any:
    return vmap(g, (0, None))(WS, X)


def reverse(g: Gradient) -> Any:
    return jacrev(g)(W, X)


def forward(g: Gradient) -> Any:
    return jacfwd(g)(W, X)


def check(ours: Gradient, theirs: Gradient, call: Callable[[Gradient], Any], rtol: float = 1e-10) -> None:
    assert_trees_close(call(ours), call(theirs), rtol=rtol, atol=rtol / 10)


@pytest.fixture(autouse=True)
def _fresh():
    """No graphs of others; and what torch forgets: compiling a checkpoint in torch.func fails with hooks left disabled."""
    torch._dynamo.reset()
    yield
    torch._C._autograd._saved_tensors_hooks_enable()


def cells(*rows: str) -> list[tuple[str, str]]:
    return [(row, column) for row, column in TABLE if row in rows]


def test_every_cell_is_walked_through():
    walked = {*cells(*TRANSFORMS), *cells(*PLAIN), *cells("`sync=`"), *cells(BACKWARD)}
    assert set(TABLE) == walked == {(row, column) for row in {row for row, _ in TABLE} for column in COLUMNS}
    assert len(TABLE) == 36


@pytest.mark.parametrize(("row", "column"), cells(*TRANSFORMS))
def test_transforms(row, column):
    assert TABLE[row, column] == "yes"
    for transform in TRANSFORMS[row]:
        ours, theirs = transform(accumulated(f)), transform(grad(f))
        if column == "alone":
            check(ours, theirs, lambda g: g(W, X))
        elif column == "in a transform":
            for call in (vmapped, reverse, forward):
                check(ours, theirs, call)
        else:
            contains_the_others = transform is TRANSFORMS[row][-1]  # and compiling takes seconds
            if contains_the_others:
                check(compiled(ours), theirs, lambda g: g(W, X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo itself looks at it
@pytest.mark.parametrize(("row", "column"), cells(BACKWARD))
def test_backward(row, column):
    """Plain autograd, with respect to a tensor that no transform knows of."""

    def pulled_back(g: Gradient, call: Callable[[Gradient], Any]) -> Any:
        scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(call(lambda w, x: g(w * scale, x)).square().sum(), scale)

    assert TABLE[row, column] == "yes"
    ours = compiled(accumulated(f)) if column == "compiled" else accumulated(f)
    for call in (vmapped, reverse, forward) if column == "in a transform" else (lambda g: g(W, X),):
        assert_trees_close(pulled_back(ours, call), pulled_back(grad(f), call))


@pytest.mark.parametrize(("row", "column"), cells(*PLAIN))
def test_losses(row, column):
    make, loss, rtol = PLAIN[row]
    ours, theirs, cell = make(), grad(loss), TABLE[row, column]
    if column == "in a transform":
        works, fails = {
            "yes": ((vmapped, reverse, forward), ()),
            "reverse [1]": ((vmapped, reverse), (forward,)),
            "window [2]": ((vmapped,), (reverse, forward)),
            "no": ((), (vmapped, reverse, forward)),
        }[cell]
        for call in works:
            check(ours, theirs, call, rtol)
        for call in fails:
            with pytest.raises(RuntimeError, match="saved tensor hooks|view functorch tensor"):
                call(ours)
        return
    if column == "compiled":
        ours = compiled(ours)
    if cell == "yes":
        check(ours, theirs, lambda g: g(W, X), rtol)
    else:
        assert cell == "no"
        with pytest.raises(RuntimeError, match="saved.tensor.{,1}hooks|saved_tensors_hooks"):
            ours(W, X)


@pytest.mark.parametrize("call", [vmapped, reverse, forward])
def test_a_compiled_loss_in_a_transform_where_the_micro_batches_are_given(call):
    """[2]"""
    grad_fn, parts = gradacc.accumulate(compiled(f)), [X[:3], X[3:]]
    check(lambda w, x: grad_fn(w, parts), grad(f), call)


def of_ranks(group, column):
    torch._dynamo.reset()
    grad_fn = accumulated(f, sync=gradacc.all_reduce(group))
    mine = [X[:2], X[2:]][group.rank()]
    if column == "in a transform":
        return vmap(grad_fn, (0, None))(WS, mine)
    return (compiled(grad_fn) if column == "compiled" else grad_fn)(W, mine)


@pytest.mark.parametrize(("row", "column"), cells("`sync=`"))
def test_sync(pool, row, column):
    if TABLE[row, column] == "yes":
        for result in pool.run(2, of_ranks, column):
            assert_trees_close(result, grad(f)(W, X))
    else:
        with pytest.raises(Failed, match="NotImplementedError: .*inside a functorch transform"):
            pool.run(2, of_ranks, column)
