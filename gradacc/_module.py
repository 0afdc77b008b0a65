"""`functional`: a module as a pure function of its parameters; NOTE [replicas instead of swapping]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradacc import _closed, _fsdp, _left, _own_tensors, _replicas, _reuse, _traced, _where
from gradacc._describe import describe


class Apply(Protocol):
    """The first of what `functional` returns: the module as a pure function of its parameters."""

    def __call__(
        self, params: Mapping[str, Tensor], *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any: ...


def functional(module: nn.Module, *, method: str = "forward") -> tuple[Apply, dict[str, Tensor], dict[str, Tensor]]:
    """A module as ``(apply, params, buffers)``: ``apply(params, *inputs)`` is ``module(*inputs)`` with these parameters.

    ``apply(params, *inputs, buffers=None, **kwargs)`` is pure: neither the module nor ``params`` nor ``buffers`` are changed,
    in training mode neither. It follows the module's mode (``train()`` or ``eval()``) at the time of the call.

    - ``apply(params, x)`` returns the module's output. It starts from the module's own buffers; what the forward pass
      writes into them (running statistics) is dropped.
    - ``apply(params, x, buffers=b)`` starts from ``b`` and returns ``(output, new_buffers)``: that is how to ask for the
      updates.

    Frozen parameters (``requires_grad=False``, now) are not in ``params``; tied ones are one entry, under their first name.
    What ``apply`` is not given, it takes from the module as it is then, as constants: that is how a frozen base is used, and
    how to freeze more (leave names out). It takes any parameter of the module, also one that was frozen before. If the
    module is frozen as a whole, ``params`` is empty: ``apply({}, x)`` is the module, and there is nothing to differentiate.

    No gradient flows through the module's own tensors, so hooks on them (``weight.register_hook(mask)``,
    ``register_post_accumulate_grad_hook``), which the ``.backward()`` loop runs, are an error. (Those on their
    ``AccumulateGrad`` nodes cannot be seen from here, and do not run.) Do to the gradients what the
    hook did: ``grads["weight"] *= mask``; or write ``weight * mask`` into the forward pass (`torch.nn.utils.parametrize`).
    Hooks of modules, also backward hooks, run as in that loop.

    What ``fully_shard`` has divided runs without FSDP's hooks, with the whole parameters that a loss gets: ``docs/fsdp.md``.

    ``method="training_step"`` runs another method than ``forward``: ``apply(params, *inputs)`` is then
    ``module.training_step(*inputs)``. Hooks of the whole module run around ``forward`` only; those of its parts always do.

    Arguments:
        module: any `torch.nn.Module`, also with activation checkpointing (``use_reentrant=False``). A module from
            `torch.compile` is refused: compile a function that calls ``apply`` instead.

        method: the name of the method that ``apply`` runs.

    Returns:
        ``apply``; ``params`` (those that require a gradient) and ``buffers``: dicts from names (as in
        ``named_parameters()``, ``named_buffers()``) to detached tensors that share the module's memory.

    Raises:
        TypeError: ``module`` is not a module, or a compiled or scripted one, or has no such method.
        ValueError: a trainable parameter has hooks. From ``apply``: names that the module does not have; the module has got
            other submodules since (call `functional` again); and where the forward pass uses a parameter or buffer of the
            module's own instead of the one that was given: NOTE [the module's own tensors]. (While Dynamo traces, the last
            one is a `torch._dynamo.exc.TorchRuntimeError`.)

    Where it is not equal: what a forward pass writes into the module (``self.calls += 1``, ``self.losses.append(x)``, hooks
    that it registers) is dropped after the call: return it from the forward pass. A loss that looks on the module for a tensor
    with a graph (``module.l_aux``) gets an error; for anything else, what was there before. NOTE [what belongs to a
    replica], NOTE [what a forward pass leaves]. In a compiled function a module that writes is an error: NOTE [while Dynamo
    traces].

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
    _check(module, method)
    plan = _replicas.module_tree(module, method)
    looks = _traced.looks(plan)
    trainable = {name: param for name, param in module.named_parameters() if param.requires_grad}
    _own_tensors.refuse_hooks("functional", trainable)
    _fsdp.check(plan.modules)
    params = {name: param.detach() for name, param in trainable.items()}
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}

    def apply(
        params: Mapping[str, Tensor], *inputs: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        return _applied(plan, looks, params, buffers, inputs, kwargs)

    return apply, params, buffers


def _applied(
    plan: _replicas.ModuleTree,
    looks: _traced.Looks,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    given = {} if buffers is None else buffers
    _check_names(params, buffers)
    _known("params", params, plan.params)
    _known("buffers", given, plan.buffers)
    own = plan.tensors()
    tensors = {**params, **given}
    tensors |= {name: tensor.detach() for name, tensor in own.items() if name not in tensors}
    # Copies, since a forward pass may write into its buffers.
    held = [name for name in plan.buffers if name in tensors]
    tensors |= {name: tensors[name].clone() for name in held}
    if torch.compiler.is_dynamo_compiling():
        if plan.divided:
            raise NotImplementedError(_fsdp.COMPILED)
        from torch._dynamo.comptime import comptime

        comptime(looks.before)
        output = looks.call(tensors, inputs, kwargs)
        comptime(looks.after)
        return output if buffers is None else (output, {name: tensors[name].detach() for name in held})
    _fsdp.check_whole(plan.modules, tensors)
    replaced = {name: own[name] for name in (*params, *given) if tensors[name] is not own.get(name) and name in own}
    _own_tensors.refuse_hooks("apply", replaced)
    _closed.note_replaced(replaced, tensors)
    run = _reuse.replicas(plan, own, tensors, replaced, params)
    new = run.new
    with _own_tensors.refused(replaced), _without_cached():
        replica = new[id(plan.modules[0])]
        call = replica if plan.method == "forward" else getattr(replica, plan.method)
        output = call(*inputs, **kwargs)
    _left.note(plan, lambda: _replicas.left(plan, new))
    _reuse.done(plan, run)
    if buffers is None:
        return output
    updated = {name: new[id(part)]._buffers.get(key) for name, (part, key) in plan.buffers.items()}
    return output, {name: buffer.detach() for name, buffer in updated.items() if buffer is not None}


_where.whole_or_not_at_all(_applied)


@contextmanager
def _without_cached() -> Iterator[None]:
    """Under `parametrize.cached` a replica has a cache of its own: the caller's outlives it, and goes by ``id``."""
    if not parametrize._cache_enabled:
        yield
        return
    before, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = before


def _check(module: Any, method: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional: expected an nn.Module, got {type(module).__qualname__}")
    if not isinstance(method, str) or not callable(getattr(module, method, None)):
        raise TypeError(
            f"functional: method must be the name of a method of the {type(module).__qualname__}, got {method!r}"
        )
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


def _check_names(params: Any, buffers: Any) -> None:
    if not isinstance(params, Mapping) or not isinstance(buffers, (Mapping, type(None))):
        what, given = ("buffers", buffers) if isinstance(params, Mapping) else ("params", params)
        raise TypeError(
            f"apply: {what} must be a dict from names to tensors, as functional returns it, got {describe(given)}; call "
            "apply(params, *inputs, buffers=None, **kwargs)"
        )


def _known(what: str, given: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    if not given.keys() <= own.keys():
        unknown = [name for name in given if name not in own]
        raise ValueError(f"apply: {what} has {_shown(unknown)}, which the module does not have; it has {_shown(own)}")


def _shown(names: Iterable[str]) -> str:
    """A model has hundreds."""
    names = list(names)
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if names[8:] else "")
