"""What crosses: the union's gradient, value and aux, in one collective, with the same bits on every rank."""

import gc
import os
import pickle
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gradacc
from gradacc._sync import record as records
from gradacc._sync import wire
from gradacc._sync.layout import Spec
from tests.helpers import assert_trees_close, assert_trees_equal, crossings
from tests.workers import Failed


def token_loss(params, batch):
    """A Mean over tokens, with leaves of every kind of aux."""
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    real = batch["mask"]
    total = (y.square().sum(-1) * real).sum()
    aux = {
        "each": y.sum((-1, -2)),
        "hits": gradacc.Mean((y > 0).sum((0, 1)), real.sum()),
        "average": total / real.sum(),
        "rest": (
            gradacc.Mean(y.square().sum(), y.numel()),
            None,
            [gradacc.Mean(y.sum((0, 1)), y.new_full((), len(y)))],
        ),
        "complex": gradacc.Mean(torch.complex(y.sum(), y.sum()), float(len(y))),
    }
    return gradacc.Mean(total, real.sum()), aux


def make(sizes, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(3, 4, generator=g, dtype=dtype), "b": torch.randn(4, generator=g, dtype=dtype)}
    n = sum(sizes)
    batch = {"x": torch.randn(n, 5, 3, generator=g, dtype=dtype), "mask": torch.rand(n, 5, generator=g) < 0.7}
    parts = [{key: value.split(sizes)[rank] for key, value in batch.items()} for rank in range(len(sizes))]
    return params, batch, parts


def call(group, params, batch, sync_options, options):
    """Twice: the first call agrees, the second one relies on it."""
    grad_fn = gradacc.accumulate_and_value(
        token_loss, has_aux=True, sync=gradacc.all_reduce(group, **sync_options), **options
    )
    return [grad_fn(params, batch) for _ in range(2)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (7, 2), (5, 0), (0, 3, 1), (1, 0, 6, 2)])
def test_ranks_equal_one_process_with_the_union(pool, sizes, overlap):
    params, batch, parts = make(sizes)
    expected = gradacc.accumulate_and_value(token_loss, has_aux=True, steps=1)(params, batch)
    answers = pool.run_each(len(sizes), call, [(params, part, {"overlap": overlap}, {"steps": 3}) for part in parts])
    for rank, calls in enumerate(answers):
        for grads, (value, aux) in calls:
            each = aux.pop("each")
            reference = dict(expected[1][1])
            assert_trees_close(each, reference.pop("each").split(sizes)[rank])
            assert_trees_close((grads, (value, aux)), (expected[0], (expected[1][0], reference)))
    for calls in answers[1:]:  # bit for bit, metrics too
        assert_trees_equal(calls, answers[0])


def windows_of(group, params, parts, loss, options):
    grad_fn = gradacc.accumulate_and_value(loss, split=iter, sync=gradacc.all_reduce(group), **options)
    return [grad_fn(params, parts) for _ in range(3)]


def squares(w, x):
    return (w * x).square().mean()


def summed(w, x):
    return (w * x).square().sum()


@pytest.mark.parametrize("layout", [[[3, 1], [2]], [[1, 2, 3], []], [[], [4, 1], [2]], [[0, 2], [0], [5, 1, 1], []]])
@pytest.mark.parametrize(("loss", "options"), [(squares, {}), (summed, {"reduction": "sum"})])
def test_windows_of_different_lengths(pool, layout, loss, options):
    """Iterables of micro-batches of any sizes, empty ones included."""
    w, x = torch.randn(3, dtype=torch.float64), torch.randn(sum(map(sum, layout)), 3, dtype=torch.float64)
    left = iter(x.split([size for window in layout for size in window]))
    windows = [[next(left) for _ in window] for window in layout]
    expected = torch.func.grad_and_value(loss)(w, x)
    answers = pool.run_each(len(layout), windows_of, [(w, window, loss, options) for window in windows])
    for answer in answers:
        for result in answer:
            assert_trees_close(result, expected)
        assert_trees_equal(answer, answers[0])


