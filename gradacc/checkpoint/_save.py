"""`save`: plan, write, publish."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gradacc._sync import group as groups
from gradacc.checkpoint import _dcp, _folder, _leaves, _ranks, _shards
from gradacc.checkpoint._shards import Part

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan

_NAME = "save"


class _Part(NamedTuple):
    """What one rank brings: its tree's nodes, its leaves' titles, values and fingerprints, its parts of tensors, DCP's plan."""

    kinds: dict[str, str]
    titles: dict[str, str]
    values: dict[str, _leaves.Value]
    fingerprints: dict[str, tuple[str, str]]
    spans: dict[str, _shards.Span]
    plan: SavePlan


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a pytree into a folder, so that `load` gives it back bit for bit; all of it, or nothing.

    .. code-block:: text

        load(path, tree) after save(path, tree) = tree

    **A crash leaves the checkpoint that was there.** Wherever a process is killed, the folder holds the last checkpoint
    that was complete, and ``load`` reads it. The next ``save`` removes what the crash has left over. (So for a moment there
    is room needed for two checkpoints. Two jobs must not save into one folder.)

    **Ranks.** Where a process group is initialised, all ranks of it must call this, with the same path on a file system
    that they share; a call returns when the checkpoint is complete. It is the union of their trees, which must be
    one tree: what several ranks have under one path (parameters) must be the same, bit for bit, and is written once, by one
    of them; lists are of one length, and only dicts may have other keys on other ranks (None is nothing). What belongs to a
    rank (its random numbers, its place in the data, what it has accumulated) goes under a key of its own:

    .. code-block:: python

        mine = {"rng": torch.get_rng_state(), "accumulated": acc_state}
        save(path, {"train": train_state, "ranks": {rank: mine}})
        tree = load(path, {"train": train_state, "ranks": {r: mine if r == rank else ... for r in range(world)}})

    What is divided over ranks (a DTensor; a `gradacc.Shard`, of which the states of `gradacc.optim.sharded` consist) is
    saved as whole tensors, under the paths of a state that is not divided. Each rank writes its parts.

    The format is the same for any number of ranks: one rank reads what two have saved, and the other way round.

    Arguments:
        path: a folder, made if it is not there; not one with other things in it.
        tree: nested dicts, lists, tuples, ``NamedTuple``s (`gradacc.TrainState`), registered classes (`gradacc.Mean`, an
            accumulator's state), with leaves of dense tensors (any dtype of whole bytes, shape and device), ints, floats,
            bools and strings. Keys of dicts are strings, numbers, bytes, None, enums, or tuples of these, whose reprs are
            the same in every process. ``None`` is structure. Tensors come back without a graph; one at two paths, as two.

    Raises:
        TypeError: another leaf or key, or a path that is none. This error and ``ValueError`` come before anything is written.
        ValueError: ``path`` holds other things, or is not the same folder for all ranks; ranks differ in what they have
            under one path, or in what that is; they have not all elements of a divided tensor, or parts that overlap; two
            leaves have one path; an int has more digits than Python reads.
        RuntimeError: another rank has raised, or has ended; or ``WORLD_SIZE`` says that there are other ranks, but no
            process group has been initialised.
        OSError: the disk is full, for instance; a ``BlockingIOError`` where another job saves there at this moment. After it,
            or a ``RuntimeError``, the checkpoint that was there is still there, or (where the last step was cut short) the
            new one is, complete.

    Example:
        >>> import tempfile, torch, gradacc
        >>> optimizer = gradacc.optim.adamw(lr=0.1)
        >>> params = {"w": torch.ones(2)}
        >>> state = gradacc.TrainState(params, optimizer.init(params), step=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gradacc.checkpoint.save(folder, {"train": state, "rng": torch.get_rng_state()})
        ...     fresh = gradacc.TrainState({"w": torch.zeros(2)}, optimizer.init(params))
        ...     loaded = gradacc.checkpoint.load(folder, {"train": fresh, "rng": torch.get_rng_state()})
        >>> loaded["train"].params, loaded["train"].step
        ({'w': tensor([1., 1.])}, 3)

    Source: ``torch.distributed.checkpoint``, whose format the data folder has; orbax (atomic by renaming).
    """
    with groups.releasing():
        _save_alike(path, tree)


def _save_alike(path: str | os.PathLike[str], tree: Any) -> None:
    """What ranks have alike is compared before anything is written."""
    group = _ranks.world(_NAME)
    rank = 0 if group is None else group.rank()
    (folder, planned), parts = _ranks.on_all_ranks(_NAME, group, lambda: _prepare(path, tree, rank, group is not None))
    _ranks.check_one_tree(_NAME, [part.kinds for part in parts])
    _ranks.check_alike(_NAME, [part.fingerprints for part in parts])
    _shards.check_tiled(_NAME, [part.spans for part in parts])
    with contextlib.ExitStack() as held:  # on rank 0, the lock
        _save(folder, group, rank, planned, parts, held)


def _save(
    folder: Path,
    group: dist.ProcessGroup | None,
    rank: int,
    planned: _dcp.Planned,
    parts: Sequence[_Part],
    held: contextlib.ExitStack,
) -> None:
    """What is known to be one tree."""
    _, (data, *_) = _ranks.on_all_ranks(
        _NAME, group, lambda: (None, _folder.begin(_NAME, folder, held) if rank == 0 else "")
    )
    body: dict[str, Any] = {
        "data": data,
        "leaves": {key: title for part in parts for key, title in part.titles.items()},
        "values": {key: value for part in parts for key, value in part.values.items()},
    }
    plans = [part.plan for part in parts]
    try:
        metadata, written = _ranks.on_all_ranks(_NAME, group, lambda: _write(folder / data, planned, plans, rank))
        _ranks.on_all_ranks(_NAME, group, lambda: _publish(folder, body, metadata, written, rank))
    except Exception:
        if rank == 0:
            with contextlib.suppress(OSError, ValueError):
                _folder.discard(folder, data)
        raise


def _prepare(
    path: str | os.PathLike[str], tree: Any, rank: int, several: bool
) -> tuple[tuple[Path, _dcp.Planned], _Part]:
    """On each rank, before anything is written."""
    folder = _folder.named(_NAME, path)
    keys, leaves, treedef = _leaves.flatten(_NAME, tree, "tree")
    found = {key: _leaves.check(_NAME, f"tree{key}", leaf) for key, leaf in zip(keys, leaves, strict=True)}
    kinds = _leaves.check_keys(_NAME, treedef, "tree")
    found |= _leaves.facts(tree)
    planned = _dcp.plan({key: leaf for key, leaf in found.items() if isinstance(leaf, (Tensor, Part))}, rank)
    return (folder, planned), _Part(
        kinds=kinds if several else {},
        titles={key: _leaves.title(leaf) for key, leaf in found.items()},
        values={key: leaf for key, leaf in found.items() if not isinstance(leaf, (Tensor, Part))},
        fingerprints=_leaves.fingerprints(found) if several else {},
        spans={key: leaf.span for key, leaf in found.items() if isinstance(leaf, Part)},
        plan=planned.plan,
    )


def _write(data: Path, planned: _dcp.Planned, plans: list[SavePlan], rank: int) -> tuple[Metadata, _dcp.Written]:
    """On each rank: its share."""
    if not data.exists():
        raise ValueError(
            f"{_NAME}: rank {rank} does not see the folder {data}, which rank 0 has made; "
            "give all ranks the same path, on a file system that they share"
        )
    return _dcp.write(data, planned, plans, rank)


def _publish(
    folder: Path,
    body: dict[str, Any],
    metadata: Metadata,
    written: list[_dcp.Written],
    rank: int,
) -> tuple[None, None]:
    """On rank 0, when all have written: make it the checkpoint."""
    if rank != 0:
        return None, None
    data = folder / body["data"]
    divided = {key: None for each in written for key in each.chunks}
    body["metadata"] = _dcp.finish(data, metadata, [each.results for each in written])
    body["places"] = {key: place for each in written for key, place in each.places.items()}
    body["chunks"] = {key: sorted(each.chunks[key] for each in written if key in each.chunks) for key in divided}
    _folder.publish(folder, body)
    with contextlib.suppress(OSError):  # it is saved; the next call tries again
        _folder.remove_unused(folder)
    return None, None
