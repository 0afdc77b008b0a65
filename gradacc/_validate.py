"""Checks and their messages: every one names the call, what arrived, and the fix; and returns what it checked."""

from __future__ import annotations

import math
import numbers
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradacc import _batch, _engines, _tree
from gradacc._describe import describe
from gradacc._mean import SEVERAL_MEANS, Mean, are_means
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


def parameters(name: str, leaves: Sequence[Any], treedef: _tree.TreeDef, root: str) -> list[Tensor]:
    """Leaves that can be differentiated: floating or complex tensors, at least one."""
    for leaf, path in zip(leaves, _paths_if(leaves, treedef, root, _is_parameter), strict=True):
        if _is_parameter(leaf):
            continue
        if isinstance(leaf, nn.Module):
            raise TypeError(
                f"{name}: {path} is an nn.Module ({type(leaf).__name__}); pass its parameters: "
                "apply, params, buffers = gradacc.functional(module), and call apply(params, ...) in the loss"
            )
        if _is_sharded(leaf):
            raise TypeError(
                f"{name}: {path} is a DTensor of shape {tuple(leaf.shape)}; sharded parameters are not supported yet. "
                "Pass local tensors (DTensor.to_local()), or full ones (DTensor.full_tensor())"
            )
        if isinstance(leaf, Tensor) and _is_odd(leaf):
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
    if not isinstance(leaf, Tensor) or _is_sharded(leaf) or _is_odd(leaf):
        return False
    return leaf.is_floating_point() or leaf.is_complex()


def _is_odd(leaf: Tensor) -> bool:
    return not _batch.is_dense(leaf)


def _is_sharded(leaf: Any) -> bool:
    # A DTensor can only exist where its module was imported; importing it here would slow every start.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


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


def splittable(name: str, leaf: Any, dim: Any, path: str) -> int | None:
    """The size along ``dim`` of a leaf of what is split; None for what is passed through (numbers, bools)."""
    if dim is None:
        return None
    if isinstance(leaf, Tensor):
        _batch.check_layout(name, leaf, path)
        return size(name, leaf, dim, path)
    _check_dim(name, dim, path)
    if _batch.is_passed_through(leaf):
        return None
    if hasattr(leaf, "__array__"):
        fix = "Convert it with torch.as_tensor"
    elif is_iterable(leaf):
        fix = "An iterable of micro-batches is passed without steps or microbatch_size. Otherwise convert it to tensors"
    else:
        fix = "Convert it to tensors (or a dict of them), or register its class as a pytree node"
    raise TypeError(
        f"{name}: {path} is {describe(leaf)}, which cannot be split: the batch is a pytree of tensors, "
        f"numbers, bools and None. {fix}, give it None in in_dims, or pass it as another argument of loss_fn"
    )


def size(name: str, leaf: Tensor, dim: Any, path: str) -> int:
    """Of a tensor of any layout along ``dim``."""
    _check_dim(name, dim, path)
    if leaf.dim() == 0:
        raise ValueError(
            f"{name}: {path} is a 0-dim tensor, which has no dimension to split. Pass a Python number, give it "
            "None in in_dims, or pass it as another argument of loss_fn"
        )
    if not -leaf.dim() <= dim < leaf.dim():
        raise ValueError(f"{name}: in_dims has {dim} for {path}, {describe(leaf)}")
    if leaf.is_nested and dim % leaf.dim():
        raise ValueError(f"{name}: in_dims has {dim} for {path}, {describe(leaf)}: its examples are along dim 0")
    size: int = leaf.size(dim)
    return size


def _check_dim(name: str, dim: Any, path: str) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name}: in_dims has {describe(dim)} for {path}; an entry is an int or None")


def batch_size(name: str, sizes: Sequence[int | None], paths: Sequence[str]) -> int:
    """The one size that all split leaves have."""
    known = [(size, path) for size, path in zip(sizes, paths, strict=True) if size is not None]
    if not known:
        raise TypeError(
            f"{name}: there is no tensor to split in the batch; by default that is the argument after params. What is split "
            "are tensors: lists of numbers or strings are converted first (torch.tensor)"
        )
    size, path = known[0]
    others = [(other, where) for other, where in known if other != size]
    if others:
        if len(known) <= 6:
            listing = ", ".join(f"{where} has {each}" for each, where in known)
        else:
            listing = (
                f"{path} has {size}, {others[0][1]} has {others[0][0]} "
                f"({len(others)} of {len(known)} tensors differ from the first)"
            )
        raise ValueError(
            f"{name}: the split dimensions differ: {listing}. Give what is not per example None in in_dims, "
            f"or pass it as another argument of loss_fn{_hint_for_lists(path, others[0][1])}"
        )
    return size


def _hint_for_lists(first: str, other: str) -> str:
    """What to do where two paths lead to items of one list: they may be micro-batches, or ragged examples."""
    a, b = (re.split(r"(?=[.\[])", path) for path in (first, other))
    shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    if shared < 2 or not all(re.fullmatch(r"\[\d+\]", parts[shared]) for parts in (a, b)):
        return ""  # 1 is where the arguments of the call part
    ragged = f"If {''.join(a[:shared])} is a list of ragged examples, pad them into one tensor"
    return f". {ragged}" + (
        "; a list of micro-batches is passed without steps or microbatch_size" if shared == 2 else ""
    )


