"""Each way in which gradients cross: compiled, by a backend's own reduce-scatter, on many ranks, and in how much memory."""

import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc._sync import bound as bounds
from tests.helpers import PeakElements, assert_trees_close, assert_trees_equal, some_slow
from tests.threads import on_threads

WAYS = {
    "summed": lambda group: gradacc.all_reduce(group),
    "ordered": lambda group: gradacc.all_reduce(group, ordered=True),
    "ordered, bfloat16": lambda group: gradacc.all_reduce(group, compress=torch.bfloat16),
    "parts": lambda group: gradacc.reduce_scatter(group),
    "parts, bfloat16": lambda group: gradacc.reduce_scatter(group, compress=torch.bfloat16),
}


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"]) * params["s"]
    real = batch["mask"]
    return gradacc.Mean((y.square().sum(-1) * real).sum(), real.sum()), {"each": gradacc.Mean(y.sum(0), real.sum())}


def made(rank, rows=4):
    g = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(3, 5, generator=g, dtype=torch.float64),
        "b": torch.randn(5, generator=g).to(torch.float32),
        "s": torch.randn((), generator=g, dtype=torch.float64),
    }
    g = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    return params, {"x": x, "mask": torch.rand(rows, generator=g) < 0.8}


def compiled(group, way, backend):
    torch._dynamo.reset()
    params, batch = made(dist.get_rank(group))
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, has_aux=True, sync=WAYS[way](group))
    expected = grad_fn(params, batch)
    with warnings.catch_warnings():
        # Torch's own, where Inductor is imported.
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        return torch.compile(grad_fn, fullgraph=True, backend=backend)(params, batch), expected


@pytest.mark.parametrize(
    ("way", "backend"),
    some_slow(
        [(way, backend) for way in WAYS for backend in ("eager", "aot_eager", "inductor")],
        ("parts", "eager"),
    ),
)
def test_in_a_graph(pool, way, backend):
    for actual, expected in pool.run(2, compiled, way, backend):
        tolerance = {"rtol": 2.0**-7, "atol": 1e-6} if "bfloat16" in way else {"rtol": 1e-5, "atol": 1e-7}
        assert_trees_close(actual[1], expected[1])
        assert_trees_close(actual[0], expected[0], **tolerance)


def reduced(group, compiled):
    """As where the backend is NCCL: what torch's reduce-scatter of gloo returns."""
    params, batch = made(dist.get_rank(group), rows=2 + dist.get_rank(group))
    usual = gradacc.accumulate_and_value(loss, steps=2, has_aux=True, sync=gradacc.reduce_scatter(group))(params, batch)
    with mock.patch.object(bounds, "_REDUCE_AND_SCATTER", {"gloo"}):
        found, counts = [], []
        for overlap in (False, True):
            sync = gradacc.reduce_scatter(group, overlap=overlap)
            grad_fn = gradacc.accumulate_and_value(loss, steps=2, has_aux=True, sync=sync)
            for _ in range(3):
                with CommDebugMode() as counter:
                    result = grad_fn(params, batch)
            found.append(result)
            counts.append(counter.get_total_counts())
            if compiled:
                torch._dynamo.reset()
                found.append(torch.compile(grad_fn, fullgraph=True, backend="eager")(params, batch))
    return usual, found, counts


@pytest.mark.parametrize("compiled", some_slow([False, True], False))
def test_a_reduce_scatter_of_the_backend_s_own(pool, compiled):
    for usual, found, counts in pool.run(3, reduced, compiled):
        assert counts == [2, 3]  # one a dtype; and metrics hold up no bucket
        assert len(found) == (4 if compiled else 2)
        for each in found:
            assert_trees_close(each, usual, rtol=1e-6, atol=1e-9)


def cancelling(group, overlap):
    """Numbers whose sum is 1 in the order of ranks, and 0 in any other one that begins elsewhere."""
    own = [1e8, -1e8, 1.0][dist.get_rank(group)]
    found = []
    for sync in (
        gradacc.all_reduce(group, ordered=True, overlap=overlap),
        gradacc.reduce_scatter(group, overlap=overlap),
    ):
        grad_fn = gradacc.accumulate(lambda w, x: (w * own).sum() * x.sum(), steps=1, reduction="sum", sync=sync)
        for _ in range(2):
            grad = grad_fn(torch.zeros(7), torch.ones(1))
        found.append(grad if isinstance(grad, torch.Tensor) else grad.values)
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_are_added_in_their_order(pool, overlap):
    for found in pool.run(3, cancelling, overlap):
        assert all(each.eq(1.0).all() for each in found)


