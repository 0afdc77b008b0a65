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

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradacc import _tree
from gradacc._engines import functorch_is_active, graph

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
        ValueError: from ``apply``, for names that the module does not have, and where the module reaches a parameter of its
            own through a closure (found in the first call's graph).

    Where it is not equal: what a forward pass assigns to an attribute (``self.calls += 1``, ``self.losses.append(x)``) stays
    on the replica and is dropped; submodules that are added or replaced later are not seen (call `functional` again); hooks
    that a forward pass registers stay on the module.

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
    plan, unchecked = _plan(module), [True]
    params = {name: param.detach() for name, param in module.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}

    def apply(
        params: Mapping[str, Tensor], *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        given = {} if buffers is None else buffers
        _known("params", params, plan.params)
        _known("buffers", given, plan.buffers)
        tensors = {**params, **given}
        tensors |= {name: tensor.detach() for name, tensor in plan.tensors() if name not in tensors}
        # Copies, since a forward pass may write into its buffers.
        tensors |= {name: tensors[name].clone() for name in plan.buffers}
        if torch.compiler.is_compiling():
            output = torch.func.functional_call(module, tensors, inputs, kwargs)
            return output if buffers is None else (output, {name: tensors[name].detach() for name in plan.buffers})
        replicas = plan.replicas(tensors)
        output = replicas[0](*inputs, **kwargs)
        if unchecked and torch.is_grad_enabled() and not functorch_is_active():
            _refuse_own_parameters(plan, params, output)  # once: it costs 1 us a node of the graph
            unchecked.clear()
        if buffers is None:
            return output
        after = {name: replicas[i]._buffers.get(key) for name, (i, key) in plan.buffers.items()}
        return output, {name: buffer.detach() for name, buffer in after.items() if buffer is not None}

    return apply, params, buffers


class _Part(NamedTuple):
    """One module of the tree: its registries, as keys and what they lead to; None for an empty entry."""

    module: nn.Module
    children: list[tuple[str, int | None]]
    params: list[tuple[str, str | None]]
    buffers: list[tuple[str, str | None]]
    holders: list[str]
    """Attributes outside the registries through which modules or tensors of the tree are reached."""
    containers: list[str]
    """Attributes that a forward pass may write into: lists, dicts, sets and tensors of the module's own."""


class _Plan(NamedTuple):
    """How the tree is put together, worked out once."""

    parts: list[_Part]
    params: dict[str, tuple[int, str]]
    """From a parameter's name to the part that owns it, and its key there."""
    buffers: dict[str, tuple[int, str]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The module's own tensors as they are now."""
        for names, registry in ((self.params, "_parameters"), (self.buffers, "_buffers")):
            for name, (part, key) in names.items():
                tensor = getattr(self.parts[part].module, registry).get(key)
                if tensor is not None:
                    yield name, tensor

    def replicas(self, tensors: Mapping[str, Tensor]) -> list[nn.Module]:
        """New modules around the given tensors; NOTE [replicas instead of swapping]."""
        replicas = [_shallow(part.module) for part in self.parts]
        for part, replica in zip(self.parts, replicas, strict=True):
            attributes = replica.__dict__
            attributes["_modules"] = {key: None if i is None else replicas[i] for key, i in part.children}
            attributes["_parameters"] = {key: None if name is None else tensors[name] for key, name in part.params}
            attributes["_buffers"] = {key: None if name is None else tensors[name] for key, name in part.buffers}
            for name in part.containers:
                value = attributes[name]
                attributes[name] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
            if attributes.get("max_norm") is not None:  # an embedding that renormalises its weight in place
                attributes["_parameters"] = {
                    k: v if v is None else v.clone() for k, v in attributes["_parameters"].items()
                }
        if any(part.holders for part in self.parts):
            new: dict[int, Any] = {id(own): tensors[name] for name, own in self.tensors()}
            new |= {id(part.module): replica for part, replica in zip(self.parts, replicas, strict=True)}
            for part, replica in zip(self.parts, replicas, strict=True):
                for name in part.holders:
                    replica.__dict__[name] = _renew(part.module.__dict__[name], new)
        return replicas


def _plan(module: nn.Module) -> _Plan:
    originals = list(module.modules())
    number = {id(original): i for i, original in enumerate(originals)}
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    owned = set(number) | set(names)
    parts = [
        _Part(
            original,
            [(key, number.get(id(child))) for key, child in original._modules.items()],
            [(key, names.get(id(param))) for key, param in original._parameters.items()],
            [(key, names.get(id(buffer))) for key, buffer in original._buffers.items()],
            [key for key, value in original.__dict__.items() if key not in _REGISTRIES and _reaches(value, owned)],
            [key for key, value in original.__dict__.items() if key not in _INTERNAL and isinstance(value, _WRITABLE)],
        )
        for original in originals
    ]
    params = {name: (i, key) for i, part in reversed([*enumerate(parts)]) for key, name in part.params if name}
    buffers = {name: (i, key) for i, part in reversed([*enumerate(parts)]) for key, name in part.buffers if name}
    return _Plan(
        parts,
        {name: params[name] for name, _ in module.named_parameters()},
        {name: buffers[name] for name, _ in module.named_buffers()},
    )


_REGISTRIES = ("_parameters", "_buffers", "_modules")
_INTERNAL = frozenset(nn.Module().__dict__)
_WRITABLE = (list, dict, set, deque, Tensor)
_CONTAINERS = (list, tuple, set, frozenset, deque)


def _shallow(module: nn.Module) -> nn.Module:
    cls = type(module)
    if cls._replicate_for_data_parallel is nn.Module._replicate_for_data_parallel:
        replica: nn.Module = object.__new__(cls)  # what that method does, without five calls of Module.__setattr__
        replica.__dict__.update(module.__dict__)
        return replica
    special: nn.Module = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch has no types here
    return special


def _parts_of(value: Any) -> Iterable[Any]:
    """What a value holds, as far as `_renew` can put something else in its place."""
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, _CONTAINERS) else ()


def _reaches(value: Any, owned: set[int], depth: int = 8) -> bool:
    """Whether a module or tensor of the tree is reached through containers, bound methods and partials."""
    return id(value) in owned or (depth > 0 and any(_reaches(item, owned, depth - 1) for item in _parts_of(value)))


def _renew(value: Any, new: Mapping[int, Any], depth: int = 8) -> Any:
    """``value`` with what `_reaches` found replaced."""
    if id(value) in new:
        return new[id(value)]
    if depth == 0 or not _parts_of(value):
        return value
    if isinstance(value, MethodType):
        return MethodType(value.__func__, new.get(id(value.__self__), value.__self__))
    if isinstance(value, partial):
        args = [_renew(item, new, depth - 1) for item in value.args]
        named = {key: _renew(item, new, depth - 1) for key, item in value.keywords.items()}
        return partial(_renew(value.func, new, depth - 1), *args, **named)
    if isinstance(value, dict):
        renewed = copy.copy(value)  # an OrderedDict or a defaultdict stays one
        renewed.update({key: _renew(item, new, depth - 1) for key, item in value.items()})
        return renewed
    items = [_renew(item, new, depth - 1) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _refuse_own_parameters(plan: _Plan, given: Mapping[str, Tensor], output: Any) -> None:
    """The module's own parameter behind an output, where another was given: reached in a way that cannot be renewed."""
    own = {id(tensor): name for name, tensor in plan.tensors() if name in given and tensor is not given[name]}
    tensors = [leaf for leaf in _tree.flatten(output)[0] if isinstance(leaf, Tensor)]
    for node in graph(tensor.grad_fn for tensor in tensors):
        name = own.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise ValueError(
                f"apply: the module used its own parameter {name!r}, not the one that it was given. It reached it through a "
                "closure, or an object that is not a module, a container or a functools.partial: reach it through self"
            )


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional: expected an nn.Module, got {type(module).__qualname__}")
    for name, part in module.named_modules():
        where = f"module {name!r}" if name else "the module"
        if (
            part._compiled_call_impl is not None
            or hasattr(part, "_torchdynamo_orig_callable")
            or "_orig_mod" in part._modules
        ):
            raise TypeError(
                f"functional: {where} is compiled, which fixes the parameters that it runs with. Pass the module as it was "
                "before torch.compile, and compile a function that calls apply"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"functional: {where} is scripted; pass the Python module that it was made from")


def _known(what: str, given: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in own]
    if unknown:
        raise ValueError(f"apply: {what} has {unknown}, which the module does not have; it has {list(own)}")
