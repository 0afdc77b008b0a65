"""`from_torch`: any optimizer of ``torch.optim`` as pure functions."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _donated, _overlap, _tree, _where
from gradacc._describe import describe
from gradacc._tree import TensorTree
from gradacc.optim import _check, _lr, _memory, _slots
from gradacc.optim._optimizer import Optimizer, OptimizerReport
from gradacc.optim._take_step import take_step


class TorchState(NamedTuple):
    """State of `from_torch`."""

    step: Tensor
    """Updates so far, 0-dim int64."""
    slots: TensorTree
    """Like the parameters, with a dict in the place of each leaf: what the optimizer keeps for it, tensors under its names."""


def from_torch(cls: type[torch.optim.Optimizer], **options: Any) -> Optimizer:
    """Any optimizer of ``torch.optim`` (or a subclass of ``torch.optim.Optimizer``) as pure functions.

    A step is these lines, on copies of everything, or with ``donate=True`` on the given memory itself:

    .. code-block:: python

        optimizer = cls(params, **options)
        optimizer.state = state                  # left to the optimizer's own initialisation in the first step
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.step()

    so trajectories are the imperative original's to the last bit, with its ``foreach`` and ``fused`` kernels too. (Torch's
    fused kernels pair elements by address, and are wrong where strides differ: here they get a parameter that has no gaps, and
    a gradient and slots of its strides, in copies where they are others.) The state
    is a pytree of tensors of a fixed structure; numbers that an optimizer keeps are 0-dim tensors in it, and get their own
    type back. `init` finds the structure by a step on a copy of the parameters.

    The step reads values, so it runs eagerly only: not under `torch.vmap`, `torch.func.grad` or `torch.compile`. `sgd`,
    `adam` and `adamw` do.

    Arguments:
        cls: the class. SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, Adagrad, Adadelta, ASGD and Adafactor take any
            parameters, Muon takes matrices (see `by_path` for the rest).
        options: of its constructor, for all parameters; ``lr`` may also be a function of the step (0, 1, …), as `schedule`
            makes them. (Rprop uses ``lr`` in its first step only.)

    Raises:
        TypeError: ``cls`` is no subclass of ``torch.optim.Optimizer``, or does not know an option; ``LBFGS``, or another one
            whose step needs a closure, which evaluates the loss several times; ``SparseAdam``, which takes sparse gradients
            only; an optimizer that keeps state elsewhere than under a parameter in its ``state`` (in an attribute, under a
            name), or something that is no tensor or number.
        ValueError: an option that the optimizer refuses (in `init`, with its own words); ``differentiable=True``; a step
            under a transform. ``step`` also raises what `Optimizer` says.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.from_torch(torch.optim.RMSprop, lr=0.01, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.step(params, {"w": torch.tensor([0.5, -3.0])}, state)
        >>> params["w"]
        tensor([0.9000, 2.1000])
        >>> sorted(state.slots["w"])
        ['momentum_buffer', 'square_avg', 'step']
    """
    name = "from_torch"
    _accepted(name, cls, options)
    lr = options.get("lr")
    if lr is not None:
        _lr.check_option(name, lr)

    def checked(state: Any, leaves: list[Tensor], treedef: _tree.TreeDef) -> dict[str, Any]:
        """Of a state of such parameters: the options now."""
        _check.state(name, state, TorchState)
        count = _check.counter(name, "state.step", state.step)
        _slots.check(name, cls.__name__, state.slots, leaves, treedef, model)
        return current(count)

    def current(count: Tensor) -> dict[str, Any]:
        return options if lr is None else {**options, "lr": _lr.at_step(name, lr, count)}

    def first(leaves: list[Tensor]) -> list[dict[str, Any]]:
        """What is kept after a step on memory that is ours, of gradients that are zero."""
        return take_step(cls, current(_check.zero()), leaves, [torch.zeros_like(leaf) for leaf in leaves], None)

    @functools.lru_cache(maxsize=64)
    def model(like: _slots.Like) -> dict[str, _slots.Entry | None]:
        """What the slot of a parameter of this kind looks like, from a step of a small one."""
        (kept,) = first([torch.ones(_slots.SHAPE[: like.ndim], dtype=like.dtype, device=like.device)])
        return _slots.entries(_slots.tensors(name, cls.__name__, kept), like)

    def init(params: TensorTree) -> TensorTree:
        _eagerly(name, cls)
        leaves, treedef = _check.params(name, params)
        with torch.no_grad():
            slots = [_slots.zeros(name, cls.__name__, kept) for kept in first(_memory.copies(leaves))]
        return TorchState(_check.zero(), _tree.unflatten(treedef, slots))

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        _eagerly(name, cls)
        leaves, grad_leaves, treedef = _check.inputs(name, params, grads)
        given = checked(state, leaves, treedef)
        with torch.no_grad():
            held, structure = _tree.flatten(state.slots)
            read_only = cls in _LEAVE_GRADIENTS and not options.get("nesterov")
            new, used, slots = _own(leaves, grad_leaves, held, donate, read_only)
            each: Any = treedef.flatten_up_to(_tree.unflatten(structure, slots)) if int(state.step) > 0 else None
            kept = take_step(cls, given, new, used, each)
            after = TorchState(state.step + 1, _tree.unflatten(treedef, _slots.written(name, cls.__name__, kept)))
            if donate:
                _donated.retire(f"{name}.step", [state.step], leaves, grad_leaves, held)
        return _tree.unflatten(treedef, new), after

    def updates(state: Any) -> Tensor:
        _check.state(name, state, TorchState)
        return _check.counter(name, "state.step", state.step)

    usual = inspect.signature(cls).parameters.get("lr")
    known = lr is not None or (usual is not None and isinstance(usual.default, (float, Tensor)))

    def rate(state: Any) -> Any:
        return current(updates(state)).get("lr", None if usual is None else usual.default)

    return Optimizer(
        init,
        step,
        check=lambda params, state: checked(state, *_check.params(name, params)),
        report=OptimizerReport(rate if known else None, updates),
        elementwise=True if cls in _ELEMENTWISE else f"{name}: {cls.__name__} {_WHOLE}",
    )


def _own(
    leaves: list[Tensor], grad_leaves: list[Tensor], held: list[Any], donate: bool, read_only: bool
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """What a step writes to: the given memory, or copies; gradients themselves where they are ``read_only``."""
    if donate:
        new, changed, slots = _overlap.in_separate_memory(
            [leaves, [] if read_only else grad_leaves, held], grad_leaves if read_only else ()
        )
        new, slots = [leaf.detach() for leaf in new], [leaf.detach() for leaf in slots]
    else:
        new, changed, slots = (
            _memory.copies(leaves),
            [] if read_only else _memory.copies(grad_leaves),
            _memory.copies(held),
        )
    return (
        new,
        [grad_leaf.detach() if grad_leaf.requires_grad else grad_leaf for grad_leaf in changed or grad_leaves],
        slots,
    )


_LEAVE_GRADIENTS = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}
"""Classes whose step writes to no gradient, so that they need no copy; except SGD's with ``nesterov`` and ``foreach``."""


_ELEMENTWISE = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}
"""Classes whose rule treats every element by itself."""

