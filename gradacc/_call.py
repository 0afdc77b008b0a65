"""A call's arguments: which are differentiated, which is the batch, and what of them is split.

NOTE [what is passed whole]
    By default the batch alone is split. ``mse(params, x, y)`` with a ``y`` of as many rows as ``x`` was most likely to be
    split too, and mostly does not go through: three predictions less eight targets is an error of the loss, to which a note
    is added. Of micro-batches of *one* example it does go through, by broadcasting, and gives the mean of all pairs. So there a
    tensor that is as long as the batch is said, in a warning. It can be honest (a table that happens to have as many rows), so
    it is no error, and ``in_dims`` with None says so; where micro-batches are larger, or ``in_dims`` given, there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradacc import _batch, _rows, _tree, _where
from gradacc._describe import describe
from gradacc._dtypes import is_inexact
from gradacc._options import Options


def positions(
    options: Options, args: Sequence[Any], call: str = "grad_fn(params, batch)"
) -> tuple[tuple[int, ...], int]:
    """Where the differentiated arguments are, and where the batch is: the first one that is not differentiated."""
    name, argnums = options.name, options.argnums
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if any(not -len(args) <= n < len(args) for n in numbers):
        raise ValueError(
            f"{name}: argnums={argnums} does not fit a call with {len(args)} positional arguments; "
            f"call {call}, these positionally"
        )
    # a list's items are constants, where Dynamo (with dynamic=True) holds `argnums` symbolic
    places = list(range(len(args)))
    differentiated = tuple(places[n] for n in numbers)
    if len(set(differentiated)) < len(differentiated):
        raise ValueError(f"{name}: argnums={argnums} names an argument of the call twice; name each once")
    rest = [n for n in range(len(args)) if n not in differentiated]
    if not rest:
        raise ValueError(
            f"{name}: no batch among the {len(args)} positional arguments: each is differentiated (argnums={argnums}). "
            f"Call {call}, with the batch positionally: keyword arguments are never split"
        )
    return differentiated, rest[0]


def parameters(
    options: Options, args: Sequence[Any], differentiated: Sequence[int]
) -> tuple[list[Tensor], _tree.TreeDef]:
    """Leaves and structure of the arguments that are differentiated: of the one, or of the tuple of them."""
    single = isinstance(options.argnums, int)
    leaves, treedef = _tree.flatten(args[differentiated[0]] if single else tuple(args[n] for n in differentiated))
    return check_parameters(options.name, leaves, treedef, "params"), treedef


def check_parameters(name: str, leaves: Sequence[Any], treedef: _tree.TreeDef, root: str) -> list[Tensor]:
    """Leaves that can be differentiated: floating or complex tensors, at least one."""
    for index, leaf in enumerate(leaves):
        if _is_parameter(leaf):
            continue
        path = _tree.paths(treedef, root)[index]
        if isinstance(leaf, nn.Module):
            raise TypeError(
                f"{name}: {path} is an nn.Module ({type(leaf).__name__}); pass its parameters: "
                "apply, params, buffers = gradacc.functional(module), and call apply(params, ...) in the loss"
            )
        if _rows.is_dtensor(leaf):
            raise TypeError(f"{name}: {path} is a DTensor {_rows.told(leaf)}. {_why_not_divided(name)}")
        if isinstance(leaf, Tensor) and not _batch.is_dense(leaf):
            raise TypeError(
                f"{name}: {path} is a sparse or nested tensor; parameters must be dense. Pass it as to_dense()"
            )
        if isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: {path} is a tensor of dtype {leaf.dtype} and shape {tuple(leaf.shape)}; only floating and "
                "complex tensors can be differentiated. Pass it as another argument of loss_fn, or close over it"
            )
        raise TypeError(
            f"{name}: {path} is {describe(leaf)}; parameters are a pytree of floating or complex tensors"
            + ("; did you mean dict(module.named_parameters())?" if hasattr(leaf, "__next__") else "")
        )
    if not leaves:
        raise ValueError(
            f"{name}: {root} holds no tensor: there is nothing to differentiate. (gradacc.functional returns the "
            "parameters that require a gradient; is the whole module frozen?)"
        )
    return list(leaves)


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not _rows.is_dtensor(leaf) and _batch.is_dense(leaf) and is_inexact(leaf)


def _why_not_divided(name: str) -> str:
    """What would take a DTensor."""
    if _where.transforming():
        return (
            "Under torch.func's transforms, in torch.compile and in the loss of another grad_fn there are none (pytorch issue "
            "134462): call grad_fn outside, or pass DTensor.full_tensor()"
        )
    if name == "accumulator":
        return (
            "A state is of whole parameters, which every update would have to gather. Pass the micro-batches as an iterable "
            "to gradacc.accumulate_and_value(loss_fn, sync=gradacc.reduce_scatter(mesh)), or DTensor.full_tensor()"
        )
    return (
        "Parameters that are divided over ranks take sync=gradacc.reduce_scatter(mesh), with the mesh of the DTensor; or pass "
        "DTensor.full_tensor()"
    )


def in_dims(options: Options, args: Sequence[Any], differentiated: Sequence[int], batch: int) -> tuple[Any, ...]:
    """One entry of ``in_dims`` for each positional argument; by default 0 for the batch, None for every other one."""
    if options.in_dims is None:
        return tuple(0 if n == batch else None for n in range(len(args)))
    dims = options.in_dims
    if len(dims) != len(args):
        raise ValueError(
            f"{options.name}: in_dims={dims} has {len(dims)} entries for a call with {len(args)} positional arguments"
        )
    for n in differentiated:
        if dims[n] is not None:
            raise ValueError(
                f"{options.name}: in_dims[{n}]={dims[n]} splits an argument that is differentiated "
                f"(argnums={options.argnums}); its entry must be None"
            )
    return dims


def only_the_batch(options: Options, dims: Sequence[Any], batch: int) -> None:
    """Where the batch comes divided, nothing else is."""
    extra = [n for n, dim in enumerate(dims) if n != batch and dim is not None]
    if extra:
        raise ValueError(
            f"{options.name}: in_dims[{extra[0]}]={dims[extra[0]]}, but without steps or microbatch_size only the "
            f"batch (argument {batch}) is divided and every other argument is passed whole: its entry must be None"
        )


def warn_unsplit(
    options: Options, args: Sequence[Any], kwargs: Mapping[str, Any], differentiated: Sequence[int], batch: int
) -> None:
    """Of micro-batches of one example: what is as long as the batch, and would be broadcast; NOTE [what is passed whole]."""
    if options.in_dims is None and (len(args) > len(differentiated) + 1 or kwargs):
        said = _unsplit(options, args, kwargs, differentiated, batch)
        if said is not None:
            _batch.warn(
                f"{said} Micro-batches have one example, with which it may be broadcast without an error. Where it is meant "
                "whole, in_dims says so, and there is no warning"
            )


def _unsplit(
    options: Options, args: Sequence[Any], kwargs: Mapping[str, Any], differentiated: Sequence[int], batch: int
) -> str | None:
    """What has the batch's leading size, but is passed whole."""
    size = _leading(args[batch])
    if size <= 1:
        return None
    whole = [n for n, arg in enumerate(args) if n not in (*differentiated, batch) and _leading(arg) == size]
    named = [key for key, arg in kwargs.items() if _leading(arg) == size]
    names = " and ".join([f"args[{n}]" for n in whole] + [f"the keyword argument {key!r}" for key in named])
    if not names:
        return None
    more = len(args)
    dims = tuple(0 if n in (batch, *whole) or n >= more else None for n in range(more + len(named)))
    each, verb = ("has", "is") if len(whole) + len(named) == 1 else ("have", "are")
    positional = " (keyword arguments are never split: pass it positionally)" if named else ""
    return (
        f"{options.name}: {names} {each} the batch's leading size, {size}, but {verb} passed whole; "
        f"did you mean in_dims={dims}?{positional}"
    )


