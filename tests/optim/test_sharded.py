"""`sharded`: what a rank holds, wrappers around and inside, what is refused, and ranks that differ or fail."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import _shard, _tree, optim
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.workers import Failed


def squares(params, batch):
    return ((batch @ params["w"]) * params["s"] + params["b"]).square().mean()


def params_of(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    shapes = {"w": (3, 7), "b": (7,), "s": ()}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def batch_of(group, dtype=torch.float32):
    rank = dist.get_rank(group) if group is not None else 0
    return torch.randn(2 + rank, 3, generator=torch.Generator().manual_seed(rank)).to(dtype)


def steps(group, optimizer, sync, params, number=3, batch=None, loss=squares, **options):
    batch = batch_of(group) if batch is None else batch
    step = gradacc.train_step(gradacc.accumulate_and_value(loss, steps=2, sync=sync, **options), optimizer)
    state, metrics = gradacc.TrainState(params, optimizer.init(params)), {}
    for _ in range(number):
        state, metrics = step(state, batch)
    return state, metrics


# What a rank holds.


def held(group):
    params = {"w": torch.ones(5, 3), "few": torch.ones(2), "half": torch.ones(7).bfloat16(), "scalar": torch.ones(())}
    state = optim.sharded(optim.adamw(0.1), group).init(params)
    tensors = [shard.values for tree in (state.exp_avg, state.exp_avg_sq) for shard in tree.values()]
    return sum(tensor.nbytes for tensor in tensors), [
        tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_state_is_the_share_of_a_rank(pool, world):
    """Of n elements of a dtype ceil(n / W) at most, on one rank exactly, in two slots; and no memory besides."""
    answers = pool.run(world, held)
    assert max(answer[0] for answer in answers) <= 2 * (-(-18 // world) * 4 + -(-7 // world) * 2)
    assert sum(answer[0] for answer in answers) == 2 * (18 * 4 + 7 * 2)
    assert all(all(own) for _, own in answers)


def masters(group):
    """bfloat16 parameters that are the roundings of float32 ones, whichever dtype gradients come in."""
    found = []
    for options in ({}, {"dtype": torch.float32}):
        optimizer = optim.sharded(optim.adamw(1e-3), group, master_dtype=torch.float32)
        state, metrics = steps(
            group,
            optimizer,
            gradacc.reduce_scatter(group),
            params_of(torch.bfloat16),
            number=6,
            batch=batch_of(group, torch.bfloat16),
            **options,
        )
        found.append((state.params, state.opt_state.masters, metrics))
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_masters(pool, world):
    answers = pool.run(world, masters)
    for number in range(2):
        params = answers[0][number][0]
        for rank in range(world):
            own, parts, metrics = answers[rank][number]
            assert_trees_equal(own, params)
            assert metrics["lr"] == 1e-3
            for name, shard in parts.items():
                assert shard.values.dtype == torch.float32
                whole = own[name].reshape(-1)[shard.offset : shard.offset + shard.length]
                assert torch.equal(shard.values.bfloat16(), whole)
                if shard.length:
                    assert not torch.equal(shard.values, whole.float())


# Wrappers.

WRAPPERS = {
    "clip": lambda make: optim.clip_by_global_norm(make(), 0.1),
    "skip": lambda make: optim.skip_nonfinite(make()),
    "spikes": lambda make: optim.skip_spikes(make(), window=4, sigma=1.0),
    "scale": lambda make: optim.dynamic_loss_scale(make(), init_scale=2.0**10, growth_interval=2),
    "all": lambda make: optim.dynamic_loss_scale(
        optim.skip_spikes(optim.skip_nonfinite(optim.clip_by_global_norm(make(), 0.1)), window=4)
    ),
}


def wrapped(group, name, inside, bad):
    """With sharded gradients and with whole ones; ``bad``: the rank whose batch has an inf in the second step."""
    found = []
    for sync in (gradacc.all_reduce(group, ordered=True), gradacc.reduce_scatter(group)):
        parts = isinstance(sync, gradacc.ReduceScatter)

        def make(parts=parts):
            return optim.sharded(optim.adamw(0.1), group) if parts and not inside else optim.adamw(0.1)

        optimizer = WRAPPERS[name](make)
        if parts and inside:
            optimizer = optim.sharded(optimizer, group)
        loss = optim.scaled_loss(squares) if optimizer.loss_scale else squares
        step = gradacc.train_step(gradacc.accumulate_and_value(loss, steps=2, sync=sync), optimizer)
        params = params_of()
        state, told = gradacc.TrainState(params, optimizer.init(params)), []
        for number in range(6):
            batch = batch_of(group) * (30.0 if number == 4 else 1.0)
            if number == 1 and dist.get_rank(group) == bad:
                batch[0, 0] = float("inf")
            state, metrics = step(state, batch)
            told.append({key: metrics[key] for key in ("grad_norm", "skipped", "loss_scale") if key in metrics})
        found.append((state.params, told))
    return found


@pytest.mark.parametrize(
    ("name", "inside", "bad"),
    [
        (name, False, bad) for name in WRAPPERS for bad in (None, 1) if (name, bad) != ("clip", 1)
    ]  # which it does not survive
    + [("clip", True, None), ("skip", True, None), ("skip", True, 1)],
)
def test_wrappers_judge_the_gradients_of_all_ranks(pool, name, inside, bad):
    answers = pool.run(3, wrapped, name, inside, bad)
    for (whole, told), (parts, others) in answers:
        assert_trees_close(parts, whole, rtol=1e-5, atol=1e-6)
        assert_trees_close(others, told, rtol=1e-5)
    for _, answer in answers[1:]:  # bit for bit
        assert_trees_equal(answer, answers[0][1])
    skipped = answers[0][0][1][-1].get("skipped")
    if bad is not None or name in ("spikes", "all"):
        assert int(skipped) >= 1


def an_element_of_one_part(group, wrap, inside):
    adamw = optim.adamw(0.1)
    optimizer = optim.sharded(wrap(adamw), group) if inside else wrap(optim.sharded(adamw, group))

    def loss_fn(params, x):
        return (params * x).sum() / len(x)

    step = gradacc.train_step(
        gradacc.accumulate_and_value(loss_fn, steps=2, sync=gradacc.reduce_scatter(group)), optimizer
    )
    state = gradacc.TrainState(torch.ones(8), optimizer.init(torch.ones(8)))
    found = []
    for number in range(9):
        x = torch.ones(2, 8)
        if number < 8:
            x[0, number] = torch.inf
        state, metrics = step(state, x)
        found.append((state.params, int(metrics["skipped"])))
    return found


@pytest.mark.parametrize("inside", [False, True])
def test_one_element_that_is_not_finite_is_one_of_all_ranks(pool, inside):
    """Whichever rank has it in its part: no rank makes the step."""
    for found in pool.run(3, an_element_of_one_part, optim.skip_nonfinite, inside):
        for number, (params, skipped) in enumerate(found[:8]):
            assert params.eq(1.0).all()
            assert skipped == number + 1
        assert found[8][0].lt(1.0).all()


def small_collectives(group):
    """Of a whole training step: gradients, their norm, that of clip, and new parameters."""
    optimizer = optim.clip_by_global_norm(optim.sharded(optim.adamw(0.1), group), 1.0)
    step = gradacc.train_step(
        gradacc.accumulate_and_value(squares, steps=2, sync=gradacc.reduce_scatter(group)), optimizer
    )
    state = gradacc.TrainState(params_of(), optimizer.init(params_of()))
    for _ in range(4):
        with CommDebugMode() as counter:
            state, _ = step(state, batch_of(group))
    return {str(op): n for op, n in counter.get_comm_counts().items()}


def test_a_norm_is_one_small_collective(pool):
    for counts in pool.run(2, small_collectives):
        assert counts == {"c10d.alltoall_base_": 1, "c10d._allgather_base_": 3}


def seen(group):
    """What predicates of `by_path` are asked about."""
    asked = {}

    def matrices(path, leaf):
        asked[path] = (tuple(leaf.shape), leaf.ndim, leaf.dtype)
        return leaf.ndim == 2

    optimizer = optim.sharded(optim.by_path(optim.sgd(0.0), (matrices, optim.adamw(0.1))), group)
    state, _ = steps(group, optimizer, gradacc.reduce_scatter(group), params_of(), number=1)
    return asked, state.params


def test_predicates_see_whole_parameters(pool):
    before = params_of()
    for asked, params in pool.run(3, seen):
        assert asked == {
            "params['w']": ((3, 7), 2, torch.float32),
            "params['b']": ((7,), 1, torch.float32),
            "params['s']": ((), 0, torch.float32),
        }
        assert not torch.equal(params["w"], before["w"])
        assert torch.equal(params["b"], before["b"])


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optim.sharded(optim.from_torch(torch.optim.Muon, lr=0.1)),
            "from_torch: Muon is none of torch's classes",
        ),
        (lambda: optim.sharded(optim.from_torch(torch.optim.Adafactor)), "whole parameters.*Adafactor"),
        (
            lambda: optim.sharded(
                optim.by_path(optim.adamw(0.1), (lambda path, leaf: leaf.ndim == 2, optim.from_torch(torch.optim.Muon)))
            ),
            "Muon",
        ),
        (lambda: optim.sharded(optim.clip_by_global_norm(optim.from_torch(torch.optim.Muon), 1.0)), "Muon"),
        (
            lambda: optim.sharded(optim.Optimizer(lambda params: (), lambda params, grads, state: (params, state))),
            "not known to treat every element by itself.*elementwise=True",
        ),
        (
            lambda: optim.sharded(optim.dynamic_loss_scale(optim.adam(0.1))),
            "dynamic_loss_scale, and what is around one",
        ),
        (lambda: optim.sharded(optim.skip_spikes(optim.adam(0.1))), "takes the loss of each step"),
    ],
)
def test_rules_that_need_more_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.optim.SGD,), {}, "must be a gradacc.optim.Optimizer"),
        ((optim.sgd(0.1),), {"master_dtype": torch.bfloat16}, "master_dtype must be torch.float32"),
        ((optim.sgd(0.1),), {"master_dtype": "float32"}, "master_dtype must be"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        optim.sharded(*arguments, **options)


class Descent:
    """A transformation as TorchOpt's are; ``decays``: matrices alone. It cannot be hashed."""

    __hash__ = None

    def __init__(self, decays):
        self.decays = decays

    def __eq__(self, other):
        return self is other

    def init(self, params):
        return {name: torch.zeros_like(leaf) for name, leaf in params.items()}

    def update(self, grads, state, *, params, inplace=False):
        state = {name: state[name] + grad for name, grad in grads.items()}
        return {
            name: -0.1 * (each + params[name] * (self.decays and params[name].ndim > 1)) for name, each in state.items()
        }, state