_WHOLE = (
    "is none of torch's classes that are known to treat every element by itself (Muon and Adafactor do not). Where a class of "
    "your own does, say so: optimizer._replace(elementwise=True)"
)


def _accepted(name: str, cls: Any, options: dict[str, Any]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        made = isinstance(cls, torch.optim.Optimizer)
        raise TypeError(
            f"{name}: cls must be a class of torch.optim, got {describe(cls)}; "
            + (
                f"pass torch.optim.{type(cls).__name__} and its options"
                if made
                else "for example torch.optim.SGD, lr=0.1"
            )
        )
    if issubclass(cls, torch.optim.LBFGS):
        raise TypeError(
            f"{name}: LBFGS evaluates the loss several times a step (its step takes a closure), where an Optimizer's step is "
            "given one gradient. torch.optim.LBFGS itself works on a module's own parameters, whose .grad its closure sets "
            "(docs/recipes/lbfgs.md); or use another optimizer"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{name}: {cls.__name__}.step needs a closure, which evaluates the loss again, where an Optimizer's step is given "
            "one gradient; use another optimizer"
        )
    if issubclass(cls, torch.optim.SparseAdam):
        raise TypeError(f"{name}: SparseAdam takes sparse gradients only, and gradients here are dense; use Adam")
    if options.get("differentiable"):
        raise ValueError(
            f"{name}: differentiable=True has no effect on a step of copies; gradacc.optim.sgd, adam and adamw are "
            "differentiable under torch.func.grad"
        )
    if "params" in options:
        raise TypeError(f"{name}: params are given to init and step, not to {name}; leave params= out")


def _eagerly(name: str, cls: type) -> None:
    if _where.transforming():
        raise ValueError(
            f"{name}: {cls.__name__} reads values and writes in place, which torch.vmap, torch.func and torch.compile do not "
            "allow; gradacc.optim.sgd, adam and adamw run there"
        )
