"""What composes with the heads that never hold all logits: the table of `docs/microbatch.md`, made by running each cell.

    python -m benchmarks.heads [COLUMN ...]

Rewrites the table's columns (all that can run here, where none is named). Every cell runs one question on a few tokens and
compares value and gradients with plain PyTorch on all logits.

=================  ==================================================================================
``yes``            equal (float64: rtol 1e-8; Liger's float32: 1e-3)
``all logits``     equal, but a tensor as large as all logits was there: it took the plain way
``error``          raises
``needs a GPU``    Triton's interpreter cannot run it
``not offered``    there is no argument for it, and its logits are out of reach
``wrong``          returns something else without an error
=================  ==================================================================================

Liger's kernels are Triton's. Without a GPU they run in Triton's interpreter: install both in a folder of their own (Triton
changes what Inductor finds) with ``pip install --no-deps --target FOLDER liger-kernel==0.8.5 triton==3.9.0``, and name it:
``LIGER=FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gradacc

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "microbatch.md"
TOKENS, WIDTH, VOCABULARY, PIECE = 16, 4, 40, 4
MANY = 256, 8192
"""Tokens, and a vocabulary, that the auto-chunker finds large."""
SMOOTHING, CAP = 0.1, 2.0


class NotOfferedError(Exception):
    """There is no argument for it."""


class Data(NamedTuple):
    """Of one call."""

    hidden: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    """Of each token."""
    teacher: Tensor
    """Its hidden states,"""
    teachers_weight: Tensor
    """and its head."""


Loss = Callable[[Data], Tensor]
"""A mean over tokens."""

BY_TOKENS = ("hidden", "labels", "scale", "teacher")


def data(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Data:
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    hidden, weight, bias, scale = (
        normal(tokens, WIDTH),
        normal(vocabulary, WIDTH),
        normal(vocabulary),
        normal(tokens).exp(),
    )
    return Data(hidden, labels, weight, bias, scale, normal(tokens, WIDTH), normal(vocabulary, WIDTH))


def piece_of(kind: str) -> Callable[[Data], Tensor]:
    """A loss in plain PyTorch, summed over some tokens."""

    def loss_sum(d: Data) -> Tensor:
        logits = F.linear(d.hidden, d.weight, d.bias if kind == "bias" else None)
        if kind == "softcap":
            logits = CAP * torch.tanh(logits / CAP)
        if kind == "KL":
            theirs = F.log_softmax(F.linear(d.teacher, d.teachers_weight), 1)
            return F.kl_div(F.log_softmax(logits, 1), theirs, reduction="sum", log_target=True)
        if kind == "weights":
            return (F.cross_entropy(logits, d.labels, reduction="none") * d.scale).sum()
        return F.cross_entropy(
            logits, d.labels, reduction="sum", label_smoothing=SMOOTHING if kind == "smoothing" else 0.0
        )

    return loss_sum


def plain(kind: str) -> Loss:
    """The oracle: all logits at once."""
    return lambda d: piece_of(kind)(d) / len(d.labels)


def ours(kind: str) -> Loss:
    """`gradacc.microbatch`."""
    loss_sum = piece_of(kind)
    dims: Any = Data(*(0 if name in BY_TOKENS else None for name in Data._fields))  # type: ignore[arg-type]  # dims, not tensors
    by_pieces = gradacc.microbatch(
        lambda d: gradacc.Mean(loss_sum(d), len(d.labels)), microbatch_size=PIECE, in_dims=(dims,)
    )
    return lambda d: by_pieces(d).value


def checkpointed(kind: str) -> Loss:
    """`torch.utils.checkpoint` of each piece."""
    loss_sum = piece_of(kind)

    def loss(d: Data) -> Tensor:
        parts = zip(*(getattr(d, name).split(PIECE) for name in BY_TOKENS), strict=True)
        pieces = [d._replace(**dict(zip(BY_TOKENS, part, strict=True))) for part in parts]
        terms = [checkpoint(lambda *leaves: loss_sum(Data(*leaves)), *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(terms).sum() / len(d.labels)

    return loss


def torchs(kind: str) -> Loss:
    """`F.linear_cross_entropy` with its options."""
    options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=PIECE)

    def loss(d: Data) -> Tensor:
        if kind == "softcap":
            raise NotOfferedError
        target = d.labels
        if kind == "KL":
            log_p = F.log_softmax(F.linear(d.teacher, d.teachers_weight), 1)
            target = log_p.exp()
            cross = F.linear_cross_entropy(d.hidden, d.weight, target, options=options)
            return cross + (target * log_p).sum() / len(d.labels)
        found = F.linear_cross_entropy(
            d.hidden,
            d.weight,
            target,
            linear_bias=d.bias if kind == "bias" else None,
            label_smoothing=SMOOTHING if kind == "smoothing" else 0.0,
            reduction="none" if kind == "weights" else "mean",
            options=options,
        )
        return (found * d.scale).mean() if kind == "weights" else found

    return loss


def ligers(kind: str) -> Loss:
    """Liger's fused kernels."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    def loss(d: Data) -> Tensor:
        if kind == "KL":
            divergence = LigerFusedLinearJSD(jsd_beta=0.0)
            return divergence(d.hidden, d.weight, d.teacher, d.teachers_weight, None)  # type: ignore[no-any-return]  # Liger has no types
        fused = LigerFusedLinearCrossEntropyLoss(
            label_smoothing=SMOOTHING if kind == "smoothing" else 0.0,
            softcap=CAP if kind == "softcap" else None,
            reduction="none" if kind == "weights" else "mean",
            accum_dtype=torch.float32 if d.hidden.dtype == torch.bfloat16 else None,
        )
        found = fused(d.weight, d.hidden, d.labels, d.bias if kind == "bias" else None)
        return (found * d.scale).mean() if kind == "weights" else found  # type: ignore[no-any-return]  # nor here

    return loss


