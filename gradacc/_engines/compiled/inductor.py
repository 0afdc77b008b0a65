"""What Inductor is told about the buffer: that nobody looks at the old one, so that a sum can be made in place.

NOTE [sums in place]
    In a graph everything is new: ``buffer + gradient`` is a tensor beside the buffer, and a loop's carry one in every
    iteration. Inductor makes elementwise sums in place where it can, but not ``addmm``, which is what the sum with a
    matrix's gradient becomes: that costs a copy of the buffer for every micro-batch, and a loop holds the gradients three
    times. So the sum is an operator of our own, ``gradacc::add``, which Inductor rewrites here:

    - ``add(buffer, a @ b)`` is ``addmm``, which Inductor's own pass makes in place where nothing reads the buffer afterwards
      (and is not rewritten where ``a`` or ``b`` is the buffer, or shares its memory);
    - a ``scan`` whose carry is such a sum, and that has no other results, writes to its carry, of which it gets a copy of
      its own. (With other results, aux that is concatenated for instance, it stays as it is.)

    Everywhere else, and if a version of Inductor does not know these names, the operator is an ordinary sum. Inductor keeps
    compiled graphs on disk, and knows the rewrites by the operators' names alone: `VERSION` is part of them.

NOTE [what a loop compiles]
    The first call is mostly C++ that Inductor writes and compiles, a file a kernel. A loop's counter would be three of them,
    and a zero for each shape of accumulator one: these are calls of ATen instead (in torch's words, they "fall back").

NOTE [symbols of a loop]
    Where batches are of several sizes, a loop runs over ``n // size`` micro-batches. Inductor compiles its body as a function
    of its own, which must be given ``n`` itself if the size of one of its operands is made of it. A body that does not use
    ``n`` is not given it, which is an error of Inductor's. So it is.

NOTE [the order of writes]
    Inductor's ``while_loop`` (which a ``scan`` becomes) takes the carries that its body writes to in the order of the first
    write, and needs that of the carries. So the body begins with a write of each to itself, in that order, which compiles
    to nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols

if TYPE_CHECKING:
    from torch._inductor.pattern_matcher import Match
    from torch.fx import Graph, Node

VERSION = 3
"""Of the rewrites: another number with every change of them."""

_MARK = "sum of gradients"

_NAMESPACE = f"gradacc_v{VERSION}"
_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]  # torch's
_library.define("add(Tensor buffer, Tensor gradient) -> Tensor")
_library.define("addmm(Tensor buffer, Tensor a, Tensor b) -> Tensor")
_library.define("addmm_(Tensor(a!) buffer, Tensor a, Tensor b) -> Tensor(a!)")
_library.define("own(Tensor tensor) -> Tensor")
_ops: Any = getattr(torch.ops, _NAMESPACE)


def add(buffer: Tensor, gradient: Tensor) -> Tensor:
    """``buffer + gradient``, where the buffer is used for nothing else. See NOTE [sums in place]."""
    if torch.compiler.is_exporting():  # to be run where there is no gradacc
        return buffer + gradient
    total: Tensor = _ops.add(buffer, gradient)
    return total


def _add_fake(buffer: Tensor, gradient: Tensor) -> Tensor:
    if "torch._inductor.compile_fx" in sys.modules:  # Inductor compiles, or has done so: there is somebody to tell
        with contextlib.suppress(ImportError, AttributeError, LookupError):
            register_rewrites()
    return torch.empty_like(buffer)


_library.impl("add", torch.add, "CompositeExplicitAutograd")
torch.library.register_autograd(f"{_NAMESPACE}::add", lambda _, grad: (grad, grad), lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::add", _add_fake, lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::addmm", lambda buffer, a, b: torch.empty_like(buffer), lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::addmm_", lambda buffer, a, b: buffer, lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::own", torch.empty_like, lib=_library)


@functools.cache
def register_rewrites() -> None:
    """Once a process: the rewrites, and how to compile what they make.

    Raises:
        ImportError, AttributeError, LookupError: this Inductor has other names; it has been told nothing.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.fx_passes import post_grad, reinplace
    from torch._inductor.fx_utils import get_node_storage
    from torch._inductor.pattern_matcher import Arg, CallFunction, CallFunctionVarArgs, register_graph_pattern
    from torch._inductor.virtualized import V

    aten, hop, register = torch.ops.aten, torch.ops.higher_order, lowering.register_lowering
    lower_addmm, lower_clone = lowering.lowerings[aten.addmm.default], lowering.clone
    fallback = ir.FallbackKernel.create
    patterns: Any = post_grad.pass_patterns[-1]
    decompose = post_grad.decompose_scan_to_while_loop
    in_place: Any = reinplace.InplaceableOp(_ops.addmm_.default, 0)
    reinplace.inplaceable_ops[_ops.addmm.default] = in_place

    @register(_ops.addmm.default, type_promotion_kind=None)
    def addmm(buffer: Any, a: Any, b: Any) -> Any:
        return lower_addmm(buffer, a, b)

    @register(_ops.addmm_.default, type_promotion_kind=None)
    def addmm_in_place(buffer: Any, a: Any, b: Any) -> Any:
        buffer.realize()
        fallback(aten.addmm_.default, buffer, a, b)
        return buffer

    @register(_ops.own.default, type_promotion_kind=None)
    def own(tensor: Any) -> Any:
        source: Any = V.graph.current_node.args[0]
        if _is_zero(source):  # NOTE [what a loop compiles]
            val = source.meta["val"]
            return ir.TensorBox.create(
                fallback(aten.zeros.default, tensor.get_size(), dtype=val.dtype, device=val.device)
            )
        copy = lower_clone(tensor)
        copy.realize()
        return copy

    @register_graph_pattern(CallFunction(_ops.add.default, Arg(), Arg()), pass_dict=patterns)
    def sums(match: Match, buffer: Node, gradient: Node) -> None:
        _rewrite_sum(match.graph, match.output_node(), buffer, gradient, get_node_storage)

    @register_graph_pattern(CallFunctionVarArgs(hop.scan), pass_dict=patterns)
    def loops(match: Match, *_: Any) -> None:
        graph: Any = match.graph
        scans = graph.find_nodes(op="call_function", target=hop.scan)
        changed = [_rewrite_loop(graph, node) for node in scans]
        if any(changed) or any(_symbols(node.args[1:]) for node in scans):
            others = graph.find_nodes(op="call_function", target=hop.while_loop)
            decompose(graph.owning_module)  # as Inductor does later; all scans, which are then not matched any more
            for node in graph.find_nodes(op="call_function", target=hop.while_loop):
                if node not in others:
                    if any(changed):
                        _simplify_counter(graph, node)
                    _add_symbols(graph, node)


