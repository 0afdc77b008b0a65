"""`sharded`: an optimizer's state, and its work, divided over ranks.

NOTE [what is gathered]
    Each rank updates its parts of the parameters, and all get all parts in one all-gather for each dtype and device. It is a
    call of the process group like that of a ``grad_fn``: if the update raises on one rank, every rank raises, and has its
    parameters as they were (with ``donate=True`` what was given away is).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc import _donated, _rows, _shard, _tree, _where
from gradacc._cut import Cut
from gradacc._describe import describe
from gradacc._rows import Home, Homes
from gradacc._shard import Shard, ShardFacts
from gradacc._sync import gathering
from gradacc._sync import group as groups
from gradacc._tree import TensorTree
from gradacc.optim import _check, _report
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

    Parameters are whole on every rank before and after. Their bits are those of ``optimizer`` with the gradients of
    ``all_reduce(ordered=True)``, and a step sends as many bytes as one all-reduce (ZeRO-1; with
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
    lasting = gathering.Lasting()

    def init(params: TensorTree) -> TensorTree:
        leaves, treedef = _check.params(_NAME, params, divided=True)
        own = _own(leaves, treedef, _placed(leaves, treedef, _ranks(group)), copy=True)
        if master_dtype is None:
            return optimizer.init(own)
        masters = _tree.map_tensors(lambda part: part.to(master_dtype), own)
        return ShardedState(masters, optimizer.init(masters))

    def checked(leaves: list[Tensor], treedef: _tree.TreeDef, placed: _Placed, state: Any) -> Any:
        """What is updated, and the state of the optimizer inside."""
        _check_state(state, placed.facts, master_dtype)
        own = _own(leaves, treedef, placed, copy=False)
        if master_dtype is None:
            return own, state
        like = _tree.map_tensors(lambda part: part.new_empty(part.shape, dtype=master_dtype), own)
        found, structure = _tree.flatten(like)
        _check.slot(_NAME, "state.masters", state.masters, found, structure)
        return state.masters, state.inner

    def step(
        params: TensorTree, grads: TensorTree, state: TensorTree, *, donate: bool = False
    ) -> tuple[TensorTree, TensorTree]:
        leaves, treedef = _check.params(_NAME, params, divided=True)
        ranks = _ranks(group)
        turn = None if ranks is None else _turn(lasting, ranks, leaves, treedef)
        try:
            placed = _placed(leaves, treedef, ranks)
            given = [*leaves, *_tree.flatten(grads)[0], *_tree.flatten(state)[0]] if donate else []
            grads = _rows.as_shards(_NAME, grads, "grads")
            _check_gradients(grads, leaves, treedef, placed.facts)
            own, inner = checked(leaves, treedef, placed, state)
            if master_dtype is not None:
                grads = _tree.map_tensors(lambda grad: grad.to(master_dtype), grads)
            moved, inner = optimizer.step(own, grads, inner, donate=donate)
            parts = _tree.flatten(moved)[0]
            if master_dtype is not None:
                parts = [part.to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        except BaseException as error:
            if turn is not None:
                turn.fail(error)
            raise
        with torch.no_grad():
            into = _new(leaves, parts, placed, turn, donate)
        after = _tree.unflatten(treedef, into), inner if master_dtype is None else ShardedState(moved, inner)
        return _donated.hand_over(f"{_NAME}.step", given, after)

    def check(params: TensorTree, state: TensorTree) -> None:
        leaves, treedef = _check.params(_NAME, params, divided=True)
        own, inner = checked(leaves, treedef, _placed(leaves, treedef, _ranks(group)), state)
        if optimizer.check is not None:
            optimizer.check(own, inner)

    report = optimizer.report
    if master_dtype is not None:
        report = _report.of_inner(_NAME, ShardedState, report)
    return Optimizer(init, step, None if optimizer.check is None else check, report)


def _check_master(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 4):
        raise TypeError(f"{_NAME}: master_dtype must be torch.float32 or torch.float64, got {dtype!r}")


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
        _shard.part_of(leaf.detach(), each) if home is None else _rows.local(leaf)
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
    new: list[Tensor | None] = [None] * len(leaves)
    whole = [n for n, home in enumerate(placed.homes) if home is None]
    for n in whole:
        new[n] = leaves[n].detach() if donate else torch.empty_like(leaves[n], requires_grad=False)
    into = [leaf for leaf in new if leaf is not None]
    if turn is not None:
        gathering.gather_parts(turn, [parts[n] for n in whole], into, [placed.cuts[n] for n in whole])
    else:
        for n, leaf in zip(whole, into, strict=True):
            leaf.copy_(parts[n].view(leaf.shape))
    for n, (leaf, home) in enumerate(zip(leaves, placed.homes, strict=True)):
        if home is not None:
            own = _rows.local(leaf)
            new[n] = home.dtensor(own.copy_(parts[n]) if donate else parts[n])
    return [leaf for leaf in new if leaf is not None]


def _turn(
    lasting: gathering.Lasting, ranks: dist.ProcessGroup, leaves: Sequence[Tensor], treedef: _tree.TreeDef
) -> gathering.Gathering:
    if _where.transforming():
        raise NotImplementedError(
            f"{_NAME}: inside a functorch transform or a compiled function new parameters cannot be gathered; call the step "
            "outside (a compiled grad_fn goes with it)"
        )
    paths = _tree.paths(treedef, "params")
    params = [(path, tuple(leaf.shape), leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)]
    divided = ("DTensors", tuple(map(_rows.is_dtensor, leaves)))
    turn = gathering.Gathering(f"optim.{_NAME}", ranks, lasting, gathering.describe(params, divided))
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
