"""`docs/scale.md`: the tables of `scale.json`, and what they mean."""

from __future__ import annotations

from typing import Any

from benchmarks._scale_report import tables

_PAGE = """\
# Many ranks

This page is generated from `benchmarks/results` by `python -m benchmarks.pages`; `python -m benchmarks.scale` measures
anew, in some minutes on two cores. Nothing here ran on a cluster. Each claim is put to the cheapest method that could
refute it:

| claim | method | would be refuted by |
|---|---|---|
| [the large batch's gradient, for any number of ranks](#exactness) | ranks that are threads, with real sums between them | \
an error above 1e-10, a rank with other bits, one that hangs or is not told |
| [what a rank does itself hardly grows](#what-a-rank-does-itself) | one rank of many that are not there | \
a slope that is felt beside the all-reduce |
| [one crossing a step, whatever the micro-batches](#collectives-and-bytes) | two real ranks, counted by dispatcher, transport \
and kernel | one more collective or byte |
| [how long that takes](#time) | a model of the ring, fitted to few ranks on links that are known | ranks it has not seen |

## Exactness

Threads of one process, with torch's process group for them: what crosses is really added. Shares are uneven (none to four
examples in two micro-batches), a fifth of the ranks have none; float64, against autograd over one large batch. Of three
calls the second fails on one rank: that rank raises its own error, all others one that names it, and the third call goes
on.

{exactness}

Each rank reads the records of all, so in one process the time grows at least with the square of the ranks; 1024 threads fit
into two cores and 2 GB.

## What a rank does itself

From the last micro-batch to the result: packing, records, reading them, unpacking; what the all-reduce takes is not in it.
A fake process group, whose ranks have all sent the same record. Memory is over the gradients, which are let go as they are
packed.

{cost}

The bytes a rank are its record, which every rank gets from every other in the same all-reduce; beside the gradients they
are nothing before there are tens of thousands. [First use](speed.md#first-use) has its own table.

## Collectives and bytes

A step of a GPT with six layers, after which every rank has the gradient, or its part of it. FSDP2 shards each block and the
rest, seven groups. It keeps parameters sharded, which is what it is for, and pays for it in bytes: *deferred* is
`set_requires_gradient_sync(False)` until the last micro-batch, while the whole gradient accumulates on every rank;
*parameters kept* adds `set_reshard_after_backward(False)`, with which each rank holds them whole too. `optim.sharded` is
with the step of the optimizer, which gathers parameters as FSDP2's next forward pass does.

{bytes}

A collective is counted where it is asked for, by torch's dispatcher (*of them*), and where it is carried out, by the
profiler's records of gloo (which has no reduce-scatter of its own: it all-reduces, and keeps a part; NCCL has one, of half
the bytes). Bytes are those of the kernel's counter of the interface, headers included.

## Time

All-reduces of 0.2 to 4 MB over links of 100 to 400 Mbit/s and 0 to 5 ms, which a relay between network namespaces keeps to.
Links are slow on purpose: the ranks share two cores, and what is measured shall be the link. The model is that of a ring,

```text
T(W, n) = 2 (W - 1) (software + delays * delay) + 2 (W - 1) / W * n * overhead / rate
```

with three numbers for all links, sizes and ranks.

{model}

The first table is what the model is worth: whether its errors grow with the ranks that it has not seen is all that can be
told of 1024 from here. The ranges in the second one are those errors. Most of the time at 1024 is messages, by the ring
that gloo makes; NCCL has trees. What stays is the comparison, as both ways make the same all-reduces. *Once* includes [what
a rank does itself](#what-a-rank-does-itself). *From k on* is the number of micro-batches from which one boundary at the end
is faster than an all-reduce in each, where each of those hides behind all of a micro-batch's arithmetic (as none could
better), and the one at the end behind none. Without arithmetic to hide behind it is 2, for any link and number of ranks;
where a micro-batch computes for longer than the network takes, the all-reduces of all micro-batches cost no time, only
bytes.

![one rank's own time, the model, and what it says of more ranks](../benchmarks/results/scale.png)
"""


def page(results: dict[str, Any]) -> str:
    """The page of the results as they are."""
    found = tables(results)
    return _PAGE.format(**{part: found.get(part, "Not measured.") for part in ("exactness", "cost", "bytes", "model")})
