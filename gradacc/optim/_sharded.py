"""`sharded`: an optimizer's state, and its work, divided over ranks.

NOTE [what is gathered]
    Each rank updates its parts of the parameters, and all get all parts in one all-gather for each dtype and device. It is a
    call of the process group like that of a ``grad_fn``: if the step raises on one rank, every rank raises, and has its
    parameters as they were (with ``donate=True`` what has been written to is given away all the same).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _donated, _overlap, _rows, _shard, _tree, _where
from gradacc._cut import Cut
from gradacc._describe import describe
from gradacc._rows import Home, Homes
from gradacc._shard import Shard, ShardFacts
from gradacc._sync import agreement as agreements
from gradacc._sync import gathering
from gradacc._sync import group as groups
from gradacc._sync import turn as turns
from gradacc._tree import TensorTree
from gradacc.optim import _check, _memory, _report
from gradacc.optim._optimizer import Optimizer

_NAME = "sharded"
_ALONE = "every rank would keep the whole state. Call torch.distributed.init_process_group() first"


class ShardedState(NamedTuple):
    """State of `sharded` with ``master_dtype``; without, it is the state of the optimizer that is wrapped."""

    masters: TensorTree
    """This rank's parts of the parameters, in that dtype."""
    inner: TensorTree
    """State of the optimizer that is wrapped."""


def sharded(optimizer: Optimizer, group: Any = None, *, master_dtype: torch.dtype | None = None) -> Optimizer:
    """An optimizer whose state is divided over ranks: each updates its part of every parameter, and all gather the results.

    .. code-block:: text

        own             = this rank's part of each parameter, flattened (of n elements together at most ceil(n / W))
        own, state      = optimizer.step(own, grads, state)              grads: of sync=gradacc.reduce_scatter(group)
        params          = all_gather(own)

    Parameters are whole on every rank before and after. Where the backend is gloo, their bits are those of ``optimizer`` with
    the gradients of ``all_reduce(ordered=True)``; NCCL adds in an order of its own, and `clip_by_global_norm` takes the norm of
    the ranks' norms: with either they are equal to rounding. A step sends as many bytes as one all-reduce (ZeRO-1; with
    ``reduce_scatter(overlap=True)`` ZeRO-2).

    Of a parameter that is a DTensor (``fully_shard``) a rank updates its own rows, and gathers nothing: ``docs/fsdp.md``.

    ``optimizer`` is given trees like the parameters, with a `gradacc.Shard` in the place of each tensor; its rule must treat
    every element by itself. Wrappers may be inside or outside (`skip_spikes` and `dynamic_loss_scale` outside):
    `clip_by_global_norm` and they judge the gradients of all ranks, for which each takes one small collective a step. `by_path`
    goes inside; its predicates see paths and shapes of whole parameters. The state is saved by `gradacc.checkpoint.save` as
    whole tensors, and loads on any number of ranks, and into a run without `sharded`.

    Arguments:
        optimizer: an `Optimizer` that is ``elementwise``: `sgd`, `adam`, `adamw`, `from_torch` of such classes,
            `from_torchopt` of such transformations, and what is made of them.
        group: the ranks, as for `gradacc.reduce_scatter`: a ProcessGroup, a DeviceMesh of one dimension, or None, the default
            one. Without a process group a part is the whole.
        master_dtype: keep this rank's parts of the parameters in this dtype (`torch.float32`), and update these: parameters in
            bfloat16 are then what the masters are rounded to. Gradients may come in either dtype
            (``accumulate(..., dtype=torch.float32)``).

    Raises:
        TypeError: ``optimizer`` is no `Optimizer`; ``master_dtype`` no floating dtype. When called: gradients that are not
            those of `gradacc.reduce_scatter`.
        ValueError: ``optimizer`` needs whole tensors (Muon, Adafactor), is a `dynamic_loss_scale`, or takes the loss. When
            called: gradients, or a state, of another number of ranks or of other parameters. They come before anything crosses.
        RuntimeError: the update has raised on another rank, or it made another call.
        NotImplementedError: inside `torch.compile` or a functorch transform, with ranks to talk to.

    Example:
        >>> import torch, gradacc
        >>> optimizer = gradacc.optim.sharded(gradacc.optim.sgd(1.0))
        >>> grad_fn = gradacc.accumulate(lambda w, x: (x @ w).mean(), steps=2, sync=gradacc.reduce_scatter())
        >>> w = torch.zeros(3)
        >>> w, state = optimizer.step(w, grad_fn(w, torch.ones(4, 3)), optimizer.init(w))
        >>> w
        tensor([-1., -1., -1.])

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
    arXiv 1910.02054.
    """
    _check.optimizer(_NAME, optimizer)
    _check.elementwise(_NAME, optimizer)
    _check_master(master_dtype)
    place = agreements.count_place(f"optim.{_NAME}", group)
    how = _How(optimizer, group, master_dtype, place, gathering.Lasting())

    def init(params: TensorTree) -> TensorTree:
        leaves, treedef = _check.params(_NAME, params, divided=True)
        _check_width(leaves, treedef, master_dtype)
        own = _own(leaves, treedef, _placed(leaves, treedef, _ranks(group)), copy=True)
        if master_dtype is None:
            return optimizer.init(own)
        masters = _tree.map_tensors(lambda part: part.to(master_dtype), own)
        return ShardedState(masters, optimizer.init(masters))

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        call = functools.partial(_step, how, params, grads, state, donate=donate)
        after: tuple[TensorTree, TensorTree] = (
            _donated.written_by(f"{_NAME}.step", (params, grads, state), call) if donate else call()
        )
        return after

    def check(params: TensorTree, state: TensorTree) -> None:
        leaves, treedef = _check.params(_NAME, params, divided=True)
        own, inner = _checked(how, leaves, treedef, _placed(leaves, treedef, _ranks(group)), state)
        if optimizer.check is not None:
            optimizer.check(own, inner)

    report = optimizer.report
    if master_dtype is not None:
        report = _report.of_inner(_NAME, ShardedState, report)
    return Optimizer(init, step, None if optimizer.check is None else check, report)


