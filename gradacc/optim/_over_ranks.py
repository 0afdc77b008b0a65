"""Numbers of gradients that are divided over ranks: the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from gradacc import _rows, _shard, _where
from gradacc._sync import gathering
from gradacc._sync import group as groups

_NORM = "the norm of gradients that are divided over ranks"


def group_of(tree: Any) -> str:
    """The name of the process group that the parts in a tree are divided over; empty where there is none."""
    names = {shard.facts.group for shard in _shard.shards(_rows.as_shards(_NORM, tree, "grads"))} - {""}
    if len(names) > 1:
        raise ValueError(f"gradients are divided over several process groups: {sorted(names)}; use one for all of them")
    return names.pop() if names else ""


def total_norm(tree: Any, norm: Tensor) -> Tensor:
    """Of the norm of this rank's gradients: that of all ranks', where ``tree`` has parts of them."""
    name = group_of(tree)
    if not name:
        return norm
    (rows,) = _gathered(name, norm.detach().double().reshape(1))
    total: Tensor = torch.linalg.vector_norm(rows)
    return total.to(norm)


def everywhere(tree: Any, fine: Tensor) -> Tensor:
    """Whether something holds on all ranks, where ``tree`` has parts of gradients: 0-dim, bool."""
    name = group_of(tree)
    if not name:
        return fine
    (rows,) = _gathered(name, fine.double().reshape(1))
    return (rows != 0).all().to(fine.device)


_agreed: gathering.Lasting = gathering.Lasting()
_DESCRIBED = gathering.describe([])


def _gathered(name: str, number: Tensor) -> Sequence[Tensor]:
    if _where.transforming():
        raise NotImplementedError(
            f"{_NORM} cannot be taken inside a functorch transform or a compiled function; call the step outside"
        )
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    turn = gathering.Gathering(_NORM, group, _agreed, _DESCRIBED)
    turn.begin()
    rows = turn.cross([number.to(groups.device(group))])
    turn.done()
    return rows
