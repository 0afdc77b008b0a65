"""Windows: the micro-batches of one optimizer step each, and as many of them on every rank."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch.distributed as dist
from torch import Tensor

from gradacc._describe import describe
from gradacc._sync import group as groups
from gradacc._sync.loop import Loop
from gradacc._values import positive_int
from gradacc._window import Window

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

Steps: TypeAlias = int | Callable[[int], int]
"""Micro-batches in a window, or a function of its number (0, 1, …) that returns them."""

_NAME = "windows"


@dataclass(frozen=True, slots=True)
class Windows(Generic[T]):
    """What `windows` returns."""

    loader: Iterable[T]
    steps: Steps
    group: weakref.ref[dist.ProcessGroup] | None
    """The ranks to keep up with; None where there is nobody. Held by torch alone, as by `gradacc._sync.loop.Loop`."""

    def __iter__(self) -> Iterator[list[T]]:
        if self.group is None:
            return _cut(self.loader, self.steps)
        return _cut_alike(self.loader, self.steps, Loop(_NAME, self.group))

    def __len__(self) -> int:
        if self.group is not None:
            raise TypeError(
                f"{_NAME}: with a group, the number of windows is that of the rank with the most, which is asked for when "
                "the loop begins; len() would have to wait for every other rank to call it too"
            )
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{_NAME}: the loader has no len(), so its windows have none: {describe(self.loader)}")
        return _number(len(self.loader), self.steps)


def windows(loader: Iterable[T], steps: Steps, *, group: dist.ProcessGroup | DeviceMesh | None = None) -> Windows[T]:
    """Lists of up to ``steps`` micro-batches: one for each optimizer step, and as many on every rank.

    It is this loop, which may be run again:

    .. code-block:: python

        left = iter(loader)
        while window := list(itertools.islice(left, steps)):
            yield window

    Nothing is dropped: the last window is shorter where ``steps`` does not divide the number of micro-batches. With
    ``group``, ranks whose data ends early yield empty windows until the last rank's data has ended. An empty window adds
    nothing to what ``accumulate(..., sync=gradacc.all_reduce(group))`` returns, which weights by what each rank holds; so
    the call on every rank's window is the call on their union, and nobody waits for a rank that has stopped.

    ``steps`` may be a function of the update, as ``every_k_schedule`` of ``optax.MultiSteps`` is: ``steps(0)`` micro-batches
    in the first window of a loop, ``steps(1)`` in the second one. Every loop begins at 0; for updates of several epochs pass
    ``lambda update: schedule(done + update)``. It is called for windows that hold something, and not only once (by ``len()``
    too; with a group, to count the windows before the first), so it must return the same each time. With ``group`` it should
    be the same function on every rank: then the windows of an update are cut alike. How many windows a rank has is counted
    with its own, so ranks stay together even where it is not.

    ``optax.MultiSteps`` differs in the rest: it carries what is left of an epoch into the next one's first update and its
    schedule counts the updates of all epochs, where a loop here ends with a shorter window and the next begins at 0; and it
    averages the micro-batches' averages, where `gradacc.accumulate` weights them by what they hold.

    **What crosses.** Without a group, nothing: this process is alone. With one, an all-reduce (MAX) of 24 bytes when a loop
    begins, if every rank's loader has a ``len()``; if one has not, such an all-reduce before each window and one at the end.
    Ranks must begin the same loops in the same order, and leave them after the same window.

    Arguments:
        loader: an iterable of micro-batches, a `torch.utils.data.DataLoader` for instance. If it can be iterated again, the
            windows can too; an iterator (a generator) ends, and its windows with it. It is read ``steps`` micro-batches at
            a time.
        steps: micro-batches in a window: an int, or ``steps(update)`` that returns one, for ``update`` = 0, 1, …
        group: the ranks to keep up with: a ProcessGroup, a one-dimensional DeviceMesh or one dimension of a mesh, as for
            `gradacc.all_reduce`; None, by default, is this process alone. ``torch.distributed.group.WORLD`` is all ranks.

    Returns:
        An iterable of lists. It has a ``len()`` where the loader has one and there is no other rank. (Of a group's windows
        the number is known only inside the loop: a rank that asked for it outside, in its progress bar, would wait for
        ranks that do not ask.)

    Raises:
        TypeError: ``loader`` is not iterable, or is one batch (a tensor, a dict); ``steps`` is no int, or a function that
            returns none; ``len()`` where there is none.
        ValueError: ``steps``, or what it returns, is less than 1; this process is not in ``group``; a mesh of several
            dimensions; in the loop, a loader that yields more than its ``len()`` says (some would be dropped).
        RuntimeError: in the loop, another rank has ended or did not come within the group's timeout, or its loader (or
            schedule) has raised.

    What ``steps`` returns is looked at when its window begins; with a group and a ``len()``, before the first one. If the
    loader or ``steps`` raises, its exception passes through, and the micro-batches that were read for that window are lost
    with it; the state that earlier windows led to stays valid. With a group, the other ranks then get a RuntimeError that
    names this one: of the loop if it raised in the first window, or if flags cross before each; otherwise of their next call
    with ``sync=`` in this group, if the loop's last round made one (this rank waits for them in its place). Where it made none,
    this rank is missed by whatever the others wait for. The loop is over on this rank: let it be so on all of them.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, x):
        ...     return (w * x).square().mean()
        >>> grad_fn = gradacc.accumulate(loss_fn)           # the batch is a window: an iterable of micro-batches
        >>> loader = torch.utils.data.DataLoader(torch.arange(7.0), batch_size=2)
        >>> windows = gradacc.data.windows(loader, 3)
        >>> len(windows)
        2
        >>> for window in windows:
        ...     print([len(x) for x in window], grad_fn(torch.ones(()), window))
        [2, 2, 2] tensor(18.3333)
        [1] tensor(72.)
    """
    if not hasattr(loader, "__iter__") or isinstance(loader, (Tensor, str, bytes)) or hasattr(loader, "keys"):
        raise TypeError(
            f"{_NAME}: the loader must be an iterable of micro-batches, got {describe(loader)}. "
            "Pass a torch.utils.data.DataLoader, a list or a generator of them"
        )
    if not callable(steps):
        steps = positive_int(_NAME, "steps", steps)
    ranks = None if group is None else groups.resolve(_NAME, group)
    return Windows(loader, steps, None if ranks is None else weakref.ref(ranks))


def _size(steps: Steps, update: int) -> int:
    """Micro-batches in a window."""
    return positive_int(_NAME, f"steps({update})", steps(update)) if callable(steps) else steps


def _number(length: int, steps: Steps) -> int:
    """How many windows so many micro-batches are."""
    if not callable(steps):
        return -(-length // steps)
    number = 0
    while length > 0:
        length -= _size(steps, number)
        number += 1
    return number


def _cut(loader: Iterable[T], steps: Steps) -> Iterator[Window[T]]:
    left = iter(loader)
    for update, first in enumerate(left):
        size = _size(steps, update)
        window = Window([first, *itertools.islice(left, size - 1)])
        ended = len(window) < size  # before the caller has it
        yield window
        if ended:
            break  # an iterator that has ended is not asked again


def _cut_alike(loader: Iterable[T], steps: Steps, loop: Loop) -> Iterator[list[T]]:
    """The same, then empty ones, as many as the rank with the most has."""
    length = _length(loader)
    counted: int | None = None
    own, total = _cut(loader, steps), None
    for number in itertools.count():
        window: Window[T] = Window()
        error: Exception | None = None
        try:
            if number == 0 and length is not None:
                counted = _number(length, steps)
            window = next(own, window)
        except Exception as raised:  # whatever a loader raises, or a schedule
            error = raised
        # Until everyone can count.
        if total is None:
            left = int(bool(window)) if counted is None else counted - number
            with groups.releasing(), contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
                unknown, most = loop.exchange(counted is None, left, error is not None)
                total = number if most <= 0 else None if unknown else most
        elif error is not None:
            loop.fail(error)
        if error is not None:
            raise error
        if total is not None and number >= total:
            break
        window.number = number + 1
        loop.begin_window()
        yield window
    if window:
        raise ValueError(
            f"{_NAME}: the loader's len() is {length}, but it yields more; with a group, ranks rely on it. "
            "Correct it, or pass iter(loader), which has none"
            + ("; or steps returned less than when the windows were counted" if callable(steps) else "")
        )


def _length(loader: Iterable[Any]) -> int | None:
    """Of a loader that knows; there are many ways not to (`torch.utils.data` has several)."""
    if isinstance(loader, Sized):
        with contextlib.suppress(Exception):
            return len(loader)
    return None