def note_unsplit(error: Exception, options: Options, args: Sequence[Any]) -> None:
    """Add to a loss's own error what was passed whole, or split, where that is likely not what was meant."""
    if torch.compiler.is_compiling():
        return  # Dynamo knows no tracebacks
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("gradacc."):
        return  # an error of ours says it all
    differentiated, batch = positions(options, args)
    if options.steps is None and options.microbatch_size is None:
        if options.split is None and _batch.may_be_one(args[batch]):
            error.add_note(_batch.note_parts(options.name, args[batch]))
        return
    if options.in_dims is not None:
        return
    size = _leading(args[batch])
    whole = [
        n for n, arg in enumerate(args) if n not in (*differentiated, batch) and size > 1 and _leading(arg) == size
    ]
    if whole:
        dims = tuple(0 if n in (batch, *whole) else None for n in range(len(args)))
        names = " and ".join(f"args[{n}]" for n in whole)
        each, verb = ("has", "is") if len(whole) == 1 else ("have", "are")
        error.add_note(
            f"{options.name}: {names} {each} the batch's leading size, {size}, but {verb} passed whole; "
            f"did you mean in_dims={dims}?"
        )
    if type(args[batch]) in (list, tuple) and not any(isinstance(item, Tensor) for item in args[batch]):
        error.add_note(
            f"{options.name}: args[{batch}] is {describe(args[batch])}, and every tensor in it was split; "
            "a list of micro-batches is passed without steps or microbatch_size"
        )


