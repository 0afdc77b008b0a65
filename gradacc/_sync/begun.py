"""Windows of an accumulator that a rank drops.

NOTE [windows that are dropped]
    An ``update`` that raises tells nobody. A rank that then begins another state and finalizes that one has left out a call,
    and its next window meets the others' last one. It may also have begun the same window again, or all ranks may have agreed
    to leave it out: which of these it is shows in how many states each rank has begun since its last ``finalize``. So that
    number is in the records, and where ranks differ in it after such an update, the call and
    every later one of this accumulator are errors on all of them: no rank can know which of its windows the others are in.
"""

from __future__ import annotations


class Begun:
    """On this rank, since the last ``finalize``."""

    def __init__(self) -> None:
        self.states = 0
        """How many ``init`` has begun."""
        self.raised = False
        """Whether an ``update`` has raised,"""
        self.dropped = False
        """and a state was begun after that."""
        self.apart = False
        """Whether ranks have found that they differ; for good."""

    def begin(self) -> None:
        """A state."""
        self.states += 1
        self.dropped = self.raised

    def take(self) -> tuple[int, bool]:
        """What there is to tell, at ``finalize``; and the next window begins."""
        found = self.states, self.dropped
        self.states, self.raised, self.dropped = 0, False, False
        return found
