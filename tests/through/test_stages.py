"""The three stages of a call in the eager engine: what is run again, with what, and what is found out."""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import Mean
from tests.helpers import PeakElements, fingerprint, living_tensors
from tests.through import cases

SIZE = 7


def counted(encode: Any) -> Any:
    """And the sizes for which it was called."""
    calls: list[int] = []

    @functools.wraps(encode)
    def counting(params: Any, batch: Any) -> Any:
        calls.append(len(batch["label"]))
        return encode(params, batch)

    return counting, calls


def expected(encode: Any, loss: Any, batch: Any, params: Any) -> Any:
    return torch.func.grad(lambda p: cases.value(loss(p, encode(p, batch), batch)))(params)


# What is encoded, and how often.


def test_each_micro_batch_is_encoded_twice() -> None:
    encode, calls = counted(cases.encode)
    gradacc.accumulate(cases.clip, through=encode, steps=3)(cases.params(), cases.batch(SIZE))
    assert calls == [3, 2, 2] * 2


def test_an_encoder_with_one_micro_batch_is_run_once() -> None:
    image, images = counted(cases.encode_image)
    text, texts = counted(cases.encode_text)
    grad_fn = gradacc.accumulate(
        cases.clip, through={"image": image, "text": text}, microbatch_size={"image": 3, "text": 256}
    )
    params, batch = cases.params(), cases.batch(SIZE)
    torch.testing.assert_close(grad_fn(params, batch), expected(cases.encode, cases.clip, batch, params))
    assert (images, texts) == ([3, 3, 1] * 2, [7])


@pytest.mark.parametrize("why", ["frozen", "detached by the loss", "not used", "weight 0"])
def test_what_has_no_cotangent_is_not_encoded_again(why: str) -> None:
    params, batch = cases.params(), cases.batch(SIZE)
    frozen = params["v"].clone()

    def encode_text(params: Any, batch: Any) -> Tensor:
        return cases.encode_text({"v": frozen} if why == "frozen" else params, batch)

    def loss(params: Any, outputs: Any, batch: Any) -> Any:
        if why == "detached by the loss":
            outputs = {**outputs, "text": outputs["text"].detach()}
        if why == "not used":
            return outputs["image"].std()
        value = cases.clip(params, outputs, batch)
        return Mean(value, 0) if why == "weight 0" else value

    image, images = counted(cases.encode_image)
    text, texts = counted(encode_text)
    grads = gradacc.accumulate(loss, through={"image": image, "text": text}, steps=2)(params, batch)
    assert texts == [4, 3]
    assert images == [4, 3] * (1 if why == "weight 0" else 2)

    def encode(params: Any, batch: Any) -> Any:
        return {"image": cases.encode_image(params, batch), "text": encode_text(params, batch)}

    if why == "weight 0":
        assert not any(grad.any() for grad in grads.values())
    else:
        torch.testing.assert_close(grads, expected(encode, loss, batch, params))


def test_micro_batches_are_decided_once() -> None:
    params, batch = cases.params(), cases.batch(SIZE)
    cuts = iter([[3, 4], [1, 6]])

    def split(batch: Any) -> Any:
        parts = {key: leaf.split(next_cut) for next_cut in [next(cuts)] for key, leaf in batch.items()}
        return ({key: part[n] for key, part in parts.items()} for n in range(2))

    encode, calls = counted(cases.encode)
    grads = gradacc.accumulate(cases.clip, through=encode, split=split)(params, batch)
    assert calls == [3, 4, 3, 4]
    torch.testing.assert_close(grads, expected(cases.encode, cases.clip, batch, params))


# Memory.


