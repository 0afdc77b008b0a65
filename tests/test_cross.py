"""The boundary alone: the exact mean over the union of ranks, of sums that were made elsewhere, in one collective."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import Mean
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint, transformed


def losses(params, x):
    """The sum over tokens, which are rows; and what the layout of gradients may be: a complex one, and a 0-dim one."""
    y = (torch.tanh(x @ params["w"]) + params["more"][0].abs() + params["more"][1]).square()
    return y.sum()


def make(n):
    g = torch.Generator().manual_seed(n)
    params = {
        "w": torch.randn(3, 4, generator=g, dtype=torch.float64),
        "more": [torch.randn(4, generator=g, dtype=torch.complex128), torch.tensor(0.5, dtype=torch.float64)],
    }
    return params, torch.randn(n, 3, generator=g, dtype=torch.float64)


def summed(params, x):
    """Of a rank, as a caller has it: zeros where there is nothing."""
    return torch.func.grad_and_value(losses)(params, x)


def large(params, x):
    grads, value = torch.func.grad_and_value(lambda params: losses(params, x) / len(x))(params)
    return grads, value


def cross_twice(group, params, x, options):
    """Also the second call, which relies on what the first one agreed on."""
    grads, total = summed(params, x)
    before = fingerprint((grads, total))
    results = []
    for _ in range(2):
        with CommDebugMode() as counter:
            results.append(gradacc.cross(grads, Mean(total, len(x)), sync=gradacc.all_reduce(group, **options)))
        count = counter.get_total_counts()
    assert fingerprint((grads, total)) == before
    return results, count


@pytest.mark.parametrize("sizes", [(5,), (4, 4), (7, 2), (5, 0), (0, 3, 1), (1, 0, 6, 2)])
def test_ranks_equal_the_large_batch(pool, sizes):
    params, x = make(sum(sizes))
    expected, value = large(params, x)
    answers = pool.run_each(len(sizes), cross_twice, [(params, part, {}) for part in x.split(sizes)])
    for results, count in answers:
        assert count == (len(sizes) > 1)
        for grads, mean in results:
            assert_trees_close(grads, expected)
            assert_trees_close(mean.value, value)
            assert mean.weight == sum(sizes)
        assert_trees_equal(results, answers[0][0])


def beside_finalize(group, params, parts, kind, options):
    """The accumulator's answer, and that of `cross` for the same sums."""
    sync = getattr(gradacc, kind)(group, **options)
    acc = gradacc.accumulator(lambda params, x: Mean(losses(params, x), len(x)), sync=sync)
    state, sums, mean = acc.init(params), None, Mean(torch.zeros((), dtype=torch.float64), 0)
    for x in parts:
        state = acc.update(state, params, x)
        grads, total = summed(params, x)
        sums = (
            grads
            if sums is None
            else {
                "w": sums["w"] + grads["w"],
                "more": [a + b for a, b in zip(sums["more"], grads["more"], strict=True)],
            }
        )
        mean = mean + Mean(total, len(x))
    if sums is None:
        sums = {"w": torch.zeros_like(params["w"]), "more": [torch.zeros_like(p) for p in params["more"]]}
    return acc.finalize(state), gradacc.cross(sums, mean, sync=sync)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("all_reduce", {}),
        ("all_reduce", {"compress": torch.bfloat16}),
        ("all_reduce", {"compress": torch.float16}),
        ("all_reduce", {"ordered": True}),
        ("reduce_scatter", {}),
    ],
)
@pytest.mark.parametrize("sizes", [((8,), (16,)), ((4, 4), (32,), ()), ((2,),)])
def test_it_is_finalize_after_a_fold(pool, sizes, kind, options):
    """Bit for bit, as sizes that are powers of two round nothing in the fold."""
    params, x = make(sum(map(sum, sizes)))
    left = iter(x.split([n for own in sizes for n in own]))
    parts = [[next(left) for _ in own] for own in sizes]
    arguments = [(params, own, kind, options) for own in parts]
    for finalized, crossed in pool.run_each(len(sizes), beside_finalize, arguments):
        assert_trees_equal(crossed[0], finalized[0])
        assert_trees_equal(crossed[1], finalized[1])