def test_nothing_on_any_rank(pool):
    """Nobody knows what the loss returns: gradients 0 and value NaN, also later, once somebody does."""
    w, x = torch.ones(3), torch.ones(2, 3)
    for windows in ([[], []], [[x[:0]], []]):
        for answer in pool.run_each(2, windows_of, [(w, window, squares, {}) for window in windows]):
            for grads, value in answer:
                assert grads.eq(0).all()
                assert value.isnan()
    assert pool.run(2, nothing_after_something)[1] == [(6.0, 6.0), (0.0, "nan"), (6.0, 6.0)]


def nothing_after_something(group):
    grad_fn = gradacc.accumulate_and_value(squares, split=iter, sync=gradacc.all_reduce(group))
    answers = []
    for window in ([torch.full((2, 1), 3.0**0.5)], [], [torch.full((1, 1), 3.0**0.5)]):
        grads, value = grad_fn(torch.full((1,), 2.0**0.5), window)
        answers.append((round(grads.item() / 2**0.5, 5), "nan" if value.isnan() else round(value.item(), 5)))
    return answers


def nothing_is_an_error_with_aux(group):
    grad_fn = gradacc.accumulate(token_loss, has_aux=True, sync=gradacc.all_reduce(group))
    grad_fn(make((1,))[0], [])


def test_nothing_on_any_rank_with_aux(pool):
    with pytest.raises(Failed, match="no micro-batch arrived, so nothing says what aux is"):
        pool.run(2, nothing_is_an_error_with_aux)


def dtypes_of(group, params, batch, sync_options, options):
    def loss(params, x):
        return (
            sum((p.double().abs() if not p.is_complex() else p.abs()).sum() * (n + 1) for n, p in enumerate(params))
            * x.mean()
        )

    grad_fn = gradacc.accumulate(loss, steps=2, sync=gradacc.all_reduce(group, **sync_options), **options)
    grad_fn(params, batch)
    with CommDebugMode() as counter:
        grads = grad_fn(params, batch)
    return grads, counter.get_total_counts()


def test_one_collective_per_accumulator_dtype(pool):
    """bfloat16, float16, float32 and complex64 gradients cross together as float32; float64 ones are another call."""
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.complex64, torch.float64]
    params = [torch.randn(2, 3, dtype=torch.complex64 if k.is_complex else torch.float32).to(k) for k in kinds]
    batch = torch.rand(4, 2, dtype=torch.float64)
    for chosen, options, calls in ((params[:4], {}, 1), (params, {}, 2), (params, {"dtype": torch.float32}, 1)):
        alone = dtypes_of(None, chosen, batch, {}, options)[0]
        for grads, count in pool.run(2, dtypes_of, chosen, batch, {}, options):
            assert_trees_close(grads, alone, rtol=1e-6)
            assert count == calls


def count(group, size, steps, metrics, overlap):
    params = [torch.randn(3) for _ in range(size)]

    def loss(params, x):
        value = sum((p * x).square().sum(-1).mean() for p in params)
        return value, {n: gradacc.Mean(value.detach(), 1) for n in range(metrics)} | {-1: value.detach()}

    grad_fn = gradacc.accumulate_and_value(
        loss, steps=steps, has_aux=True, sync=gradacc.all_reduce(group, overlap=overlap)
    )
    batch = torch.randn(8, 3)
    counts = []
    for _ in range(3):
        with CommDebugMode() as counter:
            grad_fn(params, batch)
        counts.append({str(op): n for op, n in counter.get_comm_counts().items()})
    return counts


@pytest.mark.parametrize("overlap", [False, True])
def test_the_number_of_collectives_is_one(pool, overlap):
    """Whatever the number of parameters, micro-batches and metrics; and at first use two small ones more, to see that ranks are
    alike, and one that says so, where calls of another shape came before (in this group many did, in other tests)."""
    for size, steps, metrics in ((1, 1, 0), (5, 1, 3), (50, 8, 0), (50, 2, 40)):
        for first, *later in pool.run(2, count, size, steps, metrics, overlap):
            assert later == [{"c10d.allreduce_": 1}] * 2
            assert first.pop("c10d.allreduce_") <= 4
            # The order of the gradients, where they overlap: broadcast_object_list is two, the size and the bytes.
            assert first == ({"c10d.broadcast_": 2} if overlap else {})


