"""The state of `gradacc.accumulator`: a fold that waits, as a pytree of tensors.

NOTE [facts]
    A state is tensors, which are computed with, saved and sent, and *facts*, which are structure: what was accumulated, and
    what the numbers among the tensors stand for. Facts are plain Python values, so that a state can be pickled, compared,
    and go in and out of a compiled function; the structure of the parameters and of aux is that of trees in it, where
    `Missing` is a gradient that has not arrived (None would be structure, which parameters may have too).
    After the first micro-batch that counts, they stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradacc import _parts, _scalars, _sums, _tree
from gradacc._describe import describe
from gradacc._options import Options
from gradacc._sums import Sums


class Param(NamedTuple):
    """A parameter, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Facts(NamedTuple):
    """NOTE [facts]"""

    reduction: str
    dtype: torch.dtype | None
    has_aux: bool
    params: tuple[Param, ...]
    plain: tuple[bool, ...] = ()
    """Which of `_sums.numbers` are Python numbers, where values can be read."""
    arrived: bool = False
    targets: int = 1
    """How many gradients there are of each parameter: NOTE [several means] in ``_sums.py``."""
    nonfinite: str = "keep"
    empty: bool = False
    """Whether an empty micro-batch is all that there was: it says what types to return, and nothing else."""
    has_carry: bool = False


_OPTIONS = ("reduction", "dtype", "has_aux", "nonfinite", "has_carry")
"""Of the accumulator, among the facts."""


class Missing:
    """In the place of a gradient that has not arrived."""

    def __repr__(self) -> str:
        return "Missing()"


@dataclass(frozen=True, slots=True, eq=False)
class AccumulatorState:
    """What `gradacc.accumulator` has summed; see there. Its leaves are dense tensors."""

    grads: Any
    """Like the parameters, in the accumulators' dtypes, in units of ``sums.unit``: NOTE [units] in ``_units.py``.

    Of several targets a list with one for each.
    """
    sums: Sums
    """All its numbers are tensors here."""
    facts: Facts
    carry: Any = None
    """What `init` was given, where there is a carry; what it is now is in the sums."""


_tree.register(Missing, lambda _: (), ())
_tree.register_with_facts(AccumulatorState, ("grads", "sums", "carry"), "facts")


def is_missing(leaf: Any) -> bool:
    """`Missing` is a leaf here."""
    return isinstance(leaf, Missing)


def initial(
    options: Options, params: Sequence[Tensor], treedef: _tree.TreeDef, carry: Any, start: Any
) -> AccumulatorState:
    """Before the first micro-batch, with this carry, which begins with these parts."""
    facts = Facts(params=of_params(params), **{option: getattr(options, option) for option in _OPTIONS})
    weight = torch.zeros((), dtype=torch.float64, device="cpu")
    sums = Sums(value=None, aux=None, weight=weight, unit=None, carry=start, differentiated=False)
    return AccumulatorState(_tree.unflatten(treedef, [Missing() for _ in params]), sums, facts, carry)


def of_params(params: Sequence[Tensor]) -> tuple[Param, ...]:
    """What a state knows of parameters."""
    return tuple(Param(tuple(param.shape), param.dtype, param.device) for param in params)


def slots(state: AccumulatorState) -> tuple[list[Any], _tree.TreeDef]:
    """Its gradients, those of each target one after the other, and the structure of the parameters."""
    if state.facts.targets == 1:
        return _tree.flatten(state.grads, is_missing)
    each = [_tree.flatten(grads, is_missing) for grads in state.grads]
    return [slot for found, _ in each for slot in found], each[0][1]


def of_each(found: list[Any], targets: int) -> list[list[Any]]:
    """What was found one after the other, of each target."""
    number = len(found) // targets
    return [found[at * number : (at + 1) * number] for at in range(targets)]


def with_slots(treedef: _tree.TreeDef, found: list[Any], targets: int) -> Any:
    """The inverse of `slots`."""
    each = [_tree.unflatten(treedef, own) for own in of_each(found, targets)]
    return each[0] if targets == 1 else each


def like_params(state: AccumulatorState) -> tuple[list[Tensor], _tree.TreeDef]:
    """Tensors with the shapes, dtypes and devices of the parameters, and the memory of one number each; their structure."""
    found, treedef = slots(state)
    numbers = [
        torch.zeros((), dtype=p.dtype, device=slot.device if isinstance(slot, Tensor) else p.device)
        for slot, p in zip(found, state.facts.params, strict=False)
    ]
    return [_expanded(number, p.shape) for number, p in zip(numbers, state.facts.params, strict=True)], treedef


def _expanded(number: Tensor, shape: tuple[int, ...]) -> Tensor:
    """To a shape; to one of one element with usual strides, which ``zeros_like`` would keep, and autograd warns of others."""
    return number.reshape(shape) if math.prod(shape) == 1 else number.expand(shape)