class _How(NamedTuple):
    """What an optimizer was made of."""

    optimizer: Optimizer
    group: Any
    master_dtype: torch.dtype | None
    place: str
    """What ranks call it among themselves."""
    lasting: gathering.Lasting


def _step(
    how: _How, params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool
) -> tuple[TensorTree, TensorTree]:
    leaves, treedef = _check.params(_NAME, params, divided=True)
    ranks, master_dtype = _ranks(how.group), how.master_dtype
    with turns.telling(how.place, ranks):
        placed = _placed(leaves, treedef, ranks)
        grads = _rows.as_shards(_NAME, grads, "grads")
        _check_gradients(grads, leaves, treedef, placed.facts)
        _check_where(ranks, grads)
        own, inner = _checked(how, leaves, treedef, placed, state)
        if master_dtype is not None:
            grads = _tree.map_tensors(lambda grad: grad.to(master_dtype), grads)
        before, structure = _tree.flatten(own)
        kinds = list(map(_kind, before))
        after, following = how.optimizer.step(own, grads, inner, donate=donate)
        parts = _parts_of(after, kinds, structure, ranks)
        if master_dtype is not None:
            parts = [part.to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        turn = None if ranks is None else _turn(how, _said(following), ranks, leaves, treedef)
        into = _new(leaves, parts, placed, turn, donate)
    return _tree.unflatten(treedef, into), following if master_dtype is None else ShardedState(after, following)


def _checked(how: _How, leaves: list[Tensor], treedef: _tree.TreeDef, placed: _Placed, state: Any) -> Any:
    """What is updated, and the state of the optimizer inside."""
    master_dtype = how.master_dtype
    _check_state(state, placed.facts, master_dtype)
    own = _own(leaves, treedef, placed, copy=False)
    if master_dtype is None:
        return own, state
    like = _tree.map_tensors(lambda part: part.new_empty(part.shape, dtype=master_dtype), own)
    found, structure = _tree.flatten(like)
    _check.slot(_NAME, "state.masters", state.masters, found, structure)
    return state.masters, state.inner


def _check_master(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 4):
        raise TypeError(f"{_NAME}: master_dtype must be torch.float32 or torch.float64, got {dtype!r}")


def _check_width(leaves: Sequence[Tensor], treedef: _tree.TreeDef, dtype: torch.dtype | None) -> None:
    """Masters hold every number of a parameter."""
    for leaf, path in zip(leaves, _tree.paths(treedef, "params"), strict=True):
        if dtype is not None and torch.promote_types(leaf.dtype, dtype) != dtype:
            raise TypeError(
                f"{_NAME}: {path} is a tensor of dtype {leaf.dtype}, which master_dtype={dtype} does not hold; leave "
                "master_dtype out, or keep such parameters in a tree of their own"
            )


def _check_where(ranks: dist.ProcessGroup | None, grads: TensorTree) -> None:
    """Nothing differentiates, batches or traces what is gathered."""
    if ranks is None or not _memory.differentiable(None, _tree.flatten(grads)[0]):
        return
    raise NotImplementedError(
        f"{_NAME}: new parameters cannot be gathered inside a functorch transform or a compiled function, nor with a graph "
        "(where gradients or a learning rate require grad, and grad mode is enabled); call the step outside, or under "
        "torch.no_grad() (a compiled grad_fn goes with it)"
    )


class _Placed(NamedTuple):
    """Of each parameter:"""

    facts: tuple[ShardFacts, ...]
    """which part is this rank's,"""
    cuts: tuple[Cut, ...]
    """which are whose,"""
    homes: tuple[Home | None, ...]
    """and how it is divided already, if it is."""


def _ranks(group: Any) -> dist.ProcessGroup | None:
    """None where there is nobody else."""
    return groups.resolve(_NAME, group, _ALONE)


def _placed(leaves: Sequence[Tensor], treedef: _tree.TreeDef, ranks: dist.ProcessGroup | None) -> _Placed:
    homes: Homes = [None] * len(leaves)
    if any(map(_rows.is_dtensor, leaves)):
        homes = _rows.homes(_NAME, leaves, _tree.paths(treedef, "params"), ranks)
    place = (0, 1, "") if ranks is None else (ranks.rank(), ranks.size(), ranks.group_name)
    rows = tuple(home is not None for home in homes)
    facts, cuts = _divided(tuple((leaf.shape, leaf.dtype) for leaf in leaves), rows, *place)
    return _Placed(facts, cuts, tuple(homes))


@functools.lru_cache(maxsize=32)
def _divided(
    leaves: tuple[tuple[torch.Size, torch.dtype], ...],
    rows: tuple[bool, ...],
    rank: int,
    world: int,
    group: str,
) -> tuple[tuple[ShardFacts, ...], tuple[Cut, ...]]:
    cuts = _rows.cuts(leaves, rows, world)
    facts = [
        ShardFacts(tuple(shape), *cut.part(rank), rank, world, group)
        for (shape, _), cut in zip(leaves, cuts, strict=True)
    ]
    return tuple(facts), tuple(cuts)


def _own(leaves: Sequence[Tensor], treedef: _tree.TreeDef, placed: _Placed, *, copy: bool) -> TensorTree:
    """This rank's parts."""
    parts = [
        _shard.part_of(leaf if _where.transforming() else leaf.detach(), each) if home is None else _rows.local(leaf)
        for leaf, each, home in zip(leaves, placed.facts, placed.homes, strict=True)
    ]
    shards = [Shard(part.clone() if copy else part, each) for part, each in zip(parts, placed.facts, strict=True)]
    return _tree.unflatten(treedef, shards)


def _new(
    leaves: Sequence[Tensor],
    parts: Sequence[Tensor],
    placed: _Placed,
    turn: gathering.Gathering | None,
    donate: bool,
) -> list[Tensor]:
    """Parameters of parts: DTensors of their own rows, and whole tensors of those of all ranks. NOTE [what is gathered]"""
    whole = [n for n, home in enumerate(placed.homes) if home is None]
    if turn is None and _memory.differentiable(None, parts):
        into = [parts[n].view(leaves[n].shape) for n in whole]
    else:
        with torch.no_grad():
            into = _room([leaves[n] for n in whole], donate)
            gathering.gather_parts(turn, [parts[n] for n in whole], into, [placed.cuts[n] for n in whole])
    found = dict(zip(whole, into, strict=True))
    with torch.no_grad():
        for n, (leaf, home) in enumerate(zip(leaves, placed.homes, strict=True)):
            if home is not None:
                own = _rows.local(leaf)
                found[n] = home.dtensor(own.copy_(parts[n]) if donate else parts[n])
    return [found[n] for n in range(len(leaves))]


def _room(leaves: list[Tensor], donate: bool) -> list[Tensor]:
    """For new parameters: their own memory, where that is given, or new one."""
    if not donate:
        return [torch.empty_like(leaf, requires_grad=False) for leaf in leaves]
    (own,) = _overlap.in_separate_memory([leaves])
    return [leaf.detach() for leaf in own]


class _Kind(NamedTuple):
    """What a part is, and stays."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _kind(part: Tensor) -> _Kind:
    return _Kind(part.shape, part.dtype, part.device)


def _parts_of(
    after: TensorTree, kinds: list[_Kind], expected: _tree.TreeDef, ranks: dist.ProcessGroup | None
) -> list[Tensor]:
    """The new parts, which are like those before."""
    found, treedef = _tree.flatten(after)
    if treedef != expected:
        raise ValueError(
            f"{_NAME}: the optimizer's step returned parameters of another structure: {treedef}, not {expected}"
        )
    for part, kind, path in zip(found, kinds, _tree.paths(expected, "params"), strict=True):
        if not isinstance(part, Tensor) or _kind(part) != kind:
            got = f"{part.dtype}, {describe(part)}" if isinstance(part, Tensor) else describe(part)
            raise ValueError(
                f"{_NAME}: the optimizer's step returned {got} as {path}, which was a {kind.dtype} tensor of shape "
                f"{tuple(kind.shape)} on {kind.device}"
            )
    _check_where(ranks, after)
    return found


def _said(state: TensorTree) -> str:
    """Of an optimizer's state what is the same on every rank: of which kind it is, and where its tensors are."""
    return f"{type(state).__qualname__} {_tree.paths(_tree.flatten(state)[1])}"


def _turn(
    how: _How, said: str, ranks: dist.ProcessGroup, leaves: Sequence[Tensor], treedef: _tree.TreeDef
) -> gathering.Gathering:
    paths = _tree.paths(treedef, "params")
    params = [(path, tuple(leaf.shape), leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)]
    divided = ("DTensors", tuple(map(_rows.is_dtensor, leaves)))
    options = ("optimizer", said), ("master_dtype", how.master_dtype)
    turn = gathering.Gathering(how.place, ranks, how.lasting, gathering.describe(params, divided, *options))
    turn.device = leaves[0].device
    turn.begin()
    return turn


def _check_gradients(grads: Any, leaves: Sequence[Tensor], treedef: _tree.TreeDef, facts: Sequence[ShardFacts]) -> None:
    """They are this rank's parts of the gradients of these parameters."""
    found, structure = _tree.flatten(grads, _shard.is_shard)
    if structure != treedef:
        raise ValueError(
            f"{_NAME}: grads has another structure than params: {_check.differing(structure, treedef, 'grads')}. Pass what "
            "grad_fn(params, ...) returned for these params"
        )
    for grad, leaf, each, path in zip(found, leaves, facts, _tree.paths(treedef, ""), strict=True):
        if not isinstance(grad, Shard):
            raise TypeError(
                f"{_NAME}: grads{path} is {describe(grad)}, and this optimizer takes this rank's part of each gradient, a "
                "gradacc.Shard: make grad_fn with sync=gradacc.reduce_scatter(group)"
            )
        if grad.facts != each:
            raise ValueError(f"{_NAME}: grads{path} is {told(grad.facts)}, where {told(each)} is due. {_SAME}")
        if not isinstance(grad.values, Tensor) or grad.values.device != leaf.device:
            raise ValueError(f"{_NAME}: grads{path} is not on {leaf.device}, where params{path} is")


_SAME = "grad_fn and the optimizer must have the same group and the same params (by_path goes inside of sharded)"


def told(facts: ShardFacts) -> str:
    """In words."""
    return (
        f"elements {facts.offset} to {facts.offset + facts.length} of a tensor of shape {facts.shape}, on rank {facts.rank} of "
        f"{facts.world}" + (f" of process group {facts.group!r}" if facts.group else "")
    )


def _check_state(state: Any, facts: Sequence[ShardFacts], master_dtype: torch.dtype | None) -> None:
    """It is of as many ranks; the optimizer inside checks the rest."""
    if isinstance(state, ShardedState) != (master_dtype is not None):
        raise TypeError(
            f"{_NAME}: state is {describe(state)}, and this optimizer has master_dtype={master_dtype}. Pass what its "
            "init(params) or its last step returned"
        )
    own = facts[0]
    for shard in _shard.shards(state):
        if (shard.facts.world, shard.facts.rank, shard.facts.group) != (own.world, own.rank, own.group):
            raise ValueError(
                f"{_NAME}: state has {told(shard.facts)}, and this is rank {own.rank} of {own.world}"
                + (f" of process group {own.group!r}" if own.group else "")
                + ". Load a checkpoint of it into init(params), which divides it anew"
            )
