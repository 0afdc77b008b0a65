"""``optax.microbatching`` as a table of (function, accumulator, sizes): here on both engines, and beside optax itself.

After optax/microbatching/_microbatching_test.py (github.com/google-deepmind/optax): the same equations, written anew, with
sizes that do not divide the batch, gradients, and what optax has no test of. `tests.optax_oracle` is the other side.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradacc import microbatch
from tests import optax_oracle
from tests.helpers import ENGINES, assert_trees_close, some_slow
from tests.optax_oracle import flat

D = torch.float64
SIZES = (1, 2, 3, 4, 5, 7, 10, 11)
GIVEN = {name: torch.from_numpy(value) for name, value in optax_oracle.inputs().items()}
SCALE, FIRST, SECOND = GIVEN["scale"], GIVEN["first"], GIVEN["second"]
ENGINE = {name: ENGINES[name] for name in ("eager", "functional")}


def each(a: Tensor, x: Tensor, y: Tensor) -> Any:
    return x * y, x / y * a


def total(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (a + x + 2 * y).sum(0)


def mean(a: Tensor, x: Tensor, y: Tensor) -> Any:
    return (a * x).mean(), {"key": y.mean()}


def everything(a: Tensor, x: Tensor, y: Tensor) -> Any:
    return {"each": each(a, x, y), "sum": total(a, x, y), "mean": mean(a, x, y)}


def extremes(a: Tensor, x: Tensor, y: Tensor) -> Any:
    return (a * x).amax(0), y.amin()


TABLE: dict[str, tuple[Callable[..., Any], Any]] = {
    "each": (each, "concat"),
    "sum": (total, "sum"),
    "mean": (mean, "mean"),
    "running mean": (mean, "mean"),
    "everything": (everything, {"each": "concat", "sum": "sum", "mean": "mean"}),
    "extremes": (extremes, ("max", "min")),
}


def loss(params: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x @ params - y).square().mean()


def per_example(size: int) -> Callable[..., Any]:
    """``micro_grad``: gradients of each example, transformed and summed; values and norms of each."""

    def of_one(params: Tensor, x: Tensor, y: Tensor) -> Any:
        grad, value = torch.func.grad_and_value(loss)(params, x[None], y[None])
        return grad, grad.square(), value, grad.norm()

    def of_some(params: Tensor, x: Tensor, y: Tensor) -> Any:
        grads, squares, values, norms = torch.vmap(of_one, (None, 0, 0))(params, x, y)
        return grads.sum(0), squares.sum(0), values, norms

    return microbatch(of_some, microbatch_size=size, in_dims=(None, 0, 0), out=("sum", "sum", "concat", "concat"))


def one_number(scale: Tensor, first: Tensor, size: int) -> Tensor:
    run = microbatch(total, microbatch_size=size, in_dims=(None, 0, 0), out="sum")
    return run(scale, first.sin(), SECOND).square().sum()


@pytest.mark.parametrize("engine", ENGINE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str, size: int, engine: str) -> None:
    function, out = TABLE[name]
    run = microbatch(function, microbatch_size=size, in_dims=(None, 0, 0), out=out)
    assert_trees_close(ENGINE[engine](lambda: run(SCALE, FIRST, SECOND)), function(SCALE, FIRST, SECOND))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TABLE)
def test_gradients_of_the_table(name: str, size: int) -> None:
    function, out = TABLE[name]
    run = microbatch(function, microbatch_size=size, in_dims=(None, 0, 0), out=out)

    def number(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        return sum((leaf.sin() * leaf).sum() for leaf in flat("", function(*tensors)).values())  # type: ignore[return-value]

    tensors = (SCALE, FIRST, SECOND)
    expected = torch.func.grad(lambda *tensors: number(function, *tensors), (0, 1, 2))(*tensors)
    assert_trees_close(torch.func.grad(lambda *tensors: number(run, *tensors), (0, 1, 2))(*tensors), expected)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    assert_trees_close(torch.autograd.grad(number(run, *leaves), leaves), expected)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Tensor]:
    """What optax says, in a process of its own."""
    missing = [name for name in ("jax", "optax") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = tmp_path_factory.mktemp("optax") / "results.npz"
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.optax_oracle", str(path)]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return {name: torch.from_numpy(value.copy()) for name, value in np.load(path).items()}


@pytest.mark.xdist_group("optax")  # which is asked once
@pytest.mark.parametrize("engine", ENGINE)
@pytest.mark.parametrize("size", some_slow(optax_oracle.SIZES, optax_oracle.SIZES[-1]))
def test_beside_optax(theirs, size: int, engine: str) -> None:
    ours: dict[str, Tensor] = {}
    for name, (function, out) in TABLE.items():
        run = microbatch(function, microbatch_size=size, in_dims=(None, 0, 0), out=out)
        if name != "extremes":  # optax has none
            ours |= flat(f"{name}/{size}", ENGINE[engine](lambda run=run: run(SCALE, FIRST, SECOND)))
    if engine == "functional":
        grads = torch.func.grad(one_number, (0, 1))(SCALE, FIRST, size)
    else:
        leaves = SCALE.clone().requires_grad_(), FIRST.clone().requires_grad_()
        grads = torch.autograd.grad(one_number(*leaves, size), leaves)
    ours |= flat(f"gradient/{size}", grads)
    mapped = microbatch(torch.vmap(lambda x, y: (x * y.square()).sum()), microbatch_size=size)
    ours |= flat(f"vmap/{size}", ENGINE[engine](lambda: mapped(FIRST, SECOND)))
    grad_fn = per_example(size)
    ours |= flat(f"grad/{size}", ENGINE[engine](lambda: grad_fn(GIVEN["params"], FIRST, GIVEN["targets"])))
    expected = {name: value for name, value in theirs.items() if name.split("/")[1] == str(size)}
    assert_trees_close(ours, expected, atol=1e-12)


# What else optax's tests promise.


def test_per_example_gradients_of_few_numbers() -> None:
    """Optax's own example, in whose numbers everything can be seen."""
    features, targets = torch.ones(4, 1, dtype=D), torch.arange(4, dtype=D)
    for size in (1, 2, 3, 4):
        grads, squares, values, norms = per_example(size)(torch.zeros(1, dtype=D), features, targets)
        assert (grads, squares) == (torch.tensor([-6.0], dtype=D), torch.tensor([14.0], dtype=D))
        assert torch.equal(values, targets.square() / 2)
        assert torch.equal(norms, targets)


