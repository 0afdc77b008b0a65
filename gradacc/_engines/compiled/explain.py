"""While Dynamo traces: what a loss does that cannot be traced under `torch.func.vjp`, said with what can.

Dynamo's errors end the compilation, and no ``try`` in traced code sees them; so the loss is called by an operator, as in
NOTE [what cannot be a loop]. What Dynamo says of anything else is raised as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._ops import HigherOrderOperator

T = TypeVar("T")

_NAME = "gradacc_explain"
_CALLS = {"autograd.grad": "torch.autograd.grad", "backward()": ".backward()", "requires_grad_": ".requires_grad_()"}
"""What of a kind of error of Dynamo's, or of torch's message, tells which call it is about."""


def explained(name: str, loss: Callable[[], T]) -> T:
    """``loss()``; an error about a gradient that it takes inside, in a way that cannot be traced, is one of ours."""
    if not _register():
        return loss()
    result: T = _explain(name, loss)
    return result


class _Explain(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__(_NAME)  # type: ignore[no-untyped-call]  # torch's

    def __call__(self, _: str, loss: Callable[[], Any]) -> Any:
        """Where Dynamo has broken the graph here."""
        return loss()


_explain = _Explain()


def _register() -> bool:
    """Whether Dynamo knows of the operator; it runs this when it traces one, and takes the result for a constant."""
    try:
        from torch._dynamo.exc import TorchRuntimeError, Unsupported
        from torch._dynamo.variables import higher_order_ops

        known: Any = higher_order_ops._hop_name_to_variable_class
        base: Any = higher_order_ops.TorchHigherOrderOperatorVariable
        call = base.call_function
    except (ImportError, AttributeError):
        return False
    if _NAME in known:
        return True

    class ExplainVariable(base):  # type: ignore[misc]  # of a class that is looked up
        _HOP_NAME = "gradacc's call of a loss"

        def _call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
            name, loss = args
            try:
                return loss.call_function(tx, [], {})
            except Unsupported as error:
                # Without fullgraph=True Dynamo breaks the graph for it.
                kind = str(error.gb_type)
                said = _said(name.as_python_constant(), kind)
                if said is None:
                    raise
                raise Unsupported(said, kind, error.skip_frame, real_stack=error.real_stack) from error
            except RuntimeError as error:
                # Functorch's own, of a tensor that is traced: for Dynamo a fault of its own.
                said = _said(name.as_python_constant(), str(error)) if type(error) is RuntimeError else None
                if said is None:
                    raise
                raise TorchRuntimeError(said) from error

    # Without the name of this operator on every other error, which Dynamo notes of the innermost one.
    ExplainVariable.call_function = call
    known[_NAME] = ExplainVariable
    return True


_register._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result imports Dynamo


def _said(name: str, what: str) -> str | None:
    """An error of ours about ``what`` torch says, if that is about a gradient."""
    called = next((call for part, call in _CALLS.items() if part in what), None)
    if called is None:
        return None
    return (
        f"{name}: the loss calls {called}, which cannot be traced in a compiled grad_fn. For a gradient inside a loss (a "
        "gradient penalty, a force) use torch.func.grad, which can: torch.func.grad(energy)(x) for a function energy of x, "
        "without .requires_grad_(). Without torch.compile the loss works as it is"
    )
