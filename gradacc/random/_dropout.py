"""Dropout whose mask is a function of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from gradacc.random import _check, _draw


def dropout(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Each example's elements are 0 with probability ``p``, by its own key; the others are multiplied by ``1 / (1 - p)``.

    .. code-block:: text

        dropout(x, keys, p)[i] = where(bernoulli(keys[i], p, x[i].shape), 0, x[i] / (1 - p))

    Row ``i`` depends on ``x[i]`` and ``keys[i]`` alone: not on the other rows, nor on the number of micro-batches or ranks. So
    with the keys in the batch, `accumulate` returns the large batch's gradient. The mask is the same for every dtype of ``x``.
    What is dropped is 0 and has a gradient of 0, whatever its value is. Keys that are used again drop the same again: for
    another dropout of the model use ``fold_in(keys, layer)``, for another step other keys. In evaluation leave it out.

    Arguments:
        x: floating or complex, of shape ``(*batch, ...)``.
        keys: uint64, of shape ``(*batch, 2)``: one for each example. One key, of shape (2,), is for all of ``x``: for what is
            not per example, such as a weight.
        p: a number in [0, 1]; what is drawn is ``p`` rounded up to a multiple of ``2**-24``.

    Returns:
        Like ``x``.

    Raises:
        TypeError: ``x`` is no floating or complex tensor, ``keys`` no uint64 tensor, ``p`` no number.
        ValueError: ``keys`` has another shape, or not a key for each example, or is on another device; ``p`` is not in [0, 1].

    Source: Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15, 2014.

    Example:
        >>> import torch, gradacc
        >>> def loss_fn(w, batch):
        ...     return (gradacc.random.dropout(batch["x"], batch["keys"], 0.5) @ w).square().mean()
        >>> batch = {"x": torch.ones(6, 4), "keys": gradacc.random.split(gradacc.random.key(7), 6)}
        >>> w = torch.arange(4.0)
        >>> grads = gradacc.accumulate(loss_fn, steps=4)(w, batch)
        >>> torch.testing.assert_close(grads, torch.func.grad(loss_fn)(w, batch))
    """
    _check.keys("dropout", keys)
    _check.of_examples("dropout", x, keys)
    p = _check.probability("dropout", p)
    if p == 0:
        return x.clone()
    dropped = _draw.below(keys, x.shape[keys.ndim - 1 :], p)
    kept = torch.where(dropped, 0, x)
    return kept if p == 1 else kept * (1 / (1 - p))