def compiled(kind: str) -> Loss:
    """Inductor's auto-chunker, which looks for outputs of a million elements."""
    return _Compiled(plain(kind))


class _Compiled:
    """A function that Inductor compiles, and must have chunked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        from torch._inductor import config

        with config.patch({"auto_chunker.enable": True, "force_disable_caches": True}):
            return self.function(*args)


COLUMNS: dict[str, Callable[[str], Loss]] = {
    "`F.linear_cross_entropy`": torchs,
    "Inductor's auto-chunker": compiled,
    "checkpointed pieces": checkpointed,
    "Liger": ligers,
    "`microbatch`": ours,
}


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """The elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.set_.source_Storage, torch.ops.aten.copy_.default):
            # Memory that was there, which Triton's interpreter takes whole.
            return result
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def backward(loss: Loss, d: Data, names: Sequence[str] = ("hidden", "weight")) -> Any:
    """The value and gradients, by plain autograd."""
    leaves = [getattr(d, name).clone().requires_grad_() for name in names]
    value = loss(d._replace(**dict(zip(names, leaves, strict=True))))
    grads = torch.autograd.grad(3.0 * value, leaves)
    return [value.detach(), *grads]


def _tied(loss: Loss, d: Data) -> Any:
    """The weight is the embedding, too."""

    def of_all(d: Data) -> Tensor:
        return loss(d._replace(hidden=torch.tanh(F.embedding(d.labels, d.weight))))

    return backward(of_all, d, ["weight"])


def _of_hidden(loss: Loss, d: Data) -> Callable[[Tensor], Tensor]:
    return lambda hidden: loss(d._replace(hidden=hidden))


def _hessian(loss: Loss, d: Data) -> Any:
    """Of a factor for each channel."""
    return hessian(lambda factors: loss(d._replace(hidden=d.hidden * factors)))(torch.ones_like(d.hidden[0]))


def _second(loss: Loss, d: Data) -> Any:
    """A Hessian-vector product by plain autograd, through hidden states and weight."""
    leaves = [d.hidden.clone().requires_grad_(), d.weight.clone().requires_grad_()]
    value = loss(d._replace(hidden=leaves[0], weight=leaves[1]))
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    return list(torch.autograd.grad(torch.stack([(g * g.detach().cos()).sum() for g in grads]).sum(), leaves))


def _fullgraph(loss: Loss, d: Data) -> Any:
    """In one graph, of which Inductor makes nothing: what is asked is whether it traces."""
    if isinstance(loss, _Compiled):
        return backward(loss, d)
    return backward(torch.compile(loss, fullgraph=True, backend="aot_eager"), d)


class Question(NamedTuple):
    """A row."""

    kind: str
    ask: Callable[[Loss, Data], Any]
    sees_memory: bool = True
    """Whether the largest tensor says anything: not where vmap makes it larger, or a graph hides it."""
    is_transform: bool = False
    """Whether a compiler wants it compiled with the loss."""


FULLGRAPH = "`compile(fullgraph=True)`"
QUESTIONS = {
    "`torch.func.grad`": Question("", lambda loss, d: grad(_of_hidden(loss, d))(d.hidden), True, True),
    "`vmap` of it": Question(
        "", lambda loss, d: vmap(grad(_of_hidden(loss, d)))(torch.stack([d.hidden, d.hidden.cos()])), False, True
    ),
    "`jvp`": Question("", lambda loss, d: jvp(_of_hidden(loss, d), (d.hidden,), (d.hidden.cos(),)), True, True),
    "`hessian`": Question("", _hessian, False, True),
    "`create_graph=True`": Question("", _second, False),
    FULLGRAPH: Question("", _fullgraph, False),
    "a weight for each token": Question("weights", backward),
    "label smoothing": Question("smoothing", backward),
    "softcapping": Question("softcap", backward),
    "KL to a teacher": Question("KL", backward),
    "bias": Question("bias", lambda loss, d: backward(loss, d, ("hidden", "weight", "bias"))),
    "tied weight": Question("", _tied),
    "frozen weight": Question("", lambda loss, d: backward(loss, d, ["hidden"])),
}
SUMS = "bfloat16, sums in float32"
ROWS = (*QUESTIONS, SUMS)