def test_memory_is_that_of_a_micro_batch_and_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 64, generator=generator) / 8 for _ in range(6)]

    def encode(layers: list[Tensor], x: Tensor) -> Tensor:
        for weight in layers:
            x = (x @ weight).sin()
        return x[:, :2].clone()

    def loss(layers: list[Tensor], outputs: Tensor, x: Tensor) -> Tensor:
        return outputs.std(0).sum()

    peaks = {}
    for through in (False, True):
        for size in (32, 256):
            x = torch.randn(size, 64, generator=generator)
            grad_fn = gradacc.accumulate(loss, through=encode, microbatch_size=8 if through else size)
            with PeakElements() as counter:
                grad_fn(layers, x)
            peaks[through, size] = counter.peak
    assert peaks[False, 256] - peaks[False, 32] > 224 * 64 * 6
    # A few times the outputs: of 2 columns.
    assert peaks[True, 256] - peaks[True, 32] < 224 * 2 * 8


@pytest.mark.slow
def test_clip_of_16384_pairs_in_a_part_of_its_logits() -> None:
    """The loss of ``docs/through.md``, by rows."""
    size = 16384

    def direction(queries: Tensor, own: Tensor, keys: Tensor, scale: Tensor) -> Mean:
        return Mean(F.cross_entropy(scale.exp() * queries @ keys.T, own, reduction="sum"), len(own))

    by_rows = gradacc.microbatch(direction, microbatch_size=1024, in_dims=(0, 0, None, None))

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        own = torch.arange(len(outputs["image"]))
        return (
            by_rows(outputs["image"], own, outputs["text"], params["scale"]).value
            + by_rows(outputs["text"], own, outputs["image"], params["scale"]).value
        ) / 2

    def encode(params: Any, batch: Any) -> Any:
        return {key: F.normalize(leaf, dim=1) for key, leaf in cases.encode(params, batch).items()}

    params, batch = cases.params(torch.float32), cases.batch(size, torch.float32)
    grad_fn = gradacc.accumulate(loss, through=encode, microbatch_size=2048)
    with PeakElements() as counter:
        grads = grad_fn(params, batch)
    assert counter.peak < size * size / 6
    small = cases.batch(512, torch.float32)
    torch.testing.assert_close(grad_fn(params, small), expected(cases.encode, cases.clip, small, params))
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


def test_nothing_grows() -> None:
    params, batch = cases.params(), cases.batch(SIZE)
    grad_fn = gradacc.accumulate_and_value(cases.clip, through=cases.encode, steps=3)
    grad_fn(params, batch)
    before = living_tensors().keys()
    for _ in range(20):
        grad_fn(params, batch)
    assert not living_tensors().keys() - before


# Random numbers and autocast.


def dropout(params: Any, batch: Any) -> Any:
    return {key: F.dropout(leaf, 0.4) for key, leaf in cases.encode(params, batch).items()}


def test_random_numbers_are_drawn_again() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def noisy(params: Any, outputs: Any, batch: Any) -> Tensor:
        return cases.clip(params, outputs, batch) * torch.rand((), dtype=torch.float64)

    def whole(params: Any) -> Tensor:
        pieces = {key: leaf.split(3) for key, leaf in batch.items()}
        parts = [dropout(params, {key: piece[n] for key, piece in pieces.items()}) for n in range(3)]
        return noisy(params, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, batch)

    torch.manual_seed(5)
    reference, after = torch.func.grad(whole)(params), torch.get_rng_state()
    torch.manual_seed(5)
    grads = gradacc.accumulate(noisy, through=dropout, microbatch_size=3)(params, batch)
    torch.testing.assert_close(grads, reference)
    assert torch.equal(torch.get_rng_state(), after)


def test_random_numbers_of_each_of_several_encoders_are_drawn_again() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def noisy(key: str) -> Any:
        return lambda params, batch: dropout(params, batch)[key]

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        # The first is not encoded again.
        return cases.clip(params, {**outputs, "image": outputs["image"].detach()}, batch)

    through = {"image": noisy("image"), "text": noisy("text")}

    def whole(params: Any) -> Tensor:
        pieces = [{key: leaf.split([4, 3])[n] for key, leaf in batch.items()} for n in range(2)]
        outputs = {key: torch.cat([encode(params, piece) for piece in pieces]) for key, encode in through.items()}
        return loss(params, outputs, batch)

    torch.manual_seed(6)
    reference, after = torch.func.grad(whole)(params), torch.get_rng_state()
    torch.manual_seed(6)
    torch.testing.assert_close(gradacc.accumulate(loss, through=through, steps=2)(params, batch), reference)
    assert torch.equal(torch.get_rng_state(), after)


