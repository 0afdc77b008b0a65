"""`gradacc.testing`: every cause is found out, nothing passed in is changed, strategies give what they promise."""

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradacc
from gradacc.testing import Report, check_accumulation
from tests.helpers import fingerprint
from tests.testing.cases import F64, data


def least_squares(p: Any, b: Any) -> Tensor:
    return (b["x"] @ p["w"] + p["b"] - b["y"]).square().mean()


def tokens(p: Any, b: Any) -> gradacc.Mean:
    losses = (b["x"] * p["w"] + p["b"]).square() * b["mask"]
    return gradacc.Mean(losses.sum(), b["mask"].sum())


def token_mean(p: Any, b: Any) -> Tensor:
    return tokens(p, b).value


def class_weighted(p: Any, b: Any, reduction: str = "mean") -> Tensor:
    weights, y = torch.arange(1, 6, dtype=F64), b["mask"].sum(dim=1) - 1
    return F.cross_entropy(
        b["x"] * p["w"] + b["y"][:, None] * p["b"] * torch.arange(5), y, weights, reduction=reduction
    )


def class_weighted_as_mean(p: Any, b: Any) -> gradacc.Mean:
    weights, y = torch.arange(1, 6, dtype=F64), b["mask"].sum(dim=1) - 1
    return gradacc.Mean(class_weighted(p, b, "sum"), weights[y].sum())


def sum_squares(p: Any, b: Any) -> Tensor:
    return (b["x"] @ p["w"] + p["b"] - b["y"]).square().sum()


def penalty(p: Any) -> Tensor:
    return p["w"].square().sum() + p["b"].square()


def contrastive(p: Any, b: Any) -> Tensor:
    left, right = F.normalize(b["x"] * p["w"], dim=1), F.normalize(b["x"] + p["b"], dim=1)
    return F.cross_entropy(5 * left @ right.T, torch.arange(len(left)))


def standardized(p: Any, b: Any) -> Tensor:
    z = b["x"] @ p["w"]
    return ((z - z.mean()) / z.std() * p["b"] - b["y"]).square().mean()


def dropped(p: Any, b: Any) -> Tensor:
    return (F.dropout(b["x"], 0.5) @ p["w"] + p["b"]).square().mean()


def noisy(draw: Callable[[int], Any]) -> Callable[..., Tensor]:
    return lambda p, b: least_squares(p, b) + p["w"].sum() * torch.as_tensor(draw(len(b["y"]))).mean()


def counting() -> Callable[..., Tensor]:
    calls = itertools.count(1)
    return lambda p, b: least_squares(p, b) * next(calls)


def with_own_generator() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda p, b: least_squares(p, b) * torch.rand((), generator=generator)


def ill_conditioned(p: Any, b: Any) -> Tensor:
    return (b["x"] @ p["w"] + 3e4 - b["y"]).square().mean() - 9e8


def closing_over(identity: Tensor) -> Callable[..., Tensor]:
    return lambda p, b: token_mean({"w": identity @ p["w"], "b": p["b"]}, b)


def full_rows(p: Any, b: Any) -> Tensor:  # a mean over the rows of 5 tokens: NaN where there are none
    return (b["x"] @ p["w"] + p["b"])[b["mask"][:, 4]].square().mean()


def signed(p: Any, b: Any) -> Tensor:  # a weighted mean, which no Mean can be: a negative weight is refused
    signs = b["mask"].sum(dim=1) - 2
    return ((b["x"] @ p["w"] + p["b"] - b["y"]).square() * signs).sum() / signs.sum()


def largest(p: Any, b: Any) -> Tensor:
    return (b["x"] @ p["w"] + p["b"] - b["y"]).square().max()


