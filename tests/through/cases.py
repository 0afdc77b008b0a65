"""Encoders and losses over the whole batch, for tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradacc import Mean


def params(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "w": torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype),
        "v": torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype),
        "scale": torch.tensor(0.3, dtype=dtype),
    }


def batch(size: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "image": torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype),
        "text": torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
        "label": torch.arange(size) % 3,
    }


def encode_image(params: Any, batch: Any) -> Tensor:
    return torch.tanh(batch["image"] @ params["w"])


def encode_text(params: Any, batch: Any) -> Tensor:
    return torch.tanh(batch["text"] @ params["v"])


def encode(params: Any, batch: Any) -> dict[str, Tensor]:
    return {"image": encode_image(params, batch), "text": encode_text(params, batch)}


def _logits(params: Any, outputs: Any) -> Tensor:
    image, text = (F.normalize(outputs[key], dim=1) for key in ("image", "text"))
    return params["scale"].exp() * image @ text.T


def clip(params: Any, outputs: Any, batch: Any) -> Tensor:
    """Radford et al. 2021: symmetric cross-entropy, with a learned temperature."""
    logits = _logits(params, outputs)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def siglip(params: Any, outputs: Any, batch: Any) -> Mean:
    """Zhai et al. 2023: each pair a binary problem."""
    logits = _logits(params, outputs)
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return Mean(-F.logsigmoid(signs * logits).sum(), len(logits))


def correlation(params: Any, outputs: Any, batch: Any) -> Tensor:
    """Pearson's, of two numbers an example."""
    numbers = {key: outputs[key] @ torch.arange(4).to(outputs[key].dtype).sin() for key in ("image", "text")}
    x, y = (each - each.mean() for each in numbers.values())
    return -(x @ y) / (x.norm() * y.norm())


def barlow_twins(params: Any, outputs: Any, batch: Any) -> Tensor:
    """Zbontar et al. 2021: the cross-correlation matrix is to be the identity."""
    image, text = (F.batch_norm(outputs[key], None, None, training=True, eps=0.01) for key in ("image", "text"))
    matrix = image.T @ text / len(image)
    return (matrix - torch.eye(len(matrix), dtype=matrix.dtype)).square().sum()


def batch_hard_triplets(params: Any, outputs: Any, batch: Any) -> Tensor:
    """Hermans et al. 2017: the farthest of one's own class, the nearest of the others."""
    apart = outputs["image"][:, None] - (outputs["image"] + outputs["text"])
    # (`torch.cdist` has no second derivative.)
    distances = (apart.square().sum(-1) + 0.01).sqrt()
    same = batch["label"][:, None] == batch["label"]
    farthest = torch.where(same, distances, -torch.inf).amax(1)
    nearest = torch.where(same, torch.inf, distances).amin(1)
    return F.softplus(farthest - nearest).mean()


def splade(params: Any, outputs: Any, batch: Any) -> dict[str, Mean]:
    """Formal et al. 2021: a ranking loss, and FLOPS: squares of means over the batch."""
    ranking = clip(params, outputs, batch) * len(batch["label"])
    flops = sum(outputs[key].abs().mean(0).square().sum() for key in ("image", "text"))
    return {"ranking": Mean(ranking, len(batch["label"])), "flops": Mean(0.1 * flops, 1)}


def rows_of_clip(params: Any, outputs: Any, batch: Any, rows: slice) -> Mean:
    """`clip`, of these rows and columns."""
    image, text = (F.normalize(outputs[key], dim=1) for key in ("image", "text"))
    scale = params["scale"].exp()
    own = torch.arange(len(image))[rows]
    losses = F.cross_entropy(scale * image[rows] @ text.T, own, reduction="sum") + F.cross_entropy(
        scale * text[rows] @ image.T, own, reduction="sum"
    )
    return Mean(losses / 2, len(own))


LOSSES = {loss.__name__: loss for loss in (clip, siglip, correlation, barlow_twins, batch_hard_triplets, splade)}


def value(loss: Any) -> Any:
    """The number that a loss is."""
    if isinstance(loss, Mean):
        return loss.value
    return sum(mean.value for mean in loss.values()) if isinstance(loss, dict) else loss
