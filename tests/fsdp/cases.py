"""Parameters that are divided over ranks, in tests: trees, and the whole of them."""

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import gradacc

ROWS = {"w": (5, 3), "few": (1, 4), "b": (7,), "cube": (4, 2, 3), "none": (0, 2)}
"""Of dim 0: divided unevenly, of fewer rows than ranks, and of none."""


def loss_fn(params, batch):
    y = torch.tanh(batch["x"] @ params["w"].T).sum(-1) + (batch["x"] @ params["cube"].sum((0, 1))).square()
    y = y * params["few"].square().sum() + params["b"].square().sum() + params["none"].sum()
    real = batch["mask"]
    return gradacc.Mean((y.square() * real).sum(), real.sum())


def params_of(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return {name: (0.3 * torch.randn(shape, generator=g)).to(dtype) for name, shape in ROWS.items()}


def batch_of(rank, dtype=torch.float64, number=0):
    """Uneven, and empty on some rank in some step."""
    g = torch.Generator().manual_seed(100 * number + rank)
    n = (4, 0, 3, 1)[(rank + number) % 4]
    return {"x": torch.randn(n, 3, generator=g).to(dtype), "mask": torch.rand(n, generator=g) < 0.8}


def union(world, dtype=torch.float64, number=0):
    parts = [batch_of(rank, dtype, number) for rank in range(world)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def mesh_of(group):
    return DeviceMesh.from_group(group, "cpu")


def divided(mesh, tensor):
    """As ``fully_shard`` divides it."""
    world, rank = mesh.size(), mesh.get_local_rank()
    rows = [*tensor.chunk(world), *[tensor[:0]] * world][rank].clone()
    return DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def divide(mesh, params, *whole):
    """All but those of these names."""
    return {name: leaf if name in whole else divided(mesh, leaf) for name, leaf in params.items()}


def undivided(tree):
    """The tree with whole tensors in the place of DTensors; `gradacc.Shard`s stay."""
    return optree.tree_map(
        lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree, namespace="gradacc"
    )