def test_alone():
    """Without sync, and with one where there is no process group."""
    params, x = make(5)
    grads, total = summed(params, x)
    before = fingerprint((grads, total))
    for sync in (None, gradacc.all_reduce()):
        found, value = gradacc.cross(grads, Mean(total, 5), sync=sync)
        assert_trees_close((found, value.value), large(params, x))
        assert value.weight == 5
    assert fingerprint((grads, total)) == before


@pytest.mark.parametrize("weight", [1, 4.0, torch.tensor(4), torch.tensor(0.0)])
def test_results_are_new_tensors(weight):
    w, total = torch.ones(3), torch.ones(())
    found, value = gradacc.cross([w, w], Mean(total, weight), sync=None)
    held = {t.untyped_storage().data_ptr() for t in (w, total, weight) if isinstance(t, torch.Tensor)}
    made = [t.untyped_storage().data_ptr() for t in (*found, value.total)]
    assert len({*made, *held}) == len(made) + len(held)


def bits_of(group, sums, weight):
    return gradacc.cross(sums, Mean(torch.zeros(()), weight), sync=gradacc.all_reduce(group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(pool, dtype):
    """256 + 1 - 256 is 0 in bfloat16. And it comes back as it came, in one collective with float32."""
    each = [[torch.full((2,), x, dtype=dtype), torch.full((2,), x)] for x in (2048.0, 1.0, -2048.0)]
    for grads, _ in pool.run_each(3, bits_of, [(sums, n) for sums, n in zip(each, (1, 0.5, 0.5), strict=True)]):
        assert_trees_equal(grads, [torch.full((2,), 0.5, dtype=dtype), torch.full((2,), 0.5)])
    alone = [torch.full((2,), 1.0, dtype=dtype)]
    assert_trees_equal(gradacc.cross(alone, Mean(torch.zeros(()), 3), sync=None)[0], [alone[0] / 3])


NUMBERS = [3, 3.0, torch.tensor(3), torch.tensor(3, dtype=torch.int32), torch.tensor(3.0), torch.tensor(3.0).double()]


@pytest.mark.parametrize("weight", NUMBERS, ids=repr)
def test_weights_of_every_kind(pool, weight):
    for grads, value in (bits_of(None, [torch.ones(2)], weight), *pool.run(2, bits_of, [torch.ones(2)], weight)):
        assert_trees_equal(grads, [torch.full((2,), 1 / 3)])
        assert isinstance(value.weight, torch.Tensor) == isinstance(weight, torch.Tensor)
    assert value.weight == 6


def nothing(group, sums, weights, garbage):
    total = torch.tensor(float("nan") if garbage else 0.0)
    weight = weights[0 if group is None else group.rank()]
    return gradacc.cross(sums, Mean(total, weight), sync=None if group is None else gradacc.all_reduce(group))


@pytest.mark.parametrize("weights", [(0, 0), (torch.tensor(0), torch.tensor(0))])
@pytest.mark.parametrize("garbage", [False, True])
def test_the_gradient_of_nothing_is_zero(pool, weights, garbage):
    sums = {"w": torch.full((3,), float("nan") if garbage else 0.0)}
    for grads, value in (nothing(None, sums, weights, garbage), *pool.run(2, nothing, sums, weights, garbage)):
        assert_trees_equal(grads, {"w": torch.zeros(3)})
        assert value.weight == 0
        assert value.total == 0
        assert value.value.isnan()


def rank_of_weight_0(group):
    here = group.rank() == 1
    sums = [torch.full((3,), float("nan") if here else 6.0)]
    mean = Mean(torch.tensor(float("nan") if here else 9.0), 0 if here else 3)
    return gradacc.cross(sums, mean, sync=gradacc.all_reduce(group))


def test_a_rank_of_weight_0_contributes_nothing(pool):
    """Whatever it has."""
    for grads, value in pool.run(3, rank_of_weight_0):
        assert_trees_equal(grads, [torch.full((3,), 2.0)])
        assert (value.total, value.weight) == (18, 6)


def alternating(group):
    """Collectives of calls of two structures, two kinds of means and a `grad_fn`, again and again."""
    sync = gradacc.all_reduce(group)
    grad_fn = gradacc.accumulate(lambda w, x: (w * x).mean(), steps=2, sync=sync)

    def count(call):
        with CommDebugMode() as counter:
            call()
        return counter.get_total_counts()

    mean, other = Mean(torch.ones(()), 2), Mean(torch.ones(()).double(), torch.tensor(2))
    shards = distribute_tensor(torch.ones(4), DeviceMesh.from_group(group, "cpu"), [Shard(0)])
    calls = (
        lambda: gradacc.cross([torch.ones(3)], mean, sync=sync),
        lambda: gradacc.cross({"w": torch.ones(3), "b": torch.ones(())}, mean, sync=gradacc.all_reduce(group)),
        lambda: gradacc.cross([torch.ones(3)], other, sync=sync),
        lambda: gradacc.cross([torch.ones(3)], mean, sync=gradacc.all_reduce(group, compress=torch.bfloat16)),
        lambda: gradacc.cross([shards], mean, sync=sync),
        lambda: gradacc.cross([shards, torch.ones(3).double()], mean, sync=sync),
        lambda: grad_fn(torch.ones(3), torch.ones(4, 3)),
    )
    return [[count(call) for call in calls] for _ in range(6)]


def test_one_collective_a_call(pool):
    """After the first call of each kind; and the order of calls has been learnt after two rounds."""
    for counts in pool.run(2, alternating):
        assert counts[-1] == [
            1,
            1,
            1,
            2,
            1,
            1,
            1,
        ]  # compressed there are two: parts are summed in float32, and gathered


def of_weights(group, options, weights):
    found = []
    for each in weights:
        weight = each[group.rank()]
        sums = [torch.tensor([1.0, -3.0]) * weight]
        before = fingerprint(sums)
        grads, value = gradacc.cross(
            sums, Mean(torch.tensor(float(weight)), weight), sync=gradacc.all_reduce(group, **options)
        )
        assert fingerprint(sums) == before
        found.append((grads, value.value))
    return found


@pytest.mark.parametrize("options", [{}, {"compress": torch.bfloat16}, {"compress": torch.float16}])
def test_weights_that_change_a_lot(pool, options):
    """Gradients then cross once more, in a unit that fits."""
    weights = [(1, 2), (1.0, 2.0), (1e9, 1.0), (0.0, 1e-9), (1e20, 0.0), (0.0, 0.0), (1.0, 1e30)]
    for found in pool.run(2, of_weights, options, weights):
        for (grads, value), each in zip(found, weights, strict=True):
            counts = torch.tensor(float(any(each)))
            rtol = 1e-2 if options else 1e-6
            assert_trees_close(grads, [torch.tensor([1.0, -3.0]) * counts], rtol=rtol)
            assert_trees_close(value, torch.ones(()) if any(each) else torch.tensor(float("nan")), rtol=1e-6)


def failing(group, who, how):
    sync = gradacc.all_reduce(group)
    good = [torch.ones(2)], Mean(torch.ones(()), 1)
    sums, mean = good
    if group.rank() == who:
        sums = [None] if how == "sums" else sums
        mean = {"mean": torch.ones(()), "weight": Mean(torch.ones(()), -1.0)}.get(how, mean)
    said = []
    for arguments in ((sums, mean), good, (sums, mean), good):
        try:
            said.append(gradacc.cross(*arguments, sync=sync)[0][0].tolist())
        except (TypeError, ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize("how", ["sums", "mean", "weight"])
def test_a_rank_that_raises_tells_the_others(pool, how):
    """At first use and later; and the next call is right on all of them."""
    words = {"sums": "sums[0] is None", "mean": "mean must be", "weight": "the weight of mean is -1"}[how]
    for rank, (one, two, three, four) in enumerate(pool.run(3, failing, 1, how)):
        for said in (one, three):
            assert (words if rank == 1 else "because the call raised on rank 1") in said
        assert two == four == [1.0, 1.0]


def differing(group, each):
    group = dist.new_group()  # in which nothing was agreed on before
    sync, said = gradacc.all_reduce(group), []
    sums, mean, options = each[dist.get_rank() == 1]
    for arguments in (
        (sums, mean, gradacc.all_reduce(group, **options)),
        ([torch.ones(2)], Mean(torch.ones(()), 1), sync),
        (sums, mean, gradacc.all_reduce(group, **options)),
        ([torch.ones(2)], Mean(torch.ones(()), 1), sync),
    ):
        try:
            said.append(gradacc.cross(*arguments[:2], sync=arguments[2])[0][0].tolist())
        except (TypeError, ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    dist.destroy_process_group(group)
    return said


ONE = Mean(torch.ones(()), 1)
DIFFERENCES = {
    "structure": (([torch.ones(2)], ONE, {}), ([torch.ones(2), torch.ones(1)], ONE, {}), "params[1]"),
    "names": (({"w": torch.ones(2)}, ONE, {}), ({"v": torch.ones(2)}, ONE, {}), "['w'] on rank 0"),
    "shape": (([torch.ones(2)], ONE, {}), ([torch.ones(3)], ONE, {}), "shape (3,) on rank 1"),
    "dtype": (([torch.ones(2)], ONE, {}), ([torch.ones(2).double()], ONE, {}), "torch.float64"),
    "mean": (([torch.ones(2)], ONE, {}), ([torch.ones(2)], Mean(torch.ones(()), torch.tensor(1)), {}), "number"),
    "options": (([torch.ones(2)], ONE, {}), ([torch.ones(2)], ONE, {"compress": torch.bfloat16}), "bfloat16"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_get_the_same_error(pool, what):
    """And go on together."""
    one, other, words = DIFFERENCES[what]
    first, *others = pool.run(4, differing, [one, other])
    assert others == [first] * 3
    assert words in first[0]
    assert first[1] == first[3] == [1.0, 1.0]
    assert "differ" in first[2]
    if what == "shape":  # one of them was agreed on, and the other one is new
        assert "alike in name and number: they differ in the structure" in first[2]


W, TOTAL = torch.ones(2), torch.ones(())
BAD = [
    (None, ONE, TypeError, "sums is None.*zeros_like"),
    ({"w": W, "b": None}, ONE, TypeError, r"sums\['b'\] is None; .*zeros_like"),
    ([], ONE, ValueError, "holds no tensor"),
    ({"n": torch.ones(2, dtype=torch.int64)}, ONE, TypeError, r"sums\['n'\] is a tensor of dtype torch.int64"),
    ([1.0], ONE, TypeError, r"sums\[0\] is 1.0 \(float\)"),
    (nn.Linear(1, 1), ONE, TypeError, "sums is an nn.Module .*param.grad"),
    (nn.Linear(1, 1).named_parameters(), ONE, TypeError, "generator.*param.grad"),
    (list(nn.Linear(1, 1).parameters()), ONE, ValueError, r"sums\[0\] requires grad.*\.grad"),
    ([W.to_sparse()], ONE, TypeError, "sparse"),
    ([W], TOTAL, TypeError, "mean must be gradacc.Mean"),
    ([W], (TOTAL, 1), TypeError, "mean must be gradacc.Mean"),
    ([W], None, TypeError, "mean must be gradacc.Mean"),
    ([W], Mean(3.0, 1), TypeError, "the total of mean is 3.0"),
    ([W], Mean(torch.tensor(3), 1), TypeError, "the total of mean is a tensor of dtype torch.int64"),
    ([W], Mean(torch.tensor(3j), 1), TypeError, "complex64"),
    ([W], Mean(W, 1), ValueError, r"the total of mean has shape \(2,\)"),
    ([W], Mean(TOTAL, W), ValueError, "the weight of mean is a torch.float32 tensor"),
    ([W], Mean(TOTAL, "3"), TypeError, "the weight of mean is a str"),
    ([W], Mean(TOTAL, None), TypeError, "the weight of mean is None"),
    ([W], Mean(TOTAL, TOTAL.clone().requires_grad_()), ValueError, "depends on the parameters"),
    *[([W], Mean(TOTAL, x), ValueError, "must be finite and not") for x in (-1, float("nan"), float("inf"))],
    *[([W], Mean(TOTAL, torch.tensor(x)), ValueError, "must be finite and not") for x in (-1, float("nan"))],
]


@pytest.mark.parametrize(("sums", "mean", "kind", "words"), BAD)
def test_bad_input(sums, mean, kind, words):
    with pytest.raises(kind, match=f"^cross: .*{words}"):
        gradacc.cross(sums, mean, sync=None)


def test_bad_sync():
    with pytest.raises(TypeError, match="^cross: sync must be gradacc.all_reduce"):
        gradacc.cross([W], ONE, sync="mean")
    with pytest.raises(TypeError, match="sync"):
        gradacc.cross([W], ONE)


def test_world_size_without_a_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="^cross: WORLD_SIZE is 2"):
        gradacc.cross([W], ONE, sync=gradacc.all_reduce())


def test_a_total_with_a_graph_comes_back_without():
    total = torch.ones((), requires_grad=True) * 2
    assert not gradacc.cross([W], Mean(total, 2), sync=None)[1].total.requires_grad


def test_under_a_transform_and_compiled():
    """Alone it is arithmetic, and is differentiated and compiled like any."""

    def alone(w):
        return gradacc.cross({"w": w}, Mean(TOTAL, 4), sync=None)[0]["w"]

    assert_trees_equal(torch.func.vmap(alone)(torch.ones(3, 2)), torch.full((3, 2), 0.25))
    assert_trees_equal(torch.func.grad(lambda w: alone(w).sum())(W), torch.full((2,), 0.25))
    assert_trees_equal(transformed(lambda: gradacc.cross([W], ONE, sync=None)), gradacc.cross([W], ONE, sync=None))
    assert_trees_equal(torch.compile(alone, fullgraph=True, backend="eager")(W), torch.full((2,), 0.25))


def sharded(group, kind, nothing):
    """Sums over the union as DTensors, of both or of one of two leaves; and what is a rank's own."""
    mesh = DeviceMesh.from_group(group, "cpu")
    rank, weight = group.rank(), 0 if nothing else group.rank() + 1
    whole = torch.zeros(5, 2) if nothing else torch.arange(10.0).view(5, 2)
    placement = {"shard": Shard(0), "columns": Shard(1), "replicate": Replicate(), "bfloat16": Shard(0)}[kind]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    given = distribute_tensor(whole.to(dtype), mesh, [placement])
    own = torch.full((3,), rank + 1.0)
    before = fingerprint(given.to_local())
    mean = Mean(torch.tensor(rank + 1.0), weight)
    answers = []
    for sums in ({"a": given}, {"a": given, "b": own}, {"a": own.double(), "b": given}):
        for ordered in (False, False, True):
            found, value = gradacc.cross(sums, mean, sync=gradacc.all_reduce(group, ordered=ordered))
        assert fingerprint(given.to_local()) == before
        kinds = {key: getattr(x, "placements", None) for key, x in found.items()}
        assert kinds == {key: getattr(x, "placements", None) for key, x in sums.items()}
        plain = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in found.items()}
        answers.append((plain, value.total, value.weight))
    return answers


@pytest.mark.parametrize("kind", ["shard", "columns", "replicate", "bfloat16"])
def test_dtensors_are_sums_already(pool, kind):
    """They are divided by the weight of all ranks; what is plain is summed too."""
    whole = torch.arange(10.0).view(5, 2)
    whole = (whole / 6).to(torch.bfloat16) if kind == "bfloat16" else whole * torch.tensor(1 / 6)
    own = torch.ones(3)
    for answers in pool.run(3, sharded, kind, False):
        expected = {"a": whole}, {"a": whole, "b": own}, {"a": own.double(), "b": whole}
        for (found, *rest), grads in zip(answers, expected, strict=True):
            assert_trees_close(found, grads, rtol=1e-6)
            assert rest == [6.0, 6]


def test_dtensors_of_nothing_are_zero(pool):
    for answers in pool.run(2, sharded, "shard", True):
        for found, _, weight in answers:
            assert all(grad.eq(0).all() for grad in found.values())
            assert weight == 0


def sharded_wrongly(group, how):
    mesh = DeviceMesh.from_group(group, "cpu")
    sync = gradacc.all_reduce(group)
    given = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    if how == "partial":
        given = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    elif how == "alone":
        sync = None
    elif how == "parts":
        sync = gradacc.reduce_scatter(group)
    try:
        gradacc.cross({"w": given}, Mean(torch.ones(()), 1), sync=sync)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("partial", "is a DTensor with placements (Partial(sum),): its parts have not been summed"),
        ("parts", "is a DTensor of which each rank has a part already, and reduce_scatter would cut it"),
        ("alone", "is a DTensor over ranks [0, 1, 2, 3], and sync counts the weights of ranks ["),
    ],
)
def test_dtensors_that_were_summed_otherwise(pool, how, words):
    for said in pool.run(4, sharded_wrongly, how):
        assert words in said, said
        assert said.startswith("cross: sums['w'] ")


def meshes(group):
    """Of two dimensions: data differ along one of them, or along both."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    given = distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)])
    found = []
    for sync in (mesh["dp"], group, mesh["tp"]):
        grads, value = gradacc.cross([given], Mean(torch.ones(()), 1), sync=gradacc.all_reduce(sync))
        found.append((grads[0].full_tensor(), value.weight))
    for sync in (gradacc.all_reduce(), None):
        with pytest.raises(ValueError, match="say where data differ"):
            gradacc.cross([given], Mean(torch.ones(()), 1), sync=sync)
    return found


def test_of_a_mesh_sync_says_where_data_differ(pool):
    for found in pool.run(4, meshes):
        assert_trees_equal(found, [(torch.ones(4) / n, n) for n in (2, 4, 2)])


def compiled(group):
    """A rank of weight 0, too, whose sums are not numbers; and what it is as it is."""
    own = group.rank() != 1
    sums = {"w": torch.full((3,), 6.0 if own else float("nan")), "h": torch.full((2,), 1.5).bfloat16()}
    mean = Mean(torch.tensor(9.0), torch.tensor(3.0 * own))

    def crossed(sums, mean):
        return gradacc.cross(sums, mean, sync=gradacc.all_reduce(group))

    found = torch.compile(crossed, fullgraph=True, backend="eager")(sums, mean)
    return found, crossed(sums, mean)


def test_compiled_ranks(pool):
    for found, expected in pool.run(2, compiled):
        assert_trees_close(found, expected, rtol=1e-6)
        assert_trees_equal(found[0], {"w": torch.full((3,), 2.0), "h": torch.full((2,), 0.5).bfloat16()})


def test_inference_tensors():
    with torch.inference_mode():
        found, _ = gradacc.cross([torch.ones(2)], Mean(torch.ones(()), 2), sync=None)
    assert_trees_equal(found, [torch.full((2,), 0.5)])
    assert not found[0].is_inference()
