"""Law 11: `accumulate(loss, through=encode)` is the gradient of ``loss(params, encode(params, batch), batch)``.

Over random encoders, losses, structures of outputs and splits, on both engines and under transforms. Ranks: ``tests/through``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradacc
from tests.helpers import some_slow
from tests.laws.test_pieces import close
from tests.through import cases

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward mode

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "normalize": lambda x: F.layer_norm(x, x.shape[-1:]),
    "square": lambda x: x * x,
}


def encoder(image: list[str], text: list[str], structure: str) -> Callable[..., Any]:
    """Of these layers; what it returns has more in it than the losses read."""

    def tower(x: Tensor, weight: Tensor, layers: list[str]) -> Tensor:
        for n, name in enumerate(layers):
            x = LAYERS[name](x @ weight if n == 0 else x @ weight.T @ weight / 4)
        return x

    def encode(params: Any, batch: Any) -> Any:
        out = {
            "image": tower(batch["image"], params["w"], image),
            "text": tower(batch["text"], params["v"], text),
        }
        if structure == "integers":
            out["rank"] = batch["label"] * 2
        elif structure == "unused":
            out["extra"] = (batch["image"] @ params["w"]).sigmoid()
        elif structure == "frozen":
            out["teacher"] = batch["image"].sin()
            out["text"] = out["text"].detach()
        elif structure == "text":
            out["kind"] = "pair"
        return out

    return encode


STRUCTURES = ("plain", "integers", "unused", "frozen", "text")


@st.composite
def calls(draw: Callable[..., Any]) -> Any:
    """An encoder, a loss, a batch, and options that divide it."""
    layers = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3)
    encode = encoder(draw(layers), draw(layers), draw(st.sampled_from(STRUCTURES)))
    loss = cases.LOSSES[draw(st.sampled_from(sorted(cases.LOSSES)))]
    size = draw(st.integers(4, 9))
    split: dict[str, Any] = draw(
        st.one_of(
            st.builds(lambda n: {"steps": n}, st.integers(1, 11)),
            st.builds(lambda n: {"microbatch_size": n}, st.integers(1, 11)),
            st.builds(
                lambda at: {"split": lambda batch: [cut(batch, 0, at), cut(batch, at, size)]}, st.integers(1, size - 1)
            ),
        )
    )
    return encode, loss, cases.batch(size), split


def cut(batch: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {key: leaf[begin:end] for key, leaf in batch.items()}


def whole(encode: Any, loss: Any, batch: Any) -> Callable[[Any], Tensor]:
    """One number of the parameters: the oracle."""
    return lambda params: cases.value(loss(params, encode(params, batch), batch))


@settings(max_examples=60)
@given(call=calls())
def test_the_gradient_and_the_value_of_the_whole_batch(call: Any) -> None:
    encode, loss, batch, split = call
    params = cases.params()
    grads, value = gradacc.accumulate_and_value(loss, through=encode, **split)(params, batch)
    close((grads, cases.value(value)), torch.func.grad_and_value(whole(encode, loss, batch))(params))


@settings(max_examples=15)
@given(call=calls())
def test_under_transforms(call: Any) -> None:
    encode, loss, batch, split = call
    params = cases.params()
    grad_fn = gradacc.accumulate(loss, through=encode, **split)
    plain = torch.func.grad(whole(encode, loss, batch))

    def of(func: Any) -> Any:
        return lambda params: sum(leaf.sin().sum() for leaf in func(params).values())

    close(torch.func.grad(of(lambda p: grad_fn(p, batch)))(params), torch.func.grad(of(plain))(params))
    stacked = {key: torch.stack([leaf, leaf * 0.9]) for key, leaf in params.items()}
    close(torch.vmap(lambda p: grad_fn(p, batch))(stacked), torch.vmap(plain)(stacked))
    _, forward = torch.func.jvp(lambda p: grad_fn(p, batch), (params,), (params,))
    close(forward, torch.func.jvp(plain, (params,), (params,))[1])


@settings(max_examples=10)
@given(call=calls())
def test_results_are_connected_to_what_requires_grad(call: Any) -> None:
    encode, loss, batch, split = call
    params = {key: leaf.requires_grad_() for key, leaf in cases.params().items()}
    plain = torch.func.grad(whole(encode, loss, batch))

    def gradients(grads: Any) -> Any:
        total = sum(leaf.sin().sum() for leaf in grads.values())
        return torch.autograd.grad(total, list(params.values()), allow_unused=True, materialize_grads=True)

    found = gradients(gradacc.accumulate(loss, through=encode, **split)(params, batch))
    close(list(found), list(gradients(plain(params))))


@pytest.mark.parametrize(
    ("structure", "split"),
    some_slow(
        [("plain", {"steps": 1}), ("integers", {"steps": 3}), ("frozen", {"microbatch_size": 2})],
        ("plain", {"steps": 1}),
    ),
)
def test_compiled(structure: str, split: dict[str, int]) -> None:
    torch._dynamo.reset()
    encode, params, batch = encoder(["tanh"], ["gelu", "normalize"], structure), cases.params(), cases.batch(5)
    grad_fn = torch.compile(
        gradacc.accumulate_and_value(cases.clip, through=encode, **split), fullgraph=True, backend="aot_eager"
    )
    expected = torch.func.grad_and_value(whole(encode, cases.clip, batch))(params)
    for _ in range(2):
        close(grad_fn(params, batch), expected)


@pytest.mark.slow
def test_inductor() -> None:
    encode, params, batch = encoder(["tanh"], ["gelu"], "integers"), cases.params(), cases.batch(5)
    grad_fn = torch.compile(gradacc.accumulate_and_value(cases.clip, through=encode, steps=3), fullgraph=True)
    close(grad_fn(params, batch), torch.func.grad_and_value(whole(encode, cases.clip, batch))(params))


@settings(max_examples=20)
@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), name=st.sampled_from(sorted(cases.LOSSES)))
def test_encoders_with_a_micro_batch_size_of_their_own(sizes: tuple[int, int], name: str) -> None:
    params, batch, loss = cases.params(), cases.batch(8), cases.LOSSES[name]
    grad_fn = gradacc.accumulate_and_value(
        loss,
        through={"image": cases.encode_image, "text": cases.encode_text},
        microbatch_size=dict(zip(("image", "text"), sizes, strict=True)),
    )
    grads, value = grad_fn(params, batch)
    close((grads, cases.value(value)), torch.func.grad_and_value(whole(cases.encode, loss, batch))(params))
    found = torch.func.jacrev(lambda p: grad_fn(p, batch)[0])(params)
    close(found, torch.func.jacrev(torch.func.grad(whole(cases.encode, loss, batch)))(params))


@pytest.mark.parametrize("name", sorted(cases.LOSSES))
def test_one_micro_batch_is_the_plain_path_bit_for_bit(name: str) -> None:
    params, batch, loss = cases.params(torch.float32), cases.batch(8, torch.float32), cases.LOSSES[name]
    calls = []

    def encode(params: Any, batch: Any) -> Any:
        calls.append(len(batch["label"]))
        return cases.encode(params, batch)

    grads, value = gradacc.accumulate_and_value(loss, through=encode, steps=1)(params, batch)
    assert calls == [8]
    expected = torch.func.grad_and_value(whole(cases.encode, loss, batch))(params)
    torch.testing.assert_close((grads, cases.value(value)), expected, rtol=0, atol=0)