def cell(column: str, row: str) -> str:
    """Ask, and compare with the plain computation."""
    make = COLUMNS[column]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if column == "Liger" and row in (FULLGRAPH, SUMS):
                # The interpreter hides kernels from Dynamo, and has a bfloat16 of its own.
                return "needs a GPU"
            return _sums(make) if row == SUMS else _answer(make, QUESTIONS[row], column)
        except NotOfferedError:
            return "not offered"
        # Whatever a head raises is its answer to the question; HEADS_SHOW prints it.
        except Exception as error:
            if type(error).__name__ == "InterpreterError":
                return "needs a GPU"
            if os.environ.get("HEADS_SHOW"):
                print(f"{column}, {row}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            return "error"


def _answer(make: Callable[[str], Loss], question: Question, column: str) -> str:
    d = data(torch.float32 if column == "Liger" else torch.float64, *(MANY if make is compiled else ()))
    rtol = 1e-3 if column == "Liger" else 1e-8
    expected = question.ask(plain(question.kind), d)
    chunked = _chunkings()
    loss = make(question.kind)
    torch._dynamo.reset()
    looks = question.sees_memory and not isinstance(loss, _Compiled)
    largest = LargestTensor()
    with largest if looks else nullcontext():
        if isinstance(loss, _Compiled) and question.is_transform:
            found = _Compiled(lambda d: question.ask(plain(question.kind), d))(d)
        else:
            found = question.ask(loss, d)
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    if not all(torch.allclose(mine, theirs, rtol=rtol, atol=rtol / 10) for mine, theirs in pairs):
        return "wrong"
    if isinstance(loss, _Compiled):
        return "yes" if _chunkings() > chunked else "all logits"
    return "all logits" if looks and largest.elements >= TOKENS * VOCABULARY else "yes"


def _chunkings() -> int:
    from torch._inductor import metrics

    return metrics.num_auto_chunking


def _sums(make: Callable[[str], Loss]) -> str:
    """Many pieces of one sign each: what is summed in bfloat16 loses the small ones."""
    d = data(torch.bfloat16, 256 * PIECE, *(MANY[1:] if make is compiled else ()))
    exact = backward(plain(""), Data(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in d)))[2]

    def error(loss: Loss) -> float:
        found = backward(loss, d)[2].double()
        return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))

    mine, theirs = error(make("")), error(plain(""))
    if os.environ.get("HEADS_SHOW"):
        print(f"error of the weight's gradient: {mine:.2e}, of all logits {theirs:.2e}", file=sys.stderr)
    return "yes" if mine <= 2.5 * theirs else "rounds each piece"


def column(name: str) -> dict[str, str]:
    """All of its cells; Liger's in a process that has it."""
    if name != "Liger" or "liger_kernel" in sys.modules or _has_liger():
        return {row: cell(name, row) for row in ROWS}
    folder = os.environ["LIGER"]
    path = os.pathsep.join([folder, str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.heads", "--print", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    print(done.stderr, file=sys.stderr)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _has_liger() -> bool:
    import importlib.util

    return importlib.util.find_spec("liger_kernel") is not None


def read(page: str) -> dict[str, dict[str, str]]:
    """``{column: {row: cell}}`` of the table."""
    lines = [line for line in _table(page).splitlines() if line.startswith("|")]
    if not lines:
        return {}
    (_, *names), _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(names, 1)}


def _table(page: str) -> str:
    found = re.search("<!-- heads -->\n(.*?)<!-- /heads -->", page, re.DOTALL)
    assert found is not None
    return found[1]


def written(columns: dict[str, dict[str, str]]) -> str:
    """The table."""
    head = f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
    rows = (f"| {row} | {' | '.join(columns[name].get(row, '') for name in COLUMNS)} |\n" for row in ROWS)
    return head + "".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run columns, and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("columns", nargs="*")
    parser.add_argument("--print", action="store_true", help="the cells as JSON, and nothing else")
    options = parser.parse_args(arguments)
    can = [name for name in COLUMNS if name != "Liger" or _has_liger() or os.environ.get("LIGER")]
    found = {name: column(name) for name in options.columns or can}
    if options.print:
        print(json.dumps(found[options.columns[0]]))
        return 0
    page = PAGE.read_text()
    table = written({name: {} for name in COLUMNS} | read(page) | found)
    PAGE.write_text(page.replace(_table(page), table))
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
