"""Checks of what an optimizer is given, before anything is changed; they return what they checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradacc import _rows, _shard, _tree, _where
from gradacc._describe import describe
from gradacc.optim._optimizer import Optimizer


def params(name: str, tree: Any, *, divided: bool = False) -> tuple[list[Tensor], _tree.TreeDef]:
    """The leaves of the parameters, dense floating or complex tensors, and their structure; ``divided``: DTensors may be."""
    leaves, treedef = _tree.flatten(tree)
    if not leaves:
        raise ValueError(f"{name}: params holds no tensor: there is nothing to update")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dtype not in _UPDATED or leaf.layout != torch.strided:
            break
        if type(leaf) is not Tensor and not divided and _rows.is_dtensor(leaf):
            break
    else:
        return leaves, treedef
    for leaf, path in zip(leaves, _tree.paths(treedef, "params"), strict=True):
        if isinstance(leaf, nn.Module):
            raise TypeError(
                f"{name}: {path} is an nn.Module ({type(leaf).__name__}); pass its parameters: "
                "apply, params, buffers = gradacc.functional(module)"
            )
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: {path} is {describe(leaf)}; parameters are a pytree of floating tensors")
        if _rows.is_dtensor(leaf) and not divided:
            raise TypeError(
                f"{name}: {path} is a DTensor {_rows.told(leaf)}, of which every rank updates its rows: "
                "gradacc.optim.sharded(optimizer, mesh) makes an optimizer that does"
            )
        if leaf.layout != torch.strided:
            raise TypeError(f"{name}: {path} is a tensor of layout {leaf.layout}; pass it as to_dense()")
        if leaf.dtype not in _UPDATED:
            raise TypeError(
                f"{name}: {path} is a tensor of dtype {leaf.dtype} and shape {tuple(leaf.shape)}; only floating and "
                "complex tensors of 16 bits or more can be updated. Keep it apart from params (buffers, or the batch)"
            )
    raise AssertionError("a leaf is bad and none was found")


_UPDATED = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
}


def inputs(name: str, params_tree: Any, grads_tree: Any) -> tuple[list[Tensor], list[Tensor], _tree.TreeDef]:
    """The leaves of the parameters and of the gradients, and their structure."""
    leaves, treedef = params(name, params_tree)
    return leaves, _grads(name, grads_tree, leaves, treedef), treedef


def _grads(name: str, tree: Any, leaves: Sequence[Tensor], treedef: _tree.TreeDef) -> list[Tensor]:
    """The gradients' leaves: each of the shape, dtype and device of its parameter."""
    found, other = _tree.flatten(tree)
    if other != treedef:
        if _shard.shards(tree):
            raise TypeError(
                f"{name}: grads are parts of gradients (gradacc.Shard), those of sync=gradacc.reduce_scatter(...), and this "
                "optimizer takes whole ones: gradacc.optim.sharded(optimizer, group) makes one that takes parts"
            )
        raise ValueError(
            f"{name}: grads has another structure than params: {differing(other, treedef, 'grads')}. "
            "Pass what grad_fn(params, ...) returned for these params; a parameter without a gradient has zeros"
        )
    if _alike(found, leaves):
        return found
    for grad, leaf, path in zip(found, leaves, _tree.paths(treedef, ""), strict=True):
        if not isinstance(grad, Tensor):
            raise TypeError(f"{name}: grads{path} is {describe(grad)}; it must be a tensor like params{path}")
        if grad.layout != torch.strided:
            raise TypeError(f"{name}: grads{path} is a tensor of layout {grad.layout}; pass it as to_dense()")
        if grad.shape != leaf.shape:
            raise ValueError(
                f"{name}: grads{path} has shape {tuple(grad.shape)}, but params{path} has shape {tuple(leaf.shape)}"
            )
        if grad.dtype != leaf.dtype:
            raise TypeError(
                f"{name}: grads{path} has dtype {grad.dtype}, but params{path} has dtype {leaf.dtype}; "
                f"convert it with .to({leaf.dtype}), or leave dtype= out where it was accumulated"
            )
        if grad.device != leaf.device:
            raise ValueError(f"{name}: grads{path} is on {grad.device}, but params{path} is on {leaf.device}")
    raise AssertionError("a gradient is bad and none was found")


