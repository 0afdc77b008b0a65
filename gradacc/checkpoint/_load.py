"""`load`: compare, read, verify."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gradacc import _tree
from gradacc.checkpoint import _folder, _leaves, _read, _shards
from gradacc.checkpoint._shards import Part

_NAME = "load"
_BY_KEY = ("leaves", "values", "places", "chunks")


def load(path: str | os.PathLike[str], like: Any) -> Any:
    """The pytree that `save` wrote into a folder, bit for bit.

    Every byte that is used is compared with what was written (SHA-256). Nothing that is read is executed: the folder is
    described by JSON, and tensors are read with ``torch.load(weights_only=True)``. So a checkpoint from somebody else can
    give wrong numbers, but do nothing.

    Ranks load by themselves: nothing crosses, and each gets what it asks for, whichever rank has saved it.

    Beside a process that saves, this starts anew with the next checkpoint where the one that it reads is replaced: as often
    as that happens, so saves must come less often than a load takes.

    Arguments:
        path: the folder.
        like: a tree of the structure, shapes, dtypes and Python types of what was saved; it is not changed. Tensors come
            back on its tensors' devices and in their memory layout, whatever these were when saved. ``...`` leaves out what
            was saved there, and stays in its place: ``load(path, gradacc.TrainState(params, ..., ...))`` for the parameters
            alone. In the place of an accumulator's state, any state of that accumulator is like it, whatever either has seen:
            ``init(params)`` is enough.
            Whether a tensor was divided over ranks, and how, is nothing to it: a `gradacc.Shard` in ``like``, as in
            ``gradacc.optim.sharded(...).init(params)``, takes its elements of what was saved, and a tensor takes all.

    Returns:
        A new tree of ``like``'s structure.

    Raises:
        FileNotFoundError: there is no (complete) checkpoint.
        ValueError: what is there is not a checkpoint of gradacc, or is damaged; or does not fit ``like``: a leaf is missing,
            or is of another shape, dtype or type, or was saved but is not in ``like``. The leaf is named. Or ``like`` has parts
            for another rank, or for a process group that is not there.
        TypeError: a leaf of ``like`` cannot be saved, or the path is none.

    Example:
        >>> import tempfile, torch, gradacc
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gradacc.checkpoint.save(folder, {"w": torch.ones(2), "epoch": 3, "rate": 0.1})
        ...     gradacc.checkpoint.load(folder, {"w": torch.zeros(2), "epoch": 0, "rate": 0.0})
        ...     gradacc.checkpoint.load(folder, {"w": ..., "epoch": 0, "rate": ...})
        {'w': tensor([1., 1.]), 'epoch': 3, 'rate': 0.1}
        {'w': Ellipsis, 'epoch': 3, 'rate': Ellipsis}
    """
    folder = _folder.named(_NAME, path)
    keys, leaves, _ = _leaves.flatten(_NAME, like, "like")
    for key, leaf in zip(keys, leaves, strict=True):
        if leaf is not ...:
            _leaves.check(_NAME, f"like{key}", leaf)
        if isinstance(leaf, Part):
            _shards.check_here(_NAME, f"like{key}", leaf.facts)
    while True:
        body = _folder.read(_NAME, folder)
        try:
            return _tree_of(folder, body, like)
        except (OSError, ValueError):
            if body["data"] == _folder.read(_NAME, folder)["data"]:
                raise
        # Another process has saved the next one, and removed this one, in the meantime.


def _tree_of(folder: Path, body: dict[str, Any], like: Any) -> Any:
    """What was saved, as a tree like ``like``."""
    titles, values, places, chunks = (
        {_leaves.escaped(key): value for key, value in body[of].items()} for of in _BY_KEY
    )
    try:
        like, facts = _leaves.with_saved_facts(like, values)
    except ValueError as error:
        raise ValueError(f"{_NAME}: the checkpoint {folder} does not fit: like{error}") from error
    keys, leaves, treedef = _leaves.flatten(_NAME, like, "like")
    named = list(map(_leaves.escaped, keys))
    _fit(folder, {key: title for key, title in titles.items() if key not in facts}, named, leaves)
    source = _read.Source(_NAME, folder / body["data"], places, chunks)
    source.verify(body["metadata"], "its description for torch.distributed.checkpoint")
    return _tree.unflatten(
        treedef,
        [
            _loaded(source, key, leaf) if isinstance(leaf, (Tensor, Part)) else leaf if leaf is ... else values[key]
            for key, leaf in zip(named, leaves, strict=True)
        ],
    )


def _loaded(source: _read.Source, key: str, leaf: Tensor | Part) -> Tensor:
    found = source.tensor(key, leaf)
    return leaf.of(found) if isinstance(leaf, Part) else found


def _fit(folder: Path, saved: dict[str, str], keys: Sequence[str], leaves: Sequence[Any]) -> None:
    """A ValueError where ``like`` is not like what was saved."""
    problems, asked_for = [], set(keys)
    left_out = [key for key, leaf in zip(keys, leaves, strict=True) if leaf is ...]
    for key, leaf in zip(keys, leaves, strict=True):
        if leaf is ...:
            continue
        if key not in saved:
            problems.append(f"like{key} was not saved")
        elif _leaves.title(leaf) != saved[key]:
            problems.append(f"like{key} is {_leaves.title(leaf)}, but {saved[key]} was saved")
    for key in saved:
        if key not in asked_for and not any(key.startswith(above) and key[len(above)] in ".[" for above in left_out):
            problems.append(f"tree{key} ({saved[key]}) was saved, but is not in like (where ... would leave it out)")
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(
            f"{_NAME}: the checkpoint {folder} does not fit: {problems[0]}{more}. Pass a tree like the one that was saved"
        )
