"""Where torch's draws are seen, and what is done there.

NOTE [below autograd]
    A dispatch mode sees each draw as an operator on plain tensors, whoever makes it: below autograd, autocast and the
    transforms of ``torch.func``, and behind every Python function of torch. A function mode sees functions before they
    choose a kernel that draws by itself (attention), or an order of dimensions (recurrent networks).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradacc import _where
from gradacc.random import _keys, _replay, _rule
from gradacc.random._torch_draws import DRAWS

_TWO_LINES = (
    'Put the keys into the batch, batch["keys"] = gradacc.random.split(key, n), and inside of the function that is given the '
    'micro-batch write\n    with gradacc.random.keyed(batch["keys"]):\n        ...  # the forward pass'
)


ANYWHERE = object()
"""For what runs again, whose place was checked when it ran first."""


class Given(NamedTuple):
    """Of one context."""

    keys: Tensor
    shared: Tensor | None


@contextmanager
def entered(given: Given, number: int, divided: object) -> Iterator[Draws]:
    """Where draws are keyed, from one number on."""
    with _Functions(), Draws(given, number, divided) as draws:
        yield draws


class _Functions(TorchFunctionMode):
    """NOTE [below autograd]."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RECURRENT:
            _check_recurrent(func.__name__, args)
        with sdpa_kernel(SDPBackend.MATH) if _has_dropout(func, args, kwargs) else nullcontext():
            return func(*args, **kwargs)


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
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


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """NOTE [below autograd]; it counts the draws."""

    supports_higher_order_operators = True

    def __init__(self, given: Given, number: int, divided: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = given
        self.number = number
        self.divided = divided
        self.of_examples = False
        self.of_nothing: str | None = None
        self.outside = len(_replay.checkpoints())
        self.reentrant = _replay.reentrant()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise NotImplementedError(
                f"keyed: {func} runs a function of its own, whose draws keyed does not see; call it outside, or draw by "
                "gradacc.random.dropout, uniform and normal"
            )
        if torch.Tag.nondeterministic_seeded not in func.tags or func is torch.ops.aten._fused_sdp_choice.default:
            return func(*args, **kwargs)
        if func in DRAWS and kwargs.get("generator") is None:
            if any(isinstance(arg, Tensor) and arg.is_nested for arg in args):
                raise NotImplementedError(f"keyed: {func} of a nested tensor; pad it, and draw of the padded one")
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
            with torch.no_grad():
                return DRAWS[func](functools.partial(self._take, func.__name__), *args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            with self:  # under inference_mode composed operators arrive whole
                return func.decompose(*args, **kwargs)
        if _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        raise NotImplementedError(
            f"keyed: {func} draws numbers, and has no keyed counterpart (or was given a generator of its own), so it would "
            "differ from split to split. Use F.dropout, rand, randn, normal, bernoulli or their *_like and in-place forms, "
            "without generator= and out=; or draw it outside and pass it in with the batch"
        )

    def _take(self, draw: str, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Sequence[int]]:
        """The keys of one draw, and the shape of what each draws."""
        self._check_place(draw)
        for frame in _replay.checkpoints()[self.outside :]:
            if frame is not None:
                _replay.enter_again(frame, functools.partial(entered, self.given, self.number, ANYWHERE))
        keys, shared = self.given
        of_examples = _rule.is_of_examples(draw, shape, len(keys))
        if not of_examples and shared is None:
            raise ValueError(
                f"keyed: {draw} draws numbers of shape {tuple(shape)}, which are of no batch of {len(keys)}, the number of "
                "keys. If that is how many numbers all examples have in common, name the key that they are drawn from, the "
                "same in every micro-batch: keyed(keys, shared=gradacc.random.key(seed)); else keys must have one for each "
                "example"
            )
        number, self.number = self.number, self.number + 1
        self.of_examples |= of_examples
        if shape and not of_examples:
            self.of_nothing = f"{draw} drew shape {tuple(shape)}"
        source = keys if of_examples or shared is None else shared
        return _keys.fold_in(source.to(device), number), shape[1:] if of_examples else shape

    def _check_place(self, draw: str) -> None:
        if self.divided is not ANYWHERE and self.divided is not _where.divided():
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
