"""`functional`: a module as a pure function of its parameters.

NOTE [replicas instead of swapping]
    `torch.func.functional_call` puts the given tensors into the module, runs it, and puts the old ones back. Two things
    that must work here break under that: activation checkpointing runs parts of the module *again* during the backward
    pass, when the old tensors are back (the gradient is then silently that of a mixture of both), and two threads that
    call the same module swap under each other's feet. So every call runs a replica: new module objects (what
    `torch.nn.parallel.replicate` makes, through the same protocol), which hold the given tensors for as long as anything
    refers to them. Dynamo traces no such thing, but has neither problem: while it traces, `functional_call` is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def functional(module: nn.Module) -> tuple[Callable[..., Any], Tensors, Tensors]:
    """A module as ``(apply, params, buffers)``: ``apply(params, *inputs)`` is ``module(*inputs)`` with these parameters.

    ``apply(params, *inputs, buffers=None, **kwargs)`` is pure: neither the module nor ``params`` nor ``buffers`` are changed,
    in training mode neither. It follows the module's mode (``train()`` or ``eval()``) at the time of the call.

    - ``apply(params, x)`` returns the module's output. It starts from the module's own buffers; what the forward pass
      writes into them (running statistics) is dropped.
    - ``apply(params, x, buffers=b)`` starts from ``b`` and returns ``(output, new_buffers)``: that is how to ask for the
      updates.

    Tied parameters are one entry, under their first name. ``params`` and ``buffers`` may leave names out: those are taken
    from the module, as constants (that is how to freeze some: pass the trainable ones only).

    Arguments:
        module: any `torch.nn.Module`, also with activation checkpointing (``use_reentrant=False``). A module from
            `torch.compile` is refused: compile a function that calls ``apply`` instead.

    Returns:
        ``apply``; ``params`` and ``buffers``: dicts from names (as in ``named_parameters()``, ``named_buffers()``) to
        detached tensors that share the module's memory.

    Raises:
        TypeError: ``module`` is not a module, or a compiled or scripted one.
        ValueError: from ``apply``, for names that the module does not have.

    Where it is not equal: an attribute that a forward pass assigns (``self.calls += 1``) is assigned on the replica and
    dropped; modules that the forward pass reaches only through a closure run with their own parameters.

    Example:
        >>> import torch, gradacc
        >>> apply, params, buffers = gradacc.functional(torch.nn.Linear(2, 1))
        >>> apply(params, torch.ones(3, 2)).shape
        torch.Size([3, 1])
        >>> def loss_fn(params, batch):
        ...     return (apply(params, batch["x"]) - batch["y"]).square().mean()
        >>> batch = {"x": torch.ones(3, 2), "y": torch.zeros(3, 1)}
        >>> grads = gradacc.accumulate(loss_fn, steps=3)(params, batch)
        >>> sorted(grads)
        ['bias', 'weight']

    Source: `torch.func.functional_call`, of which this is the form that survives recomputation and threads.
    """
    _check(module)
    params = {name: param.detach() for name, param in module.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}

    def apply(params: Mapping[str, Tensor], *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        own_params, own_buffers = dict(module.named_parameters()), dict(module.named_buffers())
        _known("params", params, own_params)
        _known("buffers", buffers or {}, own_buffers)
        tensors = {name: param.detach() for name, param in own_params.items()} | dict(params)
        # Copies, since a forward pass may write into its buffers.
        written = {name: buffer.detach().clone() for name, buffer in (own_buffers | dict(buffers or {})).items()}
        if torch.compiler.is_compiling():
            tensors |= written
            output = torch.func.functional_call(module, tensors, inputs, kwargs)
            after = {name: tensors[name] for name in written}
        else:
            replica = _replicate(module, own_params, tensors, own_buffers, written)
            output = replica(*inputs, **kwargs)
            after = dict(replica.named_buffers())
        return output if buffers is None else (output, {name: after[name].detach() for name in written})

    return apply, params, buffers


def _replicate(
    module: nn.Module, own_params: Mapping[str, Tensor], params: Tensors, own_buffers: Tensors, buffers: Tensors
) -> nn.Module:
    """A new tree of modules around the given tensors; NOTE [replicas instead of swapping]."""
    new: dict[int, Any] = {}  # from the id of what the module holds to what the replica holds instead
    new |= {id(own_params[name]): tensor for name, tensor in params.items()}
    new |= {id(own_buffers[name]): tensor for name, tensor in buffers.items()}
    originals = list(module.modules())
    new |= {id(original): _shallow(original) for original in originals}
    for original in originals:
        attributes = new[id(original)].__dict__
        for name, value in original.__dict__.items():
            if name in _REGISTRIES:
                attributes[name] = {key: new.get(id(entry), entry) for key, entry in value.items()}
            elif isinstance(value, (list, tuple, dict, MethodType, nn.Module, Tensor)):
                attributes[name] = _renew(value, new)
    replica: nn.Module = new[id(module)]
    return replica


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _shallow(module: nn.Module) -> nn.Module:
    replica: nn.Module = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch has no types here
    return replica


def _renew(value: Any, new: Mapping[int, Any]) -> Any:
    """``value`` with what it holds of the module replaced; itself where there is nothing to replace."""
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, new[id(value.__self__)]) if id(value.__self__) in new else value
    if type(value) in (list, tuple):
        items = [_renew(item, new) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if type(value) is dict:
        renewed = {key: _renew(item, new) for key, item in value.items()}
        return renewed if any(renewed[key] is not value[key] for key in value) else value
    return value


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional: expected an nn.Module, got {type(module).__qualname__}")
    for name, part in module.named_modules():
        where = f"module {name!r}" if name else "the module"
        if part._compiled_call_impl is not None or hasattr(part, "_torchdynamo_orig_callable") or "_orig_mod" in part._modules:
            raise TypeError(
                f"functional: {where} is compiled, which fixes the parameters that it runs with. Pass the module as it was "
                "before torch.compile, and compile a function that calls apply"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"functional: {where} is scripted; pass the Python module that it was made from")


def _known(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    unknown = [name for name in given if name not in own]
    if unknown:
        raise ValueError(f"apply: {what} has {unknown}, which the module does not have; it has {list(own)}")
