"""Whose a draw of torch's is, by its shape: of the examples of a batch, or of nothing in it."""

from __future__ import annotations

from collections.abc import Sequence

_FIX = (
    "Where it is meant for each example, draw it with the batch in front, (n, ...), as reshape makes it afterwards; "
    "else draw it outside of keyed, from a key of gradacc.random, and pass it in"
)


def is_of_examples(draw: str, shape: Sequence[int], n: int) -> bool:
    """Whether ``shape`` is that of numbers of ``n`` examples; False where it has nothing to do with them.

    Raises:
        ValueError: it cannot be known.
    """
    if not shape:
        return False
    if shape[0] == n:
        return True
    why = _doubt(shape, n)
    if why is not None:
        raise ValueError(
            f"keyed: {draw} draws numbers of shape {tuple(shape)}, inside keyed(keys of {n}): {why}. {_FIX}"
        )
    return False


def _doubt(shape: Sequence[int], n: int) -> str | None:
    if n == 1:
        return (
            f"of a batch of one nobody can tell whether {shape[0]} is of it, such as heads or time steps, or of nothing in it. "
            "With two examples or more in each micro-batch it may be known"
        )
    if shape[0] == 1:
        return (
            "one for all examples, which in a micro-batch of one would be the example's own. Without that dimension it is "
            "shared"
        )
    if n and shape[0] % n == 0:
        return (
            f"{shape[0]} is {shape[0] // n} times the number of examples, such as batch * heads or batch * time, whose "
            "order is not known"
        )
    if n and n in shape[1:]:
        return f"{n} is the number of examples, but not at dim 0"
    return None
