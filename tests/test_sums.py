"""What is summed beside the gradients: totals, weights of every kind, weight 0, nothing at all, and dtypes."""

import pytest
import torch

import gradacc
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, squares

D = torch.float64


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


def test_numpy_scalars_are_numbers():
    import numpy as np

    for weight in (np.int64(4), np.float32(4), np.float64(4)):
        assert (
            gradacc.accumulate(lambda w, x, n=weight: gradacc.Mean((w * x).sum(), n), steps=1)(
                torch.ones(()), torch.ones(4)
            )
            == 1
        )
