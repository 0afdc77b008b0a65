"""The calling conventions, and everything that must simply work."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradacc
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint, living_tensors

D = torch.float64


def squares(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]).square().mean()


@pytest.fixture
def params() -> dict[str, Tensor]:
    return {"w": torch.tensor([1.0, -2.0, 3.0], dtype=D), "b": torch.tensor(0.5, dtype=D)}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    x = torch.arange(21, dtype=D).view(7, 3).sin()
    return {"x": x, "y": x.sum(1).cos()}


def halves(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for rows in (slice(0, 1), slice(1, 6), slice(6, 7)):
        yield {name: leaf[rows] for name, leaf in batch.items()}


WAYS = {
    "steps": (dict(steps=3), lambda batch: batch),
    "more steps than examples": (dict(steps=50), lambda batch: batch),
    "microbatch_size": (dict(microbatch_size=2), lambda batch: batch),
    "one micro-batch": (dict(microbatch_size=100), lambda batch: batch),
    "split": (dict(split=halves), lambda batch: batch),
    "generator": ({}, halves),
    "list": ({}, lambda batch: list(halves(batch))),
    "tuple with empty ones": ({}, lambda batch: (*halves(batch), {"x": batch["x"][:0], "y": batch["y"][:0]})),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_split_is_the_large_batch(way, engine, params, batch):
    options, divide = WAYS[way]
    expected, value = torch.func.grad_and_value(squares)(params, batch)
    run = ENGINES[engine]
    assert_trees_close(run(lambda: gradacc.accumulate(squares, **options)(params, divide(batch))), expected)
    both = run(lambda: gradacc.accumulate_and_value(squares, **options)(params, divide(batch)))
    assert_trees_close(both, (expected, value))


def test_decorator_and_keyword_arguments(params, batch):
    @gradacc.accumulate_and_value(steps=2)
    def step(params, batch, *, scale):
        """Documented."""
        return scale * squares(params, batch)

    assert step.__name__ == "step"
    assert step.__doc__ == "Documented."
    expected = torch.func.grad_and_value(lambda p: 3 * squares(p, batch))(params)
    assert_trees_close(step(params, batch, scale=3), expected)


def test_iterables_are_consumed_lazily_and_one_at_a_time(params, batch):
    seen = []

    def loader():
        for i, part in enumerate(halves(batch)):
            seen.append(f"load {i}")
            yield part

    def loss(params, part):
        seen.append("loss")
        return squares(params, part)

    gradacc.accumulate(loss)(params, loader())
    assert seen == ["load 0", "loss", "load 1", "loss", "load 2", "loss"]


def test_the_callers_iterator_runs_in_the_callers_modes(params, batch):
    modes = []

    def loader():
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        yield batch

    with torch.no_grad():
        gradacc.accumulate(squares)(params, loader())
    with torch.inference_mode():
        gradacc.accumulate(squares)(params, loader())
    assert modes == [(False, False), (False, True)]


def test_micro_batches_are_views_not_copies(params, batch):
    pointers = []

    def loss(params, part):
        pointers.append(part["x"].data_ptr())
        return squares(params, part)

    gradacc.accumulate(loss, steps=3)(params, batch)
    assert pointers == [batch["x"][i].data_ptr() for i in (0, 3, 5)]


# --- in_dims, argnums


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("in_dims", "args"),
    [
        ((None, 0, 0), lambda x, y: (x, y)),
        ((None, 1, 0), lambda x, y: (x.T.contiguous(), y)),
        ((None, -1, 0), lambda x, y: (x.T, y)),
        ((None, {"x": 1, "rest": None}, 0), lambda x, y: ({"x": x.T, "rest": [torch.ones(2), 3]}, y)),
        ((None, (0, None), 0), lambda x, y: ((x, {"mask": torch.ones(3)}), y)),
    ],
)
def test_in_dims(in_dims, args, engine):
    x, y = torch.arange(10, dtype=D).view(5, 2).sin(), torch.arange(5, dtype=D)

    def loss(w, a, y):
        if isinstance(a, dict):
            assert a["rest"][0].shape == (2,)
            assert a["rest"][1] == 3
            a = a["x"]
        if isinstance(a, tuple):
            a, rest = a
            assert rest["mask"].shape == (3,)
        if in_dims[1] != 0 and not isinstance(in_dims[1], tuple):
            a = a.T
        return (a @ w - y).square().mean()

    w = torch.ones(2, dtype=D)
    expected = torch.func.grad_and_value(loss)(w, *args(x, y))
    run = ENGINES[engine]
    actual = run(lambda: gradacc.accumulate_and_value(loss, steps=3, in_dims=in_dims)(w, *args(x, y)))
    assert_trees_close(actual, expected)


def test_what_is_not_split_is_passed_whole(params, batch):
    table = torch.ones(4, dtype=D)

    def loss(params, batch, table, note):
        assert table.shape == (4,)
        assert note == "note"
        return squares(params, batch) * table.sum()

    expected = torch.func.grad(loss)(params, batch, table, "note")
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, batch, table, "note"), expected)


def test_numbers_and_none_pass_through_the_split(params, batch):
    def loss(params, batch):
        assert batch["power"] == 2
        assert batch["flag"] is True
        assert batch["nothing"] is None
        return squares(params, batch)

    more = batch | {"power": 2, "flag": True, "nothing": None}
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, more), torch.func.grad(loss)(params, more))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("argnums", "order"), [((0, 2), "wxb"), ((2, 0), "wxb"), ((1, -1), "xwb"), (1, "xwb"), (-1, "xbw"), ((0,), "wxb")]
)
def test_argnums(argnums, order, engine):
    values = {
        "x": torch.arange(6, dtype=D).view(3, 2).sin(),
        "w": torch.ones(2, dtype=D),
        "b": torch.tensor(2.0, dtype=D),
    }

    def loss(*args):
        named = dict(zip(order, args, strict=True))
        return (named["x"] @ named["w"] + named["b"]).square().mean()

    args = [values[name] for name in order]
    expected = torch.func.grad_and_value(loss, argnums=argnums)(*args)
    run = ENGINES[engine]
    assert_trees_close(run(lambda: gradacc.accumulate_and_value(loss, steps=2, argnums=argnums)(*args)), expected)


# --- what the loss returns


@pytest.mark.parametrize("engine", ENGINES)
def test_sum_reduction(engine, params, batch):
    def loss(params, batch):
        return (batch["x"] @ params["w"]).exp().sum()

    expected = torch.func.grad_and_value(loss)(params, batch)
    run = ENGINES[engine]
    actual = run(lambda: gradacc.accumulate_and_value(loss, steps=3, reduction="sum")(params, batch))
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["int64 tensor", "float tensor", "bool tensor", "int", "float"])
def test_mean_weights_of_every_kind(kind, engine):
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    x = torch.arange(7, dtype=D).sin()

    def loss(w, batch):
        x, mask = batch
        count = mask.sum()
        weight = {
            "int64 tensor": count,
            "float tensor": count.to(D),
            "bool tensor": count > 0,
            "int": len(mask),
            "float": len(mask) / 2,
        }[kind]
        return gradacc.Mean((w * x * mask).exp().sum(), weight)

    parts = [(x[i : i + 2], mask[i : i + 2]) for i in range(0, 7, 2)]
    run = ENGINES[engine]
    grads, value = run(lambda: gradacc.accumulate_and_value(loss)(torch.tensor(2.0, dtype=D), parts))
    weight = {"bool tensor": 3, "int": 7, "float": 3.5}.get(kind, 3)
    # A micro-batch of weight 0 contributes nothing; of the numbers, none is 0.
    used = [part for part in parts if part[1].any() or kind in ("int", "float")]
    total = sum((torch.tensor(2.0, dtype=D) * a * m).exp().sum() for a, m in used)
    assert isinstance(value, gradacc.Mean)
    assert float(value.weight) == weight
    torch.testing.assert_close(value.total, total)
    expected = sum((a * m * (2.0 * a * m).exp()).sum() for a, m in used) / weight
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_micro_batch_of_weight_0_contributes_exactly_0_never_nan(engine):
    x = torch.arange(6, dtype=D).view(3, 2)

    def loss(w, part):
        x, keep = part
        bad = torch.tensor(0.0, dtype=D) if keep.any() else torch.tensor(float("nan"), dtype=D)
        per_example = (x @ w).sin() * keep
        return gradacc.Mean(per_example.sum() + bad * w.sum(), keep.sum()), {
            "m": gradacc.Mean(per_example.sum() + bad, keep.sum()),
            "f": bad + 1,
        }

    w = torch.ones(2, dtype=D)
    keep = torch.tensor([True, False, True])
    parts = [(x[i : i + 1], keep[i : i + 1]) for i in (1, 0, 2)]
    run = ENGINES[engine]
    grads, (value, aux) = run(lambda: gradacc.accumulate_and_value(loss, has_aux=True)(w, parts))
    kept = x[keep]
    torch.testing.assert_close(grads, ((kept @ w).cos() @ kept) / 2)
    torch.testing.assert_close(value.value, (kept @ w).sin().mean())
    torch.testing.assert_close(aux["m"].value, (kept @ w).sin().mean())
    assert aux["f"] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_weight_0(engine):
    def loss(w, x):
        return gradacc.Mean((w * x).sum() * float("nan"), (x > 0).sum())

    grads, value = ENGINES[engine](lambda: gradacc.accumulate_and_value(loss, steps=2)(torch.ones(()), -torch.ones(4)))
    assert grads == 0
    assert value.total == 0
    assert value.weight == 0
    assert value.value.isnan()


# --- aux


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "Mean"])
def test_aux_is_what_the_large_batch_would_have_returned(reduction, engine, params, batch):
    def loss(params, batch):
        residual = batch["x"] @ params["w"] - batch["y"]
        weight = (batch["y"] > 0).sum() if reduction == "Mean" else torch.tensor(float(len(residual)), dtype=D)
        total = (residual.square() * (batch["y"] > 0 if reduction == "Mean" else 1)).sum()
        average = (residual * (batch["y"] > 0 if reduction == "Mean" else 1)).sum() / weight
        aux = {
            "residual": residual,
            "nested": (
                gradacc.Mean(residual.abs().sum(), len(residual)),
                [gradacc.Mean(batch["x"].sum(0), torch.ones(3))],
            ),
            "average": average,
            "labels": batch["y"] > 0,
            "nothing": None,
        }
        return {"mean": total / weight, "sum": total, "Mean": gradacc.Mean(total, weight)}[reduction], aux

    value, expected = loss(params, batch)
    options = dict(reduction="sum") if reduction == "sum" else {}
    run = ENGINES[engine]
    # The weight of a column sum is a number of micro-batches: Means add, whatever they count.
    actual = run(lambda: gradacc.accumulate_and_value(loss, steps=3, has_aux=True, **options)(params, batch))[1]
    expected["nested"][1][0] = gradacc.Mean(batch["x"].sum(0), torch.full((3,), 3.0))
    assert_trees_close(actual, (value, expected))
    assert (
        run(lambda: gradacc.accumulate(loss, steps=3, has_aux=True, **options)(params, batch))[1].keys()
        == expected.keys()
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        (lambda x: torch.tensor(3), r"aux\['leaf'\] is a torch.int64 tensor of shape \(\)"),
        (lambda x: torch.ones(5), r"shape \(5,\)"),
        (lambda x: 1.5, r"1.5 \(float\)"),
        (lambda x: "text", "a str"),
    ],
)
def test_aux_that_cannot_be_put_together_is_an_error(leaf, named, engine):
    def loss(w, x):
        return (w * x).mean(), {"leaf": leaf(x)}

    with pytest.raises(TypeError, match=f"(?s){named}.*gradacc.Mean.*micro-batch's size is 2"):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2, has_aux=True)(torch.ones(()), torch.ones(4)))


@pytest.mark.parametrize(("total", "weight"), [(1.0, 2), (torch.ones(()), "2"), (torch.ones(()), None)])
def test_a_mean_in_aux_is_of_a_tensor_and_a_number(total, weight):
    with pytest.raises(TypeError, match=r"aux\['m'\] is a Mean of .*; its total must be a tensor"):
        gradacc.accumulate(lambda w, x: ((w * x).mean(), {"m": gradacc.Mean(total, weight)}), steps=2, has_aux=True)(
            torch.ones(()), torch.ones(4)
        )


def test_aux_of_another_structure_or_kind_is_an_error():
    def structure(w, x):
        return (w * x).mean(), {str(len(x)): w}

    def kind(w, x):
        return (w * x).mean(), x if len(x) == 2 else x.sum()

    with pytest.raises(ValueError, match="another structure"):
        gradacc.accumulate(structure, steps=2, has_aux=True)(torch.ones(()), torch.ones(3))
    with pytest.raises(TypeError, match="same kind"):
        gradacc.accumulate(kind, steps=2, has_aux=True)(torch.ones(()), torch.ones(3))


def test_aux_keeps_no_graph_and_does_not_alias_the_batch(params, batch):
    def loss(params, batch):
        return squares(params, batch), (batch["x"], params["b"] * 1, gradacc.Mean(params["b"], 1))

    grads, (value, (x, b, mean)) = gradacc.accumulate_and_value(loss, steps=1, has_aux=True)(params, batch)
    for leaf in (x, b, mean.total, value, *grads.values()):
        assert leaf.grad_fn is None
        assert not leaf.requires_grad
    before = fingerprint((params, batch))
    for leaf in (x, b, mean.total, value, *grads.values()):
        leaf.zero_()
    assert fingerprint((params, batch)) == before


# --- parameters of every kind


class Layer(NamedTuple):
    w: Tensor
    b: Tensor


@dataclass
class Registered:
    w: Tensor
    b: Tensor


@dataclass
class ForTorch:
    w: Tensor
    b: Tensor


optree.register_pytree_node(
    Registered, lambda node: ((node.w, node.b), None), lambda _, xs: Registered(*xs), namespace="gradacc"
)
torch.utils._pytree.register_dataclass(ForTorch)


@pytest.mark.parametrize("kind", [dict, Layer, Registered, ForTorch, "nested", "optree dataclass"])
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_are_any_pytree(kind, engine, batch):
    w, b = torch.ones(3, dtype=D), torch.ones((), dtype=D)
    if kind == "nested":
        params = [({"w": w}, None), [b]]
        get = lambda p: (p[0][0]["w"], p[1][0])  # noqa: E731
    elif kind == "optree dataclass":
        Node = optree.dataclasses.make_dataclass("Node", [("w", Tensor), ("b", Tensor)], namespace="gradacc")  # noqa: N806
        params = Node(w, b)
        get = lambda p: (p.w, p.b)  # noqa: E731
    else:
        params = kind(w=w, b=b)
        get = (lambda p: (p["w"], p["b"])) if kind is dict else (lambda p: (p.w, p.b))

    def loss(params, batch):
        w, b = get(params)
        return squares({"w": w, "b": b}, batch)

    expected = torch.func.grad(squares)({"w": w, "b": b}, batch)
    grads = ENGINES[engine](lambda: get(gradacc.accumulate(loss, steps=3)(params, batch)))
    assert_trees_close(grads, (expected["w"], expected["b"]))
    assert type(gradacc.accumulate(loss, steps=3)(params, batch)) is type(params)


@pytest.mark.parametrize("engine", ENGINES)
def test_tied_unused_and_odd_parameters(engine):
    base = torch.arange(12, dtype=D).view(3, 4).cos()
    tied = base[0].clone()
    params = {
        "tied": [tied, tied],
        "unused": torch.ones(2, 3, dtype=torch.float32),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 4, dtype=D).expand(3, 4),
        "empty": torch.ones(0, 5, dtype=D),
        "scalar": torch.tensor(2.0, dtype=D),
        "complex": torch.tensor([1 + 2j, 3j], dtype=torch.complex128),
    }
    x = torch.arange(5, dtype=D).sin()

    def loss(p, x):
        common = p["tied"][0] @ p["tied"][1] + p["transposed"].square().sum() + p["strided"].exp().sum()
        odd = (p["expanded"] * base).square().sum() + p["empty"].sum() + p["complex"].abs().square().sum()
        return (x * common * p["scalar"] + x * x * odd).mean()

    expected = torch.func.grad_and_value(loss)(params, x)
    actual = ENGINES[engine](lambda: gradacc.accumulate_and_value(loss, steps=3)(params, x))
    assert_trees_close(actual, expected)
    assert (actual[0]["unused"] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype, asked, engine):
    x = torch.tensor([0.5, 1.0, 1.5, 2.0])
    params = {
        "real": torch.ones(2, dtype=dtype),
        "complex": torch.ones(2, dtype=torch.complex64),
        "unused": torch.ones(1, dtype=dtype),
    }

    def loss(p, x):
        return ((p["real"] * p["real"]).sum() * x + p["complex"].abs().square().sum() * x).mean()

    grads, value = ENGINES[engine](lambda: gradacc.accumulate_and_value(loss, steps=3, dtype=asked)(params, x))
    assert grads["real"].dtype == grads["unused"].dtype == (asked or dtype)
    assert grads["complex"].dtype == (asked.to_complex() if asked else torch.complex64)
    assert value.dtype == loss(params, x).dtype
    # Micro-batches of 2, 1 and 1 examples: 2.5 is exact in every dtype, and so are the shares 1/2, 1/4, 1/4.
    assert (grads["real"] == 2.5).all()
    assert (grads["complex"] == 2.5).all()


def test_requires_grad_parameters_of_a_module_collect_nothing():
    module = nn.Linear(3, 1)
    params = dict(module.named_parameters())
    other = nn.Linear(3, 1)  # closed over, not passed

    def loss(params, x):
        return (torch.func.functional_call(module, params, (x,)) + other(x)).square().mean()

    with torch.no_grad():  # else they are connected, as torch.func.grad's
        grads, value = gradacc.accumulate_and_value(loss, steps=2)(params, torch.ones(4, 3))
    assert not value.requires_grad
    assert not any(grad.requires_grad for grad in grads.values())
    gradacc.accumulate_and_value(loss, steps=2)(params, torch.ones(4, 3))
    assert all(p.grad is None for p in (*module.parameters(), *other.parameters()))


def test_a_graph_of_the_caller_is_neither_used_up_nor_kept(params, batch):
    w = params["w"].requires_grad_()
    upstream = w.exp()
    x = batch["x"] * upstream
    gradacc.accumulate(squares, steps=2)({"w": upstream, "b": params["b"]}, {"x": x, "y": batch["y"]})
    (grad,) = torch.autograd.grad(x.sum(), w)  # the caller's own graph is still whole
    torch.testing.assert_close(grad, batch["x"].sum(0) * upstream.detach())


def test_meta_device():
    params, x = torch.ones(3, device="meta"), torch.ones(5, 3, device="meta")
    grads, value = gradacc.accumulate_and_value(lambda p, x: (x @ p).square().mean(), steps=2)(params, x)
    assert grads.device.type == value.device.type == "meta"
    grads, value = gradacc.accumulate_and_value(lambda p, x: gradacc.Mean((x @ p).sum(), (x[:, 0] > 0).sum()), steps=2)(
        params, x
    )
    assert grads.shape == (3,)
    assert value.total.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 0])
def test_sparse_embeddings_are_densified(dtype, padding):
    table = torch.arange(12).view(6, 2).to(dtype)
    ids = torch.tensor([[1, 1], [0, 2], [1, 5]])

    def loss(p, ids, sparse=True):
        return F.embedding(ids, p["table"], padding_idx=padding, sparse=sparse).square().sum((1, 2)).mean()

    grads = gradacc.accumulate(loss, steps=3)({"table": table}, ids)
    assert grads["table"].layout == torch.strided
    expected = torch.func.grad(lambda p: loss(p, ids, sparse=False))({"table": table})
    assert_trees_close(grads, expected, rtol=1e-10 if dtype is D else 1e-2)


# --- losses of every kind


def test_losses_that_use_transforms_themselves(params, batch):
    def per_example(params, x, y):
        return (x @ params["w"] - y).square()

    def with_vmap(params, batch):
        return torch.func.vmap(per_example, (None, 0, 0))(params, batch["x"], batch["y"]).mean()

    def with_grad(params, batch):
        force = torch.func.grad(lambda x: per_example(params, x, 0.0).sum())
        return torch.stack([force(x).square().sum() for x in batch["x"]]).mean()

    for loss in (with_vmap, with_grad):
        expected = torch.func.grad_and_value(loss)(params, batch)
        assert_trees_close(gradacc.accumulate_and_value(loss, steps=3)(params, batch), expected)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside):
    weight, x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48.0).view(6, 8).sin()

    def loss(w, x):
        with nullcontext() if outside else torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = x @ w
            assert hidden.dtype == torch.bfloat16
        return hidden.float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        grads = gradacc.accumulate(loss, steps=3)(weight, x)
        expected = torch.func.grad(loss)(weight, x)
    assert grads.dtype == torch.float32
    torch.testing.assert_close(grads, expected, rtol=2e-2, atol=1e-3)  # bfloat16 products, rounded per micro-batch


def test_activation_checkpointing(params, batch):
    def loss(params, batch):
        hidden = checkpoint(lambda x: torch.sin(x * params["w"]), batch["x"], use_reentrant=False)
        return (hidden.sum(1) - batch["y"]).square().mean()

    plain = torch.func.grad(lambda p, b: (torch.sin(b["x"] * p["w"]).sum(1) - b["y"]).square().mean())(params, batch)
    assert_trees_close(gradacc.accumulate(loss, steps=3)(params, batch), plain)


@pytest.mark.parametrize("through_inputs", [True, False])
def test_reentrant_checkpointing_is_refused(through_inputs, params, batch):
    def loss(params, batch):
        # Not through inputs: params are used in the checkpoint, but only closed over; torch itself would not notice.
        x = (batch["x"] * params["w"]) if through_inputs else batch["x"].clone().requires_grad_()
        hidden = checkpoint(lambda x: torch.sin(x * params["w"]), x, use_reentrant=True)
        return (hidden.sum(1) + params["b"]).square().mean()

    before = fingerprint((params, batch))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradacc.accumulate(loss, steps=3)(params, batch)
    assert fingerprint((params, batch)) == before


def test_reentrant_checkpointing_in_a_later_micro_batch_is_refused(params):
    def loss(params, x):
        if x[0, 0] == 0:
            return (x * params["w"]).mean()
        return (
            checkpoint(lambda x: x * params["w"], x.clone().requires_grad_(), use_reentrant=True) * params["b"]
        ).mean()

    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradacc.accumulate(loss, microbatch_size=1)(params, torch.arange(6, dtype=D).view(2, 3))


def test_arguments_passed_whole_are_the_callers_own_objects(params, batch):
    def loss(params, batch, log, *, more):
        log.append(len(batch["x"]))
        more["calls"] = more.get("calls", 0) + 1
        return squares(params, batch)

    log, more = [], {}
    gradacc.accumulate(loss, steps=3)(params, batch, log, more=more)
    assert log == [3, 2, 2]
    assert more == {"calls": 3}


def test_a_compiled_loss_in_the_eager_engine(params, batch):
    compiled = torch.compile(squares, backend="eager")
    grads = gradacc.accumulate(compiled, steps=7)(params, batch)
    assert_trees_close(grads, torch.func.grad(squares)(params, batch))


def test_an_aux_vector_of_the_batchs_size_is_taken_for_a_batch_dimension():
    """Documented: two classes, micro-batches of two. Mean says what is meant."""

    def per_class(w, x, meant):
        counts = torch.stack([(x > 0).sum(), (x <= 0).sum()])
        return (w * x).mean(), gradacc.Mean(counts, 1) if meant else counts

    x = torch.tensor([1.0, -1.0, 1.0, 1.0])
    wrong = gradacc.accumulate(lambda w, x: per_class(w, x, False), steps=2, has_aux=True)(torch.ones(()), x)[1]
    right = gradacc.accumulate(lambda w, x: per_class(w, x, True), steps=2, has_aux=True)(torch.ones(()), x)[1]
    assert wrong.tolist() == [1, 1, 2, 0]
    assert right.total.tolist() == [3, 1]


def test_saved_tensor_hooks(params, batch):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        grads = gradacc.accumulate(squares, steps=3)(params, batch)
    assert packed
    assert_trees_close(grads, torch.func.grad(squares)(params, batch))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode, params, batch):
    expected = torch.func.grad_and_value(squares)(params, batch)
    with mode():
        made_inside = {name: leaf.clone() for name, leaf in params.items()}, {k: v.clone() for k, v in batch.items()}
        for inputs in ((params, batch), made_inside):
            actual = gradacc.accumulate_and_value(squares, steps=3)(*inputs)
            assert not any(leaf.is_inference() for leaf in (*actual[0].values(), actual[1]))
            assert_trees_close(actual, expected)
    # Inference tensors also outside of the mode that made them.
    assert_trees_close(gradacc.accumulate_and_value(squares, steps=3)(*made_inside), expected)


def test_threads_share_a_grad_fn():
    module = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate(lambda p, x: apply(p, x).square().mean(), steps=4)
    x = torch.arange(24, dtype=D).view(8, 3).sin()
    scaled = [{name: (i + 1) * p for name, p in params.items()} for i in range(8)]
    expected = [torch.func.grad(lambda p: apply(p, x).square().mean())(p) for p in scaled]
    results: list = [None] * len(scaled)

    def work(i):
        for _ in range(20):
            results[i] = grad_fn(scaled[i], x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(scaled))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        assert_trees_close(actual, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_one_and_none(engine, params, batch):
    run = ENGINES[engine]
    one = {name: leaf[:1] for name, leaf in batch.items()}
    expected = torch.func.grad_and_value(squares)(params, one)
    assert_trees_equal(run(lambda: gradacc.accumulate_and_value(squares, steps=4)(params, one)), expected)
    none = {name: leaf[:0] for name, leaf in batch.items()}
    for options, empty in ((dict(steps=4), none), (dict(microbatch_size=2), none), ({}, [none, none]), ({}, [])):
        grads, value = run(lambda o=options, e=empty: gradacc.accumulate_and_value(squares, **o)(params, e))
        assert all((grad == 0).all() for grad in grads.values())
        assert value.isnan()
        _, value = run(
            lambda o=options, e=empty: gradacc.accumulate_and_value(squares, reduction="sum", **o)(params, e)
        )
        assert value == 0


def test_a_batch_of_none_has_the_types_of_the_large_batch(params, batch):
    def loss(params, batch):
        residual = batch["x"] @ params["w"] - batch["y"]
        return gradacc.Mean(residual.sum(), len(residual)), {"residual": residual, "mean": residual.mean()}

    none = {name: leaf[:0] for name, leaf in batch.items()}
    grads, (value, aux) = gradacc.accumulate_and_value(loss, steps=2, has_aux=True)(params, none)
    assert (value.total, value.weight) == (0, 0)
    assert aux["residual"].shape == (0,)
    assert aux["mean"].isnan()
    assert (grads["w"] == 0).all()
    with pytest.raises(ValueError, match="no micro-batch arrived"):
        gradacc.accumulate(loss, has_aux=True)(params, [])


def test_ragged_structures_in_an_iterable_need_a_mean():
    graphs = [{"nodes": torch.ones(n, 2), "edges": torch.ones(2 * n, 3)} for n in (1, 4)]

    def mean(w, graph):
        return (graph["nodes"] @ w).mean()

    def right(w, graph):
        return gradacc.Mean((graph["nodes"] @ w).sum(), len(graph["nodes"])), graph["edges"].sum(1)

    with pytest.raises(TypeError, match=r"sizes \[1, 2\].*gradacc.Mean"):
        gradacc.accumulate(mean)(torch.ones(2), graphs)
    grads, edges = gradacc.accumulate(right, has_aux=True)(torch.ones(2), graphs)
    torch.testing.assert_close(grads, torch.ones(2))
    assert edges.shape == (10,)
    # With in_dims, what counts can be said instead.
    counted = gradacc.accumulate(mean, in_dims=(None, {"nodes": 0, "edges": None}))(torch.ones(2), graphs)
    torch.testing.assert_close(counted, torch.ones(2))


def test_opaque_micro_batches_need_a_mean_or_a_sum():
    class Opaque:
        def __init__(self, x):
            self.x = x

    parts = [Opaque(torch.ones(2)), Opaque(torch.ones(1))]
    w = torch.ones(())
    with pytest.raises(TypeError, match="holds no tensor to count"):
        gradacc.accumulate(lambda w, part: (w * part.x).mean())(w, parts)
    assert gradacc.accumulate(lambda w, part: (w * part.x).sum(), reduction="sum")(w, parts) == 3
    assert gradacc.accumulate(lambda w, part: gradacc.Mean((w * part.x).sum(), len(part.x)))(w, parts) == 1


def test_random_numbers_are_reproducible_and_differ_between_micro_batches():
    drawn = []

    def loss(w, x):
        noise = torch.rand(len(x))
        drawn.append(noise)
        return (w * x * noise).mean()

    grad_fn = gradacc.accumulate(loss, steps=2)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(grad_fn(torch.ones(()), torch.ones(4)))
    assert results[0] == results[1]
    assert not torch.equal(drawn[0], drawn[1])


def test_an_exception_halfway_propagates_unchanged_and_leaves_nothing(params, batch):
    class Halfway(Exception):
        pass

    module = nn.Linear(3, 1).double()
    apply, weights, _ = gradacc.functional(module)
    seen, error = [], Halfway("second micro-batch")

    def loss(weights, batch):
        hidden = apply(weights, batch["x"])
        seen.append(weakref.ref(hidden))
        if len(seen) == 2:
            raise error
        return hidden.square().mean()

    before = fingerprint((weights, batch, dict(module.named_parameters())))
    with pytest.raises(Halfway) as raised:
        gradacc.accumulate(loss, steps=3)(weights, batch)
    assert raised.value is error
    assert fingerprint((weights, batch, dict(module.named_parameters()))) == before
    error.__traceback__ = None
    del raised
    gc.collect()
    assert all(ref() is None for ref in seen)
    grads = gradacc.accumulate(lambda w, b: apply(w, b["x"]).square().mean(), steps=3)(weights, batch)
    assert_trees_close(grads, torch.func.grad(lambda w: apply(w, batch["x"]).square().mean())(weights))


# --- losses that do more than compute


def test_a_grad_fn_inside_a_loss_is_differentiated_through():
    """MAML: the outer gradient goes through the inner one, on the eager engine too."""
    w, x = torch.tensor([0.3, -0.7], dtype=D), torch.arange(12, dtype=D).view(6, 2).sin()

    def inner(w, x):
        return torch.tanh(x @ w).square().mean()

    def outer(grad_fn):
        return lambda w, x: inner(w - 0.5 * grad_fn(w, x[:1].expand(4, 2) * 2), x)

    expected = torch.func.grad_and_value(outer(torch.func.grad(inner)))(w, x)
    ours = outer(gradacc.accumulate(inner, steps=2))
    assert_trees_close(gradacc.accumulate_and_value(ours, steps=1)(w, x), expected)
    penalty = gradacc.accumulate(lambda w, x: gradacc.accumulate(inner, steps=2)(w, x).square().sum(), steps=1)
    assert_trees_close(penalty(w, x), torch.func.grad(lambda w: torch.func.grad(inner)(w, x).square().sum())(w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hooks_on_parameters_do_not_pile_up(dtype):
    def loss(w, x):
        w.register_hook(lambda grad: 2 * grad)
        return (w * x).mean()

    grads = gradacc.accumulate(loss, steps=4)(torch.ones((), dtype=dtype), torch.ones(4, dtype=dtype))
    assert grads == 2


def test_backward_inside_the_loss_is_refused():
    def loss(w, x):
        w.square().backward()
        return (w * x).mean()

    with pytest.raises(ValueError, match=r"called .backward\(\) through the parameters"):
        gradacc.accumulate(loss, steps=2)(torch.ones(()), torch.ones(4))


def test_an_autograd_gradient_inside_the_loss():
    def loss(w, x):
        (slope,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        return (slope * x[:, None]).mean()

    x, w = torch.arange(3, dtype=D), torch.tensor([1.0, 2.0], dtype=D)
    torch.testing.assert_close(gradacc.accumulate(loss, steps=3)(w, x), 6 * w / 2)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's forward mode uses it
def test_forward_mode_differentiation_reaches_the_gradient():
    from torch.autograd import forward_ad

    def loss(w, x):
        return (w**3 * x).mean()

    x = torch.ones(4, dtype=D)
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.tensor(2.0, dtype=D), torch.tensor(1.0, dtype=D))
        grad, tangent = forward_ad.unpack_dual(gradacc.accumulate(loss, steps=2)(w, x))
    assert grad == 12
    assert tangent == 12


def test_a_loader_may_refill_its_buffer():
    buffer = torch.zeros(2)

    def loader():
        for i in range(3):
            yield buffer.fill_(i)

    aux = gradacc.accumulate(lambda w, x: ((w * x).mean(), x), has_aux=True)(torch.ones(()), loader())[1]
    assert aux.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_micro_batch_without_tensor_rows_may_still_have_a_weight():
    parts = [{"edges": torch.ones(2, 4), "n": 4}, {"edges": torch.zeros(0, 4), "n": 5}]
    loss = lambda w, part: gradacc.Mean(w * part["n"] + (w * part["edges"]).sum(), part["n"])  # noqa: E731
    grads, value = gradacc.accumulate_and_value(loss)(torch.ones(()), parts)
    assert value.weight == 9
    torch.testing.assert_close(grads, torch.tensor((4 + 8 + 5) / 9))


def test_memory_does_not_grow_under_an_outer_autocast():
    w, x = torch.ones(64, 64), torch.ones(4, 64)
    grad_fn = gradacc.accumulate(lambda w, x: (x @ w).float().mean(), steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            grad_fn(w, x)
        # Tensors that earlier tests left behind may go meanwhile, so it is the new ones that count.
        gc.collect()
        before = living_tensors()
        for _ in range(23):
            grad_fn(w, x)
        gc.collect()
        kept = living_tensors().keys() - before.keys()
        bytes_kept = tensor_bytes_kept(lambda: [grad_fn(w, x) for _ in range(20)])
    assert not kept
    assert bytes_kept == 0


def tensor_bytes_kept(run):
    """What torch has allocated and not freed after ``run()`` and its result are gone, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_numpy_scalars_are_numbers():
    import numpy as np

    for weight in (np.int64(4), np.float32(4), np.float64(4)):
        assert (
            gradacc.accumulate(lambda w, x, n=weight: gradacc.Mean((w * x).sum(), n), steps=1)(
                torch.ones(()), torch.ones(4)
            )
            == 1
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_aux_of_different_shapes_is_named(engine):
    def loss(w, x):
        return (w * x).mean(), {"each": x}

    batch = [torch.ones(2, 3), torch.ones(2, 4)]
    with pytest.raises(
        ValueError, match=r"aux\['each'\] has shape \(2, 3\) in one micro-batch and \(2, 4\) in another"
    ):
        ENGINES[engine](lambda: gradacc.accumulate(loss, split=iter, has_aux=True)(torch.ones(()), batch))