def test_a_transformation_that_looks_at_shapes():
    assert optim.sharded(optim.from_torchopt(Descent(False)))
    with pytest.raises(ValueError, match="gave parts of parameters other updates"):
        optim.sharded(optim.from_torchopt(Descent(True)))


def test_an_experiment_leaves_no_trace():
    """TorchOpt's momentum knows in a closure whether it has been called."""
    torchopt = pytest.importorskip("torchopt")
    params, grads = torch.zeros(1), torch.ones(1)
    plain, sharded = (torchopt.sgd(1.0, momentum=0.9, dampening=0.5) for _ in range(2))
    one, other = optim.from_torchopt(plain), optim.sharded(optim.from_torchopt(sharded))
    expected, _ = one.step(params, grads, one.init(params))
    part = gradacc.Shard(grads, gradacc.ShardFacts((1,), 0, 1, 0, 1, ""))
    assert torch.equal(other.step(params, part, other.init(params))[0], expected)


def test_torchopt_is_tried():
    torchopt = pytest.importorskip("torchopt")
    assert optim.sharded(optim.from_torchopt(torchopt.adam(0.1)))
    assert optim.sharded(optim.by_path(optim.from_torchopt(torchopt.sgd(0.1, momentum=0.9))))
    clipping = torchopt.combine.chain(torchopt.clip.clip_grad_norm(max_norm=1.0), torchopt.sgd(0.1))
    with pytest.raises(ValueError, match="gave parts of parameters other updates"):
        optim.sharded(optim.from_torchopt(clipping))


