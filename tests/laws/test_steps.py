"""Law 1: any split gives the large batch's gradient, value and aux. Law 2: ``steps=1`` does so bit for bit."""

import optree
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc.testing import batches, parameter_trees, splits
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, value_of

D = torch.float64
few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes, seeds = st.integers(1, 7), st.integers(0, 2**16)


def oracle(case, batch):
    """Gradient, value (as the loss returns it) and aux of the whole batch, by torch.func."""

    def scalar(params):
        value, aux = case.loss(params, batch)
        weight = value.weight if isinstance(value, gradacc.Mean) else torch.ones(())
        total = value.total if isinstance(value, gradacc.Mean) else value
        return value_of(value), (total, torch.as_tensor(weight), [aux["each"], aux["rest"][0].total, aux["rest"][2][0]])

    grads, (value, (total, weight, aux)) = torch.func.grad_and_value(scalar, has_aux=True)(case.params)
    return grads, value, total, weight, aux


def check(case, batch, engine, equal, **options):
    expected, value, total, weight, aux = oracle(case, batch)
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, **case.options, **options)
    grads, (actual, actual_aux) = ENGINES[engine](lambda: grad_fn(case.params, batch))
    if weight == 0:  # nothing but padding: the gradient of nothing is zero, the mean of nothing is NaN
        assert all((leaf == 0).all() for leaf in optree.tree_leaves(grads))
        assert actual.weight == 0
        assert actual.value.isnan()
        return
    equal(grads, expected)
    equal(value_of(actual), value)
    if isinstance(actual, gradacc.Mean):
        equal(actual.total, total)
        assert actual.weight == weight
    equal(actual_aux["each"], aux[0])
    equal(actual_aux["rest"][0].total, aux[1])
    equal(actual_aux["rest"][2][0], aux[2])
    assert actual_aux["rest"][1] is None


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(data=st.data(), size=sizes, seed=seeds)
def test_any_split_is_the_large_batch(case, engine, data, size, seed):
    check(case, case.batch(size, seed), engine, assert_trees_close, **data.draw(splits(size)))


@pytest.mark.parametrize("engine", ENGINES)
@few
@given(size=sizes, seed=seeds)
def test_one_step_is_grad_and_value_bit_for_bit(case, engine, size, seed):
    batch = case.batch(size, seed)
    # Under functorch, torch decomposes group_norm's backward: torch.func.grad and torch.autograd.grad of it differ in the
    # last bits. The eager engine is plain autograd; there, plain autograd is the oracle of the bits.
    same_bits = engine == "functional" or case.name != "convolutions and GroupNorm"
    check(case, batch, engine, assert_trees_equal if same_bits else assert_trees_close, steps=1)


@few
@given(size=sizes, seed=seeds)
def test_one_step_is_plain_autograd_bit_for_bit(case, size, seed):
    batch = case.batch(size, seed)
    params, treedef = optree.tree_flatten(case.params)
    leaves = [param.detach().requires_grad_() for param in params]
    value = value_of(case.loss(optree.tree_unflatten(treedef, leaves), batch)[0])
    expected = optree.tree_unflatten(treedef, torch.autograd.grad(value, leaves))
    grad_fn = gradacc.accumulate_and_value(case.loss, steps=1, has_aux=True, **case.options)
    grads, (actual, _) = grad_fn(case.params, batch)
    if not (isinstance(actual, gradacc.Mean) and actual.weight == 0):
        assert_trees_equal((grads, value_of(actual)), (expected, value.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(size=sizes, seed=seeds)
def test_one_step_is_grad_and_value_bit_for_bit_in_other_dtypes(dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator).to(dtype)
    params = {"w": torch.randn(3, 3, generator=generator).to(dtype), "b": torch.randn(3, generator=generator).to(dtype)}

    def loss(params, x):
        return torch.tanh(x @ params["w"] + params["b"]).square().mean()

    def mean(params, x):
        return gradacc.Mean(torch.tanh(x @ params["w"] + params["b"]).square().sum(), (x > 0).sum() + 1)

    assert_trees_equal(
        gradacc.accumulate_and_value(loss, steps=1)(params, x), torch.func.grad_and_value(loss)(params, x)
    )
    grads, value = gradacc.accumulate_and_value(mean, steps=1)(params, x)
    expected = torch.func.grad_and_value(lambda p: value_of(mean(p, x)))(params)
    assert_trees_equal((grads, value.value), expected)


@pytest.mark.parametrize("engine", ENGINES)
@given(
    data=st.data(),
    params=parameter_trees(dtypes=(torch.float64, torch.complex128), tied=True),
    batch=batches({"x": torch.zeros((), dtype=D), "y": torch.zeros(2, dtype=D)}, min_size=1),
)
def test_any_parameter_tree(engine, data, params, batch):
    def loss(params, batch):
        leaves = optree.tree_leaves(params)
        common = sum(((n + 1) * leaf).abs().square().sum() for n, leaf in enumerate(leaves))
        return (batch["x"] * common + batch["y"].sum(1) * common.square()).mean()

    leaves, treedef = optree.tree_flatten(params)  # torch.func takes no None
    expected, value = torch.func.grad_and_value(lambda leaves: loss(optree.tree_unflatten(treedef, leaves), batch))(
        leaves
    )
    split = data.draw(splits(len(batch["x"])))
    actual = ENGINES[engine](lambda: gradacc.accumulate_and_value(loss, **split)(params, batch))
    assert_trees_close(actual, (optree.tree_unflatten(treedef, expected), value))


def test_where_it_is_not_the_large_batch():
    """The mean over tokens of each micro-batch, without Mean: a mean of means, which no split can make right."""
    tokens = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]], dtype=D)

    def mean_over_tokens(w, tokens):
        real = tokens > 0
        return (w * tokens * real).sum() / real.sum()

    w = torch.ones((), dtype=D)
    assert torch.func.grad(mean_over_tokens)(w, tokens) == 2.5  # (1 + 2 + 3 + 4) / 4
    assert gradacc.accumulate(mean_over_tokens, steps=2)(w, tokens) == 3.0  # ((1 + 2 + 3) / 3 + 4) / 2
