"""Replicas that serve several micro-batches of a call.

NOTE [replicas of a whole call]
    A replica of every module for every micro-batch costs 20 us a module, as much as a small module's own work. All
    micro-batches of a call are given the same tensors (NOTE [leaves of a whole call]), so a replica that a pass has left as it
    was made serves the next micro-batch too:

    - replicas on which a pass has written (an attribute, an item of a container, a hook, a submodule; in the forward pass or
      later: in the backward pass, in a checkpoint's second run) do not serve again, and no others are kept in that call;
    - every pass gets new buffers and new frozen parameters, so that what an earlier one did to them is gone;
    - where the module has changed meanwhile (``eval()``, a dropout rate), new replicas are made;
    - two passes of one micro-batch have two replicas: a checkpoint may still run the first again.

    Whether something was written is seen by comparing identities, attribute by attribute, when the next pass begins. A state
    that may hide more than that shows (hooks, tensors, ``__slots__``, containers of other classes, callables that lead to the
    module) is made anew for every pass. What is kept elsewhere under the replica's identity (`functools.cache` on a method)
    is the outside world's, and lasts as it does in a loop over the module itself.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping
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
    classes: list[type]
    hooks: list[dict[int, Any]]
    views: list[Iterable[Any]]
    """Names and values of attributes and of registries; of registries that every pass gives other values, the names."""
    containers: list[Any]
    held: list[Any]
    """What these held."""


class Kept(NamedTuple):
    """Replicas of all modules of a tree."""

    new: New
    own: list[Tensor]
    given: list[Any]
    """Names and tensors that the caller gave."""
    module: State
    replica: State
    renewed: list[tuple[dict[str, Any], str, str | None]]
    """Where every pass puts what it is given, under which key, and each one's name in the tree; None where there is none."""


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
        passes.written = not _is_as_it_was(kept.replica)
        same = _same(kept.own, list(own.values())) and _same(kept.given, given)
        if same and not passes.written and _is_as_it_was(kept.module):
            for held, key, name in kept.renewed:
                held[key] = None if name is None else tensors[name]
            return Pass(kept.new, kept)
    new = _replicas.replicate(plan, own, tensors, replaced)
    # Of the first micro-batch nothing says whether there will be another one, with the same tensors.
    before = [each() if isinstance(each, weakref.ref) else each for each in passes.given or ()]
    passes.given = [*params, *map(weakref.ref, params.values())]
    keeps = _same(before, given) and not passes.written
    return Pass(new, _keep(plan, own, given, new) if keeps else None)


def done(plan: ModuleTree, run: Pass) -> None:
    """The forward pass has run: its replicas may serve another micro-batch."""
    kept, passes = run.kept, _left.passes(plan)
    if kept is None or passes is None:
        return
    if any(held[key] is not None and held[key].grad_fn is not None for held, key, _ in kept.renewed if key in held):
        # A graph would live on with it.
        passes.written = True
    else:
        _left.keep_until_the_loss_has_run(passes, kept)


def _keep(plan: ModuleTree, own: Mapping[str, Tensor], given: list[Any], new: New) -> Kept | None:
    """Replicas as they were made, before the pass; None where a state may hide what is written into it."""
    if new[_replicas.LED] or any(any(map(_replicas.is_mark, tensor.__dict__)) for tensor in own.values()):
        return None
    frozen = [name for name in plan.params if name in own and name not in given]
    names = {id(own[name]): name for name in (*plan.buffers, *frozen) if name in own}
    containers: dict[int, tuple[Any, Any]] = {}
    renewed: list[tuple[dict[str, Any], str, str | None]] = []
    made: list[nn.Module] = []
    for module, first in zip(plan.modules, plan.first, strict=True):
        replica = new[id(module)]
        if not _replicas.containers(module, first, new, containers):
            return None
        made.append(replica)
        renewed += [(replica._buffers, key, names.get(id(buffer))) for key, buffer in module._buffers.items()]
        parameters = module._parameters
        if any(id(param) in names for param in parameters.values()):
            every = {id(own[name]): name for name in plan.params if name in own}
            renewed += [(replica._parameters, key, every.get(id(param))) for key, param in parameters.items()]
    before = _state(plan.modules, [], [one for one, _ in containers.values()])
    if any(before.hooks):
        return None
    after = _state(made, [held for held, _, _ in renewed], [copied for _, copied in containers.values()])
    return Kept(new, list(own.values()), given, before, after, renewed)


def _state(modules: list[nn.Module], renewed: list[dict[str, Any]], containers: list[Any]) -> State:
    attributes = [module.__dict__ for module in modules]
    apart = {id(held): held for held in renewed}
    every = [held[key] for held in attributes for key in ("_parameters", "_buffers", "_modules")]
    registries = [held for held in every if id(held) not in apart]
    hooks = [hooks for held in attributes for hooks in _replicas.hooks_of(held)]
    views = [held.keys() for held in (*attributes, *registries, *apart.values())]
    views += [held.values() for held in (*attributes, *registries)]
    return State(modules, attributes, [*map(type, modules)], hooks, views, containers, [*_held(views, containers)])


def _is_as_it_was(state: State) -> bool:
    return (
        all(map(operator.is_, map(vars, state.modules), state.attributes))
        and all(map(operator.is_, map(type, state.modules), state.classes))
        and not any(state.hooks)
        # Both end with what nothing else holds: where one is longer, an end meets something else.
        and all(map(operator.is_, state.held, _held(state.views, state.containers)))
    )


def _held(views: list[Iterable[Any]], containers: list[Any]) -> Iterator[Any]:
    inside = chain.from_iterable(chain(_replicas.items(container), (_END,)) for container in containers)
    return chain(chain.from_iterable(views), inside, (_END,))


_END = object()


def _same(one: list[Any] | None, other: list[Any]) -> bool:
    return one is not None and len(one) == len(other) and all(map(operator.is_, one, other))
