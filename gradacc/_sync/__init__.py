"""The boundary: what crosses between ranks, once a call.

`gradacc.all_reduce` is a value that says how; a call does this with it:

.. code-block:: text

    boundary = connect(...)
    boundary.bind(params, ...)
    buffer, sums = fold(...)                    # on each rank by itself; boundary.fail(error) where it raises
    grads, sums = boundary.cross(buffer, sums)  # the union's
    boundary.done()                             # it was divided, and is returned

It is `Alone` where there is nobody to talk to, a `Link` to the other ranks, or `Traced` into a graph.

NOTE [one collective]
    Gradients, and beside them a *record* of everything that is not one (weight, value, scalar metrics, whether this rank
    failed), are packed into one tensor per accumulator dtype and device, and cross together, in one of the ways of
    ``crossing.py``, NOTE [ways]. A record is cut into bytes, so that it is exact although it rides among floats. Where the
    backend sums them (`SUMMED`, `REDUCED`), each rank writes its own into a slot of its own, where every other rank adds zeros;
    elsewhere the records of all ranks arrive side by side. All ranks then do the same arithmetic with the same records, in
    float64.

NOTE [agreement]
    To pack alike, ranks must know alike what there is to pack; a rank without a micro-batch has not even seen what the loss
    returns. So at first use (of a ``grad_fn``, with parameters of this structure, in this group) they exchange descriptions,
    and compare them. Later calls rely on it. Ranks must therefore make the same calls in the same order; what happens where
    they do not is told in ``channel.py``, NOTE [turns].

NOTE [failing together]
    A rank that raises takes part in the collective all the same, with a record that says so, and then raises its own error;
    the others raise one that names it. Nobody waits, and nobody is a collective ahead of the others afterwards. Where it
    cannot wait for them (a KeyboardInterrupt), it does so at the beginning of its next call. What later calls rely on (the
    channel, agreements, scales) changes only by what all ranks have read in the same records, when all of them went through.
"""

from __future__ import annotations

from gradacc import _where
from gradacc._options import Options
from gradacc._reduce import ReduceScatter
from gradacc._rows import Homes
from gradacc._sync import group as groups
from gradacc._sync.agreement import Agreed as Agreed
from gradacc._sync.boundary import Alone
from gradacc._sync.boundary import Boundary as Boundary
from gradacc._sync.gather import Gather as Gather
from gradacc._sync.link import Link
from gradacc._sync.traced import Traced
from gradacc._sync.whole import whole as whole


def connect(options: Options, agreed: Agreed | None, homes: Homes = ()) -> Boundary:
    """The boundary of one call; ``homes``: how its parameters were divided before it."""
    parts = isinstance(options.sync, ReduceScatter)
    if options.sync is None or agreed is None:
        return Alone(parts, homes)
    group = groups.resolve(options.name, options.sync.group)
    if group is None:
        return Alone(parts, homes)
    if _where.loops():
        if options.through is not None:
            raise NotImplementedError(
                f"{options.name}: through= with sync= in a compiled function is not available; compile loss_fn and the "
                "encoder, and call grad_fn outside"
            )
        return Traced(options, group)
    if _where.transforming():
        raise NotImplementedError(
            f"{options.name}: sync= inside a functorch transform or another grad_fn's loss is not available in "
            "this version; call it outside, or leave sync out"
        )
    if agreed.begun.apart:
        raise RuntimeError(
            f"{options.name}: an earlier finalize has found that ranks of {groups.named(group)} are in different windows. Make "
            "another accumulator on every rank, and go on from the same place"
        )
    link = Link(options, group, agreed, homes)
    link.begin()
    return link
