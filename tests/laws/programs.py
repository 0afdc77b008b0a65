"""Random functions of a batch, from a small grammar: what law 10 is tested on.

.. code-block:: text

    program  = step* outputs          one example is a (tokens, width) matrix h, starting as x
    step     = matmul with a whole weight | with one that is closed over | elementwise | reduction or cumsum within an example
             | lookup by an integer label | dropout
    outputs  = one or several of OUTPUTS, each with how `microbatch` is told to put it together
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import gradacc
from gradacc.testing import microbatch_sizes, splits
from gradacc.testing._strategies import BySizes

D = torch.float64
TOKENS, WIDTH, LABELS = 3, 2, 3


class Env(NamedTuple):
    """What a step may use beside the example's matrix."""

    x: Tensor
    label: Tensor
    w: Tensor
    b: Tensor
    closed: Tensor


STEPS: dict[str, Callable[[Tensor, Env], Tensor]] = {
    "matmul": lambda h, env: h @ env.w,
    "matmul, transposed": lambda h, env: F.linear(h, env.w, env.b),
    "matmul, closed over": lambda h, env: h @ env.closed,
    "scale": lambda h, env: h * env.b,
    "scale, closed over": lambda h, env: h * env.closed[0],
    "tanh": lambda h, _: h.tanh(),
    "sin": lambda h, _: h.sin(),
    "gelu": lambda h, _: F.gelu(h),
    "square": lambda h, _: 0.3 * h.square(),
    "residual": lambda h, env: h + env.x,
    "center": lambda h, _: h - h.mean(1, keepdim=True),
    "norm": lambda h, _: h / (1 + h.square().sum((1, 2), keepdim=True)),
    "softmax": lambda h, _: h.softmax(1),
    "gate": lambda h, _: h * h.sum(2, keepdim=True).sigmoid(),
    "cumsum": lambda h, _: h.cumsum(1),
    "lookup": lambda h, env: h + env.w[env.label % WIDTH][:, None],
    "mask": lambda h, env: torch.where((env.label > 0)[:, None, None], h, 0.5 * h),
}
LIGHT = tuple(STEPS)
STEPS["dropout"] = lambda h, _: F.dropout(h, 0.5)


class Product(NamedTuple):
    """A reducer of one's own: the product over pieces."""

    init: Callable[[Tensor], Tensor] = torch.ones_like
    update: Callable[[Tensor, Tensor], Tensor] = torch.mul
    finalize: Callable[[Tensor], Tensor] = torch.clone


class Out(NamedTuple):
    """One output of a program: ``make(h, label)``, and what ``out=`` and ``out_dims=`` say of it."""

    make: Callable[[Tensor, Tensor], Any]
    out: Any = "concat"
    dim: int = 0
    empty: bool = True
    """Whether a piece without examples has one."""
    whole: bool = True
    """Whether the function of the whole is what the pieces make together."""


def _mean(h: Tensor, label: Tensor) -> gradacc.Mean:
    return gradacc.Mean((h * (label > 0)[:, None, None]).sum(), (label > 0).sum())


def _mean_of_a_number(h: Tensor, label: Tensor) -> gradacc.Mean:
    return gradacc.Mean(h.sum((0, 1)), len(label))


OUTPUTS = {
    "each": Out(lambda h, _: h),
    "a number each": Out(lambda h, _: h.sum((1, 2))),
    "along dim 1": Out(lambda h, _: h.sum(1).mT, dim=1),
    "along dim -2": Out(lambda h, _: h.movedim(0, 1), dim=-2),
    "sum": Out(lambda h, _: h.sum(), "sum"),
    "sum of matrices": Out(lambda h, _: h.sum(0), "sum"),
    "mean": Out(lambda h, _: h.mean(), "mean"),
    "mean of matrices": Out(lambda h, _: h.mean(0), "mean"),
    "max": Out(lambda h, _: h.amax(), "max", empty=False),
    "max of matrices": Out(lambda h, _: h.amax(0), "max", empty=False),
    "min": Out(lambda h, _: h.amin((0, 1)), "min", empty=False),
    "Mean": Out(_mean, "concat"),
    "Mean of vectors": Out(_mean_of_a_number, "sum"),
    "stack": Out(lambda h, _: h.sum(0), "stack", whole=False),
    "stack along dim 1": Out(lambda h, _: h.sum((0, 1)), "stack", 1, whole=False),
    "product": Out(lambda h, _: (1 + 0.3 * h.sum((1, 2)).tanh()).prod(0), Product()),
    "labels": Out(lambda _, label: label + 1),
    "count": Out(lambda _, label: (label > 0).sum(), "sum"),
    "examples": Out(lambda _, label: len(label), "sum"),
    "flag": Out(lambda _, label: label > 1),
    "constants": Out(lambda _, label: {"none": None, "number": 7, "bool": True, "name": "h"}),
}
REAL = tuple(name for name, out in OUTPUTS.items() if name not in ("labels", "count", "examples", "flag", "constants"))
SCALARS = ("sum", "mean", "Mean")
"""Alone, or beside what has no derivative, ``backward="forward"`` takes them."""


