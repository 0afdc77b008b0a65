"""How one micro-batch's gradient gets into the buffer, in two halves: forward and backward.

An engine is a module of functions, one `Engine`; the caller never chooses it (``_loop.py`` does, by where we are):

- ``eager``: ordinary autograd, accumulated in place while the backward pass runs;
- ``functional``: `torch.func`, under a functorch transform or while Dynamo traces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from gradacc import _left
from gradacc._loss import Outcome
from gradacc._sums import Contribution

Grads: TypeAlias = Sequence[Tensor | None]
"""A gradient for each parameter, of each target; None where nothing arrived."""

Deliver: TypeAlias = Callable[[int, Tensor], None]
"""``deliver(index, gradient)``: takes a gradient that is final out of the buffer."""


class Buffer(NamedTuple):
    """The gradients so far."""

    params: list[Tensor]
    dtypes: list[torch.dtype]
    """The accumulators'."""
    grads: list[Tensor | None]
    """None where nothing arrived, or where it was delivered. Of several targets (NOTE [several means] in ``_sums.py``) those of
    each, one after the other."""
    arrived: bool
    """Whether any loss that counts depended on the parameters."""
    closed: dict[int, weakref.ref[Tensor]]
    """By identity, what else requires grad in the graphs, where they are seen: leaves that are no parameters.

    Weak: one that dies with its micro-batch's graph was made by the loss itself, which closes over nothing there.
    """

    leaves: list[Tensor]
    """Of an eager micro-batch before, if the next one may have them: NOTE [leaves of a whole call] in ``eager.py``."""
    hooks: int
    """How many hooks torch had been given then."""

    def of_targets(self, number: int) -> Buffer:
        """With a place for the gradients of so many targets."""
        missing = number * len(self.params) - len(self.grads)
        return self if missing <= 0 else self._replace(grads=[*self.grads, *[None] * missing])

    def closed_over(self) -> list[Tensor]:
        """Those leaves that are still there."""
        return [leaf for leaf in (ref() for ref in self.closed.values()) if leaf is not None]


class Engine(Protocol):
    """What `eager` and `functional` both are."""

    def guard(self) -> AbstractContextManager[None]:
        """The context for everything but the caller's own iterator."""

    def init(
        self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype], grads: Grads | None = None, donated: bool = False
    ) -> Buffer:
        """Nothing accumulated, and no memory for it; or a state's ``grads``, which are only changed if they are ``donated``."""

    def calling(self, arguments: Any, passes: _left.Call) -> AbstractContextManager[None]:
        """The context of the loss itself, of a call with these arguments beside the parameters.

        ``passes``: what is known of the forward passes of that call.
        """

    def admit(self, tree: Any) -> Any:
        """Arguments on their way to the loss."""

    def forward(self, buffer: Buffer, loss: Callable[[Sequence[Tensor]], Outcome]) -> tuple[Any, Outcome]:
        """``loss(leaves)``: what it returned, without its graph, and the tape that `backward` plays back."""

    def backward(self, buffer: Buffer, tape: Any, counts: Contribution, deliver: Deliver | None) -> Buffer:
        """``growth * buffer + cotangent * factor * gradient``, of each target into gradients of its own.

        Each gradient is delivered as soon as it is final.
        """

    def merge(
        self, a: Grads, b: Grads, shares: tuple[float | Tensor, float | Tensor], donated: bool
    ) -> list[Tensor | None]:
        """``shares[0] * a + shares[1] * b``, where one of the shares is 1."""

    def finalize(
        self, buffer: Buffer, dtypes: Sequence[torch.dtype], factors: Sequence[float | Tensor]
    ) -> list[Tensor]:
        """The sum over targets of ``factor * buffer``, zeros where nothing arrived."""