def optimizer(name: str, given: Any, where: str = "the optimizer", *, with_loss: bool = False) -> None:
    """What is wrapped is an `Optimizer` whose gradients are those of the loss, not of a multiple of it.

    ``with_loss``: the wrapper passes the loss on, and all gradients as they are.
    """
    if not isinstance(given, Optimizer):
        if isinstance(given, torch.optim.Optimizer):
            fix = f"gradacc.optim.from_torch(torch.optim.{type(given).__name__}, **options) makes one"
        else:
            fix = "gradacc.optim.sgd, adam, adamw, from_torch and from_torchopt return one"
        raise TypeError(f"{name}: {where} must be a gradacc.optim.Optimizer, got {describe(given)}; {fix}")
    if given.loss_scale is not None:
        raise ValueError(
            f"{name}: {where} is a dynamic_loss_scale, and what is around one sees gradients times its scale. Leave it out "
            "here, and put one around the whole: dynamic_loss_scale(clip_by_global_norm(sgd(0.1), 1.0))"
        )
    if given.takes_loss and not with_loss:
        raise ValueError(
            f"{name}: {where} takes the loss of each step, as a skip_spikes does, which this one does not pass on. Put it "
            "around the whole, where it sees all gradients before they are clipped: "
            "skip_spikes(clip_by_global_norm(sgd(0.1), 1.0)); around that there is room for a dynamic_loss_scale alone"
        )


class Given(NamedTuple):
    """What a wrapper is given: whole parameters and gradients, or parts of gradients (of either)."""

    leaves: list[Tensor]
    treedef: _tree.TreeDef
    grad_leaves: list[Tensor]
    structure: _tree.TreeDef
    """Of the gradients: that of the parameters, but where they are parts."""


def given(name: str, params_tree: Any, grads_tree: Any) -> Given:
    """As `inputs`; gradients that are `Shard`s of whole parameters, or DTensors, the optimizer inside looks at more closely."""
    leaves, treedef = params(name, params_tree, divided=True)
    grads_tree = _rows.as_shards(name, grads_tree, "grads")
    found, structure = _tree.flatten(grads_tree)
    if structure != treedef and _shard.shards(grads_tree):
        parts, outer = _tree.flatten(grads_tree, _shard.is_shard)
        if outer == treedef and all(isinstance(part, _shard.Shard) for part in parts):
            if not all(isinstance(leaf, Tensor) for leaf in found):
                raise TypeError(f"{name}: grads has a Shard without a tensor in it; pass what grad_fn returned")
            return Given(leaves, treedef, found, structure)
    return Given(leaves, treedef, _grads(name, grads_tree, leaves, treedef), treedef)


def elementwise(name: str, given: Optimizer) -> None:
    """An optimizer can be given parts of parameters."""
    said = given.elementwise() if callable(given.elementwise) else given.elementwise
    if said is not True:
        why = said or (
            "it is not known to treat every element by itself. If it does, say so: optimizer._replace(elementwise=True)"
        )
        raise ValueError(f"{name}: the optimizer needs whole parameters, of which a rank has parts: {why}")


def state(name: str, given: Any, kind: type) -> None:
    """A state is of the class that ``init`` returned."""
    if not isinstance(given, kind):
        expected = f"{name}: state is {describe(given)}, where this optimizer's is a {kind.__name__}. "
        raise TypeError(
            expected + "Pass what its init(params) or its last step returned; does it belong to another one?"
        )


def slot(name: str, where: str, tree: Any, leaves: Sequence[Tensor], treedef: _tree.TreeDef) -> list[Tensor]:
    """The leaves of a part of a state that is like the parameters."""
    found, other = _tree.flatten(tree)
    fix = "Is it the state of other parameters, or of an optimizer with other options? Pass what init(params) returns"
    if other != treedef:
        if bool(_shard.shards(tree)) != any(issubclass(kind, _shard.Shard) for kind in _tree.kinds(treedef)):
            raise ValueError(
                f"{name}: {where} is "
                + ("divided over ranks, as gradacc.optim.sharded's is" if _shard.shards(tree) else "whole")
                + ", and this optimizer is "
                + ("not" if _shard.shards(tree) else "gradacc.optim.sharded")
                + ". Save it by gradacc.checkpoint.save, and load it into what init(params) of this one returns"
            )
        raise ValueError(
            f"{name}: {where} has another structure than params: {differing(other, treedef, where)}. {fix}"
        )
    if _alike(found, leaves):
        return found
    for each, leaf, path in zip(found, leaves, _tree.paths(treedef, ""), strict=True):
        if not isinstance(each, Tensor):
            raise TypeError(f"{name}: {where}{path} is {describe(each)}; it must be a tensor. {fix}")
        if not _alike([each], [leaf]):
            raise ValueError(
                f"{name}: {where}{path} is a {each.dtype} tensor of shape {tuple(each.shape)} on {each.device}, but "
                f"params{path} is a {leaf.dtype} tensor of shape {tuple(leaf.shape)} on {leaf.device}. {fix}"
            )
    raise AssertionError("a slot is bad and none was found")