def test_autocast_is_that_of_the_first_run() -> None:
    params, batch = cases.params(torch.float32), cases.batch(SIZE, torch.float32)

    def encode(params: Any, batch: Any) -> Any:
        outputs = cases.encode(params, batch)
        assert outputs["image"].dtype == torch.bfloat16
        return outputs

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        return cases.clip(params, {key: leaf.float() for key, leaf in outputs.items()}, batch)

    with torch.autocast("cpu", torch.bfloat16):
        grads = gradacc.accumulate(loss, through=encode, steps=3)(params, batch)
        reference = expected(encode, loss, batch, params)
    torch.testing.assert_close(grads, reference, rtol=2e-2, atol=2e-3)


# Dtypes.


def test_half_precision_parameters_are_accumulated_in_float32() -> None:
    """Gradients 256, 1, -256 sum to 1: in bfloat16 the 1 is lost."""
    w = torch.ones(1, dtype=torch.bfloat16)
    x = torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    for dtype in (None, torch.float32):
        grad = gradacc.accumulate(
            lambda w, outputs, x: outputs.sum(), through=lambda w, x: w * x, microbatch_size=1, dtype=dtype
        )(w, x)
        assert grad.item() == 1
        assert grad.dtype == (dtype or torch.bfloat16)
    # What the loss takes directly is added to it in float32, too.
    grad = gradacc.accumulate(
        lambda w, outputs, x: outputs[:2].sum() + (w * 256).sum() * 1.0,
        through=lambda w, x: w * x,
        microbatch_size=1,
        dtype=torch.float32,
    )(w, x)
    assert grad.item() == 513


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_complex_outputs(dtype: torch.dtype) -> None:
    w = torch.randn(3, dtype=dtype)
    x = torch.randn(5, 3, dtype=dtype)

    def loss(w: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
        return (outputs @ outputs.mH).abs().square().mean()

    grad = gradacc.accumulate(loss, through=lambda w, x: x * w, steps=2)(w, x)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: loss(w, x * w, x))(w))


# What is given, and what comes back.


def test_inputs_are_unchanged_and_outputs_fresh() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        # Its own, to change in place; `clip` normalizes.
        outputs["image"] *= 2
        return cases.clip(params, outputs, batch)

    grad_fn = gradacc.accumulate_and_value(loss, through=cases.encode, steps=3)
    before = fingerprint((params, batch))
    first = grad_fn(params, batch)
    again = grad_fn(params, batch)
    assert fingerprint((params, batch)) == before
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for one, other in zip(first[0].values(), again[0].values(), strict=True):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    torch.testing.assert_close(first[0], expected(cases.encode, cases.clip, batch, params))


def test_aux_and_other_arguments_are_the_loss_s() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def loss(params: Any, outputs: Any, batch: Any, margin: float, *, factor: Tensor) -> Any:
        value = cases.clip(params, outputs, batch) * factor + margin
        return value, {
            "each": outputs["image"].sum(1),
            "mean": outputs["text"].mean(),
            "n": Mean(outputs["text"].sum(), 28),
        }

    grad_fn = gradacc.accumulate_and_value(loss, through=cases.encode, steps=3, has_aux=True)
    grads, (value, aux) = grad_fn(params, batch, 0.5, factor=torch.tensor(2.0, dtype=torch.float64))
    outputs = cases.encode(params, batch)
    torch.testing.assert_close(value, 2 * cases.clip(params, outputs, batch) + 0.5)
    torch.testing.assert_close(aux["each"], outputs["image"].sum(1))
    torch.testing.assert_close(aux["mean"], outputs["text"].mean())
    torch.testing.assert_close(aux["n"].value, outputs["text"].mean())
    half = {key: grad / 2 for key, grad in grads.items()}
    torch.testing.assert_close(half, expected(cases.encode, cases.clip, batch, params))