def _rewrite_sum(graph: Graph, node: Node, buffer: Node, gradient: Node, storage: Callable[[Node], object]) -> None:
    """``add(buffer, a @ b)`` and ``add(buffer, (a @ b).T)`` as ``addmm``, any other as an ordinary sum."""
    product, transposed = _product(gradient)
    memory: list[Any] = [] if product is None else [product, *product.args]
    if storage(buffer) in {storage(node) for node in memory}:
        product = None
    with graph.inserting_before(node):
        if product is None:
            new = graph.call_function(torch.ops.aten.add.Tensor, (buffer, gradient))
        else:
            factors = product.args if not transposed else [_transpose(graph, n) for n in reversed(product.args)]
            new = graph.call_function(_ops.addmm.default, (buffer, *factors))
    new.meta.update(node.meta)
    new.meta[_MARK] = True
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for unused in dict.fromkeys((gradient, product)) if product is not None else ():
        graph.erase_node(unused)


def _product(gradient: Node) -> tuple[Node | None, bool]:
    """The ``mm`` that is nothing but this gradient, and whether it is its transpose."""
    transposed = gradient.target is torch.ops.aten.permute.default and len(gradient.users) == 1
    product: Any = gradient.args[0] if transposed else gradient
    alone = product.target is torch.ops.aten.mm.default and len(product.users) == 1
    dims: Any = gradient.args[1] if transposed else (1, 0)
    swapped = [dim % 2 for dim in dims] == [1, 0]
    return (product if alone and swapped else None), transposed


def _transpose(graph: Graph, node: Any) -> Node:
    new = graph.call_function(torch.ops.aten.permute.default, (node, [1, 0]))
    new.meta["val"] = node.meta["val"].permute(1, 0)
    return new


