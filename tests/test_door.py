"""What the doors show: every type of a public signature, and to type checkers what the factories return.

`make lint` runs mypy on this file, where an `assert_type` fails; the tests run the same lines.
"""

import ast
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, Unpack, assert_type, get_overloads

import pytest
import torch
from torch import Tensor

import gradacc

PACKAGE = Path(gradacc.__file__).parent
DOORS: dict[str, ModuleType] = {
    "gradacc": gradacc,
    **{f"gradacc.{name}": getattr(gradacc, name) for name in ("checkpoint", "data", "optim", "random", "testing")},
}
SOURCES = {
    ".".join(("gradacc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
PUBLIC = {name for door in DOORS.values() for name in door.__all__}

OPAQUE = {"AccumulatorState": "a caller passes it on, and reads no field"}
"""Public classes whose fields are not, and why."""


def loss_fn(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).square().mean()


def test_what_accumulate_returns() -> None:
    assert_type(gradacc.accumulate(loss_fn, steps=2), Callable[..., Any])
    assert_type(gradacc.accumulate(steps=2), Callable[[Callable[..., Any]], Callable[..., Any]])
    assert_type(gradacc.accumulate(steps=2)(loss_fn), Callable[..., Any])
    grads = gradacc.accumulate(steps=2)(loss_fn)(torch.ones(()), torch.arange(4.0))
    assert grads == 7


def test_what_accumulate_and_value_returns() -> None:
    grad_fn = gradacc.accumulate_and_value(loss_fn, steps=2)
    assert_type(grad_fn, Callable[..., tuple[Any, Any]])
    assert_type(gradacc.accumulate_and_value(has_aux=True)(loss_fn), Callable[..., tuple[Any, Any]])
    assert grad_fn(torch.ones(()), torch.arange(4.0)) == (7, 3.5)


def test_what_accumulator_returns() -> None:
    w = torch.ones(())
    acc = gradacc.accumulator(loss_fn, donate=True)
    assert_type(acc, gradacc.Accumulator)
    assert_type(gradacc.accumulator(has_aux=True)(loss_fn), gradacc.Accumulator)
    state = assert_type(acc.init(w), gradacc.AccumulatorState)
    state = assert_type(acc.update(state, w, torch.arange(4.0)), gradacc.AccumulatorState)
    assert assert_type(acc.finalize(state), tuple[Any, Any]) == (7, 3.5)


def test_what_the_others_return() -> None:
    module = torch.nn.Linear(2, 1)
    apply, params, buffers = gradacc.functional(module)
    assert_type(apply, gradacc.Apply)
    assert_type(params, dict[str, Tensor])
    assert_type(buffers, dict[str, Tensor])
    assert apply(params, torch.ones(1, 2), buffers=buffers)[0].shape == (1, 1)
    optimizer = assert_type(gradacc.optim.adamw(lr=1e-3), gradacc.optim.Optimizer)
    optimizer = assert_type(gradacc.optim.clip_by_global_norm(optimizer, 1.0), gradacc.optim.Optimizer)
    careful = assert_type(gradacc.optim.skip_spikes(optimizer), gradacc.optim.Optimizer)
    careful.step(torch.ones(()), torch.ones(()), careful.init(torch.ones(())), loss=torch.ones(()), donate=True)
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, steps=2), optimizer)
    w = torch.ones(())
    state, metrics = step(gradacc.TrainState(w, optimizer.init(w)), torch.arange(4.0))
    assert_type(state, gradacc.TrainState)
    assert_type(metrics, dict[str, Any])
    assert_type(gradacc.all_reduce(), gradacc.AllReduce)
    assert_type(gradacc.data.windows([w], 2), gradacc.data.Windows[Tensor])
    assert assert_type(gradacc.testing.check_accumulation(loss_fn, w, torch.arange(4.0)), gradacc.testing.Report)


def test_a_function_around_a_factory_takes_its_options() -> None:
    def doubled(**options: Unpack[gradacc.AccumulateOptions]) -> Tensor:
        return 2 * assert_type(gradacc.accumulate(loss_fn, **options), Callable[..., Any])(w, x)  # type: ignore[no-any-return]

    w, x = torch.ones(()), torch.arange(4.0)
    assert doubled(steps=2) == 14
    with pytest.raises(TypeError):
        gradacc.accumulate(loss_fn, step=2)  # type: ignore[call-overload]  # an error for type checkers too


@pytest.mark.parametrize("factory", [gradacc.accumulate, gradacc.accumulate_and_value, gradacc.accumulator])
def test_the_overloads_have_the_options_of_the_signature(factory: Callable[..., Any]) -> None:
    (definition,) = [node for node in definitions("gradacc", factory.__name__) if not is_overload(node)]
    assert isinstance(definition, ast.FunctionDef)
    signature = {arg.arg: ast.unparse(arg.annotation or arg) for arg in definition.args.kwonlyargs}
    options = gradacc.AccumulatorOptions if factory is gradacc.accumulator else gradacc.AccumulateOptions
    declared = {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()}
    assert declared == signature
    assert len(get_overloads(factory)) == 2


def is_overload(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and "overload" in map(ast.unparse, node.decorator_list)


def origin(door: str, name: str) -> str:
    """The module that a door has a name from."""
    for node in ast.walk(SOURCES[door]):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module or ""
    return door


def targets(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign | ast.Assign):
        return [
            each.id for each in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(each, ast.Name)
        ]
    return []


def definitions(door: str, name: str) -> list[ast.stmt]:
    """Overloads too."""
    return [node for node in SOURCES[origin(door, name)].body if name in targets(node)]


def annotations(node: ast.stmt, name: str) -> Iterator[ast.expr]:
    """Of a function's signature; of the fields and methods of a class; what an alias stands for."""
    if isinstance(node, ast.FunctionDef):
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        yield from (arg.annotation for arg in every if arg is not None and arg.annotation is not None)
        yield from () if node.returns is None else (node.returns,)
    elif isinstance(node, ast.ClassDef) and name not in OPAQUE:
        for inside in node.body:
            if isinstance(inside, ast.AnnAssign):
                yield inside.annotation
            elif isinstance(inside, ast.FunctionDef) and (inside.name[:1] != "_" or inside.name[:2] == "__"):
                yield from annotations(inside, inside.name)
    elif isinstance(node, ast.AnnAssign | ast.Assign) and node.value is not None:
        yield node.value


@functools.cache
def own_types() -> set[str]:
    """Names of classes and aliases of gradacc, wherever they are."""
    return {
        name
        for module, source in SOURCES.items()
        for node in source.body
        for name in targets(node)
        if not isinstance(node, ast.FunctionDef) and is_type(importlib.import_module(module), name)
    }


def is_type(module: ModuleType, name: str) -> bool:
    """Constants are in capitals, and a `TypeVar` is nobody's own."""
    bare = name.lstrip("_")
    capital = bare[:1].isupper() and not (bare.isupper() and len(bare) > 1)
    return capital and not isinstance(getattr(module, name), TypeVar)


def test_every_type_of_a_public_signature_is_public() -> None:
    used = {
        (f"{door}.{name}", part.id if isinstance(part, ast.Name) else part.attr)
        for door, module in DOORS.items()
        for name in module.__all__
        for node in definitions(door, name)
        for annotation in annotations(node, name)
        for part in ast.walk(annotation)
        if isinstance(part, ast.Name | ast.Attribute)
    }
    own = {(where, name) for where, name in used if name in own_types()}
    assert {"AllReduce", "AccumulatorState", "LearningRate", "StepFunction", "TensorTree"} <= {name for _, name in own}
    assert not {(where, name) for where, name in own if name not in PUBLIC}


def test_doors_have_what_they_list() -> None:
    for door, module in DOORS.items():
        for name in module.__all__:
            assert hasattr(module, name), f"{door}.{name}"
            value = getattr(module, name)
            assert isinstance(value, ModuleType | str) or definitions(door, name), f"{door}.{name}"
