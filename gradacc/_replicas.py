"""Replicas: new module objects around given tensors, and around everything that a forward pass may write.

NOTE [replicas instead of swapping]
    `torch.func.functional_call` puts the given tensors into the module, runs it, and puts the old ones back. Two things
    that must work here break under that: activation checkpointing runs parts of the module *again* during the backward
    pass, when the old tensors are back (the gradient is then silently that of a mixture of both), and two threads that
    call the same module swap under each other's feet. So every call runs a replica: new module objects (what
    `torch.nn.parallel.replicate` makes, through the same protocol), which hold the given tensors for as long as anything
    refers to them. Dynamo traces no such thing; see NOTE [while Dynamo traces].

NOTE [what belongs to a replica]
    A forward pass may write into whatever it reaches. What is the module's own state is the replica's, made anew in every
    call from what the module holds then, so that nothing stays on the module and no call sees what another one wrote:

    - ``__dict__``, the registries of parameters, buffers and submodules, and every dict of hooks. (transformers installs
      hooks in the first forward pass that captures outputs, and notes that in an attribute: both are there, or neither is.)
    - lists, dicts, sets, deques and dataclasses in attributes, in any depth, and the tensors in them. Two names for one
      container are two names for one copy.
    - what a library set on a parameter or buffer (``weight.some_attribute``) is on the given tensor.
    - callables lead where they led, but to the replica: bound methods, `functools.partial`, the closures of functions,
      also as hooks. What else they hold is the caller's, not the module's: a hook that fills a dict fills that dict.

    Other objects are shared: a logger, a generator, a process group is the outside world, and what is written there is seen
    there. NOTE [the module's own tensors] says what happens if the way to a parameter leads through one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradacc import _fsdp, _left, _own_tensors, _where

New = dict[int, Any]
"""What stands in a replica for an object of the module's, by the object's id; and, under `_COPY`, how a tensor is copied, and,
under `LED`, the copies of the caller's containers that callables lead to."""
_COPY, LED = -1, -2


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleTree:
    """Which modules a tree has and which tensors, worked out once; a call of `grad_fn` knows its passes by it."""

    modules: list[nn.Module]
    params: dict[str, tuple[nn.Module, str]]
    """From a parameter's name to the module that owns it, and its key there."""
    buffers: dict[str, tuple[nn.Module, str]]
    names: list[str]
    """The modules', as in ``named_modules()``."""
    first: list[int]
    """For each module, the position in its ``__dict__`` from which on attributes are its own."""
    method: str
    """What is run of the whole one."""
    divided: bool
    """Whether ``fully_shard`` has divided any of them."""

    def tensors(self) -> dict[str, Tensor]:
        """The module's own tensors as they are now."""
        params = [(name, module._parameters.get(key)) for name, (module, key) in self.params.items()]
        buffers = [(name, module._buffers.get(key)) for name, (module, key) in self.buffers.items()]
        return {name: tensor for name, tensor in (*params, *buffers) if tensor is not None}


def module_tree(module: nn.Module, method: str = "forward") -> ModuleTree:
    """Of a module and its submodules."""
    names, modules = zip(*module.named_modules(), strict=True)
    params = {id(param): (part, key) for part in reversed(modules) for key, param in part._parameters.items()}
    buffers = {id(buffer): (part, key) for part in reversed(modules) for key, buffer in part._buffers.items()}
    return ModuleTree(
        list(modules),
        {name: params[id(param)] for name, param in module.named_parameters()},
        {name: buffers[id(buffer)] for name, buffer in module.named_buffers()},
        list(names),
        [len(_EVERY) if (*part.__dict__,)[: len(_EVERY)] == _EVERY else 0 for part in modules],
        method,
        any(map(_fsdp.is_divided, modules)),
    )