def alone():
    """Parameters, parts of their gradients, whole gradients, and a sharded optimizer, in one process."""
    params = params_of()
    sync = gradacc.reduce_scatter()
    parts = gradacc.accumulate(squares, steps=2, sync=sync)(params, batch_of(None))
    whole = gradacc.accumulate(squares, steps=2)(params, batch_of(None))
    return params, parts, whole, optim.sharded(optim.adamw(0.1))


def test_whole_gradients_for_a_sharded_optimizer():
    params, _, whole, optimizer = alone()
    with pytest.raises(TypeError, match=r"grads\['b'\] is .*reduce_scatter"):
        optimizer.step(params, whole, optimizer.init(params))


@pytest.mark.parametrize(
    "make", [lambda: optim.adamw(0.1), lambda: optim.from_torch(torch.optim.SGD), lambda: optim.by_path(optim.sgd(0.1))]
)
def test_parts_of_gradients_for_a_whole_optimizer(make):
    params, parts, _, _ = alone()
    optimizer = make()
    for wrap in (lambda one: one, lambda one: optim.clip_by_global_norm(one, 1.0), optim.skip_nonfinite):
        one = wrap(optimizer)
        with pytest.raises(TypeError, match=r"parts of gradients .*optim\.sharded\(optimizer, group\)"):
            one.step(params, parts, one.init(params))