def batch_norm(dtype: torch.dtype = F64, norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), norm(4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def of_module(module: nn.Module, call: Callable[..., Any]) -> tuple[Callable[..., Tensor], Any]:
    params = {name: param.detach() for name, param in module.named_parameters()}
    return (lambda p, b: (call(p, b["x"])[:, 0] - b["y"]).square().mean()), params


class Case(NamedTuple):
    loss: Callable[..., Any]
    cause: str | None
    fix: str = ""
    why: str = ""
    dtype: torch.dtype = F64
    examples: int = 9
    options: dict[str, Any] = {}  # noqa: RUF012  # only read


def mean_of_total(p: Any, b: Any) -> gradacc.Mean:
    return gradacc.Mean(token_mean(p, b), b["mask"].sum())


def wrong_weight(p: Any, b: Any) -> gradacc.Mean:
    return gradacc.Mean(token_mean(p, b) * len(b["y"]), len(b["y"]))


def counting_in_a_carry(p: Any, b: Any, carry: Any) -> Any:
    seen = {"moments": gradacc.Moments.of(b["x"], 0), "mean": gradacc.Mean(b["y"].sum(), len(b["y"]))}
    return least_squares(p, b), {**seen, "calls": carry["calls"] + 1}


def adding_what_was_given(p: Any, b: Any, carry: Any) -> Any:
    loss, new = counting_in_a_carry(p, b, carry)
    return loss, new | {"mean": carry["mean"] + new["mean"]}


def reading_its_carry(p: Any, b: Any, carry: Any) -> Any:
    loss, new = counting_in_a_carry(p, b, carry)
    return loss * (1 + carry["calls"]), new


ZEROS = torch.zeros(5, dtype=F64)
CARRIED: dict[str, Any] = {
    "has_carry": True,
    "carry": {
        "moments": gradacc.Moments(0, ZEROS, ZEROS),
        "mean": gradacc.Mean(torch.ones((), dtype=F64), 1),
        "calls": torch.zeros((), dtype=F64),
    },
}


CASES = {
    "a carry": Case(counting_in_a_carry, None, options=CARRIED),
    "a carry, float32": Case(
        lambda p, b, carry: (least_squares(p, b), gradacc.Moments.of(b["x"], 0)),
        None,
        dtype=torch.float32,
        options={"has_carry": True, "carry": gradacc.Moments(0, ZEROS.float(), ZEROS.float())},
    ),
    "a carry that the loss reads": Case(
        reading_its_carry, "carry", "a further argument", "gets the carry that the call begins with", options=CARRIED
    ),
    "a Mean of a carry that is added twice": Case(
        adding_what_was_given, "aux", "in the carry what the micro-batch itself adds", options=CARRIED
    ),
    "token mean with a carry": Case(
        lambda p, b, carry: (token_mean(p, b), carry),
        "weights",
        "gradacc.Mean",
        options={"has_carry": True, "carry": torch.zeros(())},
    ),
    "least squares": Case(least_squares, None),
    "least squares, float32": Case(least_squares, None, dtype=torch.float32),
    "least squares, bfloat16": Case(least_squares, None, dtype=torch.bfloat16),
    "two examples": Case(least_squares, None, examples=2),
    "token Mean": Case(tokens, None),
    "mean and penalty": Case(lambda p, b: least_squares(p, b) + penalty(p), None),
    "sum": Case(sum_squares, None, options={"reduction": "sum"}),
    "zero loss": Case(lambda p, b: 0.0 * least_squares(p, b), None),
    "accumulated in float32": Case(least_squares, None, options={"dtype": torch.float32}),
    "token mean": Case(token_mean, "weights", "gradacc.Mean(loss_sum, number)", "30% : 22% : 33% : 15%", examples=12),
    "token mean, two examples": Case(token_mean, "weights", "gradacc.Mean", "17% : 83%", examples=2),
    "token mean, three examples": Case(token_mean, "weights", "gradacc.Mean", ": 62% : 25%, and not 33%", examples=3),
    "token mean, float32": Case(token_mean, "weights", "gradacc.Mean", dtype=torch.float32),
    "token mean, bfloat16": Case(token_mean, "weights", "gradacc.Mean", dtype=torch.bfloat16),
    "token mean, float64 refused": Case(closing_over(torch.eye(5)), "weights", "gradacc.Mean", dtype=torch.float32),
    "token mean as a sum": Case(token_mean, "weights", 'leave reduction="sum" out', options={"reduction": "sum"}),
    "class weights": Case(class_weighted, "weights", "Mean(sum of the weighted losses, w[y].sum())", examples=12),
    "class weights as the fix says": Case(class_weighted_as_mean, None, examples=12),
    "Mean of another weight": Case(wrong_weight, "weights", "gradacc.Mean", "not over the weights of its Mean"),
    "Mean of a mean": Case(mean_of_total, "weights", "with the sum as total", "total is itself a mean"),
    "sum as a mean": Case(sum_squares, "reduction", 'pass reduction="sum"'),
    "mean as a sum": Case(least_squares, "reduction", 'leave reduction="sum" out', options={"reduction": "sum"}),
    "sum and penalty": Case(
        lambda p, b: sum_squares(p, b) + penalty(p), "constant", "after accumulating", options={"reduction": "sum"}
    ),
    "Mean and penalty": Case(
        lambda p, b: gradacc.Mean(tokens(p, b).total + penalty(p), b["mask"].sum()), "constant", "", "total of the Mean"
    ),
    "root of a mean": Case(lambda p, b: least_squares(p, b).sqrt(), "nonlinear", "apply the function f afterwards"),
    "in-batch negatives": Case(
        contrastive, "interaction", "negatives", "Confirmed: changing the data of one half of the batch"
    ),
    "in-batch negatives of any length": Case(
        lambda p, b: contrastive({"w": p["w"], "b": 0.0}, {"x": F.normalize(b["x"], dim=1)}),
        "interaction",
        "negatives",
        "Confirmed: changing the data of one half of the batch",
    ),
    "statistics by hand": Case(standardized, "interaction", "GroupNorm", "changing the data of one half of the batch"),
    "in-batch negatives over integers": Case(
        lambda p, b: contrastive(p, {"x": F.one_hot(b["mask"].sum(dim=1), 5 + 1)[:, 1:].to(F64)}),
        "interaction",
        "negatives",
        "repeating every example once changes the result",
    ),
    "means over different things": Case(
        lambda p, b: token_mean(p, b) + least_squares(p, b),
        "unknown",
        "all of them in a tuple, list or dict",
        "over tokens",
    ),
    "weights of both signs": Case(signed, "unknown", "", "no weights make"),
    "largest loss": Case(largest, "unknown", "needs the whole batch", "a maximum"),
    "dropout": Case(dropped, "randomness", "switch only the randomness off (p=0)"),
    "Python's random": Case(noisy(lambda _: random.random()), "randomness"),
    "NumPy's random": Case(noisy(lambda n: np.random.rand(n)), "randomness"),
    "a counter": Case(counting(), "state", "make what it reads an argument"),
    "a Generator of its own": Case(with_own_generator(), "state"),
    "cancellation, float32": Case(ill_conditioned, "rounding", "float64", "in float64 the error of", torch.float32),
    "a tolerance below rounding": Case(
        least_squares, "rounding", "", "of rounding in this dtype", options={"rtol": 1e-17}
    ),
    "float32 for float64": Case(
        least_squares, "rounding", "rtol=", "in float64 the error", options={"dtype": torch.float32, "rtol": 1e-12}
    ),
    "logarithm of a negative": Case(lambda p, b: least_squares(p, b).neg().log(), "nonfinite", "set_detect_anomaly"),
    "NaN everywhere": Case(lambda p, b: least_squares(p, b) * math.nan, "nonfinite", "", "in its value"),
    "micro-batches that count nothing": Case(
        lambda p, b: full_rows(p, b).nan_to_num(), "weights", "Mean", "count 50% : 0% : 0% : 50%"
    ),
    "micro-batches of nothing": Case(full_rows, "weights", "Mean", "50% : 0% : 0% : 50%"),
    "micro-batches of nothing, float32": Case(full_rows, "weights", "Mean", "50% : 0%", dtype=torch.float32),
}


@pytest.mark.parametrize("exact_statistics", [False, True])
def test_batch_norm_s_statistics_are_a_carry_and_its_normalisation_connects_examples(exact_statistics: bool) -> None:
    batch, options = data()[1], {"has_carry": True}
    module = batch_norm()
    if exact_statistics:
        apply, params, carry, _ = gradacc.batch_norm(module)
    else:
        plain, params, carry = gradacc.functional(module)

        def apply(params: Any, x: Tensor, carry: Any) -> Any:
            return plain(params, x, buffers=carry)

    def loss(p: Any, b: Any, carry: Any) -> Any:
        out, new = apply(p, b["x"], carry=carry)
        return (out[:, 0] - b["y"]).square().mean(), new

    before = fingerprint((params, carry, dict(module.named_buffers())))
    report = check_accumulation(loss, params, batch, carry=carry, **options)
    assert (report.cause, report.exact) == ("interaction", False)
    assert "through BatchNorm1d in training mode: in evaluation mode every split is exact" in report.why
    assert "GroupNorm or LayerNorm" in report.fix
    assert fingerprint((params, carry, dict(module.named_buffers()))) == before
    assert module.training
    module.eval()
    assert check_accumulation(loss, params, batch, carry=carry, **options).exact


def test_a_carry_and_has_carry_go_together() -> None:
    params, batch = data()
    with pytest.raises(TypeError, match="needs the carry to begin with: check_accumulation"):
        check_accumulation(counting_in_a_carry, params, batch, has_carry=True)
    with pytest.raises(TypeError, match="pass both, or neither"):
        check_accumulation(least_squares, params, batch, carry=ZEROS)
    with pytest.raises(TypeError, match=r"carry is 3"):
        check_accumulation(counting_in_a_carry, params, batch, has_carry=True, carry=3)


@pytest.mark.parametrize("name", CASES)
def test_verdict_and_cause(name: str) -> None:
    case = CASES[name]
    params, batch = data(case.dtype, case.examples)
    report = check_accumulation(case.loss, params, batch, **case.options)
    assert report.cause == case.cause, str(report)
    assert report.exact is (case.cause is None)
    assert bool(report) is report.exact
    assert case.fix in report.fix
    assert case.why in report.why
    if case.cause is not None:
        assert report.why.endswith(".")
        assert report.fix.endswith(".")


def test_a_mask_of_floats_is_no_data() -> None:
    params, batch = data()
    report = check_accumulation(
        lambda p, b: token_mean(p, b) + least_squares(p, b), params, batch | {"mask": batch["mask"].to(F64)}
    )
    assert report.cause == "unknown"
    assert "does not depend on the data of the other half" in report.why


def test_errors_are_the_documented_norms() -> None:
    params, batch = data(examples=4)
    grads, value = gradacc.accumulate_and_value(token_mean, steps=2)(params, batch)
    large, whole = torch.func.grad_and_value(token_mean)(params, batch)
    norm = math.hypot(large["w"].norm(), large["b"])
    expected = {k: float((grads[k] - large[k]).norm() / max(large[k].norm(), 0.01 * norm)) for k in ("w", "b")}
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    typical = sum(abs(token_mean(params, part)) for part in parts) / 2
    (split,) = check_accumulation(token_mean, params, batch, steps=2).splits
    worst = max(expected, key=expected.__getitem__)
    assert split.worst == f"params['{worst}']"
    torch.testing.assert_close(split.grad_error, expected[worst])
    torch.testing.assert_close(split.value_error, float(abs(value - whole) / max(abs(whole), typical)))
    assert split.sizes == (2, 2)


def test_a_leaf_that_is_nothing_but_rounding_is_exact() -> None:
    def softmax(p: Any, b: Any) -> Tensor:  # the gradient of the shift is zero, but for rounding
        return F.cross_entropy(b["x"] * p["w"] + p["b"], b["mask"].sum(dim=1) - 1)

    params, batch = data(torch.float32)
    report = check_accumulation(softmax, params, batch)
    assert 0 < gradacc.accumulate(softmax, steps=1)(params, batch)["b"].abs() < 1e-6
    assert report.exact, str(report)


def test_at_the_optimum_the_gradient_is_nothing_but_rounding() -> None:
    _, batch = data()
    design = torch.cat([batch["x"], torch.ones(9, 1, dtype=F64)], dim=1)
    solution = torch.linalg.lstsq(design, batch["y"][:, None]).solution[:, 0]
    report = check_accumulation(least_squares, {"w": solution[:5], "b": solution[5]}, batch)
    assert report.cause == "rounding"
    assert "nearly cancel" in report.why


def test_steps_and_sizes() -> None:
    report = check_accumulation(least_squares, *data(examples=9), steps=(1, 4, 20, 7))
    assert [split.sizes for split in report.splits] == [(9,), (3, 2, 2, 2), (1,) * 9, (2, 2, 1, 1, 1, 1, 1)]
    assert [split.steps for split in check_accumulation(least_squares, *data(), steps=5).splits] == [5]


@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1.5e-8), (torch.float32, 3.5e-4), (torch.bfloat16, 3.2e-2)])
def test_the_tolerance_comes_from_the_coarsest_dtype(dtype: torch.dtype, rtol: float) -> None:
    params, batch = data(dtype)
    report = check_accumulation(least_squares, params, batch)
    assert report.rtol == pytest.approx(rtol, rel=0.05)
    assert str(dtype).endswith(report.dtype)
    assert check_accumulation(token_mean, params, batch, rtol=10.0).exact


