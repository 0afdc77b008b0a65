"""`docs/speed.md`, `docs/scale.md` and figures of `docs/microbatch.md`, from `benchmarks/results`, and what they mean.

    python -m benchmarks.pages

A test compares the pages with the results, so a figure on them cannot be older than they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import (
    _boundary_report,
    _compiled_report,
    _microbatch_report,
    _report,
    _scale_page,
    _sharded_report,
    _through_report,
    agreement,
    optim,
    random,
)

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
OF_SCALE = ROOT / "docs" / "scale.md"
OF_PIECES = ROOT / "docs" / "microbatch.md"

_HEAD = """\
# Speed and memory

This page is generated from `benchmarks/results` by `python -m benchmarks.pages`. `make bench` measures anew.

All variants of a table take turns in one process, once a round, in a balanced order, and several processes do so at
different times. A ratio is within a round; what is shown is the median of the processes' medians, the quartiles of all
rounds in brackets, and the range of the processes' medians in parentheses: what another run may well find. One variant runs
twice a round under two names: how far its second row is from 1 is the noise. Gradients are checked against the large batch
before anything is timed.
"""

_EAGER = """\
## Eager

A six-layer GPT, an MLP with many parameters, and three models of almost no arithmetic, on which a fixed cost shows: a GPT
of 8 channels, transformers' GPT-2 with 12 layers of width 64, and 201 modules in a row. The floor is forward and backward
alone. Peak memory is what tensors take over the module and the batch, in sizes of the parameters.

{tables}

![time and memory](../benchmarks/results/eager.png)

Weight gradients are added to the buffer by the matrix product itself, so they never exist on their own: on the MLP, gradacc is
faster than forward and backward without any addition, and needs less memory than the loop. The price is Python in each
micro-batch, which the last three tables show. About half of it are checks without which a result could be silently wrong: of
2.2 ms a micro-batch over the loop with 201 modules, 0.56 go to comparing what modules and their replicas hold, 0.28 to reading
the graph, 0.15 to looking at the leaves. With all of these taken out (an experiment, 20 rounds) it was 1.31 of the loop in the
place of 1.63, and 1.16 in the place of 1.30 on GPT-2. Compiled, there is none of it.
"""

_COMPILED = """\
## Compiled

Against the hand-written eager loop and against `optax.microbatching` on JAX (same machine, weights and threads, gradients
equal to rtol 1e-4).

{tables}

![compiled](../benchmarks/results/compiled.png)

`torch.compile(accumulate(f))` costs more to compile and runs fastest: there is no Python between micro-batches, and gradients
are summed by the matrix product, in place. `accumulate(torch.compile(f))` compiles one micro-batch, once, and runs as the loop
with a compiled module does; its gradients come out of the compiled function whole, and exist beside the buffer.
"""

_BOUNDARY = """\
## Boundary

Two ranks on loopback, and between two network namespaces joined by a link of 400 Mbit/s.

{tables}

![step time against micro-batches](../benchmarks/results/boundary.png)

Bytes do not depend on the number of micro-batches. `overlap` pays where the network takes longer than packing: on the slow
link it hides the backward pass of one micro-batch, on loopback there is nothing to gain. What crosses in bfloat16 should
overlap: one all-to-all of gloo's does not fill a slow link (see the next section).
"""

_SHARDED = """\
## Optimizer state divided over ranks

Whole training steps: gradients of 4 micro-batches a rank, and an AdamW update. Before anything is timed, parameters after two
steps are compared with those of one process that trains on the union. See [Optimizer state divided over ranks](sharded.md).

{tables}

`zero_grad` is inside the clock, so between steps DDP holds its buckets, and gradacc no gradients; what is held is the resident
set's, so it has what gloo and torch keep as well. ZeroRedundancyOptimizer all-reduces gradients, divides the state by whole
parameters, and broadcasts these. FSDP2 divides parameters, too. "Kept" is `reshard_after_forward=False`, with
`set_reshard_after_backward(False)` but for the last micro-batch: parameters are gathered once a step. gloo's
reduce-scatter sends what an all-reduce does, so FSDP2 sends more than it would over NCCL (gradacc's is an all-to-all where the
backend is gloo). One all-to-all of all gradients does not fill a slow link: 19.6 MB took 0.36 s on this one, in four at once
0.25 s, an all-reduce of them 0.41 s; `overlap=True` sends buckets. The peak of gradacc's sharded step is in the update, where
gloo's all-gather holds all parameters twice beside the ones that are there.
"""

_OPTIM = """\
## Optimizer steps

Against `torch.optim`'s own `foreach` step of the same rule. A step that is not donated makes one copy of parameters and state.

{tables}
"""


_MICROBATCH = """\
## By pieces

The head of a language model, forward and backward, by [`microbatch`](microbatch.md). The floor is what is given and returned:
hidden states, weight, and their gradients; peaks are exact. Against torch's own at equal pieces, what is left in float32 is the
loss: torch computes softmax and its gradient in place, autograd each in new memory. Of what was tried on two cores (of
torch's time at pieces of 256, 2048 tokens, median of 5): `logsumexp` less `gather` 1.33, less the product with the label's row
1.31, pieces of 128, 512 and 1024 1.18, 1.13 and 1.27, the function compiled 1.12; as it stands here 1.16 to 1.25.

{tables}
"""


_THROUGH = """\
## Losses over the whole batch

A contrastive loss on MiniLM, by [`through=`](through.md), against sentence-transformers' cached loss at equal micro-batches;
texts are from the standard library's source. Peaks are exact. The third table is of a loss whose encoders cost nothing: of the
form that every rank evaluates for all pairs, and of the one of a rank's own rows.

{tables}
"""

_RANDOM = """\
## Keyed dropout

What it costs that the mask of an example is a function of its key. On a CPU torch has no kernel for it, so it is tensor code:
by pieces that fit into the cache where nothing is transformed, all at once under a transform.

{tables}
"""

_AGREEMENT = """\
## First use

At first use ranks find out whether they have the same parameters and options, by fingerprints. Against exchanging
everything, as version 0.1.0 did, with torch's fake process group:

{tables}

![first use against ranks](../benchmarks/results/agreement.png)
"""


def page() -> str:
    """The page of the results as they are."""
    sections = (
        (_EAGER, _report.tables(_results("eager"))),
        (_COMPILED, _compiled_report.tables(_results("compiled"))),
        (_BOUNDARY, _boundary_report.tables(_results("boundary"))),
        (_SHARDED, _sharded_report.tables(_results("sharded"))),
        (_OPTIM, optim.table(_results("optim"))),
        (_MICROBATCH, _microbatch_report.tables(_results("microbatch"))),
        (_THROUGH, _through_report.tables(_results("through"))),
        (_RANDOM, random.table(_results("random"))),
        (_AGREEMENT, agreement.table(_results("agreement"))),
    )
    return "\n".join([_HEAD, *(text.format(tables=tables) for text, tables in sections)])


def of_scale() -> str:
    """The page on many ranks, of the results as they are."""
    return _scale_page.page(_results("scale"))


def of_pieces() -> str:
    """The page on `microbatch`, with the figures of the results as they are."""
    return _microbatch_report.filled(OF_PIECES.read_text(), _results("microbatch"))


def _results(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return results


if __name__ == "__main__":
    PAGE.write_text(page())
    OF_SCALE.write_text(of_scale())
    OF_PIECES.write_text(of_pieces())
