"""Existing models, unchanged: torch's draws inside a context, by keys.

NOTE [below autograd]
    A dispatch mode sees each draw as an operator on plain tensors, whoever makes it: below autograd, autocast and the transforms of
    ``torch.func``, and behind every Python function of torch. What a function mode alone sees are functions that choose a kernel
    by themselves (attention), or order dimensions by themselves (recurrent networks).
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradacc import _surroundings, _where
from gradacc._describe import describe
from gradacc.random import _check, _keys, _replay, _rule
from gradacc.random._torch_draws import DRAWS

_TWO_LINES = (
    'Put the keys into the batch, batch["keys"] = gradacc.random.split(key, n), and inside of the function that is given the '
    'micro-batch write\n    with gradacc.random.keyed(batch["keys"]):\n        ...  # the forward pass'
)


_ANY = object()
"""For what runs again, whose place was checked when it ran first."""


class _Given(NamedTuple):
    """Of one context."""

    keys: Tensor
    shared: Tensor | None


def keyed(keys: Tensor, shared: Tensor | None = None) -> AbstractContextManager[None]:
    """Inside, torch draws by keys: dropout of a model that knows nothing of keys does not depend on the split.

    .. code-block:: text

        with keyed(keys, shared):      # draw number i = 0, 1, ... of shape s, with n = len(keys)
            draw                       #   s[0] == n: numbers of shape s[1:] of each of fold_in(keys, i)
                                       #   nothing of s is of the batch: numbers of shape s of fold_in(shared, i)
                                       #   else: an error

    It goes inside of the loss, around the forward pass, with the keys of the micro-batch. Then the mask of an example depends on
    its key and the number of the draw alone, so that `accumulate` returns the large batch's gradient. The numbers are those of
    `bernoulli`, `uniform` and `normal`; they are drawn again as they were where ``torch.utils.checkpoint`` (not reentrant),
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
            ``shared`` is missing. At the end: draws of more than one number were made, and none had ``n`` examples.
        NotImplementedError: inside, a draw has no keyed counterpart, or is in a reentrant checkpoint; at the end, something drew
            from a generator of torch, Python or NumPy nevertheless. Under ``torch.compile``; under ``vmap`` over
            keys, or with ``randomness="different"``.
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


def _given(keys: Any, shared: Any) -> _Given:
    """Plain tensors of what was passed."""
    levels = retrieve_all_functorch_interpreters() if _where.functorch_is_active() else []
    if any(level.key() == TransformType.Vmap and level.randomness() == "different" for level in levels):
        raise NotImplementedError(
            'keyed: inside of vmap(..., randomness="different"), whose elements would need keys of their own; '
            'randomness="same" draws the same for all of them'
        )
    keys = _readable("keys", _check.keys("keyed", keys))
    if keys.ndim != 2:
        raise ValueError(
            f"keyed: keys is a tensor of shape {tuple(keys.shape)}; it must be (n, 2), a key for each example of the micro-batch, "
            "as gradacc.random.split(key, n) makes them"
        )
    if shared is not None:
        shared = _readable("shared", _check.keys("keyed(shared=)", shared))
        if shared.ndim != 1:
            raise ValueError(
                f"keyed: shared is a tensor of shape {tuple(shared.shape)}; it is one key, of shape (2,), the same in every "
                "micro-batch, as gradacc.random.key(seed) makes it"
            )
    return _Given(keys, shared)


def _readable(name: str, keys: Tensor) -> Tensor:
    """What a transform that does not batch has wrapped."""
    if not _where.is_readable(keys):
        raise NotImplementedError(
            f"keyed: {name} differ between the elements of a vmap, which sees one example at a time; leave the batch "
            "to keyed and vmap over parameters only, or draw by gradacc.random.dropout, uniform and normal"
        )
    while torch._C._functorch.is_functorch_wrapped_tensor(keys):
        keys = torch._C._functorch.get_unwrapped(keys)
    return keys


@contextmanager
def _context(given: _Given) -> Iterator[None]:
    before = _generators(given.keys)
    with _entered(given, 0, _where.divided()) as draws:
        yield
    moved = [name for name, state in _generators(given.keys).items() if not _same(before.get(name), state)]
    if moved:
        raise NotImplementedError(
            f"keyed: something inside drew from, or set, {' and '.join(moved)}, which keys do not replace, so it differs from "
            "split to split. Draw it outside and pass it in with the batch, or from a key of gradacc.random"
        )
    if draws.of_nothing is not None and not draws.of_examples:
        raise ValueError(
            f"keyed: no draw had {len(given.keys)} examples, of which keys are, and {draws.of_nothing}. keys must have a key for "
            "each example of what the model is given, as gradacc.random.split(key, n) makes them; what has no examples "
            "is drawn by gradacc.random.uniform(key, shape)"
        )


_where.whole_or_not_at_all(_context)