def pack(
    facts: Facts,
    treedef: _tree.TreeDef,
    grads: Sequence[Tensor | None],
    sums: Sums,
    readable: bool,
    carry: Any = None,
) -> AccumulatorState:
    """A fold as a state of these facts, but that `Facts.plain` is what was said of the numbers before.

    Where values are read, numbers are on the CPU; else on the parameters' device, so that they can be batched.
    """
    found, rest, pieces = _sums.numbers(sums)
    plain = facts.plain or (False,) * len(found)
    device = torch.device("cpu") if readable else facts.params[0].device
    plain = tuple(
        not isinstance(number, Tensor) or (old and not readable and not number.ndim)
        for old, number in zip(plain, found, strict=True)
    )
    weight, unit = (
        None if number is None else _tensor(number, device).to(torch.float64) for number in (sums.weight, sums.unit)
    )
    numbers, joined = [_tensor(number, device) for number in found], [[_parts.joined(piece)] for piece in pieces]
    targets = len(grads) // len(facts.params)
    return AccumulatorState(
        with_slots(treedef, [Missing() if grad is None else grad for grad in grads], targets),
        _sums.with_numbers(rest, numbers, joined, weight, unit),
        facts._replace(plain=plain, targets=targets),
        carry,
    )


def unpack(state: AccumulatorState, readable: bool) -> tuple[list[Tensor | None], _tree.TreeDef, Sums]:
    """The inverse: gradients, structure of the parameters, sums, with Python numbers where they are readable."""
    if readable and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _tree.flatten(state)[0]):
        state = _tree.map_tensors(lambda leaf: leaf.detach() if leaf.requires_grad else leaf, state)
    found, treedef = slots(state)
    grads = [None if isinstance(slot, Missing) else slot for slot in found]
    sums, facts = state.sums, state.facts
    if sums.value is None:
        return grads, treedef, _sums.nothing(sums.carry)
    device = facts.params[0].device
    found, rest, pieces = _sums.numbers(sums)
    numbers = [
        _number(number, readable, device) if plain else number for number, plain in zip(found, facts.plain, strict=True)
    ]
    weight, unit = (
        None if number is None else _number(number, readable, device) for number in (sums.weight, sums.unit)
    )
    return grads, treedef, _sums.with_numbers(rest, numbers, pieces, weight, unit)


def _tensor(number: Any, device: torch.device) -> Tensor:
    return number if isinstance(number, Tensor) else _scalars.scalar(number, device, torch.float64)


def _number(tensor: Tensor, readable: bool, device: torch.device) -> Any:
    if not readable:
        return tensor.to(device)
    return tensor.item() if tensor.is_cpu else tensor  # on an accelerator nothing is read


def other_options(theirs: Facts, ours: Facts | Options) -> list[tuple[str, Any, Any]]:
    """Options of an accumulator in which two differ: name, and either one's."""
    pairs = [(option, getattr(theirs, option), getattr(ours, option)) for option in _OPTIONS]
    return [(option, one, other) for option, one, other in pairs if one != other]


def check(options: Options, state: Any, call: str, what: str = "state") -> AccumulatorState:
    """A state of an accumulator with these options."""
    name = options.name
    if not isinstance(state, AccumulatorState):
        raise TypeError(
            f"{name}: {what} must be a state that init, update or merge returned, got {describe(state)}; call {call}"
        )
    facts = state.facts
    for option, theirs, ours in other_options(facts, options):
        raise ValueError(
            f"{name}: the state is of an accumulator with {option}={theirs!r}, and this one has {option}={ours!r}; "
            "use the one that made it"
        )
    if not isinstance(state.sums.weight, Tensor) or state.sums.weight.ndim:
        raise ValueError(
            f"{name}: the state's weight is {describe(state.sums.weight)}, and not a 0-dim tensor; a state that vmap returned "
            "goes on under vmap"
        )
    found, treedef = slots(state)
    for index, (slot, param) in enumerate(zip(found, facts.params * facts.targets, strict=True)):
        if isinstance(slot, Missing):
            continue
        if not isinstance(slot, Tensor) or tuple(slot.shape) != param.shape:
            paths = _tree.paths(treedef, "state.grads")
            raise ValueError(
                f"{name}: {paths[index % len(paths)]} is {describe(slot)}, of a parameter of shape "
                f"{tuple(param.shape)}; a state is changed by update and merge only"
            )
    return state


def check_alike(
    options: Options,
    state: AccumulatorState,
    params: Sequence[Param],
    treedef: _tree.TreeDef,
    tensors: Sequence[Tensor | None],
    what: str,
) -> None:
    """Parameters of the structure, shapes and dtypes that a state is of, and ``tensors`` on the devices of its own."""
    name = options.name
    found, own = slots(state)
    if own != treedef:
        raise ValueError(
            f"{name}: {what} is of the structure {treedef}, and the state of {own}; a state goes on with parameters like "
            "those that init was given"
        )
    for index, (new, old) in enumerate(zip(params, state.facts.params, strict=True)):
        if new[:2] != old[:2]:
            raise ValueError(
                f"{name}: {_tree.paths(treedef, what)[index]} is {new.dtype} of shape {new.shape}, and in the state it is "
                f"{old.dtype} of shape {old.shape}; a state goes on with parameters like those that init was given"
            )
    for index, (slot, tensor) in enumerate(zip(found, tensors, strict=False)):
        if isinstance(slot, Tensor) and tensor is not None and slot.device != tensor.device:
            raise ValueError(
                f"{name}: {_tree.paths(treedef, what)[index]} is on {tensor.device}, and its gradient in the state on "
                f"{slot.device}; move one of them"
            )
