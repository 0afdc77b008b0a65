"""The boundary: what crosses between ranks, once a call.

`gradacc.all_reduce` is a value that says how; a call does this with it:

.. code-block:: text

    link = connect(...)                     # None: there is nobody to talk to
    link.bind(params, ...)
    buffer, sums = fold(...)                # on each rank by itself; link.fail(error) where it raises
    grads, sums = link.cross(buffer, sums)  # the union's
    link.done()                             # it was divided, and is returned

NOTE [one collective]
    Gradients, and beside them a *record* of everything that is not one (weight, value, scalar metrics, whether this rank
    failed), are packed into one tensor per accumulator dtype and device, and summed by one all-reduce. A record is exact
    although it rides in a sum of floats: it is cut into bytes, and each rank writes its own into a slot of its own, where
    every other rank adds zeros. All ranks then do the same arithmetic with the same records, in float64.

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

from gradacc._sync.agreement import Agreed as Agreed
from gradacc._sync.boundary import Link as Link
from gradacc._sync.boundary import connect as connect
from gradacc._sync.traced import Traced as Traced