@contextmanager
def _entered(given: _Given, number: int, divided: object) -> Iterator[_Draws]:
    """Where draws are keyed, from one number on."""
    with _Functions(), _Draws(given, number, divided) as draws:
        yield draws


class _Functions(TorchFunctionMode):
    """NOTE [below autograd]."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            _check_recurrent(func.__name__, args)
        with sdpa_kernel(SDPBackend.MATH) if _has_dropout(func, args, kwargs) else nullcontext():
            return func(*args, **kwargs)


_DROPOUT_AT = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
"""Where these have ``dropout_p``."""


def _has_dropout(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether it is attention whose fused kernels would draw by a seed."""
    if func not in _DROPOUT_AT:
        return False
    at = _DROPOUT_AT[func]
    return bool(kwargs.get("dropout_p", args[at] if len(args) > at else 0))


def _check_recurrent(name: str, args: Sequence[Any]) -> None:
    """``(input, hidden, weights, has_biases, layers, dropout, train, ...)``, or packed, with one more in front."""
    first = 5 if isinstance(args[3], bool) else 6
    if args[first] and args[first + 1]:
        raise NotImplementedError(
            f"keyed: {name} with dropout={args[first]}, which draws between its layers, inside of one kernel or with time in "
            "front of the batch; use one module a layer, with F.dropout between them"
        )


class _Draws(TorchDispatchMode):
    """NOTE [below autograd]; it counts the draws."""

    def __init__(self, given: _Given, number: int, divided: object) -> None:
        super().__init__()
        self.given = given
        self.number = number
        self.divided = divided
        self.of_examples = False
        self.of_nothing: str | None = None
        self.outside = len(_replay.checkpoints())
        self.reentrant = _replay.reentrant()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or func is torch.ops.aten._fused_sdp_choice.default:
            return func(*args, **kwargs)
        if func in DRAWS and kwargs.pop("generator", None) is None:
            with torch.no_grad():
                return DRAWS[func](functools.partial(self._take, func.__name__), *args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            with self:  # under inference_mode composed operators arrive whole
                return func.decompose(*args, **kwargs)
        if _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        raise NotImplementedError(
            f"keyed: {func} draws numbers, and has no keyed counterpart (or was given a generator of its own), so it would differ "
            "from split to split. Use F.dropout, rand, randn, normal, bernoulli or their *_like and in-place forms, without "
            "generator= and out=; or draw it outside and pass it in with the batch"
        )

    def _take(self, draw: str, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Sequence[int]]:
        """The keys of one draw, and the shape of what each draws."""
        self._check_place(draw)
        for frame in _replay.checkpoints()[self.outside :]:
            if frame is not None:
                _replay.enter_again(frame, functools.partial(_entered, self.given, self.number, _ANY))
        keys, shared = self.given
        of_examples = _rule.is_of_examples(draw, shape, len(keys))
        if not of_examples and shared is None:
            raise ValueError(
                f"keyed: {draw} draws numbers of shape {tuple(shape)}, which are of no batch of {len(keys)}, the number of "
                "keys. If that is how many numbers all examples have in common, name the key that they are drawn from, the same in "
                "every micro-batch: keyed(keys, shared=gradacc.random.key(seed)); else keys must have one for each example"
            )
        number, self.number = self.number, self.number + 1
        self.of_examples |= of_examples
        if shape and not of_examples:
            self.of_nothing = f"{draw} drew shape {tuple(shape)}"
        source = keys if of_examples or shared is None else shared
        return _keys.fold_in(source.to(device), number), shape[1:] if of_examples else shape

    def _check_place(self, draw: str) -> None:
        if self.divided is not _ANY and self.divided is not _where.divided():
            raise RuntimeError(
                f"keyed: {draw} draws in a micro-batch of accumulate or microbatch, which is called inside of keyed: the "
                f"batch is split, and the keys are not. {_TWO_LINES}"
            )
        if _replay.reentrant() > self.reentrant:
            raise NotImplementedError(
                f"keyed: {draw} draws inside of torch.utils.checkpoint.checkpoint(..., use_reentrant=True), which would draw "
                "other numbers when it runs again; pass use_reentrant=False"
            )


def _draws_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether it is a kernel with dropout of its own, which is 0 or not in training."""
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named |= dict(zip(named, args, strict=False)) | kwargs
    off = [not named[name] for name in ("dropout", "dropout_p", "train", "training") if name in named]
    return any(off)


def _generators(keys: Tensor) -> dict[str, Any]:
    """The states of those that keys do not replace."""
    now = _surroundings.of([keys])
    states: dict[str, Any] = {"torch's generator": [now.cpu, *now.states], "Python's random": random.getstate()}
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        name, words, *rest = numpy.get_state()
        states["NumPy's random"] = name, words.tobytes(), *rest
    return states


def _same(before: Any, now: Any) -> bool:
    if isinstance(now, list):
        return len(before) == len(now) and all(map(torch.equal, before, now))
    return before is None or bool(before == now)