def test_aux_is_compared() -> None:
    def with_aux(p: Any, b: Any) -> Any:
        return tokens(p, b), {"residuals": b["x"] @ p["w"] - b["y"], "tokens": tokens(p, b)}

    def wrong_aux(p: Any, b: Any) -> Any:
        return least_squares(p, b), {"token loss": token_mean(p, b).detach()}

    report = check_accumulation(with_aux, *data(), has_aux=True)
    assert report.exact
    assert "aux" in str(report)
    assert all(split.aux_error is not None and split.aux_error < 1e-12 for split in report.splits)
    report = check_accumulation(wrong_aux, *data(), has_aux=True)
    assert report.cause == "aux"
    assert "gradacc.Mean" in report.fix
    assert all(split.grad_error < 1e-12 and split.aux_error > 1e-3 for split in report.splits)


def test_argnums_in_dims_and_further_arguments() -> None:
    def loss(x: Tensor, w: Tensor, scale: float, y: Tensor, v: dict[str, Tensor]) -> Tensor:
        return ((w @ x) * scale + v["v"][0] - y).square().mean()

    def padded(x: Tensor, w: Tensor, scale: float, y: Tensor, v: dict[str, Tensor]) -> Tensor:
        return (((w @ x) * scale + v["v"][0] - y).square() * (y > 0)).sum() / (y > 0).sum()

    params, batch = data()
    args = (batch["x"].T, params["w"], 2.0, batch["y"], {"v": params["b"][None]})
    options: Any = {"argnums": (1, 4), "in_dims": (1, None, None, 0, None)}
    assert check_accumulation(loss, *args, **options).exact
    report = check_accumulation(padded, *args, **options)
    assert report.cause == "weights"
    assert {split.worst for split in report.splits} <= {"args[1]", "args[4]['v']"}
    assert check_accumulation(lambda b, p: least_squares(p, b), batch, params, argnums=1).exact


