"""The module's own tensors, where others were given: what uses one while a replica runs is refused.

NOTE [the module's own tensors]
    A forward pass that gets at the module's own parameter, and not at the one that it was given, computes something else:
    its gradient is silently zero, or its value that of other parameters. A replica renews what a module's state and its
    callables lead to (NOTE [what belongs to a replica]); what is left are ways through globals, class attributes and objects
    of any other kind, which nobody can list. So for as long as the replica runs, the own tensors are of a subclass with a
    ``__torch_function__``: it costs nothing where they are not used, and sees every use, in any call, frozen or not, with
    `torch.no_grad` and under `torch.vmap` too. Only what this thread's replica uses is refused (another thread may run the
    module itself), and only what depends on the values: shapes, dtypes, devices and the like are the same.

    What torch does not tell such a class is not seen: ``torch.tensor(weight)``, ``set_``, ``as_subclass``, scripted functions,
    another thread. Where a gradient would flow there, NOTE [leaves that are not parameters] sees it; a copy of the values
    without a graph (an alias by ``detach()`` in an object of another kind, too) nobody does.

    A tensor that was computed from an own one earlier (``self.half = self.weight[:2]`` in ``__init__``) is no better. The
    replica's copy of it is of such a subclass for good.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from gradacc import _graph

_refused: ContextVar[Mapping[int, str]] = ContextVar("own tensors that a replica must not use, by id", default={})  # noqa: B039
_watching: list[dict[int, str]] = []
"""Of each replica that runs, the tensors that are of a watched class for it, by id."""
_lock = threading.Lock()


@contextmanager
def refused(own: Mapping[str, Tensor]) -> Iterator[None]:
    """While the context lasts, this thread may not use the values of these tensors."""
    names = {id(tensor): name for name, tensor in own.items()}
    token = _refused.set({**_refused.get(), **names})
    try:
        with _lock:
            for tensor in _alone(names, own):
                tensor.__class__ = _watched(type(tensor))
            _watching.append(names)
        yield
    finally:
        with _lock:
            # By identity: two replicas of one module have equal ones.
            _watching[:] = [others for others in _watching if others is not names]
            for tensor in _alone(names, own):
                tensor.__class__ = _plain(type(tensor))
        _refused.reset(token)


def _alone(names: Mapping[int, str], own: Mapping[str, Tensor]) -> Iterable[Tensor]:
    """Those that no other replica that runs watches."""
    if not _watching:
        return own.values()
    others = set[int]().union(*_watching)
    return [own[name] for key, name in names.items() if key not in others]


def refuse_hooks(name: str, own: Mapping[str, Tensor]) -> None:
    """Hooks on the module's own tensors would never run.

    Raises:
        ValueError: there are some.
    """
    hooked = [key for key, tensor in own.items() if tensor._backward_hooks or tensor._post_accumulate_grad_hooks]
    hooked = [key for key in hooked if own[key].requires_grad]
    if hooked:
        shown = ", ".join(map(repr, hooked[:3])) + (f" and {len(hooked) - 3} more" if hooked[3:] else "")
        raise ValueError(
            f"{name}: {shown} of the module: hooks on parameters (register_hook, register_post_accumulate_grad_hook) do not "
            "run, since gradients are those of the tensors that apply is given. Remove them (handle.remove()) and do to the "
            "gradients what they did, for example grads[name] * mask; or write it into the forward pass "
            "(torch.nn.utils.parametrize)"
        )


def copied(tensor: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
    """A copy of a tensor of the module's state, which is refused if it comes from one of those that were replaced."""
    storage = tensor.untyped_storage()._cdata
    shared = next((name for name, own in replaced.items() if own.untyped_storage()._cdata == storage), None)
    if shared is not None:
        return _stale(tensor, shared, False)
    if tensor.grad_fn is not None:
        variables = {id(getattr(node, "variable", None)) for node in _graph.nodes([tensor.grad_fn])}
        name = next((name for name, own in replaced.items() if id(own) in variables), None)
        if name is not None:
            return _stale(tensor, name, True)
    return tensor.clone()


class _Watched:
    """A tensor whose use is looked at."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        if name not in _ABOUT:
            for value in _operands(args[:1] if name in _LIKE else (args, kwargs)):
                _look(value, name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Another thread may copy the module meanwhile: a copy is of the class that the tensor has else."""
        copied = super().__deepcopy__(memo)  # type: ignore[misc]  # a tensor's
        if isinstance(copied, _Watched) and not isinstance(copied, _Stale):
            copied.__class__ = _plain(type(copied))
        return copied


class _Stale(_Watched, Tensor):
    """A copy of what comes from a tensor that was replaced."""

    source: str
    is_constant: bool
    """Whether its values may be used, as constants."""


_ABOUT = frozenset(
    (
        "shape", "size", "dim", "ndim", "numel", "nelement", "stride", "storage_offset", "layout", "dtype", "device",
        "get_device", "is_contiguous", "element_size", "itemsize", "nbytes", "names", "is_cuda", "is_cpu", "is_meta",
        "is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu", "is_mkldnn", "is_floating_point", "is_complex",
        "is_signed", "is_leaf", "is_inference", "requires_grad", "grad", "grad_fn", "_version",
        "is_same_size", "is_pinned", "__len__", "__hash__", "__repr__", "__format__", "empty_like", "zeros_like",
        "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full",
        "result_type",
    )
)  # fmt: skip
"""What says nothing of a tensor's values, or only prints them."""
_LIKE = frozenset(("to", "type_as", "view_as", "expand_as", "reshape_as"))
"""What takes a tensor like another one: that one's values do not matter."""


@functools.cache
def _watched(cls: type[Tensor]) -> type[Tensor]:
    return type(cls.__name__, (_Watched, cls), {"__module__": cls.__module__})


def _plain(cls: type[Any]) -> type[Any]:
    """The class of which this is the watched one."""
    return cls.__mro__[2]


def _stale(tensor: Tensor, source: str, is_constant: bool) -> Tensor:
    copied = tensor.detach().clone().as_subclass(_Stale)
    copied.source, copied.is_constant = source, is_constant
    return copied


def _name(func: Callable[..., Any]) -> str:
    name = func.__name__
    return func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]  # a property's


def _operands(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _operands(item)
    elif isinstance(value, dict):
        yield from _operands(tuple(value.values()))
    else:
        yield value


def _look(value: Any, use: str) -> None:
    if isinstance(value, _Stale):
        if not value.is_constant or (torch.is_grad_enabled() and use != "detach"):
            raise ValueError(
                f"apply: the module used, in {use}, a tensor that comes from its own parameter or buffer {value.source!r}, not "
                "from the one that it was given: compute it in the forward pass"
            )
    elif id(value) in (names := _refused.get()):
        raise ValueError(
            f"apply: the module used, in {use}, its own parameter or buffer {names[id(value)]!r}, not the one that it was "
            "given. It reached it through a global, a class attribute or an object that is not a module, a container, a "
            "function or a functools.partial: reach it through self"
        )