def counter(name: str, where: str, value: Any) -> Tensor:
    """A number of steps: a 0-dim integer tensor."""
    return scalar(name, where, value, torch.int64)


def zero() -> Tensor:
    """Where a counter begins: on the CPU, where it is read for nothing, whatever torch's default device is."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def scalar(name: str, where: str, value: Any, dtype: torch.dtype) -> Tensor:
    """A number in a state: a 0-dim tensor of ``dtype``."""
    if not isinstance(value, Tensor) or value.ndim != 0 or value.dtype != dtype:
        got = f"{value.dtype}, {describe(value)}" if isinstance(value, Tensor) else describe(value)
        raise TypeError(
            f"{name}: {where} must be a 0-dim tensor of dtype {dtype}, got {got}; pass the state that init(params) "
            "or the last step returned, or torch.vmap the step over a state that is batched"
        )
    return value


def loss(name: str, value: Any) -> Tensor:
    """The value of which the gradients are: a 0-dim floating tensor."""
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        got = f"{value.dtype}, {describe(value)}" if isinstance(value, Tensor) else describe(value)
        raise TypeError(
            f"{name}: loss must be a 0-dim floating tensor, the value that came with the gradients (of a Mean, its .value), "
            f"got {got}. For one loss per member of an ensemble, torch.vmap the step"
        )
    return value


def learning_rate(name: str, value: Any, where: str = "lr") -> float | Tensor:
    """A number or 0-dim floating tensor, ``>= 0`` and finite; a tensor's value is looked at where that is possible."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name}: {where} is a {value.dtype} tensor of shape {tuple(value.shape)}; it must be a number or a 0-dim "
                "floating tensor. For one learning rate per member of an ensemble, torch.vmap over lr"
            )
        if not _where.transforming():
            number(name, where, value.detach().item())
        return value
    return number(name, where, value)


def number(name: str, option: str, value: Any, *, below: float = math.inf, finite: bool = True) -> float:
    """A real number, ``>= 0`` and less than ``below``; as it came, so that ints stay exact."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {option} must be a number, got {describe(value)}")
    if not 0 <= float(value) < below and not (value == math.inf and not finite):
        bound = "finite and not negative" if below == math.inf else f"at least 0 and less than {below}"
        raise ValueError(f"{name}: {option} must be {bound}, got {value}")
    return value  # type: ignore[return-value]  # NumPy's scalars too


def flag(name: str, option: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {option} must be True or False, got {describe(value)}")
    return value


def _alike(found: Sequence[Any], leaves: Sequence[Tensor]) -> bool:
    """One loop without a call in it: this is a good part of what a step of small parameters costs."""
    for a, b in zip(found, leaves, strict=True):
        if (
            not isinstance(a, Tensor)
            or a.dtype != b.dtype
            or a.shape != b.shape
            or a.device != b.device
            or a.layout != b.layout
        ):
            return False
    return True


def differing(found: _tree.TreeDef, expected: _tree.TreeDef, where: str) -> str:
    """What is missing or too much in one of two structures."""
    there, here = _tree.paths(found, ""), _tree.paths(expected, "")
    for what, some, others in (("misses", here, set(there)), ("has", there, set(here))):
        odd = [path for path in some if path not in others]
        if odd:
            shown = ", ".join(f"{where}{path}" for path in odd[:3]) + (f" and {len(odd) - 3} more" if odd[3:] else "")
            return f"it {what} {shown}" + ("" if what == "misses" else ", which params has not")
    return f"{found} instead of {expected}"