def test_complex_parameters_and_tied_ones() -> None:
    params, batch = data()
    z = torch.complex(params["w"], params["w"].flip(0))

    def loss(p: Any, b: Any) -> Tensor:
        return (b["x"].to(p[0]) @ p[0] - b["y"] * p[1]["again"].sum()).abs().square().mean()

    assert check_accumulation(loss, (z, {"again": z}), batch).exact


def test_works_where_torch_func_refuses() -> None:
    module = batch_norm(norm=lambda width: nn.GroupNorm(2, width))  # type: ignore[arg-type]
    apply, params, _ = gradacc.functional(module)

    def call(p: Any, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(apply, p, x, use_reentrant=False)

    assert check_accumulation(of_module(module, call)[0], params, data()[1]).exact


@pytest.mark.parametrize(("functional", "dtype"), [("gradacc", F64), ("torch", torch.float32)])
def test_batch_norm_is_named_and_left_as_it_was(functional: str, dtype: torch.dtype) -> None:
    module = batch_norm(dtype)
    if functional == "gradacc":
        call = gradacc.functional(module)[0]
    else:
        call = lambda p, x: torch.func.functional_call(module, p, (x,))  # noqa: E731
    loss, params = of_module(module, call)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = check_accumulation(loss, params, data(dtype)[1])
    assert report.cause == "interaction"
    assert "BatchNorm1d in training mode: in evaluation mode every split is exact" in report.why
    assert "GroupNorm" in report.fix
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()
    assert check_accumulation(loss, params, data(dtype)[1]).exact


def test_dropout_hides_batch_norm_until_only_dropout_is_off() -> None:
    module = batch_norm().append(nn.Dropout(0.5))
    loss, params = of_module(module, gradacc.functional(module)[0])
    report = check_accumulation(loss, params, data()[1])
    assert report.cause == "randomness"
    assert "eval()" not in report.fix  # that would switch BatchNorm off, too
    assert str(report).endswith("\nOther causes may hide behind this one: fix it, and check again.")
    module[-1].p = 0.0
    assert check_accumulation(loss, params, data()[1]).cause == "interaction"


@pytest.mark.parametrize(
    ("loss", "line"), [(contrastive, True), (counting(), True), (token_mean, False), (least_squares, False)]
)
def test_only_what_may_hide_another_cause_says_so(loss: Any, line: bool) -> None:
    assert ("Other causes may hide" in str(check_accumulation(loss, *data()))) is line


def test_state_that_a_module_keeps_is_found_out_and_put_back() -> None:
    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.calls += 1
            self.cache = x
            return x * self.calls

    class Loss:  # reached through a bound method, an attribute, a list and a partial
        def __init__(self, *modules: nn.Module) -> None:
            self.modules = list(modules)

        def __call__(self, p: Any, b: Any) -> Tensor:
            return least_squares({"w": self.modules[0](p["w"]), "b": p["b"]}, b)

    warmup = Warmup()
    report = check_accumulation(Loss(warmup).__call__, *data())
    assert report.cause == "state"
    assert warmup.calls == 0
    assert warmup.seen == 0
    assert not hasattr(warmup, "cache")


def test_what_a_module_s_containers_hold_is_put_back() -> None:
    """Lists, nested dicts, sets, hooks, submodules that a forward pass adds."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=torch.float64)
            self.losses: list[Tensor] = []
            self.table: dict[str, list[int]] = {"seen": [1]}
            self.kinds: set[str] = set()
            self.hooked = False

        def forward(self, x: Tensor) -> Tensor:
            self.losses.append(x.mean().detach())
            self.table["seen"].append(2)
            self.table["more"] = []
            self.kinds.add("x")
            self.add_module("late", nn.Tanh())
            if not self.hooked:
                self.linear.register_forward_hook(lambda module, args, output: None)
                self.hooked = True
            return x + 0.0 * self.linear(x)

    module = Collects()
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    report = check_accumulation(lambda w, b: (module(b) @ w).square().mean(), torch.ones(3, dtype=torch.float64), x)
    assert report.exact
    assert module.losses == []
    assert module.table == {"seen": [1]}
    assert module.kinds == set()
    assert list(module._modules) == ["linear"]
    assert not module.linear._forward_hooks
    assert not module.hooked


@pytest.mark.parametrize("size", [12, 3000])
@pytest.mark.parametrize("name", ["dice", "f1", "iou"])
def test_ratios_of_sums_over_the_batch(name: str, size: int) -> None:
    """Also of many alike examples, where weights nearly explain the large batch."""

    def loss(w: Tensor, batch: dict[str, Tensor]) -> Tensor:
        p, y = torch.sigmoid(batch["x"] @ w), batch["y"]
        hits = (p * y).sum()
        if name == "dice":
            return 1 - (2 * hits + 1) / (p.sum() + y.sum() + 1)
        if name == "f1":
            each = (p * y).sum(0)
            return 1 - (2 * each / (p.sum(0) + y.sum(0))).mean()
        return 1 - hits / (p.sum() + y.sum() - hits)

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(size, 5, generator=g), torch.randn(5, 3, generator=g)
    y = (torch.rand(size, 3, generator=g) > 0.6).float()
    assert check_accumulation(loss, w, {"x": x, "y": y}).cause == "interaction"


def test_a_small_term_is_seen_in_float64() -> None:
    """Of 1e-6 of the gradient: float32 takes it for rounding, and says so."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        y = x @ w
        return y.square().mean() + 1e-4 * (y[:, None] * y).sin().mean()

    x, w = torch.arange(36.0).view(12, 3).sin(), torch.ones(3)
    single = check_accumulation(loss, w, x)
    assert single.exact
    assert "not seen in float32: double=True" in str(single)
    double = check_accumulation(loss, w, x, double=True)
    assert double.dtype == "float64"
    assert double.cause == "interaction"
    assert "double=True" not in str(check_accumulation(least_squares, *data(), double=True))
    with pytest.raises(RuntimeError, match="dtype") as refused:
        check_accumulation(lambda w, x: (x @ w + torch.ones(3) @ w).square().mean(), w, x, double=True)
    assert "with double=True; as it was given, the large batch went through" in str(refused.value.__notes__)


def test_nothing_passed_in_is_changed() -> None:
    def in_place(p: Any, b: Any) -> Tensor:
        b["x"].mul_(0.5)
        return dropped(p, b) + noisy(lambda n: np.random.rand(n) * random.random())(p, b)

    params, batch = data()
    params["w"].requires_grad_()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    before = fingerprint((params, batch))
    for loss in (in_place, token_mean, least_squares, contrastive):
        check_accumulation(loss, params, batch)
        assert fingerprint((params, batch)) == before
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), states[2])