def nobody(group):
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, has_aux=True, sync=gradacc.reduce_scatter(group))
    rank, found = dist.get_rank(group), []
    for rows in (0, 4, 0):
        grads, (value, _) = grad_fn(*made(rank, rows=rows))
        found.append(({name: (grad.length, grad.values) for name, grad in grads.items()}, value))
    return found


def test_parts_of_no_examples_at_all(pool):
    """Also in the first call, where nothing says what there would be: zeros, as long as the parts are."""
    for empty, some, again in pool.run(4, nobody):
        for grads, value in (empty, again):
            assert torch.isnan(torch.as_tensor(value.value if isinstance(value, gradacc.Mean) else value))
            for name, (length, values) in grads.items():
                assert values.shape == (length,) == some[0][name][1].shape
                assert values.dtype == some[0][name][1].dtype
                assert not values.any()


# Many ranks, which are threads.


def answers(world, rank_fn):
    """Of ranks that are threads; an error is raised here."""
    found = on_threads(world, rank_fn)
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


GRADS = torch.rand(64, 257, generator=torch.Generator().manual_seed(3)) + 0.5


def rounded_once(rank, group, sync):
    grad_fn = gradacc.accumulate(lambda w, x: (w * GRADS[rank]).sum() * x.mean(), steps=1, sync=sync(group))
    grad = [grad_fn(torch.zeros(257), torch.ones(1)) for _ in range(2)][-1]
    return grad if isinstance(grad, torch.Tensor) else (grad.offset, grad.values)


@pytest.mark.parametrize("world", [2, 5, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_compression_does_not_grow_with_ranks(world, dtype):
    unit = torch.finfo(dtype).eps / 2
    exact = GRADS[:world].double().mean(0)
    found = answers(world, lambda *place: rounded_once(*place, lambda g: gradacc.all_reduce(g, compress=dtype)))
    error = ((found[0].double() - exact) / exact).abs().max()
    assert unit / 4 < error <= 2.01 * unit
    assert all(torch.equal(each, found[0]) for each in found)
    # A running sum in that dtype, as an all-reduce of it makes, is no proof where ranks are few.
    running = torch.zeros(257, dtype=dtype)
    for grad in GRADS[:world]:
        running += (grad / world).to(dtype)
    if world >= 16:
        assert ((running.double() - exact) / exact).abs().max() > 2.5 * unit


def test_parts_of_many_ranks():
    """More than elements, and no divisor of them; the bits of ordered sums."""
    for world in (5, 7):
        whole = answers(world, lambda *place: rounded_once(*place, lambda g: gradacc.all_reduce(g, ordered=True)))
        parts = answers(world, lambda *place: rounded_once(*place, gradacc.reduce_scatter))
        parts.sort(key=lambda part: part[0])
        assert_trees_equal(torch.cat([values for _, values in parts]), whole[0])


# Memory.

LAYERS, WIDE = 24, 48


def peak(group, overlap, backends=("nccl",)):
    """Most elements alive in a call, over those of all parameters; of its gradients none is kept."""
    params = [torch.randn(WIDE, WIDE) / WIDE**0.5 for _ in range(LAYERS)]

    def deep(params, x):
        for p in params:
            x = torch.tanh(x @ p)
        return x.square().mean()

    sync = gradacc.reduce_scatter(group, overlap=overlap)
    grad_fn = gradacc.accumulate(deep, steps=1, sync=sync)
    with (
        mock.patch.object(bounds, "_REDUCE_AND_SCATTER", set(backends)),
        mock.patch("gradacc._sync.wire.SMALL", 4 * WIDE * WIDE),
        mock.patch("gradacc._sync.wire.LARGE", 8 * WIDE * WIDE),
    ):
        for _ in range(2):
            grad_fn(params, torch.randn(1, WIDE))
        # On a busy machine a thread of gloo's may hold what has crossed for longer than it takes: the least of some calls.
        peaks = []
        for _ in range(6):
            with PeakElements() as elements:
                grad_fn(params, torch.randn(1, WIDE))
            peaks.append(elements.peak)
    return min(peaks) / (LAYERS * WIDE * WIDE)


def test_with_overlap_the_whole_gradient_never_exists(pool):
    """ZeRO-2: beside this rank's part there are some buckets; without overlap there is all of it, twice."""
    for world in (2, 4):
        assert max(pool.run(world, peak, True)) < 1 / world + 0.5
        assert max(pool.run(world, peak, True, ("gloo",))) < 1 / world + 0.5
        assert min(pool.run(world, peak, False)) > 1.5
