"""Losses for a device, and what waits for it."""

import contextlib

import optree
import torch
import torch.nn.functional as F

from gradacc import Mean


def move(tree, device):
    """Copies of all tensors of a tree."""
    return optree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree, namespace="gradacc"
    )


@contextlib.contextmanager
def nothing_waits(device):
    """An error where anything in the block waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters(dtype=torch.float64):
    """Large enough to be fused, and small ones."""
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (128, 128), "b": (128,), "e": (130, 128), "s": ()}
    return {name: (0.1 * torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}


def batch(size=12, dtype=torch.float64):
    """With examples of weight 0."""
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([0, 0, 0, 2, 1, 0, 3, 1, 1, 0, 0, 1])[:size]
    return torch.randn(size, 128, generator=g).to(dtype), torch.arange(size), mask


def weighted(params, batch):
    """A `Mean` whose weight is counted on the device."""
    x, index, mask = batch
    hidden = torch.tanh(F.linear(x, params["w"], params["b"]) + F.embedding(index, params["e"]))
    return Mean((hidden.square().sum(1) * mask).sum() * params["s"].exp(), mask.sum())


def plain(params, batch):
    """A mean over examples."""
    x, index, _ = batch
    hidden = torch.tanh(F.linear(x, params["w"], params["b"]) + F.embedding(index, params["e"]))
    return hidden.square().sum(1).mean() * params["s"].exp()


LOSSES = {"plain": plain, "weighted": weighted}