def replicate(
    plan: ModuleTree, own: Mapping[str, Tensor], given: Mapping[str, Tensor], replaced: Mapping[str, Tensor]
) -> New:
    """A replica of every module, with ``given`` in the place of its ``own`` tensors: what is new, by the old one's id.

    ``replaced``: those of its own tensors for which the caller gave others, which the replica must not use.

    Raises:
        ValueError: a submodule, parameter or buffer that ``plan`` does not know.
    """
    new: New = {id(None): None, LED: []}
    marked = []
    for name, tensor in own.items():
        other = given[name]
        if any(map(is_mark, tensor.__dict__)):
            other = _markable(other)
            marked.append((other, tensor))
        new[id(tensor)] = other
    new[_COPY] = partial(_own_tensors.copied, replaced=replaced)
    made = [_shallow(module) for module in plan.modules]
    new.update(zip(map(id, plan.modules), made, strict=True))
    hooked: list[dict[Any, Any]] = []
    unused = {key: OrderedDict[int, Any]() for key in _HOOKS if key not in _RUN_HOOKS}
    leading: list[tuple[dict[str, Any], str, Any]] = []
    for module, replica in zip(plan.modules, made, strict=True):
        hooked += _register(module, replica.__dict__, unused, new)
    for replica, first in zip(made, plan.first, strict=True):
        attributes = replica.__dict__
        for key, value in _own_attributes(attributes, first):
            if isinstance(value, _CALLABLES):
                leading.append((attributes, key, value))
            else:
                attributes[key] = _state(value, new)
    for module, replica in zip(plan.modules, made, strict=True):
        for slot in _slots(type(module)):  # type: ignore[arg-type]  # a class is hashable
            try:
                held = slot.__get__(module)
            except AttributeError:  # nothing in it yet
                continue
            slot.__set__(replica, _state(held, new))
    # Last, since these may lead to any of the above.
    for attributes, key, value in leading:
        attributes[key] = _led(value, new, frozenset())
    for hooks in hooked:
        for key, value in hooks.items():
            hooks[key] = _led(value, new, frozenset())
    for other, tensor in marked:
        for key, value in tensor.__dict__.items():
            if is_mark(key):
                setattr(other, key, _state(value, new))
    return new


def _own_attributes(attributes: dict[str, Any], first: int) -> Iterable[tuple[str, Any]]:
    """Of a module's attributes those that are its own, from the ``first`` on, and hold more than a value."""
    if _PLAIN.issuperset(map(type, itertools.islice(attributes.values(), first, None))):
        return ()
    own = itertools.islice(attributes.items(), first, None)
    return [(key, value) for key, value in own if type(value) not in _PLAIN and key not in _MADE]


def is_mark(key: str) -> bool:
    """Whether a library has set this attribute of a tensor: torch marks what Dynamo knows, and parameters of a subclass."""
    return not key.startswith("_dynamo_") and key != "_is_param"


def _register(
    module: nn.Module, attributes: dict[str, Any], unused: dict[str, Any], new: New
) -> Sequence[dict[Any, Any]]:
    """Registries of a replica's own, of what is new, and dicts of hooks; returns those that hold some."""
    try:
        for registry in _REGISTRIES:
            held = module.__dict__[registry]
            attributes[registry] = {key: new[id(item)] for key, item in held.items()} if held else {}
    except KeyError:
        raise ValueError(
            f"apply: a {type(module).__name__} of the module has got other submodules, parameters or buffers since "
            "functional(module) was called; call it again"
        ) from None
    attributes["_non_persistent_buffers_set"] = attributes["_non_persistent_buffers_set"].copy()
    if attributes.get("max_norm") is not None:  # an embedding that renormalises its weight in place
        attributes["_parameters"] = {k: v if v is None else v.clone() for k, v in attributes["_parameters"].items()}
    before = hooks_of(attributes)
    if not any(before):
        attributes.update(unused)
        attributes.update(zip(_RUN_HOOKS, map(OrderedDict, _NOTHING), strict=True))
        return ()
    for key, hooks in zip(_HOOKS, before, strict=True):
        attributes[key] = new[id(hooks)] = hooks.copy()
    _fsdp.drop_hooks(module, [attributes[key] for key in _RUN_HOOKS])
    return [copied for hooks in before if (copied := new[id(hooks)])]


def left(plan: ModuleTree, new: New) -> _left.Found:
    """What a pass left on the replicas that `replicate` made: attributes that hold a tensor with a graph.

    Raises:
        ValueError: it left one in a container of the caller's that had to be copied, as it holds the module too.
    """
    copies = {id(tensor) for tensor in new.values() if isinstance(tensor, Tensor)}
    if any(_has_graph(container, copies, set()) for container in new[LED]):
        raise ValueError(
            "apply: the forward pass wrote a tensor with a graph into a container (of a hook's, a closure's) that holds the "
            "module too, so that a replica has a copy of it, and what is written there is lost. Keep the module and what is "
            "written in different containers, or return it from the forward pass"
        )
    found = []
    for module, first in zip(plan.modules, plan.first, strict=True):
        attributes = new[id(module)].__dict__
        names = [key for key, value in _own_attributes(attributes, first) if _has_graph(value, copies, set())]
        if names:
            found.append((module, frozenset(names)))
    return found