def exchanges(group):
    """Collectives of three calls with sums over micro-batches whose examples cannot be counted."""
    grad_fn = gradacc.accumulate(
        lambda w, b: (w * b[0]).sum() + b[1].sum(), reduction="sum", sync=gradacc.all_reduce(group)
    )
    counts = []
    for _ in range(3):
        with CommDebugMode() as counter:
            grad_fn(torch.ones(3), [(torch.ones(2, 3), torch.ones(5))])
        counts.append(counter.get_total_counts())
    return counts


def test_sums_agree_once_too(pool):
    for first, *later in pool.run(2, exchanges):
        assert first > 1
        assert later == [1, 1]


def growing(group):
    """Weights that grow a millionfold after the first call: what crosses stays in the range of a mean."""
    grad_fn = gradacc.accumulate_and_value(
        lambda w, x: gradacc.Mean((w * x[:, 0]).sum(), x[:, 1].sum()),
        steps=1,
        dtype=torch.float32,
        sync=gradacc.all_reduce(group, compress=torch.float16),
    )
    answers = []
    for weight in (1.0, 1e3, 1e6, 1e6):
        grads, _ = grad_fn(torch.ones(()), torch.tensor([[weight * 2, weight]]))
        answers.append(round(grads.item(), 2))
    return answers


def test_compressed_gradients_stay_in_range(pool):
    assert pool.run(2, growing) == [[2.0] * 4] * 2


def scalars(group):
    """What does not fit into float32: counts beyond 2**24, float64 values."""

    def loss(w, x):
        value = (w * x).sum()
        return value, {
            "count": gradacc.Mean(torch.tensor(2**40 + 1), 2**53 - 1),
            "fine": gradacc.Mean(torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(-(2**60) + 1)),
        }

    grad_fn = gradacc.accumulate_and_value(loss, steps=1, has_aux=True, reduction="sum", sync=gradacc.all_reduce(group))
    return grad_fn(torch.ones(3), torch.ones(2, 3))[1][1]


def test_metrics_cross_exactly(pool):
    for aux in pool.run(3, scalars):
        assert aux["count"].total == 3 * 2**40 + 3
        assert aux["count"].total.dtype == torch.int64
        assert aux["count"].weight == 3 * float(2**53 - 1)
        assert aux["fine"].total == torch.tensor([1 / 3] * 3, dtype=torch.float64).sum()
        assert aux["fine"].weight == -3 * 2**60 + 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_records_survive_a_sum_of_floats(dtype):
    numbers = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 255, 256], dtype=torch.int64)
    floats = torch.tensor([0.0, -0.0, torch.pi, torch.nan, -torch.inf, 5e-324], dtype=torch.float64).view(torch.int64)
    record = torch.cat([numbers, floats])
    coded = records.encode(record, dtype)
    assert coded.dtype == dtype
    assert len(coded) == records.digits(len(record), dtype)
    slots = torch.stack([coded + torch.zeros_like(coded), torch.zeros_like(coded)])
    assert records.decode(slots, len(record)).tolist() == [record.tolist(), [0] * len(record)]


def plan_of(sizes, dtypes, *rest):
    gradients = [wire.Gradient(size, dtype, torch.device("cpu")) for size, dtype in zip(sizes, dtypes, strict=True)]
    return wire.plan(gradients, *rest)