def _rewrite_loop(graph: Graph, node: Node) -> bool:
    """Let a scan write to its carries that are sums of gradients; whether it has any."""
    body: Any = node.args[0]
    init: Any = node.args[1]
    parent: Any = graph.owning_module
    module = getattr(parent, str(body.target))
    inner: Graph = module.graph
    end = inner.output_node()
    results: list[Any] = list(end.args[0])  # type: ignore[arg-type]  # a graph's results
    carries = inner.find_nodes(op="placeholder")[: len(init)]
    shared = len(graph.find_nodes(op="get_attr", target=body.target)) > 1 or len(body.users) > 1
    if len(results) != len(init) or shared:
        return False
    start, first, changed = list(init), _after_placeholders(inner), False
    for number, (carry, result) in enumerate(zip(carries, results, strict=True)):
        if _is_sum(result) and result.args[0] is carry and len(carry.users) == len(result.users) == 1:
            changed = True
            with inner.inserting_before(first):  # see NOTE [the order of writes]
                _copy(inner, carry, carry)
            if result.target is _ops.addmm.default:
                result.target = _ops.addmm_.default
            else:
                with inner.inserting_before(end):
                    results[number] = _copy(inner, carry, result)
        elif not _is_zero(init[number]):
            continue
        with graph.inserting_before(node):
            start[number] = graph.call_function(_ops.own.default, (init[number],))
        start[number].meta["val"] = torch.empty_like(init[number].meta["val"])
    end.args = (tuple(results),)
    module.recompile()
    node.args = (node.args[0], start, *node.args[2:])
    return changed


def _simplify_counter(graph: Graph, node: Node) -> None:
    """Let ATen count a loop's iterations, ``0``, ``i < n`` and ``i + 1``; NOTE [what a loop compiles]."""
    aten = torch.ops.aten
    cond, body = (getattr(graph.owning_module, str(arg.target)).graph for arg in node.args[:2])  # type: ignore[union-attr]  # nodes
    start, test, step = node.args[2], cond.output_node().args[0], body.output_node().args[0]
    scalars: list[Any] = [part[0] if isinstance(part, (tuple, list)) else part for part in (start, test, step)]
    if [scalar.target for scalar in scalars] == [aten.full.default, aten.lt.Scalar, aten.add.Tensor]:
        for scalar in scalars:
            scalar.meta["should_fallback"] = True


def _symbols(operands: Any) -> set[Any]:
    """What the sizes and strides of operands, and numbers among them, are made of."""
    values = [node.meta["val"] for part in operands for node in part if isinstance(node, torch.fx.Node)]
    return {symbol for value in values for symbol in free_symbols(value)}


def _add_symbols(graph: Graph, node: Node) -> None:
    """Give a loop the numbers that its operands' sizes are made of; NOTE [symbols of a loop]."""
    cond, body, carried, more = node.args
    given = {_symbol(operand) for operand in (*carried, *more)}  # type: ignore[misc]  # nodes
    numbers = {_symbol(number): number for number in graph.find_nodes(op="placeholder")}
    missing = [numbers[symbol] for symbol in sorted(_symbols(node.args[2:]) - given, key=str) if symbol in numbers]
    if not missing:
        return
    node.args = (cond, body, carried, (*more, *missing))  # type: ignore[misc]  # nodes
    for part in (cond, body):
        module: Any = getattr(graph.owning_module, str(part.target))  # type: ignore[union-attr]  # nodes
        with module.graph.inserting_before(_after_placeholders(module.graph)):
            for number in missing:
                module.graph.placeholder(f"gradacc_{number.name}").meta["val"] = number.meta["val"]
        module.recompile()


def _symbol(operand: Any) -> Any:
    """Of a number that is one; None of anything else."""
    value = operand.meta.get("val") if isinstance(operand, torch.fx.Node) else None
    return value.node.expr if isinstance(value, torch.SymInt) and value.node.expr.is_symbol else None


def _is_sum(result: Any) -> bool:
    return isinstance(result, torch.fx.Node) and _MARK in result.meta


def _is_zero(node: Node) -> bool:
    return node.target is torch.ops.aten.full.default and bool(node.args[1] == 0)


def _after_placeholders(graph: Graph) -> Node:
    first: Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


def _copy(graph: Graph, target: Node, source: Node) -> Node:
    node = graph.call_function(torch.ops.aten.copy_.default, (target, source))
    node.meta["val"] = target.meta["val"]
    return node