def _has_graph(value: Any, copies: set[int], above: set[int]) -> bool:
    """Whether it holds a tensor with a graph that is not one of these copies, in containers of any depth."""
    if isinstance(value, Tensor):
        return value.requires_grad and id(value) not in copies
    if not (isinstance(value, (*CONTAINERS, tuple, frozenset)) or _is_record(value)) or id(value) in above:
        return False
    above.add(id(value))
    return any(type(item) not in _PLAIN and _has_graph(item, copies, above) for item in items(value))


def containers(module: nn.Module, first: int, new: New, found: dict[int, tuple[Any, Any]]) -> bool:
    """Add to ``found`` the containers that the module's attributes lead to, each with its copy, by the id of the first.

    False where anything else than an attribute, or an item of these, may differ between the module and its replica.
    """
    cls = _left.plain(type(module))
    special = cls._replicate_for_data_parallel is not nn.Module._replicate_for_data_parallel
    renormalises = module.__dict__.get("max_norm") is not None
    if special or renormalises or _slots(cls):  # type: ignore[arg-type]  # a class is hashable
        return False
    attributes = new[id(module)].__dict__
    own = _own_attributes(module.__dict__, first)
    return all(_pair(value, attributes[key], new, found) for key, value in own)


def _pair(own: Any, other: Any, new: New, found: dict[int, tuple[Any, Any]]) -> bool:
    if own is other or id(own) in found or isinstance(other, nn.Module):
        return True
    # Of other classes, something else than the items may differ.
    is_plain = type(own) in (list, tuple, dict, set, deque, OrderedDict, defaultdict, types.SimpleNamespace)
    if is_plain or (_is_record(own) and hasattr(own, "__dict__") and not _slots(type(own))):  # type: ignore[arg-type]
        if not isinstance(own, tuple):
            found[id(own)] = own, other
        if _PLAIN.issuperset(map(type, items(own))):
            return True
        # What a set holds is in no order.
        pairs = zip(items(own), items(other), strict=True)
        return not isinstance(own, set) and all(_pair(one, copied, new, found) for one, copied in pairs)
    return False


CONTAINERS = (list, deque, dict, set)
"""Besides dataclasses and ``SimpleNamespace``, what a forward pass may write into."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(key for key, value in nn.Module().__dict__.items() if isinstance(value, OrderedDict))
_RUN_HOOKS = tuple(key for key in _HOOKS if "state_dict" not in key)
"""Those that a forward or backward pass looks at. The others, where they are empty, are the same ones in a whole replica."""
_NOTHING = ((),) * len(_RUN_HOOKS)
hooks_of = operator.itemgetter(*_HOOKS)
_MADE = frozenset((*_REGISTRIES, *_HOOKS, "_non_persistent_buffers_set"))
_EVERY = (*nn.Module().__dict__,)
"""Attributes of every module: first in its ``__dict__``, unless it set others before ``super().__init__()``."""
_CALLABLES = (types.MethodType, types.FunctionType, partial)
_PLAIN = frozenset(
    (
        bool, int, float, complex, str, bytes, type(None), type, types.BuiltinFunctionType, types.ModuleType, torch.Size,
        torch.dtype, torch.device, torch.memory_format, torch.layout,
    )
)  # fmt: skip
"""Types of values that hold nothing else."""


@functools.cache
def _slots(cls: type[Any]) -> list[types.MemberDescriptorType]:
    return [value for base in cls.__mro__ for value in vars(base).values() if type(value) is types.MemberDescriptorType]


def _shallow(module: nn.Module) -> nn.Module:
    cls = _left.plain(type(module))
    if cls._replicate_for_data_parallel is nn.Module._replicate_for_data_parallel:
        replica: nn.Module = object.__new__(cls)  # what that method does, without five calls of Module.__setattr__
        object.__setattr__(replica, "__dict__", module.__dict__.copy())
        return replica
    special: nn.Module = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch has no types here
    return special


def _markable(given: Tensor) -> Tensor:
    """A given tensor as an object on which attributes may be set: another one, if the caller may hold this one."""
    fresh = _where.is_inside_a_loss() and given.is_leaf and given.requires_grad  # the eager engine's leaf
    return given if fresh else given.view_as(given)


def _state(value: Any, new: New) -> Any:
    """What an attribute holds, as the replica's own: containers and tensors are copies."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        new[id(value)] = copied = new[_COPY](value)
        return copied
    if isinstance(value, _CALLABLES):
        return _led(value, new, frozenset())
    if isinstance(value, RemovableHandle):
        return _handle(value, new)
    if isinstance(value, CONTAINERS) or _is_record(value):
        new[id(value)] = copied = copy.copy(value)
        if not _PLAIN.issuperset(map(type, items(value))):
            _refill(copied, value, partial(_state, new=new))
        return copied
    if isinstance(value, (tuple, frozenset)):
        return value if _PLAIN.issuperset(map(type, value)) else _rebuilt(value, partial(_state, new=new))
    return value


