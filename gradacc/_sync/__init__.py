"""The boundary: what crosses between ranks, once a call.

`gradacc.all_reduce` is a value that says how; a call does this with it:

.. code-block:: text

    link = connect(...)                     # None: there is nobody to talk to
    buffer, sums = fold(...)                # on each rank by itself; link.fail() where it raises
    grads, sums = link.cross(buffer, sums)  # the union's

NOTE [one collective]
    Gradients, and beside them a *record* of everything that is not one (weight, value, scalar metrics, whether this rank
    failed), are packed into one tensor per accumulator dtype and device, and summed by one all-reduce. A record is exact
    although it rides in a sum of floats: it is cut into bytes, and each rank writes its own into a slot of its own, where
    every other rank adds zeros. All ranks then do the same arithmetic with the same records, in float64.

NOTE [agreement]
    To pack alike, ranks must know alike what there is to pack; a rank without a micro-batch has not even seen what the loss
    returns. So at first use (of a ``grad_fn``, with parameters of this structure, in this group) they exchange descriptions,
    and compare them. Later calls rely on it. Ranks must therefore make the same calls in the same order.

NOTE [failing together]
    A rank whose loss raises takes part in the collective all the same, with a record that says so, and then raises its own
    error; the others raise one that names it. Nobody waits, and nobody is a collective ahead of the others afterwards.
"""

from __future__ import annotations

from gradacc._sync.agreement import Agreed as Agreed
from gradacc._sync.boundary import Link as Link
from gradacc._sync.boundary import connect as connect
from gradacc._sync.boundary import give_up as give_up
from gradacc._sync.traced import Traced as Traced