@pytest.mark.parametrize("wrap", [lambda one: optim.clip_by_global_norm(one, 1.0), optim.skip_nonfinite])
def test_parts_of_ranks_that_are_gone(wrap):
    part = gradacc.Shard(torch.ones(2), _shard.ShardFacts((4,), 0, 2, 0, 2, "a group that was destroyed"))
    optimizer = wrap(optim.sharded(optim.sgd(0.1)))
    params = torch.ones(4)
    with pytest.raises(
        RuntimeError, match="divided over the process group 'a group that was destroyed', which is not there"
    ):
        optimizer.step(params, part, optimizer.init(params))


def test_states_of_the_other_kind():
    params, parts, whole, optimizer = alone()
    plain = optim.adamw(0.1)
    with pytest.raises(ValueError, match="is divided over ranks.*and this optimizer is not"):
        plain.step(params, whole, optimizer.init(params))
    with pytest.raises(ValueError, match="is whole.*optim.sharded"):
        optimizer.step(params, parts, plain.init(params))
    master = optim.sharded(plain, master_dtype=torch.float32)
    for one, state in ((master, optimizer.init(params)), (optimizer, master.init(params))):
        with pytest.raises(TypeError, match="this optimizer has master_dtype="):
            one.step(params, parts, state)


def test_by_path_goes_inside():
    params, parts, _, _ = alone()
    outside = optim.by_path(
        optim.sharded(optim.sgd(0.1)), (lambda path, leaf: leaf.ndim == 2, optim.sharded(optim.adamw(0.1)))
    )
    with pytest.raises(TypeError, match="parts of gradients"):
        outside.step(params, parts, outside.init(params))


@pytest.mark.parametrize("change", [{"offset": 1}, {"world": 2}, {"shape": (21,)}])
def test_parts_of_other_tensors(change):
    params, parts, _, optimizer = alone()
    parts["w"] = gradacc.Shard(parts["w"].values, parts["w"].facts._replace(**change))
    with pytest.raises(ValueError, match=r"grads\['w'\] is elements .* is due"):
        optimizer.step(params, parts, optimizer.init(params))


