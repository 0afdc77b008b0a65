"""A module while Dynamo traces it: what would be silently wrong is refused.

NOTE [while Dynamo traces]
    Dynamo traces no replicas (they are made of ``__dict__``s), and does not need them: what it traces is recomputed by the
    graph, not by the module. So while it traces, the given tensors are put into the module itself
    (`torch.func.functional_call`). Then what the forward pass writes is written into the module, once each time that the
    graph runs, and a tensor that the module holds outside of its registries is its own. Dynamo knows of both: its list of
    mutations and the graph's inputs are looked at before and after. What is found ends the compilation, before anything has
    run. (An error of the kind that makes Dynamo break the graph would not do: what was written before the break is written.)
    Where Dynamo cannot trace the module at all and breaks the graph for it, the whole call runs as it does eagerly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradacc import _replicas

Look = Callable[[Any], None]
"""Called by Dynamo where it meets ``comptime(look)``, with its context."""


Found = weakref.WeakKeyDictionary[Any, dict[str, Any]]
"""By Dynamo's translator, what a trace has done so far."""


class Method(nn.Module):
    """A module whose forward pass is another method of a module's."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """That method."""
        return getattr(self.module, self.method)(*inputs, **kwargs)


class Looks(NamedTuple):
    """What is called before and after the module is traced; and what is traced."""

    before: Look
    after: Look
    traced: nn.Module
    prefix: str
    """Of the names of its tensors."""

    def call(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its output with these tensors; where it sets others, they are in ``tensors`` then."""
        named = {f"{self.prefix}{name}": tensor for name, tensor in tensors.items()}
        output = torch.func.functional_call(self.traced, named, inputs, kwargs)
        tensors.update({name: named[f"{self.prefix}{name}"] for name in tensors})
        return output


def looks(plan: _replicas.ModuleTree) -> Looks:
    """`Looks` at a module.

    Raises:
        torch._dynamo.exc.TorchRuntimeError: from the second, if the module has been written to, or a tensor of its own used
            for which another was given.
    """
    # Weak: a trace may end between the two.
    found: Found = weakref.WeakKeyDictionary()

    # Dynamo calls functions without free variables.
    def before(context: Any, plan: _replicas.ModuleTree = plan, found: Found = found) -> None:
        translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        found[translator] = _seen(translator.output, plan)

    def after(context: Any, plan: _replicas.ModuleTree = plan, found: Found = found) -> None:
        translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        known = found.pop(translator)
        _refuse([what for what, mark in _seen(translator.output, plan).items() if known.get(what, 0) != mark])

    module = plan.modules[0]
    if plan.method == "forward":
        return Looks(before, after, module, "")
    return Looks(before, after, Method(module, plan.method), "module.")


def _seen(output: Any, plan: _replicas.ModuleTree) -> dict[str, Any]:
    """What the trace has written into the module or used of it so far, each with a mark that changes when it does so again."""
    effects = output.side_effects
    places: dict[int, str] = {}
    names = {
        ".".join(filter(None, ("module", name))): part for name, part in zip(plan.names, plan.modules, strict=True)
    }
    for name, module in names.items():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers"):  # functional_call changes those, and changes them back
                _place(value, f"{name}.{key}", places)
    seen: dict[str, Any] = {}
    for key, variable in effects.id_to_variable.items():
        if key in places and effects.is_modified(variable):
            seen[f"writes into {places[key]}"] = _items(variable)
    for path, module in names.items():
        variable = effects.id_to_variable.get(id(module))
        for attribute, value in effects.store_attr_mutations.get(variable, {}).items():
            seen[f"writes {path}.{attribute}"] = id(value)
    own = {id(tensor): name for name, tensor in plan.tensors().items()}
    for node in output.graph.nodes:
        if node.op == "placeholder" and "grapharg" in node.meta:
            example = id(node.meta["grapharg"].example)
            if example in own:
                seen[f"uses its own {own[example]}"] = len(node.users)
            elif example in places:
                seen[f"writes into {places[example]}"] = node.meta["example_value"]._version
    return seen


def _place(value: Any, name: str, places: dict[int, str]) -> None:
    """Where containers and tensors are that a forward pass may write into, by their id."""
    if not isinstance(value, (*_replicas.CONTAINERS, Tensor)) or id(value) in places:
        return
    places[id(value)] = name
    if not isinstance(value, Tensor):
        for item in value.values() if isinstance(value, dict) else value:
            _place(item, name, places)


def _items(variable: Any) -> Any:
    """What a list or dict of Dynamo's holds now."""
    items = getattr(variable, "items", ())
    return list(map(id, items.values() if isinstance(items, dict) else items))


def _refuse(found: list[str]) -> None:
    if found:
        from torch._dynamo.exc import TorchRuntimeError

        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        raise TorchRuntimeError(
            f"apply: in a compiled function the module {shown}, which compiled code cannot keep apart from the module. Return "
            "it instead, or reach it through a submodule or a buffer; or compile the loss without it. (What a module writes "
            "in its first pass only, as transformers' output_hidden_states does: call module(...) once, then "
            "gradacc.functional(module).) Without torch.compile it works as it is"
        )
