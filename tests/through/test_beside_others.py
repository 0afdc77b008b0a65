"""The table of docs/through.md: gradients of one contrastive loss, by what else is in use.

A CLIP of two small encoders and a learned temperature, in float64. The oracle is one graph of the whole batch, with the dropout
masks that a way's first pass draws.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gradacc
from tests import vision

PAGE = (Path(__file__).parents[2] / "docs" / "through.md").read_text()
EXAMPLES, SIZE = 16, 4
SIDES = ("image", "text")


def data():
    generator = torch.Generator().manual_seed(0)
    shared, *noise = (torch.randn(EXAMPLES, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    return {side: shared + 0.5 * own for side, own in zip(SIDES, noise, strict=True)}


def clip():
    generator = torch.Generator().manual_seed(1)
    params = {
        f"{side}.{n}": torch.randn(ins, outs, generator=generator, dtype=torch.float64) / ins**0.5
        for side in SIDES
        for n, (ins, outs) in enumerate([(12, 32), (32, 8)])
    }
    return {**params, "logit_scale": torch.tensor(5.0, dtype=torch.float64).log()}


def encoder(side, rate):
    def encode(params, batch):
        hidden = F.dropout(torch.relu(batch[side] @ params[f"{side}.0"]), rate)
        return F.normalize(hidden @ params[f"{side}.1"])

    return encode


def loss_fn(params, outputs, batch=None):
    """Symmetric cross-entropy."""
    logits = params["logit_scale"].exp() * outputs["image"] @ outputs["text"].T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def parts():
    return [{side: leaf[n : n + SIZE] for side, leaf in data().items()} for n in range(0, EXAMPLES, SIZE)]


def leaves_of(params):
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}


def both(leaves, part, rate):
    return {side: encoder(side, rate)(leaves, part) for side in SIDES}


def joined(each):
    return {side: torch.cat([one[side] for one in each]) for side in SIDES}


def grads_of(leaves):
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def part_by_part(rate):
    """The oracle of what encodes both sides of a micro-batch, then the next."""
    leaves = leaves_of(clip())
    loss_fn(leaves, joined([both(leaves, part, rate) for part in parts()])).backward()
    return grads_of(leaves)


def side_by_side(rate):
    """Of what encodes all images, then all texts."""
    leaves = leaves_of(clip())
    outputs = {side: torch.cat([encoder(side, rate)(leaves, part) for part in parts()]) for side in SIDES}
    loss_fn(leaves, outputs).backward()
    return grads_of(leaves)


def naive(rate):
    """What accumulation of gradients does: a mean of losses, each of a micro-batch alone."""
    leaves = leaves_of(clip())
    for part in parts():
        (loss_fn(leaves, both(leaves, part, rate)) / len(parts())).backward()
    return grads_of(leaves)


def accum_freq(rate):
    """open_clip's: features of all micro-batches without a graph, then the whole loss for each, with its own features anew."""
    leaves = leaves_of(clip())
    with torch.no_grad():
        kept = [both(leaves, part, rate) for part in parts()]
    for n, part in enumerate(parts()):
        own = both(leaves, part, rate)
        loss_fn(leaves, joined([*kept[:n], own, *kept[n + 1 :]])).backward()
    return grads_of(leaves)


def cached(rate):
    """sentence-transformers', whose scale is a number."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.params = torch.nn.ParameterDict({name.replace(".", "_"): leaf for name, leaf in clip().items()})

        def forward(self, features):
            own = {name: self.params[name.replace(".", "_")] for name in clip()}
            (side,) = features
            return {"sentence_embedding": encoder(side, rate)(own, features)}

    model = SentenceTransformer(modules=[Towers()], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=clip()["logit_scale"].exp().item(),
        mini_batch_size=SIZE,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    loss([{side: data()[side]} for side in SIDES], None).backward()
    return grads_of({name: model[0].params[name.replace(".", "_")] for name in clip()})


def ours(rate):
    through = {side: encoder(side, rate) for side in SIDES}
    return gradacc.accumulate(loss_fn, through=through, microbatch_size=SIZE)(clip(), data())


WAYS = {
    "the mean of the micro-batches' losses": (naive, part_by_part),
    "open_clip's `--accum-freq 4`": (accum_freq, part_by_part),
    "sentence-transformers' `CachedMultipleNegativesRankingLoss`": (cached, side_by_side),
    "**`accumulate(through=)`**": (ours, side_by_side),
}
THEIRS = "sentence-transformers' `CachedMultipleNegativesRankingLoss`"


def error(grads, expected):
    """Of the encoders' gradient as a whole, in the 2-norm."""
    names = [name for name in expected if name != "logit_scale"]
    mine, other = (torch.cat([each[name].flatten() for name in names]) for each in (grads, expected))
    return ((mine - other).norm() / other.norm()).item()


def seeded(way, rate):
    torch.manual_seed(2)
    return way(rate)


def cells(name):
    """A row of the table."""
    way, oracle = WAYS[name]
    grads, expected = seeded(way, 0.0), seeded(oracle, 0.0)
    scale = grads.get("logit_scale")
    errors = [error(grads, expected), error(seeded(way, 0.5), seeded(oracle, 0.5))]
    plain, dropped = ("< 1e-12" if each < 1e-12 else f"{each:.2f}" for each in errors)
    times = "is not learned" if scale is None else f"{(scale / expected['logit_scale']).item():.2f} x"
    return [plain, times, dropped]


def said(name):
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", PAGE, re.MULTILINE)
    return row.split(" | ")


@pytest.mark.parametrize("name", [name for name in WAYS if name != THEIRS])
def test_the_table(name):
    assert said(name) == cells(name)


@pytest.mark.slow
@pytest.mark.skipif(
    not vision.has("sentence_transformers"), reason="sentence-transformers is not installed: `make test-slow` does it"
)
def test_the_row_of_sentence_transformers():
    assert said(THEIRS) == cells(THEIRS)


def test_accum_freq_counts_the_temperature_once_for_each_micro_batch():
    """And draws other masks where the features are kept than where they are differentiated."""
    grads, expected = seeded(accum_freq, 0.0), seeded(part_by_part, 0.0)
    torch.testing.assert_close(grads["logit_scale"], EXAMPLES // SIZE * expected["logit_scale"], rtol=1e-10, atol=0)
    assert error(grads, expected) < 1e-12
    assert error(seeded(accum_freq, 0.5), seeded(part_by_part, 0.5)) > 0.1
