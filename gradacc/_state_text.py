"""The state of `gradacc.accumulator` as text: all that a checkpoint cannot write as tensors.

NOTE [a state as text]
    A process that resumes cannot know whether a window was open when the other one was killed: it has ``init(params)``. So a
    checkpoint holds the facts of a state (NOTE [facts] in ``_state.py``) as text, with the structure of ``aux``, which only
    the loss knows; and `gradacc.checkpoint.load` first makes the state that it is about to read. Devices are not told: a state
    is loaded to where the parameters are now.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from gradacc import _structure, _tree
from gradacc._state import AccumulatorState, Facts, Missing, Param, of_each, other_options, slots, with_slots


def to_text(state: AccumulatorState) -> str:
    """Everything about a state but its numbers, as JSON. NOTE [a state as text]"""
    facts, device = state.facts, state.facts.params[0].device
    found, treedef = slots(state)
    paths = _tree.paths(treedef)
    grads = [
        {path: _kind(slot) for path, slot in zip(paths, own, strict=True) if isinstance(slot, Tensor)}
        for own in of_each(found, facts.targets)
    ]
    return json.dumps(
        {
            "params": {path: _kind(param) for path, param in zip(paths, facts.params, strict=True)},
            "grads": grads[0] if facts.targets == 1 else grads,
            "sums": _structure.to_json(state.sums, device),
            **({} if state.carry is None else {"carry": _structure.to_json(state.carry, device)}),
            "facts": {name: _to_json(value) for name, value in facts._asdict().items() if name != "params"},
        }
    )


def from_text(like: AccumulatorState, text: str) -> AccumulatorState:
    """A state of the structure that was told, whose tensors hold anything, with the parameters and on the devices of ``like``.

    Raises:
        ValueError: it was told of an accumulator with other options, or of other parameters; or not by `to_text`.
    """
    try:
        told = json.loads(text)
        facts = Facts(params=like.facts.params, **{name: _from_json(value) for name, value in told["facts"].items()})
        params, grads = dict(told["params"]), told["grads"]
        grads = [dict(own) for own in (grads if isinstance(grads, list) else [grads])]
        sums, carry = told["sums"], told.get("carry")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"is described by facts that this version of gradacc does not know ({error})") from error
    for option, theirs, ours in other_options(facts, like.facts):
        raise ValueError(
            f"is a state of an accumulator with {option}={ours!r}, but one of {option}={theirs!r} was saved"
        )
    held, treedef = slots(like)
    own = dict(zip(_tree.paths(treedef), facts.params, strict=True))
    for path in [*own, *params]:
        here, there = _kind(own[path]) if path in own else None, params.get(path)
        if here != there:
            raise ValueError(f"is of params{path} {_words(here)}, but {_words(there)} was saved")
    device = facts.params[0].device
    try:
        if len(grads) != facts.targets:
            raise ValueError(f"has the gradients of {len(grads)} targets, and not of {facts.targets}")
        alike = like.facts.targets == facts.targets
        places = of_each(held, facts.targets) if alike else [[None] * len(own)] * facts.targets
        found = [
            slot
            if isinstance(slot, Tensor) and _kind(slot) == kinds.get(path)
            else _structure.empty(kinds[path][1], _structure.dtype_named(kinds[path][0]), param.device)
            if path in kinds
            else Missing()
            for kinds, place in zip(grads, places, strict=True)
            for slot, (path, param) in zip(place, own.items(), strict=True)
        ]
        if carry is not None and like.carry is not None:
            _check_carry(_structure.to_json(like.carry, device), carry)
        sums = _structure.from_json(sums, like.sums, device)
        carry = None if carry is None else _structure.from_json(carry, like.carry, device)
    except Exception as error:  # of whatever somebody has written, or of a class of the user's
        raise ValueError(f"{error}; pass a state after one update where it is init's") from error
    return AccumulatorState(with_slots(treedef, found, facts.targets), sums, facts, carry)


def _check_carry(here: dict[str, Any], there: dict[str, Any]) -> None:
    own, saved = (dict(zip(told["paths"], told["tensors"], strict=True)) for told in (here, there))
    for path in [*own, *saved]:
        if (own.get(path) or [])[:2] != (saved.get(path) or [])[:2]:
            raise ValueError(
                f"began with the carry{path} {_words(own.get(path))}, but {_words(saved.get(path))} was saved"
            )


def _kind(of: Param | Tensor) -> list[Any]:
    return [_structure.dtype_name(of.dtype), list(of.shape)]


def _words(kind: list[Any] | None) -> str:
    return "none" if kind is None else f"{kind[0]} {tuple(kind[1])}"


def _to_json(fact: Any) -> Any:
    if isinstance(fact, torch.dtype):
        return {"dtype": _structure.dtype_name(fact)}
    return [_to_json(item) for item in fact] if isinstance(fact, tuple) else fact


def _from_json(fact: Any) -> Any:
    if isinstance(fact, dict):
        return _structure.dtype_named(fact["dtype"])
    return tuple(_from_json(item) for item in fact) if isinstance(fact, list) else fact