def test_arguments_may_be_in_any_place() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def loss(batch: Any, scale: Tensor, weights: Any, outputs: Any, other: Any) -> Tensor:
        raise AssertionError("outputs come before the batch")

    def right(outputs: Any, batch: Any, scale: Tensor, weights: Any) -> Tensor:
        return cases.clip({**weights, "scale": scale}, outputs, batch)

    def encode(batch: Any, scale: Tensor, weights: Any) -> Any:
        return cases.encode(weights, batch)

    weights = {key: params[key] for key in ("w", "v")}
    grad_fn = gradacc.accumulate(right, through=encode, steps=3, argnums=(2, 1))
    of_weights, of_scale = grad_fn(batch, params["scale"], weights)
    found = {**of_weights, "scale": of_scale}
    torch.testing.assert_close(found, expected(cases.encode, cases.clip, batch, params))
    with pytest.raises(TypeError):
        gradacc.accumulate(loss, through=encode, steps=3, argnums=(2, 1))(batch, params["scale"], weights)


def test_another_dimension_is_split() -> None:
    w, x = torch.randn(4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def loss(w: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
        return (outputs - outputs.mean()).square().sum() + x.sum()

    def encode(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(w @ x)

    grad = gradacc.accumulate(loss, through=encode, steps=4, in_dims=(None, 1))(w, x)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: loss(w, encode(w, x), x))(w))


def test_as_a_decorator_and_in_a_training_step() -> None:
    module = nn.Linear(5, 4, dtype=torch.float64)
    apply, params, _ = gradacc.functional(module)
    x = torch.randn(SIZE, 5, dtype=torch.float64)

    @gradacc.accumulate_and_value(through=lambda params, x: apply(params, x), microbatch_size=2)
    def grad_fn(params: Any, outputs: Tensor, x: Tensor) -> Tensor:
        return outputs.std(0).sum()

    optimizer = gradacc.optim.sgd(0.01)
    step = gradacc.train_step(grad_fn, optimizer)
    state = gradacc.TrainState(params, optimizer.init(params))
    losses = []
    for _ in range(5):
        state, metrics = step(state, x)
        losses.append(metrics["loss"].item())
    assert losses == sorted(losses, reverse=True)


def test_activation_checkpoints_inside_of_an_encoder() -> None:
    params, batch = cases.params(), cases.batch(SIZE)

    def encode(params: Any, batch: Any) -> Any:
        return checkpoint(cases.encode, params, batch, use_reentrant=False)

    grads = gradacc.accumulate(cases.clip, through=encode, steps=3)(params, batch)
    torch.testing.assert_close(grads, expected(cases.encode, cases.clip, batch, params))


def test_an_empty_batch_has_no_gradient() -> None:
    params, batch = cases.params(), cases.batch(0)
    grads, value = gradacc.accumulate_and_value(cases.siglip, through=cases.encode, steps=3)(params, batch)
    assert not any(grad.any() for grad in grads.values())
    assert value.value.isnan()


def test_a_mean_of_weight_0_has_none_either() -> None:
    """As without ``through``: the gradient of nothing is zero, the mean of nothing is NaN."""
    params, batch = cases.params(), cases.batch(SIZE)

    def loss(params: Any, outputs: Any, batch: Any) -> Mean:
        return Mean(cases.clip(params, outputs, batch), 0)

    for steps in (1, 3):
        grads, value = gradacc.accumulate_and_value(loss, through=cases.encode, steps=steps)(params, batch)
        assert not any(grad.any() for grad in grads.values())
        assert value.value.isnan()


# What is found out: NOTE [encoded twice].


def counting_up(how: str) -> Any:
    number = itertools.count()
    generator = torch.Generator().manual_seed(0)
    kept = torch.ones(SIZE, dtype=torch.float64)

    def encode(params: Any, batch: Any) -> Any:
        outputs = cases.encode(params, batch)
        n = next(number)
        if how == "a counter":
            return {**outputs, "text": outputs["text"] * (1 + 0.01 * n)}
        if how == "a generator of its own":
            noise = torch.rand(outputs["text"].shape, generator=generator, dtype=torch.float64)
            return {**outputs, "text": outputs["text"] + noise}
        if how == "structure":
            return outputs if n < 3 else {**outputs, "more": outputs["image"]}
        if how == "shape":
            return {**outputs, "text": outputs["text"] if n < 3 else outputs["text"][:, :2]}
        if how == "integers":
            return {**outputs, "text": outputs["text"], "n": torch.full((len(batch["label"]),), n)}
        kept.add_(1)  # "its own tensor"
        return outputs

    return encode


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a counter", r"returned another outputs\['text'\] \(by up to"),
        ("a generator of its own", r"returned another outputs\['text'\] \(by up to"),
        ("structure", "run again for the gradients, returned PyTreeSpec"),
        ("shape", r"outputs\['text'\] of shape \(3, 4\), then \(3, 2\)"),
        ("integers", r"returned another outputs\['n'\]"),
        ("its own tensor", "encode has changed kept in place, and is run again"),
    ],
)
def test_a_second_run_that_differs_is_an_error(how: str, says: str) -> None:
    params, batch = cases.params(), cases.batch(SIZE)
    before = fingerprint((params, batch))
    grad_fn = gradacc.accumulate(cases.clip, through=counting_up(how), steps=3)
    with pytest.raises((RuntimeError, ValueError), match=says):
        grad_fn(params, batch)
    assert fingerprint((params, batch)) == before


