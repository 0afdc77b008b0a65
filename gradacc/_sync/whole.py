"""Parameters that are divided over ranks, whole: what a call gathers before it differentiates. NOTE [rows]

It is a call of the group before the call, with as many leaves on every rank: if one rank's parameters are wrong, all raise.
"""

from __future__ import annotations

from typing import Any

import torch

from gradacc import _rows, _tree, _where
from gradacc._options import Options
from gradacc._reduce import ReduceScatter
from gradacc._rows import Homes
from gradacc._sync import gathering
from gradacc._sync import group as groups

_lasting: gathering.Lasting = gathering.Lasting()


def whole(options: Options, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Homes]:
    """A call's arguments with whole tensors in the place of DTensors among its parameters, and how these were divided.

    Where DTensors are not supported they stay, and the check of the parameters says so.
    """
    if not isinstance(options.sync, ReduceScatter) or _where.transforming():
        return args, ()
    argnums = options.argnums if isinstance(options.argnums, tuple) else (options.argnums,)
    numbers = [n for n in argnums if -len(args) <= n < len(args)]  # what does not fit is an error later
    trees = [_tree.flatten(args[n]) for n in numbers]
    leaves = [leaf for found, _ in trees for leaf in found]
    if not any(map(_rows.is_dtensor, leaves)):
        return args, ()
    paths = [path for _, treedef in trees for path in _tree.paths(treedef, "params")]
    tensors, homes = _gathered(options, leaves, paths)
    left, replaced = iter(tensors), list(args)
    for n, (found, treedef) in zip(numbers, trees, strict=True):
        replaced[n] = _tree.unflatten(treedef, [next(left) for _ in found])
    return tuple(replaced), homes


def _gathered(options: Options, leaves: list[Any], paths: list[str]) -> tuple[list[Any], Homes]:
    assert options.sync is not None
    group = groups.resolve(options.name, options.sync.group)
    divided = [n for n, leaf in enumerate(leaves) if _rows.is_dtensor(leaf)]
    turn = None
    if group is not None:
        described = gathering.describe([(paths[n], tuple(leaves[n].shape), leaves[n].dtype) for n in divided])
        turn = gathering.Gathering(f"{options.name}, parameters", group, _lasting, described)
        turn.begin()
    try:
        homes = _rows.homes(options.name, leaves, paths, group)
        with torch.no_grad():
            parts = [_rows.local(leaves[n]) for n in divided]
            into = [part.new_empty(leaves[n].shape) for n, part in zip(divided, parts, strict=True)]
    except BaseException as error:
        if turn is not None:
            turn.fail(error)
        raise
    with torch.no_grad():
        gathering.gather_parts(turn, parts, into, [home.cut for home in homes if home is not None])
    tensors = list(leaves)
    for n, tensor in zip(divided, into, strict=True):
        # What is computed of results that require grad is told that they have no graph.
        tensors[n] = tensor.requires_grad_(leaves[n].requires_grad)
    return tensors, homes
