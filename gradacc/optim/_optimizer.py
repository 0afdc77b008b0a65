"""`Optimizer`: two pure functions, what is known of them, and the types of what they take.

NOTE [Before anything is changed]

A wrapper that gives memory away (`clip_by_global_norm` scales gradients, `by_path` lets one optimizer after another write)
must know that what it wraps will take the state, before it begins. So an optimizer here has ``check(params, state)``, which
raises what ``step`` would raise for that state of such parameters. One of the caller's own may have none: such a one gets
memory that a wrapper can do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from gradacc._tree import TensorTree

LearningRate: TypeAlias = float | Tensor | Callable[..., float | Tensor]
"""A number, a 0-dim floating tensor, or a function of the step (0, 1, …) that returns one of them.

It may be called several times for a step: it depends on that alone. Eagerly what it says is read; a tensor on an accelerator
makes a step wait for it.
"""


class InitFunction(Protocol):
    """``init(params) -> state``."""

    def __call__(self, params: TensorTree) -> TensorTree: ...


class StepFunction(Protocol):
    """``step(params, grads, state, *, donate=False) -> (params, state)``; with ``loss=None`` where the optimizer takes it.

    To a type checker, ``*args: Any, **kwargs: Any`` says that a step has any further parameters.
    """

    def __call__(
        self, params: TensorTree, grads: TensorTree, state: TensorTree, *args: Any, **kwargs: Any
    ) -> tuple[TensorTree, TensorTree]: ...


class CheckFunction(Protocol):
    """``check(params, state)``: raises what ``step`` would."""

    def __call__(self, params: TensorTree, state: TensorTree) -> object: ...


ReportFunction: TypeAlias = Callable[[Any], Any]
"""A function of a state that returns a number, a 0-dim tensor, or a tuple of them."""


class OptimizerReport(NamedTuple):
    """Functions of a state; None where there is nothing to say."""

    rate: ReportFunction | None = None
    """The learning rate of the update that follows this state."""
    updates: ReportFunction | None = None
    """Updates so far, without those that were skipped."""
    skipped: ReportFunction | None = None
    """Updates skipped so far; None where none can be."""


class Optimizer(NamedTuple):
    """An optimizer as a value: how its state begins, and what one update makes of parameters, gradients and state.

    .. code-block:: python

        state = optimizer.init(params)
        for grads in ...:
            params, state = optimizer.step(params, grads, state)

    Both functions are pure: they hold nothing from call to call and change nothing that they are given. The state is a
    pytree of tensors (the number of the step, too), so it can be saved, batched and traced like the parameters. What is
    returned never shares memory with what came in, and carries no graph, except under a transform (``torch.func``,
    `torch.compile`) and where the gradients or the learning rate themselves require a gradient: there the step is
    differentiable.

    Arguments:
        init: ``init(params) -> state``. ``params`` is a pytree of dense floating or complex tensors.
        step: ``step(params, grads, state, *, donate=False) -> (params, state)``. ``grads`` is a pytree like ``params``, with
            the same shapes, dtypes and devices. With ``donate=True`` all three are given away: the update may be made in
            their memory, and only what is returned may be used afterwards (JAX's ``donate_argnums``). Using one of the
            tensors that were given is then an error, so what is needed later (an average of the parameters) is cloned
            beforehand; views of them and tensors of ``detach()`` are others, which see what is written. A module's own
            parameters stay what they are, and are trained in place where their memory is given. Tensors whose ranges of
            memory overlap (views of one tensor) are copied first. Under a transform nothing is written or given away.
        check: ``check(params, state)`` raises what ``step`` would raise for them, and changes nothing. A wrapper asks it before
            it gives memory away (``donate=True``); without one the step gets copies instead.
        report: what `gradacc.train_step` makes the metrics ``lr``, ``updates`` and ``skipped`` of: three functions of a state,
            ``rate``, ``updates`` and ``skipped``, each of which may be None.
        loss_scale: ``loss_scale(state)``: the factor of the loss whose gradients ``step`` takes, 0-dim. With one an optimizer
            is outermost: wrappers refuse it, and `gradacc.train_step` passes the factor to ``grad_fn``.
        takes_loss: ``step`` takes ``loss=`` too, the value of which ``grads`` are the gradients (0-dim), and
            `gradacc.train_step` passes it. Wrappers refuse such a one, as it would not reach it, but for
            `dynamic_loss_scale`. See `skip_spikes`.
        elementwise: True where the update of an element depends on that element's own gradient and state alone, whatever tensor
            it is in, so that `gradacc.optim.sharded` may give it parts of tensors; a text that says why it does not; or a
            function without arguments that returns either, and is called when `sharded` asks.

    ``Optimizer(other.init, step)`` has none of the last five; ``other._replace(step=step)`` has those of ``other``, which must
    then be true of ``step``.

    Raises:
        TypeError: a leaf that is no tensor, or of a dtype that cannot be updated; a state of another optimizer.
        ValueError: gradients, or a state, whose structure or shapes are not those of the parameters. These errors come
            before anything has been changed, with ``donate=True`` too.

    Example:
        Any pair of such functions is an optimizer.

        >>> import torch, gradacc
        >>> sign = gradacc.optim.Optimizer(
        ...     init=lambda params: (),
        ...     step=lambda params, grads, state, *, donate=False: (params - 0.1 * grads.sign(), state),
        ... )
        >>> sign.step(torch.ones(2), torch.tensor([3.0, -3.0]), sign.init(torch.ones(2)))
        (tensor([0.9000, 1.1000]), ())
    """

    init: InitFunction
    step: StepFunction
    check: CheckFunction | None = None
    report: OptimizerReport = OptimizerReport()
    loss_scale: Callable[[Any], Tensor] | None = None
    takes_loss: bool = False
    elementwise: bool | str | Callable[[], bool | str] = False