def _led(value: Any, new: New, above: frozenset[int]) -> Any:
    """A callable that leads to something new where it led to something of the module's; itself if it did not."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in _PLAIN or id(value) in above:
        return value
    further = partial(_led, new=new, above=above | {id(value)})
    if isinstance(value, types.MethodType):
        held = further(value.__self__)
        return value if held is value.__self__ else types.MethodType(further(value.__func__), held)
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = map(further, parts)
        same = func is value.func and args is value.args and keywords is value.keywords
        return value if same else partial(func, *args, **keywords)
    if isinstance(value, types.FunctionType):
        return _function(value, further)
    if isinstance(value, CONTAINERS):
        copied = copy.copy(value)
        if not _refill(copied, value, further):
            return value
        new[LED].append(copied)
        return copied
    return _rebuilt(value, further) if isinstance(value, (tuple, frozenset)) else value


def _function(function: types.FunctionType, further: Callable[[Any], Any]) -> types.FunctionType:
    """With another closure and other defaults, if those lead to something new; the cells that do not are the same ones."""
    cells = function.__closure__ or ()
    closure = _rebuilt(cells, partial(_cell, further=further))
    defaults, keywords = further(function.__defaults__), further(function.__kwdefaults__)
    if closure is cells and defaults is function.__defaults__ and keywords is function.__kwdefaults__:
        return function
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    made.__kwdefaults__ = keywords
    made.__dict__.update(function.__dict__)
    return made


def _cell(cell: types.CellType, further: Callable[[Any], Any]) -> types.CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # nothing in it yet
        return cell
    other = further(held)
    return cell if other is held else types.CellType(other)


def _is_record(value: Any) -> bool:
    return isinstance(value, types.SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _refill(copied: Any, value: Any, renew: Callable[[Any], Any]) -> bool:
    """Put what ``renew`` makes of each item into a shallow copy; whether that changed anything."""
    if isinstance(value, dict):
        pairs = [(renew(key), renew(item)) for key, item in value.items()]
        if any(key is not old for (key, _), old in zip(pairs, value, strict=True)):
            copied.clear()
        changed = [(key, item) for key, item in pairs if key not in copied or copied[key] is not item]
        for key, item in changed:
            copied[key] = item
        return bool(changed)
    if isinstance(value, set):
        items = [renew(item) for item in value]
        if any(item is not old for item, old in zip(items, value, strict=True)):
            copied.clear()
            copied.update(items)
            return True
        return False
    if isinstance(value, (list, deque)):
        found = False
        for i, item in enumerate(value):
            other = renew(item)
            if other is not item:
                copied[i], found = other, True
        return found
    for name, item in _fields(value).items():
        object.__setattr__(copied, name, renew(item))
    return True


def items(value: Any) -> Iterable[Any]:
    """What a container holds."""
    if isinstance(value, dict):
        return itertools.chain(value, value.values())
    return _fields(value).values() if _is_record(value) else value


def _fields(record: Any) -> dict[str, Any]:
    if hasattr(record, "__dict__"):
        named: dict[str, Any] = vars(record)
        return named
    names = [field.name for field in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


def _rebuilt(value: Any, renew: Callable[[Any], Any]) -> Any:
    """A tuple or frozenset of what ``renew`` makes of its items; itself if that is the same."""
    items = [renew(item) for item in value]
    if all(item is old for item, old in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _handle(handle: RemovableHandle, new: New) -> RemovableHandle:
    """The handle of a hook of the module's: in the replica it removes the replica's."""
    hooks = new.get(id(handle.hooks_dict_ref()))
    if hooks is None:
        return handle
    other = copy.copy(handle)
    other.hooks_dict_ref = weakref.ref(hooks)
    return other