def test_buckets():
    """In the order of a backward pass: two small ones first, each full when it has reached its size."""
    sizes = [torch.Size([n]) for n in (10, 1 << 20, 7 << 20, 1 << 20, 100, 200)]
    kind, order = [torch.float32] * 6, (4, 5, 3, 1, 2, 0)
    whole = plan_of(sizes, kind, (), None, None)
    assert [bucket.indices for bucket in whole.buckets] == [(0, 1, 2, 3, 4, 5)]
    cut = plan_of(sizes, kind, (), None, order)
    assert [bucket.indices for bucket in cut.buckets] == [(4, 5, 3), (1,), (2,), (0,)]
    large = plan_of([torch.Size([4 << 20])] * 8, kind + kind[:2], (), None, range(8))
    assert [bucket.indices for bucket in large.buckets] == [(0,), (1,), (2, 3), (4, 5), (6, 7)]
    equal = plan_of([torch.Size([1 << 16])] * 32, [torch.float32] * 32, (), None, range(32))
    assert [len(bucket.indices) for bucket in equal.buckets] == [1, 2, 7, 7, 7, 7, 1]
    two = plan_of([torch.Size([1 << 16])] * 8, [torch.float64, torch.float32] * 4, (), None, range(8))
    assert [bucket.indices for bucket in two.buckets] == [(0,), (1,), (2,), (3,), (4, 6), (5, 7)]  # of each dtype
    half = plan_of(sizes, kind, (Spec(torch.int64, (3,), False),), torch.bfloat16, order)
    assert [bucket.indices for bucket in half.buckets] == [(4, 5, 3), (1,), (2,), (0,), ()]
    assert [bucket.wire for bucket in half.buckets] == [torch.bfloat16] * 4 + [torch.int64]
    vector = plan_of(sizes, kind, (Spec(torch.float32, (3,), False),), None, None)
    assert vector.vectors == ((0,),)
    assert plan_of(sizes, kind, (Spec(torch.float32, (3,), False),), None, order).vectors[-1] == (0,)
    for plan in (whole, cut, half):
        for index, place in enumerate(plan.places):
            assert index in plan.buckets[place.bucket].indices
            assert place.offset + place.numel <= plan.buckets[place.bucket].numel
        assert sum(bucket.numel for bucket in plan.buckets) == sum(size.numel() for size in sizes)


def compressed(group, grads, dtype, overlap):
    """A loss whose gradient on each rank is known; the rank's weight is its number of examples."""

    def loss(params, x):
        return sum((p * g).sum() for p, g in zip(params, grads, strict=True)) * x.mean()

    grad_fn = gradacc.accumulate_and_value(
        loss, steps=2, sync=gradacc.all_reduce(group, compress=dtype, overlap=overlap), dtype=torch.float32
    )
    params, x = [torch.zeros_like(g) for g in grads], torch.ones(group.rank() + 1, 1)
    grad_fn(params, x)
    with CommDebugMode() as counter:
        result = grad_fn(params, x)
    return result, crossings(counter)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_compression_keeps_its_bound(pool, dtype, unit, overlap):
    """|error| <= u (sum_r |c_r| + |sum_r c_r|), and it does round; values cross exactly."""
    world = 4
    grads = [[torch.randn(1000), torch.randn(7, 3)] for _ in range(world)]
    shares = [(rank + 1) / 10 for rank in range(world)]
    answers = pool.run_each(world, compressed, [(each, dtype, overlap) for each in grads])
    for (result, value), calls in answers:
        assert calls == 1
        assert value == 0.0
        for n, grad in enumerate(result):
            exact = sum(share * each[n].double() for share, each in zip(shares, grads, strict=True))
            each = sum(share * one[n].double().abs() for share, one in zip(shares, grads, strict=True))
            bound = unit * (each + exact.abs())
            error = (grad.double() - exact).abs()
            assert (error <= bound * (1 + unit) + 1e-6).all()  # the second rounding is of what was rounded
            assert error.max() > 1e-6  # float32 would be below
        assert grad.dtype == torch.float32
    assert_trees_equal([answer[0] for answer in answers[1:]], [answers[0][0]] * (world - 1))


def mesh_groups(group):
    """A mesh of one dimension, a dimension of a mesh, and what is neither."""
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.full((1, 1), float(dist.get_rank()))
    w = torch.ones(1)

    def value(sync_group):
        return gradacc.accumulate_and_value(lambda w, x: (w * x).mean(), steps=1, sync=gradacc.all_reduce(sync_group))(
            w, x
        )[1].item()

    answers = [
        value(flat),
        value(flat["dp"]),
        value(grid["dp"]),
        value(grid["tp"]),
        value(dist.group.WORLD),
        value(None),
    ]
    messages = []
    for bad in (grid, dist.GroupMember.NON_GROUP_MEMBER, object()):
        try:
            value(bad)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return answers, messages


