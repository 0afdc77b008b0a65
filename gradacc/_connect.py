"""Results that plain autograd can differentiate: MAML with ``.backward()``, `torch.autograd.functional.jacobian`, a thread
inside a loss.

.. code-block:: text

    results = run(arguments)                                         # by the eager engine: without a graph
    backward(cotangents):
        again = run(arguments)                                       # by the functional engine: with one
        return torch.autograd.grad(again, arguments, cotangents)

NOTE [connected results]
    `torch.func.grad`'s results are connected to whatever requires grad, where grad mode is enabled. Ours are too, or they would
    be constants without a word. The graph is made when a backward pass gets there, by running the call once more: until
    then a result costs nothing but the arguments, which it holds. (Where that is not wanted, in training, parameters do not
    require grad, as those of `gradacc.functional`, or grad mode is disabled.) What a second run cannot do is an error of that
    backward pass: an iterator that is used up, an argument that has changed in place, a loss whose value is another one (or
    whose weight is, or a 0-dim leaf of aux), ``sync=``, and what `torch.func` refuses (activation checkpointing, saved-tensor
    hooks).

    It is the arguments that ask. A tensor that ``loss_fn`` closes over is connected too where an argument requires grad.
    Where none does it is an error of the backward pass, but for an ``nn.Parameter``, which is a constant: a module that is
    used and not trained (a teacher) usually has parameters that require grad.

    A leaf that the loss makes for itself (``x.clone().requires_grad_()``, of a gradient penalty) is closed over by nobody: it
    dies with its micro-batch's graph, so only the leaves that outlive theirs count, and none is kept alive to be counted.

NOTE [derivatives of a second run]
    A derivative is with respect to the arguments alone, not to what they were computed from: autograd goes on from there by
    itself. So the second run is given new leaves. With ``create_graph`` the derivatives are connected in the same way, so
    that their own backward pass runs the call a third time, and differentiates it twice.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradacc import _surroundings, _tree
from gradacc._dtypes import is_inexact
from gradacc._where import functorch_is_active, inside_a_loss, transforming

Function = Callable[[Sequence[Tensor]], Sequence[Any]]
"""A function of tensors, differentiable where grad mode is enabled; what is no tensor of its results has no derivative."""


class Call(NamedTuple):
    """A call whose results are to be connected, before it is made; empty where no argument requires grad."""

    leaves: list[Any]
    treedef: _tree.TreeDef | None
    surroundings: _surroundings.Surroundings | None
    sources: list[Tensor]
    """Leaves that require grad."""


def call_to_connect(arguments: tuple[Any, ...], params: Sequence[Tensor], rest: Any) -> Call | None:
    """A call with these arguments; None where its results are connected by themselves, or are not to be.

    ``params`` are leaves of the arguments, ``rest`` a tree of the others.
    """
    if transforming() or not torch.is_grad_enabled():
        return None
    if not any(param.requires_grad for param in params) and not any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _tree.flatten(rest)[0]
    ):
        return Call([], None, None, [])
    leaves, treedef = _tree.flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sources = [tensor for tensor in tensors if tensor.requires_grad]
    return Call(leaves, treedef, _surroundings.of(tensors), sources)


def connect(name: str, call: Call, results: Any, closed: Iterable[Tensor], run: Callable[..., Any] | str) -> Any:
    """``results``, connected to what requires grad: NOTE [connected results].

    Arguments:
        name: of the factory, for messages.
        call: that gave the results.
        closed: leaves of the graphs of its micro-batches: of arguments, and of what the loss closes over.
        run: ``run(*arguments)`` makes the call again; or why that cannot be, and what to do instead.
    """
    others = list(closed)
    if call.surroundings is None:
        others = [leaf for leaf in others if not isinstance(leaf, nn.Parameter)]
        if not others:
            return results
        run = (
            f"loss_fn closes over a tensor that requires grad (of shape {tuple(others[0].shape)}), while no argument does. "
            "Pass it to grad_fn as an argument, or close over its detach()"
        )
    leaves, treedef = _tree.flatten(results)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and is_inexact(leaf)]
    outputs = [leaves[i] for i in places]
    if isinstance(run, str):
        function, tensors = _refusal(f"{name}: a backward pass has reached the results of a call, but {run}"), []
        others = [*call.sources, *others]
    else:
        tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        value = len(_tree.flatten(results[0])[0])  # the leaf behind the gradients: a loss, or the total of a Mean
        numbers = {i: _copy(leaf) for i, leaf in enumerate(leaves) if i >= value and _is_number(leaf)}
        function = _again(name, call, run, places, (value, numbers))
    connected: Any = Connection.apply(function, len(tensors), outputs, *tensors, *others)  # type: ignore[no-untyped-call]  # torch's
    return _tree.unflatten(treedef, _tree.placed(leaves, places, connected))


class Connection(torch.autograd.Function):
    """``outputs = function(tensors)``, computed before; ``others`` are what the function uses beside its arguments."""

    @staticmethod
    def forward(ctx: Any, function: Function, count: int, outputs: list[Tensor | None], *tensors: Tensor) -> Any:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*(tensors if count else ()))  # a refusal needs nothing, and holds nothing
        ctx.set_materialize_grads(False)
        # Views (of what crossed between ranks) could not be changed in place: the same memory without a base.
        return tuple(output.data if output is not None and output._is_view() else output for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors, others = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:][: ctx.count]) if needed]
        pulled = pullback(ctx.function, ctx.count, others, given, wanted)
        arguments = [*tensors, *(cotangents[i] for i in given)]
        if functorch_is_active():  # (vectorized derivatives are connected by themselves)
            found: Any = pulled(arguments)
        else:
            found = derivatives(pulled, arguments, others, lambda: pulled(arguments))
        grads = _tree.placed([None] * ctx.count, wanted, found[: len(wanted)])
        return None, None, None, *grads, *found[len(wanted) :]


def pullback(
    function: Function, count: int, others: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int]
) -> Function:
    """``pulled(tensors and cotangents)``: derivatives of the ``given`` results by the ``wanted`` tensors, and by the others.

    NOTE [derivatives of a second run]
    """

    def pulled(arguments: Sequence[Tensor]) -> Sequence[Tensor | None]:
        connected = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [leaf.view_as(leaf) if connected else leaf.detach() for leaf in arguments[:count]]
            for i in wanted:
                leaves[i].requires_grad_()
            results = function(leaves)
            pairs = [
                (results[i], cotangent)
                for i, cotangent in zip(given, arguments[count:], strict=True)
                if isinstance(results[i], Tensor) and results[i].requires_grad
            ]
            if not pairs:
                return [None] * (len(wanted) + len(others))
            return torch.autograd.grad(
                [result for result, _ in pairs],
                [*(leaves[i] for i in wanted), *others],
                [cotangent for _, cotangent in pairs],
                retain_graph=True,  # what the loss closes over may have a graph, which is not ours
                create_graph=connected,
                allow_unused=True,
            )

    return pulled


def derivatives(
    pulled: Function, arguments: Sequence[Tensor], others: Sequence[Tensor], compute: Callable[[], Sequence[Any]]
) -> Any:
    """``compute()``, which are ``pulled(arguments)``; connected with ``create_graph``: NOTE [derivatives of a second run]."""
    with torch.no_grad():
        found: Any = compute()
    if torch.is_grad_enabled():
        found = Connection.apply(pulled, len(arguments), found, *arguments, *others)  # type: ignore[no-untyped-call]  # torch's
    return found


def _again(
    name: str, call: Call, run: Callable[..., Any], places: Sequence[int], seen: tuple[int, dict[int, Any]]
) -> Function:
    """The call as a function of its tensors; ``seen``: which leaf of the results is the value, and what numbers there were."""
    moved = [n for n, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    kept = _tree.placed(call.leaves, moved, [None] * len(moved))
    treedef, around, (value, before) = call.treedef, call.surroundings, seen
    assert treedef is not None
    assert around is not None

    def again(tensors: Sequence[Tensor]) -> Sequence[Any]:
        leaves = _tree.placed(map(_copy, kept), moved, tensors)
        with _surroundings.restored(around), inside_a_loss():
            results = _tree.flatten(run(*_tree.unflatten(treedef, leaves)))[0]
        for i, number in before.items():
            what = "value" if i == value else f"number behind it ({i - value}, of the weight and aux)"
            _check_number(name, what, number, results[i])
        return [results[i] for i in places]

    return again


def _is_number(leaf: Any) -> bool:
    """Whether it can be compared without a copy of something large: the value, a weight, a metric."""
    return isinstance(leaf, (int, float)) or (isinstance(leaf, Tensor) and leaf.ndim == 0 and not leaf.is_meta)


def _check_number(name: str, what: str, before: Any, now: Any) -> None:
    """A loss that drew other numbers, or that something has changed, has another value; rounding has not."""
    inexact = isinstance(before, Tensor) and is_inexact(before)
    near = torch.finfo(before.dtype).eps ** 0.5 if inexact else 1e-9
    one, other = _plain(before), _plain(now)
    # What is about 0 by cancellation (a metric) is rounding and nothing else; the value is not let off.
    if one == one and not cmath.isclose(one, other, rel_tol=near, abs_tol=0.0 if what == "value" else near):
        raise RuntimeError(
            f"{name}: a backward pass has reached the results of a call, which makes the call once more, and the {what} was "
            f"{one} and is {other} now: loss_fn draws numbers that are not torch's own (a Generator, NumPy), or what it "
            "closes over has changed. Differentiate with torch.func (torch.func.grad around the call), or call grad_fn "
            "under torch.no_grad() for results without a graph"
        )


def _plain(number: Any) -> Any:
    return number.detach().item() if isinstance(number, Tensor) else number


def _refusal(message: str) -> Function:
    def refuse(_: Sequence[Tensor]) -> Sequence[Any]:
        raise RuntimeError(message)

    return refuse


def _copy(leaf: Any) -> Any:
    """Without its graph. (An inference tensor can neither be saved nor take part in a graph; a copy can.)"""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
