"""What a network's latency and bandwidth say about more ranks than there are here: paper, not measurement.

Of an all-reduce of n bytes over W ranks, each of which sends B bytes a second and needs `latency` seconds a message
(Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005):

    ring   2 (W - 1) / W * n / B + 2 (W - 1) * latency      gloo's and NCCL's for large tensors
    tree   2 log2(W) * (latency + n / B)                    reduce, then broadcast, without pipelining

and of overlap, where an accumulated gradient is final only in the last of k micro-batches:

    saved = min(early * T, backward * F / k)    T: the all-reduce; F: forward and backward of all k micro-batches

with `early` the part of the bytes that leaves before the last bucket is full, `backward` the backward pass's share of F.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

BACKWARD = 2 / 3
"""Of forward plus backward: two products for every one of the forward pass."""


class Network(NamedTuple):
    """Seconds a message, bytes a second."""

    latency: float
    bandwidth: float


def fitted(small_seconds: float, large_seconds: float, large_bytes: float) -> Network:
    """From an all-reduce of next to nothing and a large one, both over two ranks, where a ring is two messages.

    >>> fitted(0.002, 1.002, 1e9)
    Network(latency=0.001, bandwidth=1000000000.0)
    """
    return Network(small_seconds / 2, large_bytes / (large_seconds - small_seconds))


def ring(world: int, size: float, network: Network) -> float:
    """Seconds of a ring all-reduce.

    >>> ring(2, 1e9, Network(0.001, 1e9))
    1.002
    """
    return 2 * (world - 1) / world * size / network.bandwidth + 2 * (world - 1) * network.latency


def tree(world: int, size: float, network: Network) -> float:
    """Seconds of a tree all-reduce.

    >>> round(tree(8, 1e9, Network(0.001, 1e9)), 3)
    6.006
    """
    return 2 * log2(world) * (network.latency + size / network.bandwidth)


def saved(compute: float, reduce: float, steps: int, early: float) -> float:
    """The part of a step (`compute` + `reduce` seconds) that overlap can save at most.

    >>> saved(6.0, 1.0, 4, early=1.0)
    0.14285714285714285
    """
    return min(early * reduce, BACKWARD * compute / steps) / (compute + reduce)


def early(bucket_bytes: Sequence[float]) -> float:
    """The part of the bytes that is sent before the last bucket is.

    >>> early([1, 25, 25, 13])
    0.796875
    """
    return 1 - bucket_bytes[-1] / sum(bucket_bytes)
