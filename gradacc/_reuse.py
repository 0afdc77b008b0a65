"""Replicas that serve several micro-batches of a call.

NOTE [replicas of a whole call]
    A replica of every module for every micro-batch costs 20 us a module, as much as a small module's own work. All
    micro-batches of a call are given the same tensors (NOTE [leaves of a whole call]), so a replica that a pass has left as it
    was made serves the next micro-batch too:

    - a pass that wrote on a replica (an attribute, an item of a container, a hook, another tensor in the place of a parameter
      or buffer) leaves one that is not used again, and no other is kept in that call;
    - what the pass wrote *into* buffers does not count, since every pass gets new copies of them;
    - where the module has changed meanwhile (``eval()``, a dropout rate), a new replica is made;
    - two passes of one micro-batch have two replicas: a checkpoint may still run the first again.

    Whether something was written is seen by comparing identities, attribute by attribute. A state that may hide more than
    that shows (hooks, tensors, ``__slots__``, callables that lead to the module) is made anew for every pass.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradacc import _left, _replicas, _where
from gradacc._replicas import ModuleTree, New


class State(NamedTuple):
    """What modules hold, and where one looks whether they still do."""

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    """Each module's ``__dict__``."""
    registries: list[dict[str, Any]]
    """Of parameters and submodules."""
    buffers: list[dict[str, Any]]
    hooks: list[dict[int, Any]]
    containers: list[Any]
    held: list[Any]
    """Names and values of the attributes, of the registries, names of buffers, what the containers hold."""


class Kept(NamedTuple):
    """Replicas of all modules of a tree."""

    new: New
    own: list[Tensor]
    given: list[Any]
    """Names and tensors that the caller gave."""
    module: State
    replica: State
    buffers: list[tuple[dict[str, Any], str, str | None]]
    """Where the replicas hold buffers, under which key, and each one's name in the tree; None where there is none."""


class Pass(NamedTuple):
    """One run of a module tree."""

    new: New
    kept: Kept | None
    """Where the replicas may serve another micro-batch."""


def replicas(
    plan: ModuleTree,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    replaced: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
) -> Pass:
    """As `_replicas.replicate`: those of an earlier micro-batch where they are as they would be made now.

    ``params``: of the ``tensors``, those that the caller gave.
    """
    passes = None if _where.functorch_is_active() else _left.passes(plan)
    if passes is None or passes.written:
        return Pass(_replicas.replicate(plan, own, tensors, replaced), None)
    given = [*params, *params.values()]
    if passes.kept:
        kept: Kept = passes.kept.pop()
        if _same(kept.own, list(own.values())) and _same(kept.given, given) and _is_as_it_was(kept.module):
            for held, key, name in kept.buffers:
                held[key] = None if name is None else tensors[name]
            return Pass(kept.new, kept)
    new = _replicas.replicate(plan, own, tensors, replaced)
    # Of the first micro-batch nothing says whether there will be another one, with the same tensors.
    again, passes.given = _same(passes.given, given), given
    return Pass(new, _keep(plan, own, given, new) if again else None)


def done(plan: ModuleTree, run: Pass) -> None:
    """The forward pass has run."""
    kept, passes = run.kept, _left.passes(plan)
    if kept is None or passes is None:
        return
    if _is_as_it_was(kept.replica):
        _left.keep_until_the_loss_has_run(passes, kept)
    else:
        passes.written = True


def _keep(plan: ModuleTree, own: Mapping[str, Tensor], given: list[Any], new: New) -> Kept | None:
    """Replicas as they were made, before the pass; None where a state may hide what is written into it."""
    if new[_replicas.LED] or any(tensor.__dict__ for tensor in own.values()):
        return None
    names = {id(own[name]): name for name in plan.buffers if name in own}
    containers: dict[int, tuple[Any, Any]] = {}
    buffers: list[tuple[dict[str, Any], str, str | None]] = []
    made: list[nn.Module] = []
    for module, first in zip(plan.modules, plan.first, strict=True):
        replica = new[id(module)]
        if not _replicas.containers(module, first, new, containers):
            return None
        made.append(replica)
        held = module._buffers
        buffers += [(replica._buffers, key, names.get(id(held[key]))) for key in held]
    before = _state(plan.modules, [one for one, _ in containers.values()])
    if any(before.hooks):
        return None
    after = _state(made, [copied for _, copied in containers.values()])
    return Kept(new, list(own.values()), given, before, after, buffers)


def _state(modules: list[nn.Module], containers: list[Any]) -> State:
    attributes = [module.__dict__ for module in modules]
    registries = [held[key] for held in attributes for key in ("_parameters", "_modules")]
    buffers = [held["_buffers"] for held in attributes]
    hooks = [hooks for held in attributes for hooks in _replicas.hooks_of(held)]
    state = State(modules, attributes, registries, buffers, hooks, containers, [])
    state.held[:] = _held(state)
    return state


def _is_as_it_was(state: State) -> bool:
    return (
        all(map(operator.is_, map(vars, state.modules), state.attributes))
        and not any(state.hooks)
        and _same(state.held, _held(state))
    )


def _held(state: State) -> list[Any]:
    found: list[Any] = [*chain.from_iterable(chain(state.attributes, state.registries, state.buffers))]
    found += chain.from_iterable(map(dict.values, chain(state.attributes, state.registries)))
    for container in state.containers:
        found += _replicas.items(container)
        found.append(_END)
    return found


_END = object()


def _same(one: list[Any] | None, other: list[Any]) -> bool:
    return one is not None and len(one) == len(other) and all(map(operator.is_, one, other))
