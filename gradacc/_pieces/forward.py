"""The forward pass over pieces, in grad mode: what they return is put together, and their graphs are given up.

NOTE [pieces in grad mode]
    In both ways every piece runs in grad mode in the forward pass, and its graph is given up when it is done: so it is known
    what is differentiable, and what the function closes over, of every piece, whatever branch it takes. It costs the memory of
    the graph of one piece, which the backward pass needs too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradacc import _order, _surroundings
from gradacc._engines import eager
from gradacc._options import Backward
from gradacc._pieces import closed, held, join, outputs, pull
from gradacc._pieces.divide import Piece, Pieces
from gradacc._pieces.gradients import Gradients
from gradacc._pieces.pull import Call


class Joined:
    """What pieces returned, so far."""

    def __init__(self, outs: outputs.Outs, of: Pieces) -> None:
        self.outs, self.of = outs, of
        self.places: list[outputs.Place] = []
        self.first: outputs.Output | None = None
        self.leaves: list[outputs.Leaf] = []
        self.states: list[join.State] = []
        self.lengths: list[list[int]] = []
        """Of each piece, how much of each concatenation it is."""

    def add(self, flat: outputs.Output, size: int | None, order: _order.Order | None = None) -> outputs.Place:
        """One piece more, of so many examples, which are at these places of the batch."""
        place = outputs.Place(len(self.places), size, self.of.total, self.of.number, order)
        if self.first is None:
            self.first = flat
            self.leaves = outputs.described(self.outs, flat)
            self.states = [join.State() for _ in self.leaves]
        outputs.check_alike(self.outs, self.first, flat)
        self.states = [
            join.add(self.outs, leaf, state, value, place)
            for leaf, state, value in zip(self.leaves, self.states, flat.leaves, strict=True)
        ]
        self.lengths.append(self._lengths(flat))
        self.places.append(place)
        return place

    def check_again(self, flat: outputs.Output, piece: int) -> None:
        """A piece that was run again has as many rows."""
        for before, now in zip(self.lengths[piece], self._lengths(flat), strict=True):
            join.check_length(self.outs, before, now)

    def _lengths(self, flat: outputs.Output) -> list[int]:
        return [join.length(leaf, value) for leaf, value in zip(self.leaves, flat.leaves, strict=True)]

    @property
    def nonlinear(self) -> list[int]:
        """Leaves whose pieces are needed for the backward pass."""
        return [i for i, leaf in enumerate(self.leaves) if not join.is_linear(leaf)]

    def results(self) -> list[Any]:
        """Of all, each in memory of its own."""
        if self.first is None:
            raise ValueError(
                f"{self.outs.name}: the iterable of pieces is empty, and what func returns for nothing is not known. Pass one "
                "empty piece, or a batch with steps= or microbatch_size="
            )
        examples = join.examples(self.places)
        totals = [
            join.total(self.outs, leaf, state, value, examples)
            for leaf, state, value in zip(self.leaves, self.states, self.first.leaves, strict=True)
        ]
        found = [
            join.in_order(self.outs, leaf, total, self.places, [lengths[i] for lengths in self.lengths])
            for i, (leaf, total) in enumerate(zip(self.leaves, totals, strict=True))
        ]
        # One piece's own output may be in the caller's memory.
        return [eager.as_buffer(value) if isinstance(value, Tensor) else value for value in found]


class Fold:
    """The forward pass over pieces."""

    def __init__(self, call: Call, joined: Joined, backward: Backward) -> None:
        self.call, self.joined, self.backward = call, joined, backward
        self.pieces: list[Piece] = []
        self.differentiable: dict[int, None] = {}
        self.kept: list[list[Any]] = []
        self.gradients = None if backward == "recompute" else Gradients(joined.outs.dtype)
        self.held = held.versions(call.func)
        self.memory: list[tuple[Tensor, int]] = []
        self.before: list[_surroundings.Surroundings] = []
        if held.sharded(call.func):
            raise ValueError(
                f"{call.name}: func is, or calls, a module that FSDP shards, whose hooks would not see the backward pass. Use "
                "microbatch inside of the sharded module, around its layers"
            )

    def step(self, piece: Piece) -> None:
        """One piece."""
        call, sources = self.call, self.joined.of.sources
        for n, _ in piece.picks:
            leaf = sources[n]
            if isinstance(leaf, Tensor) and leaf.is_inference():
                sources[n] = leaf = leaf.clone()
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                call.sources.add(n)
        if self.joined.of.total is None:
            # What gives the pieces may draw random numbers, and give the same memory again.
            own = [sources[source] for source, _ in piece.picks if isinstance(sources[source], Tensor)]
            self.before.append(_surroundings.of(own))
            self.memory += [(leaf, leaf._version) for leaf in own]
        ran = pull.run(call, piece, sources)
        place = self.joined.add(ran.output, piece.size, piece.order)
        self.pieces.append(piece)
        self.differentiable.update(dict.fromkeys(ran.roots))
        kept = [ran.output.leaves[i] for i in self.joined.nonlinear]
        # In other tensors: the result may be changed in place.
        self.kept.append([value.detach() if isinstance(value, Tensor) else value for value in kept])
        if self.gradients is None or not ran.roots:
            self._check_writes(ran)
            return
        why = self._why_not_forward(ran)
        if why is None:
            ((i, root),) = ran.roots.items()
            if join.is_nothing(self.joined.leaves[i], place):
                return
            share = place.share if self.joined.leaves[i].out == "mean" else 1.0
            self.gradients.add(ran, piece, sources, {i: torch.full_like(root, share)})
        elif self.backward == "forward":
            raise ValueError(
                f"{call.name}: backward='forward' needs one differentiable output that is 0-dim and summed, {why}"
            )
        else:
            self.gradients = None
            self._check_writes(ran)

    def _check_writes(self, ran: pull.Ran) -> None:
        if closed.writes(ran.uses):
            raise ValueError(
                f"{self.call.name}: func has a BatchNorm in training mode, whose running statistics the backward pass, which "
                "runs it again, would update once more (and whose rows see each other: pieces are not the whole). Call eval() "
                "on it, or use another normalization"
            )

    def _why_not_forward(self, ran: pull.Ran) -> str | None:
        """Why gradients cannot be taken with the forward pass, where they cannot."""
        leaves = self.joined.leaves
        if len(self.differentiable) > 1:
            paths = " and ".join(leaves[i].path for i in sorted(self.differentiable))
            return f"and func returned several: {paths}. detach() those that are only looked at, or use backward='auto'"
        (i,) = self.differentiable
        root = ran.roots[i]
        if root.ndim or leaves[i].out not in ("sum", "mean"):
            shape = tuple(root.shape)
            return (
                f"and {leaves[i].path} is of shape {shape} and put together by {leaves[i].out!r}. Use backward='auto'"
            )
        if root.is_complex():
            # The gradient of a complex number is not one number that a cotangent only scales.
            return f"and {leaves[i].path} is complex. Use backward='auto', or return its real and its imaginary part"
        if self.backward == "auto" and _is_float16(ran):
            # Undivided, they may be larger than float16 holds.
            return "and a sum of float16 gradients may overflow before it is divided"
        return None


def _is_float16(ran: pull.Ran) -> bool:
    """Whether any gradient is, or goes through, float16."""
    leaves = [leaf for _, leaf, _ in ran.inputs]
    devices = {leaf.device.type for leaf in leaves}
    tensors = [*leaves, *ran.roots.values()]
    return any(tensor.dtype == torch.float16 for tensor in tensors) or any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        for device in devices
        if torch.amp.is_autocast_available(device)
    )
