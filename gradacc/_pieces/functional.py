"""A function by pieces under torch.func's transforms: their own kind of node, in the memory of a piece.

.. code-block:: text

    forward    results = join(func(x_i, w) for all i)                       keeps x and w
    backward   torch.func.grad of <cotangent, func(x_i, w)>, of each piece, run again; x_i's put together, w's summed
    jvp        torch.func.jvp of the whole

`torch.func` refuses `torch.utils.checkpoint`; a custom ``Function`` with ``setup_context`` it takes, with transforms in any
order around it.

NOTE [closed-over tensors of a transform]
    The body of such a ``Function`` runs below the transforms, with its inputs unwrapped. A tensor of a transform that the
    function closes over is not: it would be a constant there, without a word. So the body runs under a mode that sees every
    tensor that a function of torch is given: where one belongs to a transform, or requires grad, and is neither an input nor
    made in the body, the body is given up. The piece runs once under the transforms, to find all that it closes over, and
    everything once more with those as inputs. Where that does not help (a ``Function`` of the caller's makes or takes what
    no mode sees), the plain composite is taken.

NOTE [what a backward pass of a transform keeps]
    `torch.func.grad` differentiates with ``create_graph``: the graph of a recomputation would be a part of the gradients' own
    graph, and all of them alive at the end. So the recomputation is the body of a ``Function`` too, which keeps its inputs.
    Its own derivative, the second one, keeps what the whole keeps; so does forward mode over reverse mode.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradacc import _dtypes, _surroundings, _tree
from gradacc._pieces import closed, composite, join, outputs
from gradacc._pieces.divide import Piece, Pieces


@dataclass(slots=True, eq=False)
class _Plan:
    """What a call is made of, but for tensors."""

    func: Callable[..., Any]
    of: Pieces
    """With None in the place of tensors among its sources."""
    outs: outputs.Outs
    tensors: list[int]
    """Which of the sources are."""
    closed: list[Tensor]
    """What the function closes over, inputs behind the sources."""
    around: _surroundings.Surroundings
    first: outputs.Output | None = None
    """The structure of the output of a piece, and"""
    values: list[Any] = field(default_factory=list)
    """all leaves of the result, of which tensors are not used."""


class _ClosesOverError(BaseException):
    """The function closes over something that is no input, in the piece of this number. Not for the function to catch."""


_ATTEMPTS = 4
"""How often pieces may be found to close over something new."""


def run(func: Callable[..., Any], of: Pieces, outs: outputs.Outs) -> Any:
    """What the whole would have returned."""
    of = of._replace(parts=list(of.parts))
    if _forward_levels() > 1 or not outputs.is_of_ways(outs.out):
        # Torch's own nodes give zeros for forward over forward; and what a reducer closes over is met behind the pieces.
        return outputs.unflatten(*composite.run(func, of, outs))
    tensors = [n for n, leaf in enumerate(of.sources) if isinstance(leaf, Tensor)]
    given = [of.sources[n] for n in tensors]
    around = _surroundings.of(given)
    without = of._replace(sources=[None if isinstance(leaf, Tensor) else leaf for leaf in of.sources])
    plan = _Plan(func, without, outs, tensors, [], around)
    for _ in range(_ATTEMPTS):
        try:
            results = _Node.apply(plan, *given, *plan.closed)  # type: ignore[no-untyped-call]  # torch's
        except _ClosesOverError as error:
            _surroundings.rewind(around)
            plan.closed += _closed_over(plan, of, *error.args)
            _surroundings.rewind(around)
            continue
        assert plan.first is not None
        places = [i for i, value in enumerate(plan.values) if isinstance(value, Tensor)]
        return outputs.unflatten(_tree.placed(plan.values, places, results), plan.first)
    return outputs.unflatten(*composite.run(func, of, outs))


class _Node(torch.autograd.Function):
    """All tensors of the result, of those of the arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, *tensors: Tensor) -> Any:
        begun: list[int] = []

        def refuse(_: Tensor) -> Tensor:
            raise _ClosesOverError(begun[-1])

        with closed.meeting(tensors, refuse) as meet:
            values, plan.first = _whole(plan, tensors, begun.append, meet)
        results = [value for value in values if isinstance(value, Tensor)]
        plan.first = plan.first._replace(leaves=[0] * len(plan.first.leaves))
        plan.values = [value if not isinstance(value, Tensor) else value.new_empty(()) for value in values]
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        plan, *tensors = inputs
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(result for result in output if not _dtypes.is_inexact(result)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        plan, tensors = ctx.plan, ctx.saved_tensors
        needed = [n for n, tensor in enumerate(tensors) if ctx.needs_input_grad[n + 1] and _dtypes.is_inexact(tensor)]
        # NOTE [what a backward pass of a transform keeps]
        pulled = functools.partial(_pulled, plan, needed, len(tensors))
        if _forward_levels() > 0:
            # Vectorized, forward mode does not take a second Function.
            found: Any = pulled([*tensors, *cotangents])
        else:
            found = _Pulled.apply(pulled, *tensors, *cotangents)  # type: ignore[no-untyped-call]  # torch's
        return None, *_tree.placed([None] * len(tensors), needed, found)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        plan = ctx.plan
        found = iter(_pushed(functools.partial(_inexact, plan), ctx.saved_for_forward, tangents))
        return tuple(next(found) if _is_inexact(value) else None for value in plan.values if isinstance(value, Tensor))


class _Pulled(torch.autograd.Function):
    """``function(tensors)``, of tensors that are inexact, and its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[[Sequence[Tensor]], Sequence[Tensor]], *tensors: Tensor) -> Any:
        return tuple(function(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = ctx.saved_tensors
        needed = [n for n, tensor in enumerate(tensors) if ctx.needs_input_grad[n + 1] and _dtypes.is_inexact(tensor)]
        grads = _pullback(ctx.function, tensors, needed, cotangents)
        return None, *_tree.placed([None] * len(tensors), needed, grads)


def _forward_levels() -> int:
    """How many levels of forward-mode differentiation are active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    jvps = sum(each.key() == torch._C._functorch.TransformType.Jvp for each in stack)
    return max(jvps, forward_ad._current_level + 1)


def _pushed(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
) -> Sequence[Tensor]:
    """The Jacobian-vector product."""
    moved = [n for n, tangent in enumerate(tangents) if tangent is not None and _dtypes.is_inexact(tensors[n])]
    primals, directions = tuple(tensors[n] for n in moved), tuple(tangents[n] for n in moved)
    found: Any = torch.func.jvp(lambda *some: tuple(function(_tree.placed(tensors, moved, some))), primals, directions)
    result: Sequence[Tensor] = found[1]
    return result


def _is_inexact(value: Any) -> bool:
    """Whether it has a derivative."""
    return isinstance(value, Tensor) and _dtypes.is_inexact(value)


def _filled(plan: _Plan, tensors: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
    """The sources with these tensors, and what stands for what the function closes over."""
    count = len(plan.tensors)
    return _tree.placed(plan.of.sources, plan.tensors, tensors[:count]), list(tensors[count:])


def _whole(
    plan: _Plan,
    tensors: Sequence[Tensor],
    before: Callable[[int], None] | None = None,
    meet: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Any], outputs.Output]:
    sources, aliases = _filled(plan, tensors)
    with closed.replacing(plan.closed, aliases) as replace:
        func = closed.seen(plan.func, replace)
        func = func if meet is None else closed.seen(func, meet)
        return composite.run(func, plan.of._replace(sources=sources), plan.outs, before)


def _inexact(plan: _Plan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the result that have a derivative, run again."""
    with _surroundings.restored(plan.around):
        values, _ = _whole(plan, tensors)
    return [value for value in values if _is_inexact(value)]


def _pulled(plan: _Plan, needed: list[int], count: int, given: Sequence[Tensor]) -> list[Tensor]:
    """The vector-Jacobian product, of one piece after another; ``given``: ``count`` inputs, and cotangents."""
    assert plan.first is not None
    of, tensors, left = plan.of, given[:count], iter(given[count:])
    leaves = outputs.described(plan.outs, plan.first)
    every = {i: next(left) for i, value in enumerate(plan.values) if isinstance(value, Tensor)}
    wanted = {i: cotangent for i, cotangent in every.items() if _is_inexact(plan.values[i])}
    places = [outputs.Place(n, piece.size, of.total, of.number, piece.order) for n, piece in enumerate(of.parts)]
    cotangents = join.Cotangents(leaves, wanted, join.examples(places))
    split = {source: dim for piece in of.parts for source, dim in piece.picks}
    dims = [split.get(plan.tensors[n]) if n < len(plan.tensors) else None for n in needed]
    sums: list[Any] = [None] * len(needed)
    with _surroundings.restored(plan.around):
        if not all(join.is_linear(leaves[i]) for i in wanted):
            return _pullback(functools.partial(_inexact, plan), tensors, needed, list(wanted.values()))
        for piece, place in zip(of.parts, places, strict=True):
            grads = _pulled_piece(plan, piece, tensors, needed, functools.partial(cotangents.of, place=place))
            for k, (dim, grad) in enumerate(zip(dims, grads, strict=True)):
                if dim is not None:
                    sums[k] = [*(sums[k] or []), grad]
                else:
                    wide = grad.to(_dtypes.dtypes(plan.outs.dtype, [grad])[0][0])
                    sums[k] = wide if sums[k] is None else sums[k] + wide
        if not torch.compiler.is_compiling():
            cotangents.check_all(plan.outs)
        return [
            total.to(tensors[n].dtype) if dim is None else torch.cat(total, dim)
            for n, dim, total in zip(needed, dims, sums, strict=True)
        ]


def _pulled_piece(
    plan: _Plan,
    piece: Piece,
    tensors: Sequence[Tensor],
    needed: Sequence[int],
    cotangents: Callable[[Sequence[Any]], dict[int, Tensor]],
) -> Sequence[Tensor]:
    """Of one piece: gradients of its parts of what is needed; ``cotangents``: of what it returns."""
    sources, aliases = _filled(plan, tensors)
    arguments = piece.leaves(sources)
    where = {source: at for at, (source, _) in enumerate(piece.picks)}
    picked = [where.get(plan.tensors[n]) if n < len(plan.tensors) else None for n in needed]

    def function(some: list[Tensor]) -> Tensor:
        own, replaced = list(arguments), list(aliases)
        for n, at, tensor in zip(needed, picked, some, strict=True):
            if at is not None:
                own[at] = tensor
            elif n >= len(plan.tensors):
                replaced[n - len(plan.tensors)] = tensor
        with closed.replacing(plan.closed, replaced) as replace:
            output = outputs.flatten(piece.call(closed.seen(plan.func, replace), own), torch.zeros_like)
        given = cotangents(output.leaves)
        return _product([output.leaves[i] for i in given], list(given.values()))

    return _gradient(
        function, [arguments[at] if at is not None else tensors[n] for n, at in zip(needed, picked, strict=True)]
    )


def _pullback(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    needed: Sequence[int],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """The vector-Jacobian product, by the needed ones of its arguments."""

    def product(some: list[Tensor]) -> Tensor:
        return _product(function(_tree.placed(tensors, needed, some)), cotangents)

    return _gradient(product, [tensors[n] for n in needed])


def _product(values: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    """Real, 0-dim, and its gradient by the values is the cotangents."""
    terms = [
        (value * (cotangent.conj() if cotangent.is_complex() else cotangent)).sum()
        for value, cotangent in zip(values, cotangents, strict=True)
    ]
    reals = [term.real if term.is_complex() else term for term in terms]
    return functools.reduce(operator.add, reals) if reals else torch.zeros(())


def _gradient(function: Callable[[list[Tensor]], Tensor], some: list[Tensor]) -> list[Tensor]:
    """Not by `torch.func.vjp`: of what a piece does not use, it makes zeros like tensors of a transform that has ended."""
    found: Any = torch.func.grad(function)(some)
    return list(found)


def _closed_over(plan: _Plan, of: Pieces, piece: int) -> list[Tensor]:
    """What is met in one piece, run under the transforms."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[id(tensor)] = tensor
        return tensor

    with closed.meeting([of.sources[n] for n in plan.tensors] + plan.closed, note) as meet:
        composite.called(closed.seen(plan.func, meet), list(of.parts)[piece], of.sources)
    return list(found.values())
