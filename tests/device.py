"""A stand-in accelerator for tests: the device "acc", whose kernels run on the CPU.

It shows what otherwise needs a GPU: how often something waits for the device (`WAITS`), and which operation mixes devices (an
error, as on a GPU). A tensor on it is an object around a CPU tensor, ``raw``; views share one storage, as they do anywhere.
It is made of PyTorch's Python backend for PrivateUse1, and changes the whole process (`torch.accelerator` finds it): import
this module in a process of its own, as ``tests/test_device.py`` does.

What waits, on a GPU: reading a value (``item``, ``bool``, ``tolist``), an operation whose result's shape depends on values
(``nonzero``, a boolean mask), a copy to the CPU, and a copy from the CPU, unless it is told not to (``non_blocking=True``). A
0-dim CPU tensor may be an operand among tensors on the device: it is passed as a number.

Not covered, because Python cannot say it: pinned memory, ``torch.Generator(device="acc")``, streams.
"""

import collections
import contextlib
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

WAITS: collections.Counter[str] = collections.Counter()
"""What has waited for the device so far."""


class _Stream:
    """The one queue of work; it is done when it is asked for."""

    def synchronize(self) -> None:
        pass


class _Module(backend_registration._DummyBackendModule):
    """``torch.acc``: what torch asks of an accelerator's module, random numbers of its own among it."""

    _initialized = True  # so that activation checkpointing keeps the state of the random numbers

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, device: Any = None) -> _Stream:
        return self.queue

    def __init__(self) -> None:
        self.queue = _Stream()
        self.state = torch.Generator().manual_seed(0).get_state()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.state = state.clone()

    def manual_seed_all(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("acc", backend_module=_Module())
ACC = torch.device("acc", 0)
_storages: dict[int, StorageWeakRef] = {}
"""Of every storage that holds the numbers, the one (without numbers) that tensors on the device share."""


class OnDevice(torch.Tensor):
    """A tensor on "acc:0"; its numbers are in the CPU tensor ``raw``."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "OnDevice":
        outer = torch.Tensor._make_subclass(cls, _shadow(raw), False, dispatch_device=True, device_for_backend_keys=ACC)
        outer.raw = raw
        return outer

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.raw})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.prim.device.default:
            return ACC
        return run(op, args, kwargs or {})


def _shadow(raw: torch.Tensor) -> torch.Tensor:
    """A tensor without numbers, with the layout of ``raw``, in a storage that views of ``raw`` have in common."""
    own = raw.untyped_storage()
    known = _storages.get(own._cdata)
    if known is not None and not known.expired():
        shared = torch.UntypedStorage._new_with_weak_ptr(known.cdata)
    else:
        shared = torch.UntypedStorage(own.nbytes(), device="meta")
        _storages[own._cdata] = StorageWeakRef(shared)
    empty = torch.empty(0, dtype=raw.dtype, device="meta")
    return empty.set_(shared, raw.storage_offset(), raw.size(), raw.stride())


def to_device(tree: Any) -> Any:
    """Copies of all tensors of a pytree, on the device."""
    return tree_map(lambda leaf: OnDevice(leaf.detach().clone()) if isinstance(leaf, torch.Tensor) else leaf, tree)


def to_cpu(tree: Any) -> Any:
    """Copies on the CPU, uncounted."""
    return tree_map(lambda leaf: leaf.raw.detach().clone() if isinstance(leaf, OnDevice) else leaf, tree)


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the device, or between it and the CPU."""
    given = tree_leaves((args, kwargs))
    here = any(isinstance(leaf, OnDevice) for leaf in given)
    name, kwargs, result_here = op._schema.name.removeprefix("aten::"), dict(kwargs), here
    copying = name in ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")
    if kwargs.get("device") is not None:
        result_here = torch.device(kwargs["device"]).type == "acc"
        kwargs["device"] = torch.device("cpu")
    if copying:
        _count_copy(name, args, kwargs, result_here)
    elif here:
        for leaf in given:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim:
                raise RuntimeError(f"{name}: a tensor on the CPU among tensors on acc")
    if name == "_local_scalar_dense":
        WAITS["item"] += 1
    elif here and (torch.Tag.dynamic_output_shape in op.tags or _masks(name, args)):
        WAITS[name] += 1
    if not op._schema.returns or name == "_local_scalar_dense" or torch.Tag.nondeterministic_seeded not in op.tags:
        out = op(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    else:
        out = _with_own_random_numbers(op, tree_map(_raw, args), tree_map(_raw, kwargs))
    returns = op._schema.returns
    if not returns:
        return None  # in-place foreach
    if returns[0].alias_info is not None and returns[0].alias_info.is_write:
        changed = [
            kwargs[a.name] if a.name in kwargs else args[n] for n, a in enumerate(op._schema.arguments) if _writes(a)
        ]
        assert all(not isinstance(each, OnDevice) or each.shape == each.raw.shape for each in tree_leaves(changed))
        return changed[0] if len(returns) == 1 else tuple(changed)
    return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) and result_here else leaf, out)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _raw(leaf: Any) -> Any:
    return leaf.raw if isinstance(leaf, OnDevice) else leaf


def _count_copy(name: str, args: Any, kwargs: dict[str, Any], result_here: bool) -> None:
    target, source = (result_here, args[0]) if name == "_to_copy" else (isinstance(args[0], OnDevice), args[1])
    waits = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
    if isinstance(source, OnDevice) and not target:
        WAITS["to the CPU"] += 1
    elif not isinstance(source, OnDevice) and target and waits:
        WAITS["from the CPU"] += 1


def _masks(name: str, args: Any) -> bool:
    """Indexing by a boolean mask."""
    if name not in ("index", "index_put_", "index_put"):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _with_own_random_numbers(op: Any, args: Any, kwargs: Any) -> Any:
    outside, module = torch.get_rng_state(), torch.acc
    torch.set_rng_state(module.state)
    try:
        return op(*args, **kwargs)
    finally:
        module.state = torch.get_rng_state()
        torch.set_rng_state(outside)


_library = torch.library.Library("_", "IMPL")
_library.fallback(
    lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1"
)  # factories: torch.zeros(3, device="acc")
_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

_aten = torch.library.Library("aten", "IMPL")
for _overload in ("arange", "arange.start", "arange.start_step"):  # which would resize an empty tensor
    _aten.impl(
        _overload,
        lambda *args, device=None, pin_memory=None, **kwargs: OnDevice(torch.arange(*args, **kwargs)),
        "PrivateUse1",
    )


def _casting(name: str) -> None:
    """Let autocast on the device cast what a matrix product is given, as on any accelerator."""
    op = getattr(torch.ops.aten, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("acc")
        cast = [arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 else arg for arg in args]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast, **kwargs)

    _aten.impl(name, kernel, "AutocastPrivateUse1")


for _name in ("mm", "addmm", "bmm", "linear", "matmul"):
    _casting(_name)
