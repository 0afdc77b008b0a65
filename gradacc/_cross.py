"""The boundary alone: sums that were made elsewhere, over all ranks, divided once."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradacc import _aux, _batch, _dtensors, _dtypes, _loop, _loss, _options, _sums, _sync, _tree, _where
from gradacc._describe import describe
from gradacc._engines import eager
from gradacc._mean import Mean
from gradacc._options import Options, Sync
from gradacc._sums import Sums
from gradacc._sync import group as groups

_NAME = "cross"


def cross(sums: Any, mean: Mean, *, sync: Sync | None) -> tuple[Any, Mean]:
    r"""The gradient and the value of one large batch, from what each rank has summed by itself.

    .. code-block:: text

        grads = sum_r sums_r / sum_r weight_r            value = Mean(sum_r total_r, sum_r weight_r)

    `gradacc.accumulate` with ``sync`` is a fold on each rank, and this. For whoever folds elsewhere: a loop of
    ``.backward()`` on an ordinary module, a pipeline's schedule, FSDP2 with deferred synchronisation. Nothing is divided
    before it: losses are sums over tokens (or whatever the mean is over), so that ``.grad`` is a sum of gradients.

    Sums cross once a call, with the guarantees of ``sync``: ranks may hold any numbers of tokens, and none; results have the
    same bits on every rank (with `gradacc.reduce_scatter`, each its part of them); where it raises on one rank, all ranks
    raise; where sums differ in structure, shape or dtype, all get the same error. At first use (in a group, of sums of this
    structure) ranks compare descriptions, which later calls rely on. ``docs/cross.md`` has the loops around it.

    Arguments:
        sums: a pytree of floating or complex tensors, this rank's sums of gradients, *not divided* by anything. Its structure,
            shapes and dtypes are the same on every rank: what got no gradient is given as zeros. Half precision is summed
            over ranks in float32, and returned as it came. It is not changed. A DTensor (of FSDP2) says by its placements what
            it is: not `Partial`, it is the sum over the ranks of its mesh already, and is only divided; it comes back with the
            same placements.
        mean: ``Mean(loss_sum, tokens)`` of this rank: a 0-dim floating total, and how much the sums are over (a number or 0-dim
            tensor, finite and ``>= 0``). A rank of weight 0 contributes nothing, whatever its sums are (but DTensors, which are
            all ranks'). A sum of several, ``a + b``, is fine here. The total is taken without its graph.
        sync: `gradacc.all_reduce` or `gradacc.reduce_scatter`, of the group of ranks that had different data; ``overlap`` is
            left out, as there is no backward pass. None: this rank is all there is, and its sums are divided.

    Returns:
        ``(grads, value)``: ``grads`` of the structure, shapes and dtypes of ``sums``, new tensors (with
        `gradacc.reduce_scatter`, a `gradacc.Shard` for each); ``value`` a `Mean`, of total
        and weight over all ranks (``value.value`` is the loss). If all weights are 0, grads are 0 and ``value.value`` is NaN.

    Raises:
        TypeError: sums that hold None, integers, a module, or anything else that is no dense floating or complex tensor; a
            ``mean`` that is no `Mean` of a floating tensor.
        ValueError: sums that hold no tensor, or one that requires grad (a parameter in the place of its ``.grad``); a total
            or weight that is not 0-dim; a weight that is negative, infinite or NaN; a DTensor that has not been summed, or
            was summed over other ranks than those of ``sync``; and as `gradacc.all_reduce` has it.
        RuntimeError: the call has raised on another rank, or that one made another call.

    Example:
        >>> import torch, gradacc
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> total, tokens = 0.0, 0
        >>> for x in (torch.ones(3, 2), torch.ones(1, 2)):             # micro-batches of 3 and 1
        ...     loss = module(x).sum()                                 # a sum, not a mean
        ...     loss.backward()
        ...     total, tokens = total + loss.detach(), tokens + len(x)
        >>> sums = {name: param.grad for name, param in module.named_parameters()}
        >>> grads, value = gradacc.cross(sums, gradacc.Mean(total, tokens), sync=gradacc.all_reduce())
        >>> grads, value.weight
        ({'weight': tensor([[1., 1.]])}, 4)

    Source: torchtitan (sum the losses, divide by the global count of tokens).
    """
    options = _options.options(_NAME, cross, sync=sync)
    if options.sync is not None:
        options = options._replace(sync=dataclasses.replace(options.sync, overlap=False))
    boundary = _sync.connect(options, _agreed(options, mean))
    try:
        engine = _loop.engine()
        with engine.guard():
            leaves, treedef = _checked(sums, detached=engine is eager)
            shards = _dtensors.found(_NAME, leaves, treedef, sync)
            params = [_dtensors.nothing(leaf, leaves) if i in shards else leaf for i, leaf in enumerate(leaves)]
            fold = _loop.start(options, params, treedef, None)
            boundary.bind(params, treedef, fold.accumulated, None)
            own, keeps = _summed(options, mean, detached=engine is eager)
            buffer = engine.init(params, fold.accumulated)
            if own.differentiated:
                # Nothing that is returned is the caller's; what crosses comes back in new memory.
                grads: list[Tensor | None] = [
                    _own(param, dtype, keeps, copied=not boundary.crosses)
                    for param, dtype in zip(params, fold.accumulated, strict=True)
                ]
                buffer = buffer._replace(grads=grads, arrived=True)
    except BaseException as error:
        boundary.fail(error)
        raise

    def returned(results: list[Tensor]) -> list[Any]:
        found = boundary.returned(results)
        return [_dtensors.whole(shards[i], found[i]) if i in shards else found[i] for i in range(len(found))]

    with engine.guard():
        grads, union, arrived = boundary.cross(buffer.grads, own, True, lambda unchanged: unchanged)
        for i, leaf in shards.items():
            grads[i] = _dtensors.local(leaf, union)
        fold = fold._replace(returned=[leaf.dtype for leaf in leaves])
        grads_and_value = _loop.divided(fold, buffer._replace(grads=grads), union, arrived, returned)
    boundary.done()
    return grads_and_value


_known: WeakKeyDictionary[Any, dict[Any, _sync.Agreed]] = WeakKeyDictionary()
"""By process group: what calls have agreed on, by how and of what kind of mean."""

_NOTHING = _sync.Agreed(_NAME, cross, None)
"""In a graph, where nothing is agreed on."""


def _agreed(options: Options, mean: Any) -> _sync.Agreed | None:
    """What calls of this kind rely on in their group; None where there is nobody else."""
    sync = options.sync
    group = None if sync is None else groups.resolve(_NAME, sync.group)
    if sync is None or group is None:
        return None
    if _where.loops():
        return _NOTHING
    kinds: tuple[Any, ...] = ()
    if isinstance(mean, Mean):
        kinds = tuple(x.dtype if isinstance(x, Tensor) else "number" for x in (mean.total, mean.weight))
    known = _known.setdefault(group, {})
    key = dataclasses.replace(sync, group=None), kinds
    if key not in known:
        known[key] = _sync.Agreed(_NAME, cross, group)
        # Of what it is, not of how many there were before: a rank whose call raises may have been about to make another one.
        known[key].call_name = f"{_NAME} of a Mean of {' over '.join(map(str, kinds)) or 'nothing'}"
    return known[key]


def _checked(sums: Any, detached: bool) -> tuple[list[Tensor], _tree.TreeDef]:
    """Leaves and structure; ``detached``: where they have no graph."""
    leaves, treedef = _tree.flatten(sums, lambda node: node is None)
    if not leaves:
        raise ValueError(
            f"{_NAME}: sums holds no tensor; give this rank's sums of gradients, the same tree on every rank"
        )
    for i, leaf in enumerate(leaves):
        problem = _problem(leaf, detached)
        if problem is not None:
            raise type(problem)(f"{_NAME}: {_tree.paths(treedef, 'sums')[i]} {problem}")
    return [leaf.detach() if detached else leaf for leaf in leaves], treedef


_GRADS = "{name: param.grad for name, param in module.named_parameters()}"


def _problem(leaf: Any, detached: bool) -> Exception | None:
    """Why it is no sum of gradients."""
    if leaf is None:
        return TypeError(
            "is None; every rank gives the same tree of tensors. Pass zeros (torch.zeros_like(param)) where a parameter got no "
            "gradient"
        )
    if isinstance(leaf, nn.Module):
        return TypeError(f"is an nn.Module ({type(leaf).__name__}); pass the sums of its gradients: {_GRADS}")
    if not isinstance(leaf, Tensor):
        return TypeError(f"is {describe(leaf)}; sums are a pytree of floating or complex tensors, as {_GRADS}")
    if not _batch.is_dense(leaf):
        return TypeError("is a sparse or nested tensor; sums must be dense. Pass it as to_dense()")
    if not _dtypes.is_inexact(leaf):
        return TypeError(
            f"is a tensor of dtype {leaf.dtype}; sums of gradients are floating or complex. A count of tokens is the weight of "
            "the Mean"
        )
    if leaf.requires_grad and detached:
        return ValueError(
            "requires grad; sums are numbers, through which nothing is differentiated. Is it a parameter? Pass its .grad; else "
            "detach() it"
        )
    return None


def _summed(options: Options, mean: Any, detached: bool) -> tuple[Sums, Tensor | None]:
    """What this rank has beside the sums; and, where its weight is not read, whether it is not 0."""
    if not isinstance(mean, Mean):
        raise TypeError(
            f"{_NAME}: mean must be gradacc.Mean(loss_sum, tokens) of this rank, got {describe(mean)}; what it says beside "
            "the loss is what the sums are divided by"
        )
    total = mean.total
    if not isinstance(total, Tensor) or not total.is_floating_point():
        what = f"a tensor of dtype {total.dtype}" if isinstance(total, Tensor) else describe(total)
        raise TypeError(
            f"{_NAME}: the total of mean is {what}; it must be a 0-dim floating tensor, the sum of the losses of this rank "
            "(torch.zeros(()) where it has none)"
        )
    if total.ndim:
        raise ValueError(f"{_NAME}: the total of mean has shape {tuple(total.shape)}; it must be 0-dim: total.sum()")
    mean = Mean(total.detach() if detached else total, mean.weight)
    mean, weight = _loss.with_weight(options, mean, mean.total, "the weight of mean is")
    outcome = _loss.Outcome([mean.total], mean, weight, _aux.flatten(None))
    counts = _sums.contribution(options, _sums.NOTHING, outcome, None, narrow=False)
    sums = _sums.add(options, _sums.NOTHING, outcome, counts, ())
    (own,) = counts.passes
    # Nothing has divided the gradients by a unit.
    return dataclasses.replace(sums, unit=1.0 if counts.counts else None), None if own is None else own.keeps


def _own(grad: Tensor, dtype: torch.dtype, keeps: Tensor | None, copied: bool) -> Tensor:
    """In the dtype that it is summed in; ``copied``: in memory of its own."""
    if keeps is not None:
        return torch.where(keeps.to(grad.device), grad, 0).to(dtype)
    return grad.to(dtype, copy=copied)
