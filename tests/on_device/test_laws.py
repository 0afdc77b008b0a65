"""The laws on a device, and law 9: no value is read but where it is documented, and no operation mixes devices."""

import functools
import math
import weakref
from unittest import mock

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradacc
from gradacc import Mean
from gradacc._engines import fused
from gradacc.testing import splits
from tests import device
from tests import test_nonfinite as dropping
from tests.device import ACC, OnDevice, to_cpu, to_device
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, value_of
from tests.laws import test_several_means as several
from tests.laws.losses import CASES

few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
EAGER = ["eager", "fused"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A loss, its parameters and batches, on the CPU."""
    return CASES[request.param]()


def tensors(tree):
    return [leaf for leaf in optree.tree_leaves(tree, namespace="gradacc") if isinstance(leaf, torch.Tensor)]


def on_cpu(tree):
    return optree.tree_map(lambda leaf: to_cpu(leaf), tree, namespace="gradacc")


@pytest.mark.parametrize("engine", EAGER)
@few
@given(data=st.data(), size=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_any_split_is_what_the_cpu_returns_and_nothing_waits(case, engine, waits, data, size, seed):
    split, batch = data.draw(splits(size)), case.batch(size, seed)
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, **case.options, **split)
    expected = ENGINES[engine](lambda: grad_fn(case.params, batch))
    params, batch = to_device(case.params), to_device(batch)
    before = on_cpu((params, batch))
    waits.clear()
    result = ENGINES[engine](lambda: grad_fn(params, batch))
    assert not waits
    assert_trees_close(on_cpu(result), expected)
    assert all(isinstance(leaf, OnDevice) for leaf in tensors(result))
    assert_trees_equal(on_cpu((params, batch)), before)
    storages = [leaf.untyped_storage()._cdata for leaf in tensors(result)]
    assert len(set(storages)) == len(storages)


@few
@given(size=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_one_step_is_plain_autograd_bit_for_bit(case, size, seed):
    params, treedef = optree.tree_flatten(to_device(case.params))
    batch = to_device(case.batch(size, seed))
    leaves = [param.detach().requires_grad_() for param in params]
    value = value_of(case.loss(optree.tree_unflatten(treedef, leaves), batch)[0])
    expected = optree.tree_unflatten(treedef, torch.autograd.grad(value, leaves))
    grad_fn = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=1, **case.options)
    grads, (actual, _) = grad_fn(optree.tree_unflatten(treedef, params), batch)
    if not (isinstance(actual, Mean) and actual.weight == 0):
        assert_trees_equal(on_cpu((grads, value_of(actual))), on_cpu((expected, value.detach())))


@pytest.mark.parametrize("donate", [False, True])
@few
@given(data=st.data(), sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_any_tree_of_states_is_the_large_batch_and_nothing_waits(case, donate, waits, data, sizes, seed):
    batch = case.batch(sum(sizes), seed)
    expected = gradacc.accumulate_and_value(case.loss, has_aux=True, steps=1, **case.options)(case.params, batch)
    leaves, treedef = optree.tree_flatten(to_device(batch))
    parts = zip(*(leaf.split(sizes) for leaf in leaves), strict=True)
    microbatches = [optree.tree_unflatten(treedef, list(part)) for part in parts]
    cut = data.draw(st.integers(0, len(sizes)))
    params = to_device(case.params)
    init, update, merge, finalize = gradacc.accumulator(case.loss, has_aux=True, donate=donate, **case.options)
    waits.clear()
    states = []
    for some in (microbatches[:cut], microbatches[cut:]):
        state = init(params)
        for microbatch in some:
            state = update(state, params, microbatch)
        states.append(state)
    result = finalize(merge(*states))
    assert not waits
    if sum(sizes):
        assert_trees_close(on_cpu(result[0]), expected[0])
        assert_trees_close(on_cpu(result[1][1]["each"]), expected[1][1]["each"])


def weighted(params, batch):
    """Fused products and an embedding, a parameter used as it is, and a weight from the batch."""
    x, index, mask = batch
    hidden = F.linear(x, params["w"], params["b"]) + F.embedding(index, params["e"])
    return Mean((hidden.square().sum(1) * mask).sum() * params["s"], mask.sum())


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (256, 256), "b": (256,), "e": (130, 256), "s": ()}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def microbatch(mask, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(mask))
    return torch.randn(len(mask), 256, generator=g).to(dtype), torch.arange(len(mask)), torch.tensor(mask)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_0_contributes_exactly_0_whatever_its_numbers_are(dtype, bad, place, waits):
    whole = [microbatch([1, 2], dtype), microbatch([3, 0, 1], dtype)]
    whole.insert(place, microbatch([0, 0, 0, 0], dtype))
    params = to_device(parameters(dtype))
    grad_fn = gradacc.accumulate_and_value(weighted)
    expected = grad_fn(params, to_device(whole))
    whole[place][0].fill_(bad)
    some = to_device(whole)
    waits.clear()
    result = grad_fn(params, some)
    assert not waits
    assert all(leaf.isfinite().all() for leaf in tensors(on_cpu(result)))
    assert_trees_equal(on_cpu(result), on_cpu(expected))


def test_nothing_but_weight_0(waits):
    grad_fn = gradacc.accumulate_and_value(weighted)
    batch = [to_device(microbatch([0, 0])), to_device(microbatch([0]))]
    waits.clear()
    grads, value = grad_fn(to_device(parameters()), batch)
    assert not waits
    assert all((leaf == 0).all() for leaf in tensors(on_cpu(grads)))
    assert value.weight == 0
    assert value.value.isnan()


@pytest.mark.parametrize("weight", [-3.0, math.nan, math.inf, -2])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_weight_makes_gradients_and_value_nan(weight, place, streaming):
    def loss(params, batch):
        return Mean(params["w"].square().sum() * batch[0], batch[1])

    batches = [[torch.ones(()), torch.tensor(5)] for _ in range(2)]
    batches[place][1] = torch.tensor(weight)
    params, batches = to_device({"w": torch.ones(3)}), to_device(batches)
    if streaming:
        init, update, _, finalize = gradacc.accumulator(loss)
        grads, value = finalize(update(update(init(params), params, batches[0]), params, batches[1]))
    else:
        grads, value = gradacc.accumulate_and_value(loss)(params, batches)
    assert to_cpu(grads["w"]).isnan().all()
    assert to_cpu(value.value).isnan()


def test_a_weight_on_the_cpu_is_read_and_checked():
    """It costs nothing there."""

    def loss(params, batch):
        return Mean(params["w"].sum() * batch.sum(), torch.tensor(-1.0))

    with pytest.raises(ValueError, match=r"a Mean whose weight is -1\.0; it must be finite and not negative"):
        gradacc.accumulate(loss, steps=2)(to_device({"w": torch.ones(3)}), to_device(torch.ones(4)))


@pytest.mark.parametrize("weights", [[1e-37, 1e3], [1e37, 1e-37, 1e37], [1.0, 1e30], [0.0, 1e-37, 1e15]])
def test_weights_far_from_each_other(weights):
    def loss(w, weight):
        return Mean(weight * (w * 2.0), weight)

    grads = gradacc.accumulate(loss)(to_device(torch.ones(())), to_device([torch.tensor(w) for w in weights]))
    torch.testing.assert_close(to_cpu(grads), torch.tensor(2.0))


def test_counts_beyond_float32s_integers():
    """2 ** 24 + 1 tokens are not 2 ** 24."""

    def loss(w, n):
        return Mean(w * n.double(), n)

    ns = to_device([torch.tensor(2**24 + 1), torch.tensor(1)])
    w = to_device(torch.ones((), dtype=torch.float64))
    grads, value = gradacc.accumulate_and_value(loss)(w, ns)
    assert to_cpu(grads) == 1
    assert value.weight == 2**24 + 2


def test_bfloat16_gradients_256_1_minus_256_sum_to_1():
    def loss(w, x):
        return Mean((w * x).sum(), x.new_ones((), dtype=torch.int64))

    x = to_device(torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16))
    grads = gradacc.accumulate(loss, microbatch_size=1, dtype=torch.float32)(
        to_device(torch.ones((), dtype=torch.bfloat16)), x
    )
    torch.testing.assert_close(to_cpu(grads), torch.tensor(1 / 3))


def test_fused_additions_are_made_with_a_weight_that_is_not_read():
    added = []

    def spying(add, padding, target, other, grad):
        added.append(tuple(target.shape))
        add(padding, target, other, grad)

    table = {
        node: tuple((place, other, functools.partial(spying, add)) for place, other, add in operands)
        for node, operands in fused._FUSED.items()
    }
    batches = to_device([microbatch([1, 2]), microbatch([3])])
    with mock.patch.object(fused, "_FUSED", table):
        gradacc.accumulate(weighted)(to_device(parameters()), batches)
    assert len(added) == 1  # the second micro-batch's


def test_no_second_copy_of_all_gradients():
    """Masked one by one: what lives at once beside the buffer is one gradient."""
    live, peak = [], []

    def loss(params, n):
        return Mean(sum(p.square().sum() for p in params) * n, n)

    params = to_device([torch.ones(1000) for _ in range(20)])
    grad_fn = gradacc.accumulate(loss)
    original = device.OnDevice.__new__

    def counting(cls, raw):
        outer = original(cls, raw)
        live[:] = [ref for ref in live if ref() is not None]
        if raw.numel() == 1000 and not any(raw is r().raw for r in live):
            live.append(weakref.ref(outer))
            peak.append(len({ref().raw.untyped_storage()._cdata for ref in live}))
        return outer

    device.OnDevice.__new__ = staticmethod(counting)
    try:
        grad_fn(params, to_device([torch.tensor(2), torch.tensor(3)]))
    finally:
        device.OnDevice.__new__ = staticmethod(original)
    assert max(peak) < 20 + 20 + 8  # parameters, buffer, and a few on their way


@pytest.mark.parametrize("engine", ["functional"])
def test_under_a_transform(engine, waits):
    params, batches = to_device(parameters()), to_device([microbatch([1, 2]), microbatch([0]), microbatch([3])])
    expected = gradacc.accumulate_and_value(weighted)(params, batches)
    waits.clear()
    result = ENGINES[engine](lambda: gradacc.accumulate_and_value(weighted)(params, batches))
    assert not waits
    assert_trees_close(on_cpu(result), on_cpu(expected), rtol=1e-4, atol=1e-5)
    assert result[1].total.device == ACC


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", several.LOSSES.values(), ids=several.LOSSES)
@pytest.mark.parametrize("counted", [False, True])
def test_several_means_and_nothing_waits(loss, counted, engine, waits):
    """What was counted first and is not read makes NaN where it is wrong."""
    batch = several.data()
    weights = several.count(loss) if counted else None
    grad_fn = gradacc.accumulate_and_value(loss, steps=3, weights=weights)
    expected = grad_fn(several.PARAMS, batch)
    params, batch = to_device(several.PARAMS), to_device(batch)
    waits.clear()
    result = ENGINES[engine](lambda: grad_fn(params, batch))
    assert not waits
    assert_trees_close(on_cpu(result[0]), expected[0])
    assert_trees_close(
        *([mean.value for mean in several.means_of(value)] for value in (on_cpu(result[1]), expected[1]))
    )
    if counted:
        # A number that can be read is an error.
        wrong_one = lambda n: n + 1 if isinstance(n, torch.Tensor) else n  # noqa: E731
        wrong = gradacc.accumulate(loss, steps=3, weights=lambda b: optree.tree_map(wrong_one, weights(b)))
        assert on_cpu(wrong(params, batch))["trunk"].isnan().all()


def test_a_term_of_weight_0_contributes_nothing_be_it_nan(waits):
    def loss(p, b):
        return [Mean((p * b["x"]).sum(), b["n"].sum()), Mean((p / b["m"].sum()) * 0.0 + p, b["m"].sum())]

    b = {"x": torch.tensor([1.0, 2.0, 3.0]), "n": torch.ones(3), "m": torch.tensor([0.0, 0.0, 1.0])}
    grad = gradacc.accumulate(loss, microbatch_size=1)(to_device(torch.ones(())), to_device(b))
    assert not waits
    assert on_cpu(grad) == 3.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("loss", "options"), dropping.LOSSES.values(), ids=dropping.LOSSES)
def test_what_is_dropped_is_not_read(loss, options, engine, waits):
    batch = dropping.batch((3, -1.0), (6, 0.0))
    grad_fn = gradacc.accumulate_and_value(loss, microbatch_size=2, nonfinite="drop", **options)
    expected, kept = grad_fn(dropping.PARAMS, batch)
    params, batch = to_device(dropping.PARAMS), to_device(batch)
    waits.clear()
    grads, here = ENGINES[engine](lambda: grad_fn(params, batch))
    assert not waits
    assert on_cpu(here.dropped) == kept.dropped == 2
    assert_trees_close(on_cpu(grads), expected)
    assert_trees_close(dropping.numbers(on_cpu(here.value)), dropping.numbers(kept.value))