def test_the_random_state_is_put_back_when_the_loss_raises() -> None:
    def fails(p: Any, b: Any) -> Tensor:
        if len(b["y"]) == 1:
            raise RuntimeError("one is too few")
        return dropped(p, b)

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="one is too few") as caught:
        check_accumulation(fails, *data(), steps=(2, 9))
    assert caught.value.__notes__ == ["check_accumulation: with steps=9; the large batch went through"]
    assert torch.equal(torch.get_rng_state(), state)


def test_every_call_starts_from_the_same_random_state() -> None:
    torch.manual_seed(5)
    assert check_accumulation(dropped, *data(), steps=1).exact
    first, second = (check_accumulation(dropped, *data()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradient_modes(context: Any) -> None:
    with context():
        params, batch = data()
        assert check_accumulation(least_squares, params, batch).exact
        assert check_accumulation(token_mean, params, batch).cause == "weights"


def test_raise_if_inexact() -> None:
    check_accumulation(least_squares, *data()).raise_if_inexact()
    report = check_accumulation(token_mean, *data())
    with pytest.raises(AssertionError) as caught:
        report.raise_if_inexact()
    assert str(caught.value) == str(report)


def test_the_text_is_an_aligned_table() -> None:
    report = check_accumulation(token_mean, *data(), steps=(2, 12))
    verdict, head, *rows, tolerance, why, more = str(report).partition("\nFix: ")[0].splitlines()
    assert verdict == "Accumulation is NOT exact (weights)."
    assert head.split("  ")[0] == "steps"
    assert [row.split()[0] for row in rows] == ["2", "12"]
    assert "1, 1, ..., 1" in rows[1]
    column = head.index("verdict")
    assert {row[column : column + 7] for row in rows} == {"INEXACT"}
    assert all(row[head.index("worst leaf") :].startswith("params['") for row in rows)
    assert tolerance.startswith(
        "Errors are relative to the large batch (gradient: the worst leaf, relative to that leaf); "
    )
    assert tolerance.endswith("tolerance 1.5e-08 (float64).")
    assert why.startswith("Why: ")
    assert more.startswith("     ")
    assert "Fix: return gradacc.Mean" in str(report)
    exact = str(check_accumulation(least_squares, *data()))
    assert exact.startswith("Accumulation is exact.\n")
    assert "Why" not in exact


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"microbatch_size": 2}, ValueError, "splits the batch itself; say how with steps"),
        ({"split": list}, ValueError, "leave split out"),
        ({"momentum": 2}, TypeError, "there is no option 'momentum'"),
        ({"sync": None}, TypeError, "there is no option 'sync'"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": (2, 2.5)}, TypeError, "steps must be an int, got 2.5"),
        ({"steps": True}, TypeError, "steps must be an int"),
        ({"steps": ()}, ValueError, "steps is empty"),
        ({"rtol": -1.0}, ValueError, "rtol must be a number >= 0"),
        ({"rtol": "small"}, ValueError, "rtol must be a number >= 0"),
        ({"reduction": "max"}, ValueError, "check_accumulation: reduction must be"),
        ({"argnums": 7}, ValueError, "argnums=7 does not fit"),
    ],
)
def test_bad_options(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_accumulation(least_squares, *data(), **options)


def test_bad_arguments() -> None:
    params, batch = data()
    with pytest.raises(ValueError, match="the batch has 1 examples; a split needs at least 2"):
        check_accumulation(least_squares, *data(examples=1))
    with pytest.raises(ValueError, match="meta tensors"):
        check_accumulation(least_squares, {"w": torch.zeros(5, device="meta"), "b": params["b"]}, batch)
    with pytest.raises(TypeError, match=r"params\['w'\] is a tensor of dtype torch.int64"):
        check_accumulation(least_squares, {"w": torch.ones(5, dtype=torch.int64), "b": params["b"]}, batch)
    with pytest.raises(TypeError, match=r"args\[1\]\['w'\] is a tensor of dtype torch.int64"):
        check_accumulation(lambda b, p: least_squares(p, b), batch, {"w": torch.ones(5, dtype=torch.int64)}, argnums=1)
    with pytest.raises(ValueError, match="split dimensions differ"):
        check_accumulation(least_squares, params, batch | {"y": batch["y"][:3]})
    with pytest.raises(ValueError, match="it must be 0-dim"):
        check_accumulation(lambda p, b: b["x"] @ p["w"], params, batch)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        check_accumulation(lambda p, b: b["x"].mean(), params, batch)
    with pytest.raises(TypeError, match="pass has_aux=True"):
        check_accumulation(lambda p, b: (least_squares(p, b), 1), params, batch)
    with pytest.raises(ValueError, match="under a functorch transform"):
        torch.func.vmap(lambda y: check_accumulation(least_squares, params, batch | {"y": y}))(batch["y"][None])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda batch: [batch, batch], "list"),
        (lambda batch: (batch, {name: leaf[:4] for name, leaf in batch.items()}), "tuple"),
        (lambda batch: iter([batch]), "list_iterator"),
    ],
)
def test_micro_batches_are_not_one_batch(make: Callable[[Any], Any], kind: str) -> None:
    params, batch = data()
    with pytest.raises(TypeError, match=f"the batch is a {kind} of micro-batches. Pass one whole batch.*the indices"):
        check_accumulation(least_squares, params, make(batch))


