"""While Dynamo traces: one way to write a part of the graph and, where it cannot be traced, another.

NOTE [what cannot be a loop]
    The body of a ``scan`` is a graph of its own, of which Dynamo asks more than of straight code: a loss must not append to a
    list or count its calls, and the tensors that it closes over must not share memory (parameters that are views of one flat
    tensor do). Such a loss traces where the loop is unrolled. What Dynamo raises about a body ends the compilation: no ``try``
    in traced code sees it. So an attempt is an operator, traced by a class of our own: there it can be caught, and what it left
    behind be taken back (what was noted of side effects, the modes and functorch levels that it had entered, the operator
    itself: a float that changes from call to call is symbolic to Dynamo, which makes it an input of the body, where a
    ``scan`` takes tensors and integers only). This uses Dynamo's internals; where a version has other names, the attempt is
    made, and its error raised.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import HigherOrderOperator

T = TypeVar("T")

_NAME = "gradacc_attempt"


def attempt(first: Callable[[], T], second: Callable[[], T], otherwise: str) -> tuple[T, bool]:
    """``first(), True``; where Dynamo cannot trace that ``second(), False``, and a warning: ``otherwise``, and why.

    Where warnings are errors, what Dynamo said of the first is raised.
    """
    if not _register():
        return first(), True
    result: tuple[T, bool] = _attempt(lambda: (first(), True), lambda: (second(), False), otherwise)
    return result


class _Attempt(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__(_NAME)  # type: ignore[no-untyped-call]  # torch's

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("only Dynamo meets it")


_attempt = _Attempt()


def _register() -> bool:
    """Whether Dynamo knows of attempts; it runs this when it traces one, and takes the result for a constant."""
    try:
        from torch._dynamo.exc import TorchRuntimeError, UncapturedHigherOrderOpError, Unsupported
        from torch._dynamo.variables import higher_order_ops

        known: Any = higher_order_ops._hop_name_to_variable_class
        discarding = higher_order_ops.discard_graph_changes
        base: Any = higher_order_ops.TorchHigherOrderOperatorVariable
    except (ImportError, AttributeError):
        return False
    if _NAME in known:
        return True

    class AttemptVariable(base):  # type: ignore[misc]  # of a class that is looked up
        _HOP_NAME = "gradacc's loop over micro-batches"

        def _call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
            first, second, otherwise = args
            try:
                restore = _saved(tx)
            except (AttributeError, TypeError):  # other names
                return first.call_function(tx, [], {})
            before = set(tx.output.graph.nodes)
            try:
                return first.call_function(tx, [], {})
            except (Unsupported, UncapturedHigherOrderOpError, TorchRuntimeError) as error:
                failed = error
            why = _forget(tx.output.graph, before) or f"torch says: {_summary(failed)}"
            with discarding(tx):  # leaving a mode is a node, too
                restore()
            result = second.call_function(tx, [], {})
            try:
                warnings.warn(f"{otherwise.as_python_constant()}. {why}", stacklevel=2)
            except UserWarning as warning:
                raise failed from warning
            return result

    known[_NAME] = AttemptVariable
    return True


_register._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result imports Dynamo


def _saved(tx: Any) -> Callable[[], None]:
    """What Dynamo and torch know where an attempt begins, as a function that takes them back there."""
    output, modes, entered = tx.output, tx.symbolic_torch_function_state, len(tx.output.cleanup_hooks)
    effects = output.side_effects
    tables = effects.clone()  # the object itself goes on: others hold it
    switches = {name: value for name, value in vars(modes).items() if name != "mode_stack"}
    stack = list(modes.mode_stack)
    state: dict[str, tuple[Callable[[Any], object], Any]] = {}
    output.save_global_state(state)

    def restore() -> None:
        while len(output.cleanup_hooks) > entered:
            output.cleanup_hooks.pop()()
        for setter, value in state.values():
            setter(value)
        vars(modes).update(switches)
        modes.mode_stack.clear()
        modes.mode_stack.extend(stack)
        # not what it knows of objects that the attempt met first: their trackers are kept elsewhere, and met again
        effects.store_attr_mutations, effects.attr_mutation_kinds = (
            tables.store_attr_mutations,
            tables.attr_mutation_kinds,
        )
        output.side_effects = effects

    return restore


def _forget(graph: torch.fx.Graph, before: set[torch.fx.Node]) -> str | None:
    """Remove operators with bodies that are in a graph though tracing them failed; and what they failed for, if it is known."""
    left = [n for n in graph.nodes if n not in before and isinstance(n.target, HigherOrderOperator) and not n.users]
    floats = [number for node in left for number in node.all_input_nodes if _is_float(number)]
    for node in left:
        graph.erase_node(node)
    if not floats:
        return None
    names = ", ".join(dict.fromkeys(map(_origin, floats)))
    return (
        f"It uses a Python float that changes from call to call ({names}), and torch takes no float into the body of a loop: "
        "pass it as a 0-dim tensor, in an argument that is not split"
    )


def _is_float(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymFloat)


def _origin(number: torch.fx.Node) -> str:
    """Where a float comes from: Dynamo makes a 0-dim tensor of it, an input of the graph, and reads that."""
    for node in (number, *number.all_input_nodes):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None:
            return str(source.name)
    return str(number.name)


def _summary(error: Any) -> str:
    """Of Dynamo's page of text: what is wrong, with what, and the line of the loss, where it is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("This higher order operator")] or [type(error).__name__]
    label = "Developer debug context:"
    parts = [
        said[0],
        *(line.removeprefix(label).strip().removesuffix(" in") for line in said if line.startswith(label)),
    ]
    frames = list(getattr(error, "real_stack", None) or ())
    inside = not frames or frames[-1].filename.startswith(os.path.dirname(torch.__file__))
    place = "" if inside else f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return ": ".join(part.rstrip(".:") for part in parts[:2]) + place