def test_groups_and_meshes(pool):
    for rank, (answers, messages) in enumerate(pool.run(4, mesh_groups)):
        assert answers == [1.5, 1.5, [1.0, 2.0][rank % 2], [0.5, 2.5][rank // 2], 1.5, 1.5]
        assert "name the one to reduce over, as in mesh['dp']" in messages[0]
        assert "is not in the group" in messages[1]
        assert "must be a ProcessGroup or a DeviceMesh" in messages[2]


def test_without_a_process_group_nothing_crosses():
    w, x = torch.randn(3), torch.randn(4, 3)
    alone = gradacc.accumulate_and_value(squares, steps=2)(w, x)
    assert_trees_equal(gradacc.accumulate_and_value(squares, steps=2, sync=gradacc.all_reduce())(w, x), alone)


def test_a_forgotten_process_group_is_an_error(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    grad_fn = gradacc.accumulate(squares, steps=2, sync=gradacc.all_reduce())
    with pytest.raises(
        RuntimeError, match=r"WORLD_SIZE is 2, but no process group was initialised.*init_process_group"
    ):
        grad_fn(torch.ones(3), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compress": torch.float32}, "compress must be torch.bfloat16 or torch.float16, got torch.float32"),
        ({"compress": "bf16"}, "compress must be"),
        ({"overlap": 1}, "overlap must be True or False"),
        ({"group": "dp"}, "group must be a ProcessGroup, a DeviceMesh or None"),
        ({"group": torch.bfloat16}, "group must be"),
        ({"group": [0, 1]}, "group must be .*new_group"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TypeError, match=message):
        gradacc.all_reduce(**options)


def transforms(group):
    grad_fn = gradacc.accumulate(squares, steps=2, sync=gradacc.all_reduce(group))
    torch.func.vmap(grad_fn)(torch.ones(2, 3), torch.ones(2, 4, 3))


def test_transforms_of_a_synchronised_call_are_refused(pool):
    with pytest.raises(Failed, match="NotImplementedError.*inside a functorch transform"):
        pool.run(2, transforms)


def ddp(group):
    """Three micro-batches of two examples on each rank, by DDP's no_sync and by gradacc."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    apply, params, _ = gradacc.functional(module)
    wrapped = DistributedDataParallel(module, process_group=group)
    torch.manual_seed(10 + group.rank())
    x, steps = torch.randn(8, 4), 4

    def loss_of(y):
        return y.square().mean()

    parts = x.chunk(steps)
    with wrapped.no_sync():
        for part in parts[:-1]:
            (loss_of(wrapped(part)) / steps).backward()
    (loss_of(wrapped(parts[-1])) / steps).backward()
    theirs = {name: param.grad for name, param in module.named_parameters()}
    ours = [
        gradacc.accumulate(
            lambda params, x: loss_of(apply(params, x)), steps=steps, sync=gradacc.all_reduce(group, overlap=overlap)
        )
        for overlap in (False, True)
    ]
    return theirs, [grad_fn(params, x) for grad_fn in ours for _ in range(2)]


def test_ddp_no_sync_bit_for_bit(pool):
    """Where the arithmetic is the same: shares and numbers of ranks are powers of two, and no weight gradient is fused."""
    for theirs, ours in pool.run(2, ddp):
        for grads in ours:
            assert_trees_equal(grads, theirs)


def big(group, overlap):
    """Fused weight gradients, several buckets, unused parameters, and half precision beside it."""
    torch.manual_seed(0)
    params = {n: torch.randn(512, 512) / 23 for n in range(4)} | {
        "unused": torch.randn(300),
        "half": torch.randn(4).bfloat16(),
    }
    torch.manual_seed(group.rank())
    x = torch.randn(8, 512)

    def loss(params, x):
        scale = params["half"].float().square().mean()
        for n in range(4 if group.rank() else 3):  # a layer that only some ranks use
            x = torch.relu(x @ params[n])
        return x.square().mean() * scale

    grad_fn = gradacc.accumulate_and_value(loss, steps=4, sync=gradacc.all_reduce(group, overlap=overlap))
    with mock.patch.object(wire, "LARGE", 1 << 20):
        answers = [grad_fn(params, x) for _ in range(3)]
    with CommDebugMode() as counter:
        grad_fn(params, x)
    return answers, counter.get_total_counts()


def test_overlap_is_the_same_bits(pool):
    """Two ranks: a sum of two has no order. (More ranks: a ring adds an element in an order that depends on its place.)"""
    plain, overlapped = pool.run(2, big, False), pool.run(2, big, True)
    for (ours, few), (theirs, several) in zip(plain, overlapped, strict=True):
        assert_trees_equal(ours, theirs)
        assert (few, several) == (1, 5)
        assert ours[0][0]["unused"].eq(0).all()
        assert ours[0][0][3].ne(0).any()
    for (ours, _), (theirs, _) in zip(pool.run(3, big, False), pool.run(3, big, True), strict=True):
        assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-7)


def early(group):
    """Which buckets had left when the backward pass of the last micro-batch reached a layer.

    The parameters' order is not that of the backward pass: a dict's leaves are sorted by their keys.
    """
    layers = (1, 0, 2)
    params = {n: torch.randn(600, 600) / 25 for n in layers}
    sent, launches = [], []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            launches.append(len(sent))
            return grad

    def loss(params, x):
        for n in layers:
            x = Probe.apply(x @ params[n])
        return x.square().mean()

    grad_fn = gradacc.accumulate(loss, steps=2, sync=gradacc.all_reduce(group, overlap=True))
    with mock.patch.object(wire, "LARGE", 1 << 20):
        grad_fn(params, torch.randn(4, 600))
    launches.clear()
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (sent.append(1), original(*args, **kwargs))[1]
    try:
        grad_fn(params, torch.randn(4, 600))
    finally:
        dist.all_reduce = original
    return launches


def test_buckets_leave_while_the_backward_pass_runs(pool):
    for launches in pool.run(2, early):
        assert launches == [0, 0, 0, 0, 1, 2]  # micro-batch 1: none; 2: before the third, second and first layer


def changed(group):
    def loss(w, x):
        return (w * x[:, :3]).square().mean(), gradacc.Mean(torch.zeros(x.shape[1]), 1)

    grad_fn = gradacc.accumulate(loss, steps=1, has_aux=True, sync=gradacc.all_reduce(group))
    messages = []
    for columns in (3, 3 + group.rank(), 3):  # and it goes on
        try:
            grad_fn(torch.ones(3), torch.ones(2, columns))
        except (ValueError, RuntimeError) as error:
            messages.append((type(error).__name__, str(error)))
    return messages


def test_aux_that_changes_is_an_error_everywhere(pool):
    (one,), (other,) = pool.run(2, changed)
    assert one[0] == "RuntimeError"
    assert "the call raised on rank 1" in one[1]
    assert other[0] == "ValueError"
    assert "aux is torch.float32 of shape (3,)" in other[1]


def forget(group):
    own = dist.new_group()
    grad_fn = gradacc.accumulate(squares, steps=1, sync=gradacc.all_reduce(own))
    grad_fn(torch.ones(3), torch.ones(2, 3))
    reference = weakref.ref(own)
    dist.destroy_process_group(own)
    del own
    gc.collect()
    alive = reference() is not None  # `sync` itself holds the group
    del grad_fn
    gc.collect()
    return alive, reference() is None


def test_agreements_do_not_keep_a_group_alive(pool):
    assert pool.run(4, forget) == [(True, True)] * 4


def test_options_pickle():
    assert pickle.loads(pickle.dumps(gradacc.all_reduce(compress=torch.bfloat16))) == gradacc.all_reduce(
        compress=torch.bfloat16
    )
