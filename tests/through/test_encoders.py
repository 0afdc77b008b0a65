"""What may encode, how it is divided, and what it must return."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradacc
from tests.helpers import fingerprint, some_slow
from tests.through import cases


def _returning(what: Any) -> Any:
    return lambda params, batch: what(cases.encode(params, batch), batch)


@pytest.mark.parametrize(
    ("through", "error", "says"),
    [
        (3, TypeError, r"through must be a function of \(params, batch\).*got 3"),
        ("encode", TypeError, r"through must be a function .*got"),
        (
            nn.Linear(3, 4),
            TypeError,
            "through is an nn.Module .Linear., which does not take its parameters as an argument",
        ),
        ({}, ValueError, "through is an empty dict"),
        ({"a": cases.encode_image, "b": None}, TypeError, r"through\['b'\] must be a function"),
    ],
    ids=["number", "text", "module", "nothing", "none"],
)
def test_what_is_no_encoder(through: Any, error: type[Exception], says: str) -> None:
    for factory in (gradacc.accumulate, gradacc.accumulate_and_value):
        with pytest.raises(error, match=says):
            factory(cases.clip, through=through, steps=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing that says how encode divides it; give steps, microbatch_size or split"),
        ({"steps": 2, "nonfinite": "drop"}, "nonfinite='drop', which drops micro-batches"),
        ({"steps": 2, "weights": lambda batch: (1,)}, "got weights, which counts what several means are divided by"),
        (
            {"steps": 2, "has_carry": True},
            "and has_carry=True, with what one micro-batch hands to the next; leave",
        ),
        ({"steps": 2, "microbatch_size": 2}, "got steps and microbatch_size"),
        ({"steps": {"a": 2}}, r"steps is a dict of \['a'\], and through is"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1, got 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(list(value)),
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        gradacc.accumulate(cases.clip, through=cases.encode, **options)


def test_sizes_of_several_encoders() -> None:
    through = {"image": cases.encode_image, "text": cases.encode_text}
    with pytest.raises(
        ValueError, match=r"microbatch_size is a dict of \['image'\], and through is \['image', 'text'\]"
    ):
        gradacc.accumulate(cases.clip, through=through, microbatch_size={"image": 2})
    with pytest.raises(ValueError, match=r"microbatch_size\['text'\] must be at least 1, got 0"):
        gradacc.accumulate(cases.clip, through=through, microbatch_size={"image": 2, "text": 0})
    with pytest.raises(TypeError, match=r"steps\['text'\] must be an int, got 1.5"):
        gradacc.accumulate(cases.clip, through=through, steps={"image": 2, "text": 1.5})
    with pytest.raises(ValueError, match=r"steps is a dict of \['image', 'text'\], and through is None"):
        gradacc.accumulate(cases.clip, steps={"image": 2, "text": 1})


def test_the_streaming_form_refuses_it() -> None:
    with pytest.raises(
        TypeError, match=r"accumulator: got through, .* use gradacc.accumulate_and_value\(.*, through=..."
    ):
        gradacc.accumulator(cases.clip, through=cases.encode)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("encode", "error", "says"),
    [
        (_returning(lambda out, batch: None), TypeError, "encode returned nothing: no floating or complex tensor"),
        (
            _returning(lambda out, batch: 3.0),
            TypeError,
            r"outputs is 3.0 \(float\), of one micro-batch, and what the whole batch would have is not known",
        ),
        (
            _returning(lambda out, batch: {"n": batch["label"], "m": batch["label"] > 1}),
            TypeError,
            "no floating or complex tensor, so that no gradient leads through it",
        ),
        (
            _returning(lambda out, batch: {**out, "text": out["text"].sum()}),
            ValueError,
            r"outputs\['text'\] is .*3 examples",
        ),
        (_returning(lambda out, batch: out["text"].T), ValueError, r"outputs is .*of a micro-batch of 3 examples"),
        (_returning(lambda out, batch: out["text"][:2]), ValueError, "has a row for each example in dim 0"),
        (
            _returning(lambda out, batch: {**out, "text": out["text"][:, : len(batch["label"])]}),
            ValueError,
            r"outputs?\['text'\] is (.*\(3, 3\) .*one micro-batch, .*\(2, 2\)|float64\[.*3\] in one piece and float64\[2, 2\])",
        ),
        (
            _returning(lambda out, batch: out if len(batch["label"]) == 3 else out["text"]),
            ValueError,
            "what is put together has one structure",
        ),
        (
            _returning(lambda out, batch: out if len(batch["label"]) == 3 else {**out, "text": out["text"].float()}),
            ValueError,
            r"outputs?\['text'\] is (.*float64 of one micro-batch, .*float32|float64\[.*4\] in one piece and float32)",
        ),
        (
            _returning(lambda out, batch: {**out, "n": len(batch["label"])}),
            TypeError,
            r"outputs\['n'\] is 3 \(int\), of one micro-batch, and what the whole batch would have is not known",
        ),
        (
            _returning(lambda out, batch: {**out, "m": gradacc.Mean(out["text"].detach(), 2.0)}),
            TypeError,
            "is a gradacc.Mean, of one micro-batch, and what the whole batch would have is not known",
        ),
    ],
    ids=[
        "none",
        "number",
        "integers",
        "0-dim",
        "transposed",
        "rows missing",
        "width",
        "structure",
        "dtype",
        "numbers",
        "means",
    ],
)
def test_what_is_returned_has_a_row_for_each_example(encode: Any, error: type[Exception], says: str) -> None:
    params, batch = cases.params(), cases.batch(7)
    before = fingerprint((params, batch))

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        raise AssertionError("not reached")

    grad_fn = gradacc.accumulate(loss, through=encode, steps=3)
    for call in (grad_fn, lambda params, batch: torch.func.jacrev(lambda p: grad_fn(p, batch))(params)):
        with pytest.raises(error, match=says):
            call(params, batch)
    assert fingerprint((params, batch)) == before


def test_one_micro_batch_is_looked_at_too() -> None:
    grad_fn = gradacc.accumulate(cases.clip, through=_returning(lambda out, batch: out["text"].sum()), steps=1)
    with pytest.raises(ValueError, match="has a row for each example in dim 0"):
        grad_fn(cases.params(), cases.batch(5))


def test_a_split_yields_all_of_the_batch() -> None:
    def split(batch: Any) -> Any:
        return [{key: leaf[n : n + 2] for key, leaf in batch.items()} for n in (0, 2)]

    grad_fn = gradacc.accumulate(cases.clip, through=cases.encode, split=split)
    with pytest.raises(ValueError, match="4 rows of outputs were encoded of a batch of 7 examples"):
        grad_fn(cases.params(), cases.batch(7))


def test_a_split_that_reorders_says_so() -> None:
    params, batch = cases.params(), cases.batch(7)
    order = [[6, 1, 2], [0, 3, 4, 5]]

    def split(batch: Any) -> Any:
        return [{key: leaf[some] for key, leaf in batch.items()} for some in order]

    grad_fn = gradacc.accumulate(cases.batch_hard_triplets, through=cases.encode, split=split)
    with pytest.raises(ValueError, match=r"split yields examples in another order.*gradacc.data.Reordered"):
        grad_fn(params, batch)
    grads = gradacc.accumulate(
        cases.batch_hard_triplets, through=cases.encode, split=lambda batch: gradacc.data.Reordered(split(batch), order)
    )(params, batch)
    expected = torch.func.grad(lambda p: cases.batch_hard_triplets(p, cases.encode(p, batch), batch))(params)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("change", ["adds a key", "leaves one out", "cuts columns"])
def test_a_split_that_reorders_is_seen_in_what_it_leaves_alone(change: str) -> None:
    batch = cases.batch(7)
    batch["image"][:, 3:] = 0

    def split(batch: Any) -> Any:
        parts = [{key: leaf[some] for key, leaf in batch.items()} for some in ([6, 1, 2], [0, 3, 4, 5])]
        if change == "adds a key":
            return [{**part, "training": True} for part in parts]
        if change == "leaves one out":
            return [{"image": part["image"], "text": part["text"], "label": part["label"]} for part in parts]
        return [{"image": part["image"][:, :3], "text": part["text"] * 2, "label": part["label"]} for part in parts]

    def encode(params: Any, batch: Any) -> Any:
        width = batch["image"].shape[1]
        return {"image": batch["image"] @ params["w"][:width], "text": cases.encode_text(params, batch)}

    def of_images(batch: Any) -> Any:
        return [{"image": part["image"]} if change == "leaves one out" else part for part in split(batch)]

    def of_image(params: Any, batch: Any) -> Tensor:
        return batch["image"] @ params["w"][: batch["image"].shape[1]]

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        return (outputs.square().sum(1) * batch["label"]).mean()

    with pytest.raises(
        ValueError, match=r"split yields examples in another order than the batch's \(batch\['image'\] differs"
    ):
        gradacc.accumulate(loss, through=of_image, split=of_images)(cases.params(), batch)


def test_a_split_may_change_what_it_yields() -> None:
    w = torch.randn(5, 4, dtype=torch.float64)
    pixels = torch.randint(0, 255, (7, 5), dtype=torch.uint8)

    def encode(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    def loss(w: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
        return (outputs @ outputs.T).square().mean()

    expected = torch.func.grad(lambda w: loss(w, encode(w, pixels.double() / 255), pixels))(w)
    grads = gradacc.accumulate(loss, through=encode, split=lambda x: [part.double() / 255 for part in x.split(3)])(
        w, pixels
    )
    torch.testing.assert_close(grads, expected)
    scaled = gradacc.accumulate(loss, through=encode, split=lambda x: [part / 255 for part in x.split(3)])(
        w, pixels.double()
    )
    torch.testing.assert_close(scaled, expected)


def test_a_split_is_looked_at_along_the_dimension_of_the_examples() -> None:
    w = torch.randn(5, 4, dtype=torch.float64)
    batch = {"x": torch.randn(5, 6, dtype=torch.float64), "prototypes": torch.randn(3, 5, dtype=torch.float64)}

    def encode(w: Tensor, batch: Any) -> Tensor:
        return torch.tanh(batch["x"].T @ w) @ (batch["prototypes"] @ w).T

    def loss(w: Tensor, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.square().sum(1) * torch.arange(6)).mean()

    def split(order: list[list[int]]) -> Any:
        return lambda batch: [{**batch, "x": batch["x"][:, some]} for some in order]

    dims = (None, {"x": 1, "prototypes": None})
    grads = gradacc.accumulate(loss, through=encode, split=split([[0, 1, 2], [3, 4, 5]]), in_dims=dims)(w, batch)
    torch.testing.assert_close(grads, torch.func.grad(lambda w: loss(w, encode(w, batch), batch))(w))
    with pytest.raises(ValueError, match="in another order"):
        gradacc.accumulate(loss, through=encode, split=split([[3, 4, 5], [0, 1, 2]]), in_dims=dims)(w, batch)


@pytest.mark.parametrize("transform", some_slow(["vmap", "grad", "compiled"], "vmap", "grad"))
def test_under_transforms_a_split_yields_all_of_the_batch_too(transform: str) -> None:
    def split(batch: Any) -> Any:
        return [{key: leaf[n : n + 2] for key, leaf in batch.items()} for n in (0, 2)]

    grad_fn = gradacc.accumulate(cases.clip, through=cases.encode, split=split)
    params, batch = cases.params(), cases.batch(7)
    call = {
        "vmap": lambda: torch.vmap(lambda w: grad_fn({**params, "w": w}, batch))(params["w"][None]),
        "grad": lambda: torch.func.grad(lambda p: grad_fn(p, batch)["w"].sum())(params),
        "compiled": lambda: torch.compile(grad_fn, backend="eager")(params, batch),
    }[transform]
    with pytest.raises(Exception, match="4 rows of outputs were encoded of a batch of 7 examples"):
        call()


def test_rows_are_told_not_given() -> None:
    grad_fn = gradacc.accumulate(cases.rows_of_clip, through=cases.encode, steps=2)
    with pytest.raises(TypeError, match="rows is what loss_fn is told"):
        grad_fn(cases.params(), cases.batch(5), rows=slice(0, 2))


def test_what_only_the_loss_gets_is_not_split() -> None:
    grad_fn = gradacc.accumulate(lambda p, o, b, y: 0, through=cases.encode, steps=2, in_dims=(None, 0, 0))
    with pytest.raises(ValueError, match=r"in_dims\[2\]=0 splits an argument that only loss_fn gets"):
        grad_fn(cases.params(), cases.batch(4), torch.ones(4))


def test_a_loss_that_depends_on_nothing() -> None:
    grad_fn = gradacc.accumulate(
        lambda params, outputs, batch: outputs["image"].detach().sum(), through=cases.encode, steps=2
    )
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        grad_fn(cases.params(), cases.batch(4))


def test_a_loss_of_rows_without_ranks_is_of_all_rows() -> None:
    params, batch = cases.params(), cases.batch(5)
    expected = torch.func.grad(lambda p: cases.clip(p, cases.encode(p, batch), batch))(params)
    for steps in (1, 2):
        grads = gradacc.accumulate(cases.rows_of_clip, through=cases.encode, steps=steps)(params, batch)
        torch.testing.assert_close(grads, expected)

    def mean(params: Any, outputs: Any, batch: Any, rows: slice) -> Tensor:
        return cases.clip(params, outputs, batch)

    for steps in (1, 2):
        with pytest.raises(TypeError, match="loss_fn takes rows, those of the outputs that it is of, and returned"):
            gradacc.accumulate(mean, through=cases.encode, steps=steps)(params, batch)
