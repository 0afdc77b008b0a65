"""`lr`: a number, a 0-dim tensor, or a function of the step; and torch's own schedules as such functions."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradacc import _where
from gradacc._describe import describe
from gradacc._values import positive_int
from gradacc.optim import _check
from gradacc.optim._optimizer import LearningRate


def check_option(name: str, lr: LearningRate) -> LearningRate:
    """``lr`` as a factory was given it, checked as far as it is known."""
    if isinstance(lr, (type, LRScheduler)):
        made = lr.__name__ if isinstance(lr, type) else type(lr).__name__
        raise TypeError(
            f"{name}: lr must be a number, or a function of the step, got {describe(lr)}. "
            f"gradacc.optim.schedule({made}, lr, **options) makes such a function of a scheduler of torch"
        )
    if not isinstance(lr, (numbers.Real, Tensor)) and not callable(lr):
        raise TypeError(f"{name}: lr must be a number, or a function of the step, got {describe(lr)}")
    return lr if callable(lr) else _check.learning_rate(name, lr)


def at_step(name: str, lr: LearningRate, count: Tensor) -> float | Tensor:
    """The learning rate of the update that follows ``count`` others.

    A function gets an int, or under a transform, where none can be read, the 0-dim tensor.
    """
    if not callable(lr):
        return lr
    step = count if _where.transforming() else int(count)
    return _check.learning_rate(name, lr(step), f"lr({step if isinstance(step, int) else 'step'})")


def schedule(
    scheduler: Callable[..., LRScheduler], lr: float, *, length: int | None = None, **options: Any
) -> Callable[[int | Tensor], float | Tensor]:
    """A schedule of ``torch.optim.lr_scheduler`` as a function of the step, for the ``lr`` of any optimizer here.

    .. code-block:: text

        schedule(cls, lr, **options)(n) = lr of cls(optimizer, **options) after n calls of its step(),
                                          where the optimizer began with lr

    which is the learning rate of update n (0, 1, …) in a loop that calls ``optimizer.step()`` and then
    ``scheduler.step()``, to the last bit: the library's scheduler is run, not rewritten. Its values are kept, so update n
    costs one ``step()`` of it in a row, n of them after a jump (a resumed run).

    Arguments:
        scheduler: a class of ``torch.optim.lr_scheduler``, or any function ``(optimizer, **options) -> LRScheduler``, as
            for ``SequentialLR`` and ``ChainedScheduler``, which are made from schedulers of the same optimizer.
        lr: what the optimizer would have begun with.
        length: how many values to put in a table, for steps that are tensors: under `torch.vmap` and `torch.compile`, where
            the step's number cannot be read. From ``length - 1`` on, a tensor step gets the table's last value.
        options: of the scheduler.

    Raises:
        TypeError: ``scheduler`` does not return an ``LRScheduler``, or is ``ReduceLROnPlateau``, which depends on a metric.
        ValueError: the scheduler changes the momentum too (pass ``cycle_momentum=False``); a negative or NaN ``lr``; in the
            function, a negative step, or one that is a tensor under a transform and no ``length``.

    Example:
        >>> import gradacc
        >>> from torch.optim import lr_scheduler
        >>> lr = gradacc.optim.schedule(lr_scheduler.StepLR, 0.1, step_size=2, gamma=0.5)
        >>> [lr(step) for step in range(5)]
        [0.1, 0.1, 0.05, 0.05, 0.025]
        >>> warm = gradacc.optim.schedule(
        ...     lambda optimizer: lr_scheduler.SequentialLR(
        ...         optimizer,
        ...         [
        ...             lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2),
        ...             lr_scheduler.ExponentialLR(optimizer, gamma=0.1),
        ...         ],
        ...         milestones=[2],
        ...     ),
        ...     1.0,
        ... )
        >>> [warm(step) for step in range(4)]
        [0.5, 0.75, 1.0, 0.1]
        >>> optimizer = gradacc.optim.sgd(lr)
    """
    name = "schedule"
    lr = _check.number(name, "lr", lr)
    dummy = SGD([torch.zeros(())], lr=lr)
    driven = _scheduler(name, scheduler, dummy, options)
    values = [_value(name, dummy)]
    advancing = threading.Lock()

    def value(step: int) -> float:
        if step < 0:
            raise ValueError(f"{name}: a step is at least 0, got {step}")
        with advancing:
            while len(values) <= step:
                dummy.step()  # of nothing; a scheduler wants to be after it
                driven.step()
                values.append(_value(name, dummy))
        return values[step]

    if length is not None:
        value(positive_int(name, "length", length) - 1)
    table = None if length is None else torch.tensor(values, dtype=torch.float64)

    def scheduled(step: int | Tensor) -> float | Tensor:
        if not isinstance(step, Tensor):
            return value(step)
        if not _where.transforming():
            return value(int(step))
        if table is None:
            raise ValueError(
                f"{name}: the number of the step cannot be read under torch.vmap, torch.compile or torch.func; "
                "pass length=, the number of steps to tabulate"
            )
        return table.to(step.device).index_select(0, step.clamp(0, len(table) - 1).reshape(1)).reshape(())

    return scheduled


def _scheduler(name: str, factory: Callable[..., LRScheduler], dummy: SGD, options: dict[str, Any]) -> LRScheduler:
    if not callable(factory):
        raise TypeError(
            f"{name}: the scheduler must be a class of torch.optim.lr_scheduler or a function of an optimizer, got "
            f"{describe(factory)}"
        )
    if factory is ReduceLROnPlateau:
        raise TypeError(
            f"{name}: ReduceLROnPlateau depends on a metric, not on the step alone; make an optimizer with the new lr when "
            "the metric says so: the state fits"
        )
    made = factory(dummy, **options)
    if not isinstance(made, LRScheduler):
        raise TypeError(
            f"{name}: the scheduler must be an LRScheduler, got {describe(made)}. One of another library becomes a "
            "function of the step by hand, which is an lr too: drive it on an optimizer of one tensor, and return the lr of "
            "its param_groups (docs/recipes/timm_ema.md)"
        )
    return made


def _value(name: str, dummy: SGD) -> float:
    (group,) = dummy.param_groups
    if group["momentum"] != 0:
        raise ValueError(f"{name}: the scheduler changes the momentum too; pass cycle_momentum=False")
    return float(group["lr"])