@pytest.mark.parametrize("change", [{"world": 2}, {"rank": 1, "world": 2}])
def test_a_state_of_another_number_of_ranks(change):
    params, parts, _, optimizer = alone()
    state = optimizer.init(params)
    state.exp_avg["w"] = gradacc.Shard(state.exp_avg["w"].values, state.exp_avg["w"].facts._replace(**change))
    with pytest.raises(ValueError, match="this is rank 0 of 1. Load a checkpoint"):
        optimizer.step(params, parts, state)


def test_nothing_that_is_given_is_changed():
    params, parts, _, optimizer = alone()
    state = optimizer.init(params)
    before = [leaf.clone() for leaf in (*params.values(), *(part.values for part in parts.values()))]
    new, _ = optimizer.step(params, parts, state)
    assert_trees_equal([*params.values(), *(part.values for part in parts.values())], before)
    assert not {leaf.data_ptr() for leaf in new.values()} & {leaf.data_ptr() for leaf in params.values()}
    assert state.step == 0


# Ranks that differ, or fail.


def differ(group, how):
    """One rank's optimizer, or sync, is another one."""
    rank = dist.get_rank(group)
    odd = rank == 1
    params = params_of()
    if how == "sync" and odd:
        sync = gradacc.all_reduce(group, ordered=True)
    else:
        sync = gradacc.reduce_scatter(group, compress=torch.bfloat16 if how == "compress" and odd else None)
    grads = gradacc.accumulate(squares, steps=2, sync=sync)(params, batch_of(group))
    optimizer = optim.sharded(optim.adamw(0.1), group)
    if how == "params" and odd:
        params["w"] = params["w"].double()
        grads["w"] = gradacc.Shard(grads["w"].values.double(), grads["w"].facts)
    optimizer.step(params, grads, optimizer.init(params))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("sync", "sync='reduce_scatter' on rank 0, sync='all_reduce' on rank 1"),
        ("compress", "compress=None on rank 0, compress=torch.bfloat16 on rank 1"),
        ("params", r"params\['w'\] is torch.float32 of shape \(3, 7\) on rank 0, torch.float64"),
    ],
)
def test_ranks_that_differ(pool, how, message):
    with pytest.raises(Failed, match=message):
        pool.run(3, differ, how)


def one_raises(group, after):
    """An update that raises on one rank: an error on all of them, parameters as they were, and the next step goes on."""
    rank, odd = dist.get_rank(group), [True]

    def rate(step):
        if odd[0] and rank == 1 and step == after:
            odd[0] = False
            raise OSError("no rate")
        return 0.1

    optimizer = optim.sharded(optim.adamw(rate), group)
    grad_fn = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))
    params = params_of()
    state, errors = optimizer.init(params), []
    for _ in range(4):
        grads = grad_fn(params, batch_of(group))
        before = {name: leaf.clone() for name, leaf in params.items()}
        try:
            params, state = optimizer.step(params, grads, state)
        except (OSError, RuntimeError) as error:
            errors.append(str(error))
            assert_trees_equal(params, before)
    return errors, params, int(state.step)


@pytest.mark.parametrize("after", [0, 2])
def test_an_update_that_raises_on_one_rank(pool, after):
    answers = pool.run(3, one_raises, after)
    assert [answer[2] for answer in answers] == [3] * 3
    assert answers[1][0] == ["no rate"]
    for errors, params, _ in (answers[0], answers[2]):
        assert len(errors) == 1
        assert "raised on rank 1" in errors[0]
        assert_trees_equal(params, answers[0][1])


FAULTS = {
    "whole gradients": "this rank's part of each gradient",
    "a state of other ranks": "this is rank 1 of 3",
    "no rate": "no rate",
}