def test_where_it_is_not_the_function() -> None:
    """Products of neighbours see each other. Optax's micro-batches are every other example; ours are neighbours, too."""
    x = torch.arange(6, dtype=D)

    def neighbours(x: Tensor) -> Tensor:
        return x[:-1] @ x[1:]

    assert neighbours(x) == 0 * 1 + 1 * 2 + 2 * 3 + 3 * 4 + 4 * 5
    assert microbatch(neighbours, microbatch_size=3, out="sum")(x) == (0 * 1 + 1 * 2) + (3 * 4 + 4 * 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, D])
def test_the_dtype_is_the_functions(dtype: torch.dtype) -> None:
    run = microbatch(total, microbatch_size=2, in_dims=(None, 0, 0), out="sum")
    assert run(SCALE.to(dtype), FIRST.to(dtype), SECOND.to(dtype)).dtype == dtype


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("out", ["sum", "mean", "concat", "stack", "max"])
def test_the_dimension_that_is_split_does_not_matter(out: str, size: int) -> None:
    first = torch.randn(10, 4, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    other = first.transpose(0, 1)
    results = [
        microbatch(lambda a, b: torch.einsum("bij,bkj->ik", a, b), microbatch_size=size, out=out)(first, first),
        microbatch(lambda a, b: torch.einsum("ibj,kbj->ik", a, b), microbatch_size=size, in_dims=1, out=out)(
            other, other
        ),
        microbatch(lambda a, b: torch.einsum("bij,kbj->ik", a, b), microbatch_size=size, in_dims=(0, -2), out=out)(
            first, other
        ),
        microbatch(
            lambda t: torch.einsum("bij,kbj->ik", t["a"], t["b"]),
            microbatch_size=size,
            in_dims=({"a": 0, "b": 1},),
            out=out,
        )({"a": first, "b": other}),
    ]
    for result in results[1:]:
        assert_trees_close(result, results[0])


def test_calling_conventions() -> None:
    """Positional arguments are split, keyword arguments whole: what optax says with argnums and argnames."""
    a, b, c = torch.ones(4, 3), 2 * torch.ones(4, 3), 3 * torch.ones(3)

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a + b + c).sum(0)

    expected = function(a, b, c)
    for run, positional, named in (
        (microbatch(function, microbatch_size=2, out="sum"), (a, b), {"c": c}),
        (microbatch(function, microbatch_size=2, out="sum", in_dims=(0, 0, None)), (a, b, c), {}),
        (microbatch(lambda *args, **kw: function(*args, **kw), microbatch_size=2, out="sum"), (a, b), {"c": c}),
        (microbatch(lambda t, *, c: function(c=c, **t), microbatch_size=2, out="sum"), ({"a": a, "b": b},), {"c": c}),
    ):
        assert torch.equal(run(*positional, **named), expected)


def test_fewer_micro_batches_than_there_are() -> None:
    """``num_real_microbatches``: the batch is an iterable of pieces, and `itertools.islice` takes some."""
    x = torch.arange(12.0) + 1
    run = microbatch(lambda x: 2 * x)
    assert torch.equal(run(itertools.islice(x.split(3), 2)), 2 * x[:6])
    assert microbatch(torch.sum, out="sum")(itertools.islice(iter(x.split(4)), 2)) == x[:8].sum()
    assert torch.equal(microbatch(torch.vmap(torch.sum))([x[:4], x[4:8]]), x[:8])


@pytest.mark.parametrize("engine", ENGINE)
def test_no_examples(engine: str) -> None:
    nothing, run = torch.zeros(0, 4), ENGINE[engine]
    assert torch.equal(
        run(lambda: microbatch(lambda x: x.sum(0), microbatch_size=2, out="sum")(nothing)), torch.zeros(4)
    )
    assert run(lambda: microbatch(lambda x: x.mean(0), microbatch_size=2, out="mean")(nothing)).isnan().all()
    assert run(lambda: microbatch(lambda x: 2 * x, microbatch_size=2)(nothing)).shape == (0, 4)
    # torch.vmap itself takes no examples only of some functions: of sin, but not of 2 * x.
    assert run(lambda: microbatch(torch.vmap(torch.sin), microbatch_size=2)(nothing)).shape == (0, 4)


def test_disagreeing_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match="microbatch"):
        microbatch(lambda a, b: a + b, microbatch_size=2)(torch.ones(4), torch.ones(5))