def test_a_batch_that_is_a_tuple_is_one_batch() -> None:
    def pair(p: Any, b: Any) -> Tensor:
        x, y = b
        return least_squares(p, {"x": x, "y": y})

    params, batch = data()
    assert check_accumulation(pair, params, (batch["x"], batch["y"])).exact
    with pytest.raises(KeyError, match="oops"):  # the loss's own error stays
        check_accumulation(lambda p, b: p["oops"] * b[0].sum(), params, (batch["x"], batch["y"]))


def test_a_report_is_a_frozen_value() -> None:
    report = check_accumulation(least_squares, *data())
    assert isinstance(report, Report)
    assert report == check_accumulation(least_squares, *data())
    with pytest.raises(AttributeError):
        report.cause = "weights"  # type: ignore[misc]


def test_gradacc_imports_testing_when_it_is_used_and_hypothesis_is_optional() -> None:
    program = """
import sys
import torch, gradacc
assert "testing" in dir(gradacc)
assert not {"hypothesis", "gradacc.testing"} & set(sys.modules)
assert not hasattr(gradacc, "tests")
gradacc.testing                                                   # imports it
assert "hypothesis" not in sys.modules
sys.modules["hypothesis"] = None                                  # as if it were not installed
assert gradacc.testing.check_accumulation(lambda w, x: (w * x).mean(), torch.ones(()), torch.arange(4.0)).exact
assert "splits" in dir(gradacc.testing)
try:
    gradacc.testing.splits
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == 'gradacc.testing.splits needs Hypothesis: pip install "gradacc[testing]"\n', done.stderr