def _leading(tree: Any) -> int:
    """The one size that all tensors of a tree have along dim 0; 0 where there is none."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in _tree.flatten(tree)[0] if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def iterable(options: Options, batch: Any) -> Any:
    """The micro-batches, where nothing says how to split: the batch must be an iterable of them."""
    if options.split is not None:
        batch = options.split(batch)
        if not is_iterable(batch):
            raise TypeError(f"{options.name}: split returned {describe(batch)}; it must yield or return micro-batches")
        return batch
    if not is_iterable(batch):
        raise TypeError(
            f"{options.name}: without steps, microbatch_size or split, the batch must be an iterable of micro-batches, "
            f"got {describe(batch)}. Pass steps= to have it split, or a list of micro-batches"
        )
    return batch


def is_iterable(batch: Any) -> bool:
    """Whether it can be micro-batches: a record (a dict, a ``NamedTuple``), a tensor or an array is one batch."""
    is_one = isinstance(batch, (str, bytes)) or any(hasattr(batch, name) for name in ("__array__", "keys", "_fields"))
    return hasattr(batch, "__iter__") and not is_one


def returned(options: Options, out: Any) -> tuple[Any, Any]:
    """What ``loss_fn`` returned as ``(loss, aux)``, with aux None where there is none."""
    if not options.has_aux:
        if isinstance(out, tuple):
            raise TypeError(
                f"{options.name}: loss_fn returned {_pair(out)}; pass has_aux=True for (loss, aux), of which the loss alone is "
                f"differentiated{_several(out, '. Or are they several losses? Return their sum')}"
            )
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"{options.name}: with has_aux=True loss_fn must return (loss, aux), got {_pair(out)}{_several(out, '')}"
        )
    return out


def loss(options: Options, value: Any) -> Tensor:
    """The tensor to differentiate: the loss itself, or the total of a `Mean`."""
    total = value.total if isinstance(value, Mean) else value
    what = f"{options.name}: loss_fn returned " + ("a Mean whose total is " if isinstance(value, Mean) else "")
    if isinstance(value, Mean) and value._pooled:
        raise ValueError(
            f"{options.name}: loss_fn returned a sum of Means. `a + b` is the mean of both together, (a.total + b.total) / "
            "(a.weight + b.weight), and not a.value + b.value. Where it is meant, for one mean that is computed in chunks, "
            f"return gradacc.Mean(pooled.total, pooled.weight) of it, pooled = a + b. {SEVERAL_MEANS}"
        )
    if isinstance(value, Mean) and options.reduction == "sum":
        raise ValueError(
            f"{options.name}: loss_fn returned a Mean, which says by itself what to divide by; "
            "leave reduction='sum' out, or return the total alone"
        )
    if total is None:
        raise TypeError(f"{what}None; is a return statement missing?")
    if not isinstance(total, Tensor):
        is_number = isinstance(total, numbers.Real)
        fix = "; a loss turned into a number (.item(), float()) cannot be differentiated" if is_number else ""
        fix += _several(total, "")
        raise TypeError(f"{what}{_pair(total)}; it must return a 0-dim floating tensor, or a Mean of one{fix}")
    if total.ndim != 0:
        raise ValueError(
            f"{what}a tensor of shape {tuple(total.shape)}; it must be 0-dim. "
            "Take its mean, or return gradacc.Mean(loss.sum(), loss.numel())"
        )
    if not total.is_floating_point():
        raise TypeError(f"{what}a tensor of dtype {total.dtype}; it must be floating")
    return total


def weight(options: Options, value: Any, like: Tensor) -> float | Tensor:
    """A Mean's weight: finite, ``>= 0``, from the data. NOTE [weights that are not read] in ``_fold.py``.

    A number where it can be read for nothing. Else a tensor, NaN where the weight is not what it must be.
    """
    name = options.name
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(
                f"{name}: loss_fn returned a Mean whose weight is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                "it must be a number or a 0-dim tensor"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name}: loss_fn returned a Mean whose weight depends on the parameters; the gradient of total / weight "
                "is then not additive. Count the weight from the data, or detach() it"
            )
        if value.is_meta:
            return 1.0  # nothing is computed from it
        transformed = _engines.transforming() and (value.is_floating_point() or not _engines.is_readable(value))
        if transformed or not (value.is_cpu or like.is_cpu):
            # float64 counts to more than 2 ** 24; Apple's GPUs have none
            dtype = torch.float64 if like.device.type != "mps" else torch.float32
            return _nan_where_wrong(value.to(device=like.device, dtype=dtype))
        value = value.item()  # a count: it carries no derivative
    if not _is_number(value):
        raise TypeError(
            f"{name}: loss_fn returned a Mean whose weight is {describe(value)}; it must be a number or tensor"
        )
    if torch.compiler.is_compiling() and isinstance(value, float):
        # one that changes from call to call is symbolic, and its arithmetic beside tensors is guarded wrongly by torch 2.13
        return _nan_where_wrong(torch.zeros((), dtype=torch.float64, device=like.device) + value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: loss_fn returned a Mean whose weight is {value}; it must be finite and not negative")
    return value if torch.compiler.is_compiling() else float(value)  # of a symbolic number Dynamo makes none


def _nan_where_wrong(weight: Tensor) -> Tensor:
    return torch.where((weight >= 0) & (weight < math.inf), weight, math.nan)


def examples(options: Options, count: int | None, sizes: tuple[int, ...]) -> int | None:
    """The number of examples a plain loss is the mean of; a sum needs none."""
    if count is None and options.reduction == "mean":
        found = (
            f"its tensors have sizes {sorted(sizes)} along their split dimension"
            if sizes
            else "it holds no tensor to count"
        )
        raise TypeError(
            f"{options.name}: loss_fn returned the mean over a micro-batch whose number of examples cannot be told: {found}. "
            "Return gradacc.Mean(loss_sum, number) instead, or say with in_dims which dimension counts"
        )
    return count


def same_kind(options: Options, first: bool, is_mean: bool, aux_first: _tree.TreeDef, aux: _tree.TreeDef) -> None:
    """All micro-batches return the same kind of value and the same structure of aux."""
    if first is not is_mean:
        raise TypeError(
            f"{options.name}: loss_fn returned a Mean for one micro-batch and a tensor for another; return one of them always"
        )
    if aux_first != aux:
        raise ValueError(
            f"{options.name}: aux has another structure in another micro-batch: {aux_first}, then {aux}; "
            "return the same one always (None is an empty one)"
        )


def dependence(options: Options, depends: bool) -> None:
    """A loss that no parameter reaches is a mistake, not a gradient of zero."""
    if not depends:
        raise ValueError(
            f"{options.name}: the loss does not depend on any parameter. Does loss_fn use the params it is given "
            "(and not a module's own), without detach(), no_grad() or .item()?"
        )


def untouched(leaves: Sequence[Tensor]) -> None:
    """A loss that calls ``.backward()`` on the parameters would add to what is accumulated."""
    if any(leaf.grad is not None for leaf in leaves):
        raise ValueError(
            "gradacc: the loss called .backward() through the parameters that it was given. Use torch.autograd.grad or "
            "torch.func.grad for a gradient inside a loss, or detach() the parameters there"
        )


def reentrant_checkpoint(found: bool) -> None:
    """Torch cannot run a reentrant checkpoint in a backward pass that is restricted to given leaves."""
    if found:
        raise ValueError(
            "gradacc: the loss uses torch.utils.checkpoint with use_reentrant=True, which torch cannot combine with a "
            "backward pass restricted to the parameters. Pass use_reentrant=False"
        )


def nothing_with_aux(options: Options) -> None:
    """Without a single micro-batch there is no aux to return."""
    if options.has_aux:
        raise ValueError(f"{options.name}: no micro-batch arrived, so nothing says what aux is; has_aux=True needs one")


def _pair(out: Any) -> str:
    if not isinstance(out, (tuple, list, dict)):
        return describe(out)
    return f"a {type(out).__name__} of {len(out)}" + (" Means" if are_means(out) else "")


def _several(out: Any, otherwise: str) -> str:
    """What a message about a container says of losses in it."""
    return f". {SEVERAL_MEANS}" if are_means(out) else otherwise


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # NumPy's scalars too


def _paths_if(leaves: Sequence[Any], treedef: _tree.TreeDef, root: str, good: Callable[[Any], bool]) -> Sequence[str]:
    # Writing paths costs more than checking leaves, and is needed only for a message.
    return [""] * len(leaves) if all(map(good, leaves)) else _tree.paths(treedef, root)
