"""What `loss_fn` returned: what is no loss is refused, with a name and a fix."""

import pytest
import torch

import gradacc
from tests.helpers import ENGINES, fingerprint

PARAMS = {"w": torch.tensor(2.0)}
BATCH = {"x": torch.arange(4.0)}


def mean(total, weight):
    return lambda p, b: gradacc.Mean(total(p, b), weight(p, b))


def linear(p, b):
    return (p["w"] * b["x"]).sum()


LOSSES = {
    "vector": (
        lambda p, b: p["w"] * b["x"],
        ValueError,
        r"returned a tensor of shape \(2,\); it must be 0-dim.*gradacc.Mean",
    ),
    "one element": (lambda p, b: linear(p, b)[None], ValueError, r"shape \(1,\)"),
    "integer": (lambda p, b: linear(p, b).long(), TypeError, "a tensor of dtype torch.int64; it must be floating"),
    "complex": (lambda p, b: linear(p, b) * 1j, TypeError, "a tensor of dtype torch.complex64; it must be floating"),
    "independent": (lambda p, b: b["x"].sum(), ValueError, "does not depend on any parameter"),
    "detached": (lambda p, b: linear(p, b).detach(), ValueError, "does not depend on any parameter"),
    "other parameter": (
        lambda p, b, w=torch.ones((), requires_grad=True): (w * b["x"]).sum(),
        ValueError,
        "does not depend on any parameter",
    ),
    "tuple": (lambda p, b: (linear(p, b), b), TypeError, "returned a tuple of 2; pass has_aux=True"),
    "None": (lambda p, b: None, TypeError, "returned None; is a return statement missing"),
    "number": (lambda p, b: 1.0, TypeError, r"returned 1.0 \(float\).*\.item\(\)"),
    "dict": (
        lambda p, b: {"loss": linear(p, b)},
        TypeError,
        "returned a dict of 1; it must return a 0-dim floating tensor",
    ),
    "negative weight": (
        mean(linear, lambda p, b: torch.tensor(-1)),
        ValueError,
        "a Mean whose weight is -1; it must be finite and",
    ),
    "negative number": (mean(linear, lambda p, b: -0.5), ValueError, "weight is -0.5"),
    "NaN weight": (mean(linear, lambda p, b: torch.tensor(float("nan"))), ValueError, "weight is nan"),
    "infinite weight": (mean(linear, lambda p, b: float("inf")), ValueError, "weight is inf"),
    "vector weight": (
        mean(linear, lambda p, b: torch.ones(2)),
        ValueError,
        r"weight is a torch.float32 tensor of shape \(2,\)",
    ),
    "complex weight": (mean(linear, lambda p, b: torch.tensor(1j)), ValueError, "weight is a torch.complex64 tensor"),
    "weight of params": (
        mean(linear, lambda p, b: p["w"]),
        ValueError,
        "weight is a tensor and depends on the parameters.*detach",
    ),
    "weight None": (mean(linear, lambda p, b: None), TypeError, "weight is None; it must be a number or"),
    "weight str": (mean(linear, lambda p, b: "3"), TypeError, "weight is a str"),
    "Mean of a vector": (
        mean(lambda p, b: p["w"] * b["x"], lambda p, b: 2),
        ValueError,
        r"Mean whose total is a tensor of shape \(2,\)",
    ),
    "Mean of None": (mean(lambda p, b: None, lambda p, b: 2), TypeError, "Mean whose total is None"),
    "Mean of integers": (
        mean(lambda p, b: b["x"].sum().long(), lambda p, b: 2),
        TypeError,
        "total is a tensor of dtype torch.int64",
    ),
    "sum of Means": (
        lambda p, b: gradacc.Mean(linear(p, b), 2) + gradacc.Mean(linear(p, b), 3),
        ValueError,
        r"a sum of Means.*not a.value \+ b.value.*Mean\(pooled.total, pooled.weight\).*a tuple, list or dict: \(a, 5.0 \* b\)",
    ),
    "sum() of Means": (
        lambda p, b: sum(gradacc.Mean(linear(p, b), n) for n in (1, 2, 3)),
        ValueError,
        r"a sum of Means.*not a.value \+ b.value",
    ),
    "a Mean and a loss": (
        lambda p, b: (gradacc.Mean(linear(p, b), 2), linear(p, b)),
        TypeError,
        r"a tuple of 2; pass has_aux=True for .* Or are they several losses\? Return a tuple of nothing but gradacc\.Means",
    ),
    "a Mean and a metric, nested": (
        lambda p, b: (gradacc.Mean(linear(p, b), 2), {"acc": gradacc.Mean(linear(p, b), 2)}),
        TypeError,
        r"a tuple of 2; pass has_aux=True for .* Or are they several losses\?",
    ),
    "a dict of a Mean and a loss": (
        lambda p, b: {"ce": gradacc.Mean(linear(p, b), 2), "box": linear(p, b)},
        TypeError,
        r"several means, and loss\['box'\] is a tensor of shape .*which is none.*Mean\(mean \* n, n\)",
    ),
    "no Means": (lambda p, b: [], TypeError, "returned a list of 0; it must return"),
    "a sum of Means in a list": (
        lambda p, b: [gradacc.Mean(linear(p, b), 2), gradacc.Mean(linear(p, b), 2) + gradacc.Mean(linear(p, b), 2)],
        ValueError,
        r"a sum of Means.*Mean\(pooled.total, pooled.weight\)",
    ),
    "one of several of a vector": (
        lambda p, b: [gradacc.Mean(linear(p, b), 2), gradacc.Mean(p["w"] * b["x"], 2)],
        ValueError,
        r"Mean whose total is a tensor of shape \(2,\)",
    ),
    "another number of Means": (
        lambda p, b: [gradacc.Mean(linear(p, b), 2)] * (1 + int(b["x"][0])),
        ValueError,
        r"several means as .* for one micro-batch and as .* for another.*a Mean of weight 0",
    ),
    "a Mean, then several": (
        lambda p, b: gradacc.Mean(linear(p, b), 1) if b["x"][0] == 0 else [gradacc.Mean(linear(p, b), 1)],
        TypeError,
        "a Mean for one micro-batch and several Means for another",
    ),
    "tuple of losses": (
        lambda p, b: (linear(p, b), linear(p, b)),
        TypeError,
        "a tuple of 2; pass has_aux=True .* Or are they several losses. Return each as a gradacc.Mean.*or their sum",
    ),
    "two kinds": (
        lambda p, b: gradacc.Mean(linear(p, b), 1) if b["x"][0] == 0 else linear(p, b),
        TypeError,
        "a Mean for one micro-batch and a tensor for another",
    ),
}
READS_VALUES = {"NaN weight"}
"""Floating tensors whose values cannot be read while a transform is active: there, these are not errors."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", LOSSES)
def test_bad_losses(case, engine):
    loss, error, message = LOSSES[case]
    if engine == "functional" and case in READS_VALUES:
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(PARAMS, BATCH))
        return
    before = fingerprint((PARAMS, BATCH))
    with pytest.raises(error, match=f"(?s)^accumulate: .*{message}"):
        ENGINES[engine](lambda: gradacc.accumulate(loss, steps=2)(PARAMS, BATCH))
    assert fingerprint((PARAMS, BATCH)) == before


def test_a_mean_is_not_a_sum():
    with pytest.raises(ValueError, match="leave reduction='sum' out"):
        gradacc.accumulate(mean(linear, lambda p, b: 2), steps=2, reduction="sum")(PARAMS, BATCH)


@pytest.mark.parametrize(
    "out", [lambda p, b: linear(p, b), lambda p, b: (linear(p, b), 1, 2), lambda p, b: [linear(p, b), 1]]
)
def test_has_aux_needs_a_pair(out):
    with pytest.raises(TypeError, match=r"with has_aux=True loss_fn must return \(loss, aux\), got"):
        gradacc.accumulate(out, steps=2, has_aux=True)(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("out", "kind"),
    [
        (lambda m: (m, m, m), "must return .* a tuple of 3 Means; several means are one loss"),
        (lambda m: [m, m], "must return .* a list of 2 Means; several means are one loss"),
    ],
)
def test_several_means_and_aux_name_what_works(out, kind):
    with pytest.raises(TypeError, match=kind):
        gradacc.accumulate(lambda p, b: out(gradacc.Mean(linear(p, b), 2)), steps=2, has_aux=True)(PARAMS, BATCH)
