"""Laws 14 and 15. Shards: the bits of ordered sums with the whole optimizer. Order: nothing else changes a bit."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import optim
from tests.helpers import assert_trees_close, assert_trees_equal, some_slow

UPDATES = 20


def loss_of_all(params, batch):
    """Over leaves of every kind: 0-dim, smaller than the ranks are many, complex, tied, narrow, and one without a gradient."""
    y = torch.tanh(batch["x"] @ params["w"] + params["few"].sum()) * params["scalar"]
    y = y + (batch["x"][:, :2].to(torch.complex64) @ params["complex"]).abs()[:, None]
    y = y + (batch["x"] @ params["half"].float()) + (0.2 * params["tied"][0] + 0.1 * params["tied"][1].square()).sum()
    real = batch["mask"]
    return gradacc.Mean((y.square().sum(-1) * real).sum(), real.sum()), {"mean": gradacc.Mean(y.detach().sum(0), 3)}


def params_of_all():
    g = torch.Generator().manual_seed(1)
    tied = torch.randn(3, generator=g)
    return {
        "w": torch.randn(4, 5, generator=g).t().contiguous().t(),
        "few": torch.randn(2, generator=g),
        "scalar": torch.randn((), generator=g),
        "complex": torch.randn(2, dtype=torch.complex64, generator=g),
        "half": torch.randn(4, 5, generator=g).bfloat16(),
        "tied": [tied, tied],
        "unused": torch.ones(7),
        "none": torch.ones(0, 3),
    }


def batches(rank, world):
    """Of this rank: uneven, and nothing now and then."""
    g = torch.Generator().manual_seed(100 + rank)
    for number in range(UPDATES):
        n = [5, 0, 3, 1, 4][(rank + number) % 5] if world > 1 else 1 + number % 3
        yield {"x": torch.randn(n, 4, generator=g), "mask": torch.rand(n, generator=g) < 0.7}


def makers():
    return {
        "sgd": lambda: optim.sgd(1e-2, momentum=0.9, nesterov=True),
        "adamw": lambda: optim.adamw(1e-2),
        "torch's AdamW": lambda: optim.from_torch(torch.optim.AdamW, lr=1e-2, amsgrad=True),
        "torch's Adagrad": lambda: optim.from_torch(torch.optim.Adagrad, lr=1e-2),
        "groups": lambda: optim.by_path(
            optim.adamw(1e-2, weight_decay=0.1),
            (lambda path, leaf: leaf.ndim < 2 or "complex" in path, optim.sgd(1e-3)),
        ),
        "torchopt": lambda: optim.from_torchopt(pytest.importorskip("torchopt").adam(1e-2)),
        "schedule": lambda: optim.adam(lambda step: 1e-2 / (1 + step)),
    }


def trained(sync, optimizer, group, donate=False, **options):
    grad_fn = gradacc.accumulate_and_value(loss_of_all, steps=2, has_aux=True, sync=sync, **options)
    step = gradacc.train_step(grad_fn, optimizer, donate=donate)
    params = params_of_all()
    state = gradacc.TrainState(params, optimizer.init(params))
    told = []
    for batch in batches(dist.get_rank(group), group.size()):
        state, metrics = step(state, batch)
        told.append({name: metrics[name] for name in ("loss", "weight", "aux")})
    return state.params, told


def both(group, name, overlap, donate):
    make = makers()[name]
    whole = trained(gradacc.all_reduce(group, ordered=True), make(), group)
    sync = gradacc.reduce_scatter(group, overlap=overlap)
    return whole, trained(sync, optim.sharded(make(), group), group, donate)


@pytest.mark.parametrize(
    ("name", "world", "overlap", "donate"),
    some_slow(
        [
            (name, world, overlap, donate)
            for name in makers()
            for world in (1, 2, 3, 4)
            for overlap in (False, True)
            for donate in (False, True)
        ],
        ("adamw", 1, False, False),
        ("sgd", 2, True, True),
        ("adamw", 3, False, True),
        ("groups", 4, True, False),
        ("torch's AdamW", 4, False, False),
        ("torchopt", 3, False, False),
    ),
)
def test_shards_are_bit_for_bit_what_ordered_sums_are(pool, name, world, overlap, donate):
    answers = pool.run(world, both, name, overlap, donate)
    for whole, parts in answers:
        assert all(leaf.isfinite().all() for leaf in whole[0].values() if isinstance(leaf, torch.Tensor))
        assert_trees_equal(parts, whole)
    for _, parts in answers[1:]:
        assert_trees_equal(parts, answers[0][1])


def gradients(group, sync, **options):
    kinds = {"all_reduce": gradacc.all_reduce, "reduce_scatter": gradacc.reduce_scatter}
    kind, how = sync
    grad_fn = gradacc.accumulate_and_value(
        loss_of_all, steps=3, has_aux=True, sync=kinds[kind](group, **how), **options
    )
    found = [grad_fn(params_of_all(), batch) for batch in list(batches(dist.get_rank(group), group.size()))[:3]]
    return [(as_whole(group, grads), value) for grads, value in found]


def as_whole(group, grads):
    """Gathered, of parts, by torch alone."""
    if not isinstance(grads["w"], gradacc.Shard):
        return grads
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, grads, group=group)
    flat = {}
    for name, shard in grads.items():
        if isinstance(shard, list):
            flat[name] = [join([each[name][n] for each in everyone]) for n in range(len(shard))]
        else:
            flat[name] = join([each[name] for each in everyone])
    return flat


def join(shards):
    ends = [shard.offset + shard.length for shard in shards]
    assert [shard.offset for shard in shards] == [0, *ends[:-1]]
    return torch.cat([shard.values for shard in shards]).view(shards[0].shape)


@pytest.mark.parametrize("compress", [None, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_neither_overlap_nor_buckets_change_a_bit(pool, world, compress):
    how = {"compress": compress}
    plain = pool.run(world, gradients, ("all_reduce", {"ordered": True, **how}))
    for kind, more in (
        ("all_reduce", {"ordered": True, "overlap": True}),
        ("reduce_scatter", {}),
        ("reduce_scatter", {"overlap": True}),
        *([("all_reduce", {}), ("all_reduce", {"overlap": True})] if compress else []),
    ):
        answers = pool.run(world, in_small_buckets, (kind, {**how, **more}))
        # The sums of a compressed all-reduce cross back rounded; those of parts are not.
        if compress is None or kind == "all_reduce":
            for answer in answers:
                assert_trees_equal(answer, plain[0])
        else:
            assert_trees_equal(answers[1:], answers[:1] * (world - 1))
            for (grads, value), (others, other) in zip(answers[0], plain[0], strict=True):
                assert_trees_equal(value, other)
                assert_trees_close(rounded(grads), rounded(others), rtol=2.0**-7, atol=1e-6)


def rounded(grads):
    return {name: leaf for name, leaf in grads.items() if isinstance(leaf, torch.Tensor)}


def in_small_buckets(group, sync):
    """Such that there are several."""
    with mock.patch("gradacc._sync.wire.SMALL", 16), mock.patch("gradacc._sync.wire.LARGE", 64):
        return gradients(group, sync)


@pytest.mark.parametrize("world", [2, 4])
def test_ordered_sums_are_the_sums(pool, world):
    plain = pool.run(world, gradients, ("all_reduce", {}))
    for answer in pool.run(world, gradients, ("all_reduce", {"ordered": True})):
        for (grads, value), (others, other) in zip(answer, plain[0], strict=True):
            assert_trees_close(value, other, rtol=1e-6)
            for name, grad in grads.items():
                assert_trees_close(grad, others[name], rtol=2.0**-7 if name == "half" else 1e-5, atol=1e-5)


def counted(group):
    """Collectives of the third call of each, and of a whole step, with the bytes that this rank sends."""
    batch = next(batches(dist.get_rank(group), group.size()))
    found = {}
    for name, sync in {
        "ordered": gradacc.all_reduce(group, ordered=True),
        "parts": gradacc.reduce_scatter(group),
    }.items():
        grad_fn = gradacc.accumulate_and_value(loss_of_all, steps=2, has_aux=True, sync=sync)
        params = params_of_all()
        for _ in range(3):
            with CommDebugMode() as counter:
                grads, _ = grad_fn(params, batch)
        found[name] = {str(op): n for op, n in counter.get_comm_counts().items()}
    optimizer = optim.sharded(optim.adamw(1e-2), group)
    state = optimizer.init(params)
    for _ in range(3):
        with CommDebugMode() as counter:
            params, state = optimizer.step(params, grads, state)
    found["step"] = {str(op): n for op, n in counter.get_comm_counts().items()}
    return found


def test_the_number_of_collectives(pool):
    """One for gradients; one for each dtype of parameters (float32, with complex64, and bfloat16) for the new ones."""
    for found in pool.run(3, counted):
        assert found["ordered"] == {"c10d.alltoall_base_": 1, "c10d._allgather_base_": 1}
        assert found["parts"] == {"c10d.alltoall_base_": 1}
        assert found["step"] == {"c10d._allgather_base_": 2}


# Every form of a call.


def mean_loss(params, batch):
    return (batch @ params["w"] + params["b"]).tanh().square().mean()


def two_means(params, batch):
    y = (batch @ params["w"] + params["b"]).tanh()
    far = batch[:, 0] > 0
    return {
        "all": gradacc.Mean(y.square().sum(), y.numel()),
        "far": 0.5 * gradacc.Mean((y.sum(1) * far).sum(), far.sum()),
    }


def weights_of(batch):
    return {"all": batch.shape[0] * 5, "far": (batch[:, 0] > 0).sum()}


def with_carry(params, batch, carry):
    y = batch @ params["w"] + params["b"]
    return y.square().mean(), {"seen": carry["seen"] + gradacc.Mean(y.detach().sum(0), len(y))}


def whole_batch(params, outputs, batch):
    return (outputs @ outputs.T).square().mean() + outputs.std()


def own_rows(params, outputs, batch, rows):
    each = (outputs[rows] @ outputs.T).square().mean(1)
    return gradacc.Mean(each.sum(), len(each))


def encode(params, batch):
    return (batch @ params["w"] + params["b"]).tanh()


FORMS = {
    "plain": lambda sync: gradacc.accumulate_and_value(mean_loss, steps=2, sync=sync),
    "sum": lambda sync: gradacc.accumulate_and_value(mean_loss, steps=2, sync=sync, reduction="sum"),
    "float64": lambda sync: gradacc.accumulate_and_value(mean_loss, steps=2, sync=sync, dtype=torch.float64),
    "two means": lambda sync: gradacc.accumulate_and_value(two_means, steps=2, sync=sync),
    "counted": lambda sync: gradacc.accumulate_and_value(two_means, steps=2, sync=sync, weights=weights_of),
    "drop": lambda sync: gradacc.accumulate_and_value(mean_loss, steps=2, sync=sync, nonfinite="drop"),
    "carry": lambda sync: gradacc.accumulate_and_value(with_carry, steps=2, sync=sync, has_carry=True),
    "whole batch": lambda sync: gradacc.accumulate_and_value(whole_batch, steps=2, sync=sync, through=encode),
    "rows": lambda sync: gradacc.accumulate_and_value(own_rows, steps=2, sync=sync, through=encode),
    "argnums": lambda sync: gradacc.accumulate_and_value(
        lambda w, b, batch: mean_loss({"w": w, "b": b}, batch), argnums=(0, 1), steps=2, sync=sync
    ),
}


def called(group, name):
    g = torch.Generator().manual_seed(4)
    params = {"w": torch.randn(4, 5, generator=g), "b": torch.randn(5, generator=g)}
    found = []
    for sync in (gradacc.all_reduce(group, ordered=True), gradacc.reduce_scatter(group)):
        results = []
        call = streamed(sync) if name == "streamed" else FORMS[name](sync)
        for number in range(3):
            g = torch.Generator().manual_seed(10 * number + dist.get_rank(group))
            batch = torch.randn([4, 0, 3][(dist.get_rank(group) + number) % 3], 4, generator=g)
            if name == "drop" and number == 2 and len(batch):
                batch[0] = float("nan")
            if name == "argnums":
                ((w, b), value) = call(params["w"], params["b"], batch)
                results.append(({"w": w, "b": b}, value))
            elif name == "carry":
                carry = {"seen": gradacc.Mean(torch.zeros(5), 0.0)}
                (grads, value), after = call(params, batch, carry=carry)
                results.append((grads, (value, after)))
            else:
                results.append(call(params, batch))
        if isinstance(sync, gradacc.ReduceScatter):
            results = [(as_whole(group, grads), value) for grads, value in results]
        found.append(results)
    return found


def streamed(sync):
    acc = gradacc.accumulator(mean_loss, sync=sync)

    def call(params, batch):
        state = acc.init(params)
        for part in batch.split(2):
            state = acc.update(state, params, part)
        return acc.finalize(state)

    return call


@pytest.mark.parametrize("name", [*FORMS, "streamed"])
def test_every_form_of_a_call(pool, name):
    for whole, parts in pool.run(3, called, name):
        assert_trees_equal(parts, whole)
