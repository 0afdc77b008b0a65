"""What several test modules share: comparing trees, fingerprints, and running under a functorch transform."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from gradacc._engines import fused

NAMESPACE = "gradacc"


def some_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """All ``cases`` of a `parametrize`: those that are not ``fast`` run in ``make test-slow`` only."""
    cases = list(cases)
    assert all(case in cases for case in fast), "a case that is not there"
    return [case if case in fast else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def value_of(value: Any) -> Tensor:
    """A loss's value as a number: a Mean is divided."""
    return value.value if isinstance(value, gradacc.Mean) else value


def large(loss_fn: Callable[..., Any]) -> Callable[..., Tensor]:
    """The loss as torch.func wants it: what one large batch would have returned, divided."""
    return lambda *args: value_of(loss_fn(*args))


def squares(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """A mean of squares, of the `params` and `batch` that `tests.conftest` has as fixtures."""
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]).square().mean()


def halves(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """That batch of seven as micro-batches of 1, 5 and 1."""
    for rows in (slice(0, 1), slice(1, 6), slice(6, 7)):
        yield {name: leaf[rows] for name, leaf in batch.items()}


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """Same structure, dtypes, shapes, and values within a tolerance."""
    leaves, treedef = optree.tree_flatten(actual, namespace=NAMESPACE)
    others, other = optree.tree_flatten(expected, namespace=NAMESPACE)
    assert treedef == other
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def crossings(counter: CommDebugMode) -> int:
    """Collectives, where an all-to-all and the all-gather behind it, in which ordered sums cross, are one."""
    counts = {str(op): n for op, n in counter.get_comm_counts().items()}
    return sum(counts.values()) - counts.get("c10d.alltoall_base_", 0)


def living_tensors() -> dict[int, Tensor]:
    """All tensors that the garbage collector knows, by ``id``.

    What a call leaves behind is what this has got that an earlier answer has not (while that one is held, no ``id`` is
    given out twice). The number of tensors says less: what earlier tests left behind may go in the meantime.
    """
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)}


class PeakElements(TorchDispatchMode):
    """``peak``: the most elements of tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in optree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {leaf.untyped_storage()._cdata for leaf in tensors}
        result = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(result):
            # What an operation in place returns is there already, and so is the memory of a view.
            if isinstance(leaf, Tensor) and id(leaf) not in self.known and leaf.untyped_storage()._cdata not in given:
                size = leaf.numel()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                self.known.add(id(leaf))
                weakref.finalize(leaf, self._gone, id(leaf), size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size
        self.known.remove(key)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    assert_trees_close(actual, expected, rtol=0, atol=0)


def fingerprint(tree: Any) -> list[Any]:
    """Everything about the tensors of a tree that must not change: bits, version, metadata, grad."""
    return [
        (leaf.dtype, leaf.shape, leaf.stride(), leaf.data_ptr(), leaf._version, leaf.requires_grad, leaf.grad is None)
        + (leaf.detach().contiguous().view(-1).tolist(),)
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in optree.tree_leaves(tree, namespace=NAMESPACE)
    ]


def eager(func: Callable[[], Any]) -> Any:
    """As it is: the eager engine."""
    return func()


def transformed(func: Callable[[], Any]) -> Any:
    """With a functorch transform active (of an argument that does not matter): the functional engine."""
    rest: list[Any] = []

    def inside(unused: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves, treedef = optree.tree_flatten(func(), namespace=NAMESPACE)  # aux of torch.func: tensors only
        rest.append((treedef, leaves))
        return unused, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    tensors = iter(torch.func.vjp(inside, torch.zeros(()), has_aux=True)[2])
    treedef, leaves = rest[0]
    return optree.tree_unflatten(treedef, [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def everything_fused(func: Callable[[], Any]) -> Any:
    """The eager engine, with the weight gradients of small parameters fused too."""
    with mock.patch.object(fused, "_SMALLEST", 1):
        return func()


ENGINES = {"eager": eager, "fused": everything_fused, "functional": transformed}