def note_unsplit(
    error: Exception, options: Options, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Add to a loss's own error what was passed whole, or split, where that is likely not what was meant."""
    if torch.compiler.is_compiling() or options.through is not None:
        return  # Dynamo knows no tracebacks; a loss of the whole batch gets nothing in parts
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("gradacc."):
        return  # an error of ours says it all
    differentiated, batch = positions(options, args)
    if options.steps is None and options.microbatch_size is None:
        if options.name == "accumulator":
            if type(args[batch]) in (list, tuple):
                error.add_note(
                    f"update: args[{batch}] is {describe(args[batch])}, and was given to loss_fn as one micro-batch; "
                    "call update for each of several"
                )
        elif options.split is None and (_batch.may_be_one(args[batch]) or _batch.is_of_examples(args[batch])):
            error.add_note(_batch.note_parts(options.name, args[batch]))
        return
    if options.in_dims is not None:
        return
    said = _unsplit(options, args, kwargs or {}, differentiated, batch)
    if said is not None:
        error.add_note(said)
    if type(args[batch]) in (list, tuple) and not any(isinstance(item, Tensor) for item in args[batch]):
        error.add_note(
            f"{options.name}: args[{batch}] is {describe(args[batch])}, and every tensor in it was split; "
            "a list of micro-batches is passed without steps or microbatch_size"
        )


def _leading(tree: Any) -> int:
    """The one size that all tensors of a tree have along dim 0; 0 where there is none, or one that is not dense."""
    tensors = [leaf for leaf in _tree.flatten(tree)[0] if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if _batch.is_dense(leaf) and leaf.ndim else 0 for leaf in tensors}
    return sizes.pop() if len(sizes) == 1 else 0