@pytest.mark.parametrize("functional", [False, True])
def test_batch_norm_in_training_mode_is_an_error(functional: bool) -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
    apply, params, _ = gradacc.functional(module)
    x = torch.randn(8, 5)

    def encode(params: Any, x: Tensor) -> Tensor:
        return apply(params, x) if functional else module[1](F.linear(x, params["0.weight"]))

    params = params if functional else {"0.weight": params["0.weight"]}
    grad_fn = gradacc.accumulate(lambda p, outputs, x: outputs.std(), through=encode, steps=2)
    with pytest.raises(ValueError, match="encode has a BatchNorm in training mode, which normalizes each micro-batch"):
        grad_fn(params, x)
    module.eval()
    torch.testing.assert_close(grad_fn(params, x), torch.func.grad(lambda p: encode(p, x).std())(params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_difference_is_seen_beside_masks_and_large_numbers(dtype: torch.dtype) -> None:
    number = itertools.count(1)
    w, x = torch.randn(5, 6, dtype=dtype), torch.randn(12, 5, dtype=dtype)

    def encode(w: Tensor, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ w) * (1 + 0.1 * next(number))
        hidden[:, 4] = 500.0
        return hidden.masked_fill(torch.arange(6) > 4, torch.finfo(dtype).min)

    with pytest.raises(RuntimeError, match="run again for the gradients, returned another outputs"):
        gradacc.accumulate(lambda w, outputs, x: outputs[:, :4].std(), through=encode, steps=4)(w, x)


def test_inf_is_equal_to_inf_alone() -> None:
    number = itertools.count()

    def encode(w: Tensor, x: Tensor) -> Tensor:
        return (x * w).masked_fill(torch.tensor(next(number) < 2), -torch.inf)

    def loss(w: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
        return torch.where(outputs.isinf(), 0, outputs).sum() + w.sum() + outputs[:, 0].exp().sum()

    with pytest.raises(RuntimeError, match="returned another outputs"):
        gradacc.accumulate(loss, through=encode, microbatch_size=2)(torch.ones(3), torch.ones(4, 3))


def test_nan_in_the_outputs_is_the_same_nan() -> None:
    w, x = torch.ones(3), torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 1.0, 2.0], [1.0, float("inf"), 0.0]])
    grad = gradacc.accumulate(lambda w, outputs, x: outputs[0].sum(), through=lambda w, x: x * w, microbatch_size=1)(
        w, x
    )
    torch.testing.assert_close(grad, torch.func.grad(lambda w: (x * w)[0].sum())(w), equal_nan=True)