def fails_once(group, wrap, fault):
    """On rank 1, in the second of five steps, somewhere before or behind a norm: all raise, and go on together."""
    rank, number = dist.get_rank(group), [0]

    def rate(step):
        if fault == "no rate" and rank == 1 and number[0] == 1:
            raise OSError("no rate")
        return 0.1

    adamw = optim.adamw(rate)
    optimizer = {
        "none": lambda: optim.sharded(adamw, group),
        "inside": lambda: optim.sharded(optim.clip_by_global_norm(adamw, 1.0), group),
        "outside": lambda: optim.skip_nonfinite(optim.clip_by_global_norm(optim.sharded(adamw, group), 1.0)),
    }[wrap]()
    grad_fn = gradacc.accumulate_and_value(squares, steps=2, sync=gradacc.reduce_scatter(group))

    def spoiled(params, batch):
        grads, value = grad_fn(params, batch)
        if rank == 1 and number[0] == 1 and fault == "whole gradients":
            grads = {name: torch.ones_like(leaf) for name, leaf in params.items()}
        return grads, value

    step = gradacc.train_step(spoiled, optimizer)
    state, told = gradacc.TrainState(params_of(), optimizer.init(params_of())), []
    for number[0] in range(5):
        given = state
        if fault == "a state of other ranks" and rank == 1 and number[0] == 1:
            given = state._replace(opt_state=_tree.unflatten(*_with_world(state.opt_state, 7)))
        try:
            state, metrics = step(given, batch_of(group))
            told.append(metrics["loss"])
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told, state.params


def _with_world(tree, world):
    """The same state of another number of ranks."""
    nodes, treedef = _tree.flatten(tree, _shard.is_shard)
    return treedef, [
        gradacc.Shard(node.values, node.facts._replace(world=world)) if isinstance(node, gradacc.Shard) else node
        for node in nodes
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("wrap", ["none", "inside", "outside"])
def test_a_step_that_fails_on_one_rank_is_one_failure_of_all(pool, wrap, fault):
    answers = pool.run(3, fails_once, wrap, fault)
    for rank, (told, params) in enumerate(answers):
        assert_trees_equal(params, answers[0][1])
        failed = [number for number, each in enumerate(told) if isinstance(each, str)]
        assert failed == [1], told
        assert (FAULTS[fault] if rank == 1 else "rank 1") in told[1]
        assert_trees_equal(told[2:], answers[0][0][2:])


def given_away(group):
    """A donated step that fails on another rank."""
    rank = dist.get_rank(group)

    def rate(step):
        if rank == 1:
            raise OSError("no rate")
        return 0.1

    optimizer = optim.sharded(optim.sgd(rate), group)
    params = params_of()
    grads = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))(params, batch_of(group))
    with pytest.raises((OSError, RuntimeError), match="rank 1|no rate"):
        optimizer.step(params, grads, optimizer.init(params), donate=True)
    try:
        return all(torch.equal(params[name], leaf) for name, leaf in params_of().items())
    except ValueError as error:
        return str(error)


def test_parameters_that_were_written_to_are_given_away(pool):
    """Where the step of a rank was taken, and another one's was not."""
    first, second, third = pool.run(3, given_away)
    assert second is True
    for told in (first, third):
        assert "given away to sharded.step" in told


def tied(group):
    shared = torch.ones(7)
    params = {"a": shared, "b": shared, "part": shared[2:5]}
    found = []
    for sync, optimizer in (
        (gradacc.all_reduce(group, ordered=True), optim.sgd(0.1)),
        (gradacc.reduce_scatter(group), optim.sharded(optim.sgd(0.1), group)),
    ):
        own = dict(zip(params, (lambda one: (one, one, one[2:5]))(shared.clone()), strict=True))
        grads = gradacc.accumulate(
            lambda p, x: (p["a"] + 2 * p["b"]).sum() * x.mean() + 3 * p["part"].sum(), steps=1, sync=sync
        )(own, torch.ones(2))
        found.append(optimizer.step(own, grads, optimizer.init(own), donate=True)[0])
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_donated_parameters_that_share_memory(pool, world):
    for whole, parts in pool.run(world, tied):
        assert_trees_equal(parts, whole)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_masters_that_do_not_hold_a_parameter(dtype):
    with pytest.raises(TypeError, match=r"params\['w'\] is a tensor of dtype .*, which master_dtype=torch.float32"):
        optim.sharded(optim.sgd(0.1), master_dtype=torch.float32).init({"w": torch.ones(2, dtype=dtype)})


