"""Existing models, unchanged: torch's draws inside a context, by keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

from gradacc import _surroundings, _where
from gradacc.random import _check, _generators, _modes


def keyed(keys: Tensor, shared: Tensor | None = None) -> AbstractContextManager[None]:
    """Inside, torch draws by keys: dropout of a model that knows nothing of keys does not depend on the split.

    .. code-block:: text

        with keyed(keys, shared):      # draw number i = 0, 1, ... of shape s, with n = len(keys)
            draw                       #   s[0] == n: numbers of shape s[1:] of each of fold_in(keys, i)
                                       #   nothing of s is of the batch: numbers of shape s of fold_in(shared, i)
                                       #   else: an error

    It goes inside of the loss, around the forward pass, with the keys of the micro-batch. Then the mask of an example depends
    on its key and the number of the draw alone, so that `accumulate` returns the large batch's gradient. The numbers are those
    of `bernoulli`, `uniform` and `normal`; they are drawn again as they were where ``torch.utils.checkpoint`` (not reentrant),
    `gradacc.microbatch` or ``accumulate(through=)`` run a forward pass again. Torch's generators do not move.

    Covered are ``F.dropout`` and its family, ``rand``, ``randn``, ``normal``, ``bernoulli`` with ``*_like`` and in-place forms,
    and attention with ``dropout_p`` by torch's math path. All others raise. ``docs/randomness.md`` has the tables, what
    cannot be known of a shape, and the price.

    Arguments:
        keys: uint64, of shape ``(n, 2)``: a key for each example. Keys that are made of these by hand use other numbers.
        shared: one key, of shape (2,), for draws that have nothing to do with the batch; the same in every micro-batch.

    Returns:
        A context manager, to be entered once.

    Raises:
        TypeError: ``keys`` is no uint64 tensor.
        ValueError: ``keys`` or ``shared`` has another shape. Inside: a draw may or may not be of the batch, or is of none and
            ``shared`` is missing. At the end: draws that are no single number were made, and none had ``n`` examples.
        NotImplementedError: inside, a draw has no keyed counterpart, or is in a reentrant checkpoint; at the end, something
            drew from a generator of torch, Python or NumPy nevertheless. Under ``torch.compile``; under ``vmap``
            over keys, or with ``randomness="different"``.
        RuntimeError: inside, a draw in a micro-batch of an `accumulate` or `microbatch` that is called inside.

    Example:
        >>> import torch, gradacc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        >>> apply, params, _ = gradacc.functional(model)
        >>> def loss_fn(params, batch):
        ...     with gradacc.random.keyed(batch["keys"]):
        ...         return apply(params, batch["x"]).square().mean()
        >>> batch = {"x": torch.ones(6, 4), "keys": gradacc.random.split(gradacc.random.key(7), 6)}
        >>> grads = gradacc.accumulate(loss_fn, steps=4)(params, batch)
        >>> torch.testing.assert_close(grads, torch.func.grad(loss_fn)(params, batch))
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "keyed: not available inside of torch.compile, whose graph would have torch's own draws. Leave the function that "
            "has keyed in it out of torch.compile, or draw by gradacc.random.dropout, uniform and normal, which compile"
        )
    return _context(_given(keys, shared))


# Behind a graph break Dynamo would trace a part of it.
_where.whole_or_not_at_all(keyed)


def _given(keys: Any, shared: Any) -> _modes.Given:
    """Plain tensors of what was passed."""
    levels = retrieve_all_functorch_interpreters() if _where.functorch_is_active() else []
    if any(isinstance(level, VmapInterpreter) and level.randomness() == "different" for level in levels):
        raise NotImplementedError(
            'keyed: inside of vmap(..., randomness="different"), whose elements would need keys of their own; '
            'randomness="same" draws the same for all of them'
        )
    keys = _readable("keys", _check.keys("keyed", keys))
    if keys.ndim != 2:
        raise ValueError(
            f"keyed: keys is a tensor of shape {tuple(keys.shape)}; it must be (n, 2), a key for each example of the "
            "micro-batch, as gradacc.random.split(key, n) makes them"
        )
    if shared is not None:
        shared = _readable("shared", _check.keys("keyed(shared=)", shared))
        if shared.ndim != 1:
            raise ValueError(
                f"keyed: shared is a tensor of shape {tuple(shared.shape)}; it is one key, of shape (2,), the same in every "
                "micro-batch, as gradacc.random.key(seed) makes it"
            )
    return _modes.Given(keys, shared)


def _readable(name: str, keys: Tensor) -> Tensor:
    """A copy of what a transform that does not batch has wrapped: what runs again later has the same keys."""
    if not _where.is_readable(keys):
        raise NotImplementedError(
            f"keyed: {name} differ between the elements of a vmap, which sees one example at a time; leave the batch "
            "to keyed and vmap over parameters only, or draw by gradacc.random.dropout, uniform and normal"
        )
    while torch._C._functorch.is_functorch_wrapped_tensor(keys):
        keys = torch._C._functorch.get_unwrapped(keys)
    with _surroundings.outside_of_transforms():
        return keys.clone()


@contextmanager
def _context(given: _modes.Given) -> Iterator[None]:
    before = _generators.states(given.keys)
    with _modes.entered(given, 0, _where.divided()) as draws:
        yield
    moved = _generators.moved(before, given.keys)
    if moved:
        raise NotImplementedError(
            f"keyed: something inside drew from, or set, {' and '.join(moved)}, which keys do not replace, so it differs from "
            "split to split. Draw it outside and pass it in with the batch, or from a key of gradacc.random"
        )
    if draws.of_nothing is not None and not draws.of_examples:
        raise ValueError(
            f"keyed: no draw had {len(given.keys)} examples, of which keys are, and {draws.of_nothing}. keys must have "
            "a key for each example of what the model is given, as gradacc.random.split(key, n) makes them; what has no "
            "examples is drawn by gradacc.random.uniform(key, shape)"
        )


_where.whole_or_not_at_all(_context)