class Program(NamedTuple):
    """A function ``f({"x": (n, tokens, width), "label": (n,)}, w, b)`` of the grammar, which closes over a matrix."""

    steps: tuple[str, ...]
    outputs: tuple[str, ...]

    def closing(self, closed: Tensor) -> Callable[..., Any]:
        def function(batch: dict[str, Tensor], w: Tensor, b: Tensor) -> Any:
            env = Env(batch["x"], batch["label"], w, b, closed)
            h = env.x
            for step in self.steps:
                h = STEPS[step](h, env)
            made = {name: OUTPUTS[name].make(h, env.label) for name in self.outputs}
            return made if len(made) > 1 else made[self.outputs[0]]

        return function

    @property
    def options(self) -> dict[str, Any]:
        """``out`` and ``out_dims``: a prefix, and one entry for all where that says the same."""
        outs = {name: OUTPUTS[name].out for name in self.outputs}
        dims = {name: OUTPUTS[name].dim for name in self.outputs}
        one = len(self.outputs) == 1
        return {"out": outs[self.outputs[0]] if one else outs, "out_dims": dims[self.outputs[0]] if one else dims}

    @property
    def of_the_whole(self) -> bool:
        return all(OUTPUTS[name].whole for name in self.outputs)

    @property
    def of_nothing(self) -> bool:
        return all(OUTPUTS[name].empty for name in self.outputs)

    @property
    def backwards(self) -> tuple[str, ...]:
        real = [name for name in self.outputs if name in REAL]
        taken = len(real) == 1 and real[0] in SCALARS
        return ("auto", "recompute", "forward") if taken else ("auto", "recompute")


def programs(
    steps: Sequence[str] = LIGHT, outputs: Sequence[str] = tuple(OUTPUTS), last: str | None = None
) -> st.SearchStrategy[Program]:
    """Programs of these steps and outputs, at least one of which has a derivative."""
    some = st.lists(st.sampled_from(steps), max_size=4).map(tuple)
    made = st.tuples(
        st.sampled_from([name for name in outputs if name in REAL]),
        st.lists(st.sampled_from(list(outputs)), max_size=3),
    ).map(lambda drawn: tuple(dict.fromkeys([drawn[0], *drawn[1]])))
    return st.builds(Program, some if last is None else some.map(lambda steps: (*steps, last)), made)


class Split(NamedTuple):
    """One way to make pieces: options of `microbatch`, and the sizes that they come to."""

    options: dict[str, Any]
    sizes: tuple[int, ...]
    given: str = "whole"
    """Or the batch itself is a list, or a generator, of pieces."""

    def argument(self, batch: dict[str, Tensor]) -> Any:
        if self.given == "whole":
            return batch
        parts = BySizes(list(self.sizes))(batch)
        return parts if self.given == "generator" else list(parts)


def all_splits(size: int, empty: bool = True) -> st.SearchStrategy[Split]:
    """Every way of `microbatch`; pieces without examples only where ``empty``."""
    sizes = microbatch_sizes(size).filter(lambda sizes: empty or 0 not in sizes)
    iterables = st.builds(
        lambda sizes, given: Split({}, tuple(sizes), given), sizes, st.sampled_from(["list", "generator"])
    )
    made = splits(size).map(lambda options: Split(options, sizes_of(size, options)))
    return st.one_of(made.filter(lambda split: empty or 0 not in split.sizes), iterables)


def sizes_of(size: int, options: dict[str, Any]) -> tuple[int, ...]:
    if "split" in options:
        return tuple(options["split"].sizes)
    if "steps" in options:
        each, more = divmod(size, options["steps"])
        found = [each + (n < more) for n in range(options["steps"])]
    else:
        m = options["microbatch_size"]
        found = [min(m, size - low) for low in range(0, size, m)]
    return tuple(own for own in found if own) or (0,)


def inputs(size: int, seed: int, *, grad: bool = True) -> list[Tensor]:
    """``x, label, w, b, closed``; the first example counts, so that no mean is of nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D).requires_grad_(grad)

    label = torch.randint(0, LABELS, (size,), generator=generator)
    label[:1] = 1
    return [normal(size, TOKENS, WIDTH), label, normal(WIDTH, WIDTH), normal(WIDTH), normal(WIDTH, WIDTH)]


def pieces_of(batch: dict[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    return [
        {name: leaf[low : low + size] for name, leaf in batch.items()}
        for low, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)
    ]


def by_hand(program: Program, outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What the loop over pieces returns, put together by hand, one output after another."""
    one = len(program.outputs) == 1
    made = {
        name: _together(OUTPUTS[name], [output if one else output[name] for output in outputs], sizes)
        for name in program.outputs
    }
    return made[program.outputs[0]] if one else made


def _together(out: Out, values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if isinstance(values[0], gradacc.Mean):
        return sum(values[1:], values[0])
    if out.out == "sum":
        return sum(values[1:], values[0])
    if out.out == "mean":
        return sum(n * value for value, n in zip(values, sizes, strict=True) if n) / sum(sizes)
    if out.out in ("max", "min"):
        return getattr(torch.stack(list(values)), f"a{out.out}")(0)
    if out.out == "stack":
        return torch.stack(list(values), out.dim)
    if isinstance(out.out, Product):
        return torch.stack(list(values)).prod(0)
    return torch.cat(list(values), out.dim) if isinstance(values[0], Tensor) else values[0]