def test_without_ranks_a_step_is_differentiated():
    def moved(lr):
        params, parts, _, _ = alone()
        optimizer = optim.sharded(optim.sgd(lr))
        return sum(leaf.sum() for leaf in optimizer.step(params, parts, optimizer.init(params))[0].values())

    _, parts, _, _ = alone()
    slope = torch.func.grad(moved)(torch.tensor(0.1))
    torch.testing.assert_close(slope, -sum(part.values.sum() for part in parts.values()))


def two_of_a_kind(group, what):
    """Two of the same shapes, taken in another order on rank 1."""
    params, made = params_of(), [optim.sharded(optim.sgd(0.1), group) for _ in range(2)]
    if what == "norms":
        made = [optim.clip_by_global_norm(one, 1.0) for one in made]
    grads = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))(params, batch_of(group))
    for one in made if dist.get_rank(group) == 0 else reversed(made):
        one.step(params, grads, one.init(params))


@pytest.mark.parametrize("what", ["steps", "norms"])
def test_two_optimizers_in_another_order(pool, what):
    with pytest.raises(Failed, match="made different calls"):
        pool.run(2, two_of_a_kind, what)


def of_other_kinds(group):
    params = params_of()
    grads = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))(params, batch_of(group))
    inner = optim.sgd(0.1) if dist.get_rank(group) else optim.adamw(0.1)
    optimizer = optim.sharded(inner, group)
    optimizer.step(params, grads, optimizer.init(params))


def test_ranks_with_other_optimizers(pool):
    with pytest.raises(Failed, match="optimizer=.*AdamState.*on rank 0, optimizer=.*SgdState"):
        pool.run(2, of_other_kinds)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda new: {**new, "more": new["b"]}, "returned parameters of another structure"),
        (lambda new: {**new, "b": gradacc.Shard(new["b"].values[:3], new["b"].facts)}, r"returned .* as params\['b'\]"),
        (lambda new: {**new, "b": gradacc.Shard(new["b"].values.double(), new["b"].facts)}, "torch.float64"),
    ],
)
def test_a_step_that_returns_something_else(spoil, message):
    params, parts, _, _ = alone()
    own = optim.Optimizer(
        lambda params: (), lambda params, grads, state, donate=False: (spoil(params), ()), elementwise=True
    )
    optimizer = optim.sharded(own)
    with pytest.raises(ValueError, match=message):
        optimizer.step(params, parts, optimizer.init(params))


def shards_again(group):
    params = params_of()
    grads = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))(params, batch_of(group))
    gradacc.cross(grads, gradacc.Mean(torch.ones(()), 1), sync=gradacc.all_reduce(group))


def test_shards_are_not_added_up(pool):
    with pytest.raises(Failed, match="parts of different elements would be added"):
        pool.run(2, shards_again)


def with_a_graph(group):
    params = params_of()
    grads = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))(params, batch_of(group))
    for part in grads.values():
        part.values.requires_grad_()
    optimizer = optim.sharded(optim.sgd(0.1), group)
    optimizer.step(params, grads, optimizer.init(params))


def test_with_ranks_it_is_not(pool):
    with pytest.raises(Failed, match="nor with a graph.*torch.no_grad"):
        pool.run(2, with_a_graph)


def one_leaves_out(group):
    """A rank whose optimizer is not sharded makes its next gradient when the others gather."""
    params = params_of()
    whole = gradacc.accumulate(squares, steps=2, sync=gradacc.all_reduce(group))
    parts = gradacc.accumulate(squares, steps=2, sync=gradacc.reduce_scatter(group))
    optimizer = optim.sharded(optim.adamw(0.1), group)
    grads = parts(params, batch_of(group))
    try:
        if dist.get_rank(group) == 1:
            whole(params, batch_of(group))
        else:
            optimizer.step(params, grads, optimizer.init(params))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_does_not_gather(pool):
    for answer in pool.run(2, one_leaves_out):
        assert "made different calls" in answer
        assert "rank 0: optim.sharded" in answer
