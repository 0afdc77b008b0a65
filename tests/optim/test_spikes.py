"""skip_spikes, against OLMo's rule restated in plain Python."""

import math
import statistics

import optree
import pytest
import torch

import gradacc
from gradacc import Mean, TrainState, optim
from tests.helpers import NAMESPACE, assert_trees_close, assert_trees_equal, fingerprint
from tests.optim.cases import compiled

INF, NAN = math.inf, math.nan
D = torch.float64


class Restated:
    """OLMo's ``SkipStepOptimizer.get_step_factor``: what is kept has the newest one in it, and goes on growing."""

    def __init__(self, window, sigma):
        self.window, self.sigma, self.losses, self.norms = window, sigma, [], []

    def takes(self, loss, norm):
        self.losses.append(loss)
        self.norms.append(norm)
        if len(self.losses) < max(2, self.window // 2) or len(self.losses) < 3:  # the latter where a std would be NaN
            return True
        return all(self._near(many[-self.window - 1 :]) for many in (self.losses, self.norms))

    def _near(self, many):
        *before, latest = many
        return latest - statistics.fmean(before) <= self.sigma * statistics.stdev(before)


def count_steps(params, loss, norm, state, optimizer, **options):
    """One step of gradients of that norm, on parameters of which ``sgd(1.0)`` subtracts them."""
    grads = {"a": norm * torch.tensor([0.0, 0.6], dtype=D), "b": torch.as_tensor(-0.8 * norm, dtype=D)}
    if loss is not None:
        options["loss"] = torch.as_tensor(loss, dtype=D)
    return optimizer.step(params, grads, state, **options)


def zeros():
    return {"a": torch.zeros(2, dtype=D), "b": torch.zeros((), dtype=D)}


SPIKED = {9: (40, 0), 21: (0, 7), 22: (0, 90), 40: (5, 5), 70: (0, 70), 140: (90, 0), 165: (1e4, 1e7), 190: (1e7, 0)}


def series(length):
    """Losses and norms that fall and rise, with spikes of one, of the other and of both."""
    drift = torch.linspace(0, 9, length, dtype=D).cos()
    losses, norms = (3 + drift + 0.1 * torch.randn(length, dtype=D) for _ in range(2))
    for at, (loss, norm) in SPIKED.items():
        losses[at] += loss
        norms[at] += norm
    return losses.tolist(), norms.tolist()


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 6])
@pytest.mark.parametrize("window", [2, 3, 5, 6, 7, 16, 128])
def test_it_is_olmos_rule(window, sigma, donate):
    optimizer, theirs = optim.skip_spikes(optim.sgd(1.0), window, sigma), Restated(window, sigma)
    params, expected = zeros(), 0.0
    state = optimizer.init(params)
    taken = []
    for loss, norm in zip(*series(200), strict=True):
        before = params["b"].item()
        params, state = count_steps(params, loss, norm, state, optimizer, donate=donate)
        taken.append(theirs.takes(loss, norm))
        expected += 0.8 * norm * taken[-1]
        assert (params["b"].item() != before) == taken[-1], len(taken)
    assert_trees_close(params["b"], torch.tensor(expected, dtype=D))
    assert (state.skipped, state.inner.step) == (taken.count(False), taken.count(True))
    assert taken.count(False) >= 2
    assert_trees_close(state.recent, torch.tensor([theirs.losses[-window:], theirs.norms[-window:]], dtype=D))


def after(many, window=8, sigma=6.0):
    """The skipped steps of a run over pairs of a loss and a norm, and the state."""
    optimizer = optim.skip_spikes(optim.sgd(1.0), window, sigma)
    params, skipped, last = zeros(), [], 0
    state = optimizer.init(params)
    for number, (loss, norm) in enumerate(many):
        params, state = count_steps(params, loss, norm, state, optimizer)
        if state.skipped > last:
            skipped.append(number)
        last = state.skipped
    return skipped, state


CALM = [(1.0 + 0.1 * (n % 2), 2.0 + 0.1 * (n % 3)) for n in range(8)]
BROKEN = [(NAN, 2.0), (INF, 2.0), (-INF, 2.0), (1.0, NAN), (1.0, INF), (NAN, INF)]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("begin", [0, 1, 8])
def test_what_is_not_finite_is_skipped_and_never_enters(begin, broken):
    skipped, state = after([*CALM[:begin], broken, *CALM[begin:], (9.0, 2.0)])
    assert skipped == [begin, len(CALM) + 1]
    _, expected = after([*CALM, (9.0, 2.0)])
    assert_trees_equal(state.recent, expected.recent)
    assert state.inner.step == len(CALM)


def test_with_the_numbers_of_olmo_the_fifth_of_equal_spikes_is_taken():
    """As the docstring says: those before it have widened the standard deviation."""
    calm = [(1.0 + 0.01 * (n % 2), 1.0) for n in range(128)]
    skipped, _ = after([*calm, *([(50.0, 1.0)] * 8)], window=128)
    assert skipped == [128, 129, 130, 131]
    skipped, _ = after([*calm, *([(1.0, 1e6)] * 8)], window=128)
    assert skipped == [128, 129, 130, 131]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7e8])
def test_a_loss_that_never_changes_is_no_spike(value):
    skipped, _ = after([*[(value, value)] * 20, (value * (1 + 1e-12), value), *[(value, value)] * 3])
    assert skipped == [20]


@pytest.mark.parametrize(("window", "first"), [(2, 2), (6, 2), (8, 3), (9, 3), (128, 63)])
def test_nothing_is_a_spike_before_half_a_window(window, first):
    """A steep rise: each is far above those before it."""
    for rise in ([(10.0**n, 1.0) for n in range(70)], [(1.0, 10.0**n) for n in range(70)]):
        skipped, _ = after(rise, window, sigma=0.1)
        assert skipped == list(range(first, 70))


def test_without_a_loss_gradients_alone_are_judged():
    optimizer = optim.skip_spikes(optim.sgd(1.0), 8)
    params = zeros()
    state = optimizer.init(params)
    for loss, norm in [*CALM, (None, 2.0), (None, 90.0), (1.0, 2.0)]:
        params, state = count_steps(params, loss, norm, state, optimizer)
    assert state.skipped == 1
    assert_trees_equal(state.recent[0, -3:].isfinite(), torch.tensor([False, False, True]))
    params, state = count_steps(params, 9.0, 2.0, state, optimizer)  # the losses are those that are known
    assert state.skipped == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, D, torch.complex64], ids=str)
def test_in_every_dtype(dtype):
    """The norm is at least in float32, the loss of any floating dtype."""
    optimizer = optim.skip_spikes(optim.sgd(1e-6), 4)
    params = {"w": torch.zeros(4, dtype=dtype)}
    state = optimizer.init(params)
    for scale, loss_dtype in ((1e4, torch.float16), (1.1e4, torch.bfloat16), (1e4, D), (6e4, torch.float32)):
        grads = {"w": torch.full((4,), scale, dtype=dtype)}
        params, state = optimizer.step(params, grads, state, loss=torch.tensor(2.0, dtype=loss_dtype))
    assert state.skipped == 1
    # 1.1e4 and 6e4 are rounded in half precision: bfloat16 has 8 bits.
    assert_trees_close(state.recent[1], 2 * torch.tensor([1e4, 1.1e4, 1e4, 6e4], dtype=D), rtol=2**-8)


# Around and inside of others


def test_the_norm_is_that_before_clipping():
    optimizer = optim.skip_spikes(optim.clip_by_global_norm(optim.sgd(1.0), 0.5), 8)
    params = zeros()
    state = optimizer.init(params)
    for loss, norm in [*CALM, (1.0, 30.0)]:
        params, state = count_steps(params, loss, norm, state, optimizer)
    assert state.skipped == 1
    assert_trees_close(params["b"], torch.tensor(0.8 * 0.5 * len(CALM), dtype=D), rtol=1e-5)
    assert_trees_close(state.recent[1], torch.tensor([norm for _, norm in [*CALM[1:], (1.0, 30.0)]], dtype=D))


AROUND = {
    "clip": (r"clip_by_global_norm: the optimizer", lambda spikes: optim.clip_by_global_norm(spikes, 1.0)),
    "skip": ("skip_nonfinite: the optimizer", optim.skip_nonfinite),
    "by_path": ("by_path: the optimizer", optim.by_path),
    "a rule": (r"by_path: rules\[0\]\[1\]", lambda spikes: optim.by_path(optim.sgd(1), (lambda *_: True, spikes))),
    "another": ("skip_spikes: the optimizer", optim.skip_spikes),
}


@pytest.mark.parametrize(
    "inside",
    [lambda: optim.skip_spikes(optim.sgd(1.0)), lambda: optim.sgd(1.0)._replace(takes_loss=True)],
    ids=["ours", "of one's own"],
)
@pytest.mark.parametrize(("who", "around"), AROUND.values(), ids=AROUND)
def test_what_does_not_pass_the_loss_on_refuses_one(who, around, inside):
    with pytest.raises(
        ValueError, match=f"^{who} takes the loss of each step, as a skip_spikes does.*around the whole"
    ):
        around(inside())


def scaled_spikes(**scaling):
    return optim.dynamic_loss_scale(optim.skip_spikes(optim.clip_by_global_norm(optim.sgd(1.0), 0.5), 8), **scaling)


def mean_of_rows(params, batch):
    """Its value and gradient are those that the batch says: a row is a value and a norm."""
    return Mean((batch[:, 0] + batch[:, 1] * (params - params.detach())).sum(), len(batch))


def batches(many):
    return [torch.tensor([[loss, norm]] * 4, dtype=D) for loss, norm in many]


def trained(optimizer, many, *, scaled=False, donate=False, wrap=lambda step: step):
    """The state and the metrics after each step of a run over batches of these losses and norms."""
    loss_fn = optim.scaled_loss(mean_of_rows) if scaled else mean_of_rows
    step = wrap(gradacc.train_step(gradacc.accumulate_and_value(loss_fn, steps=2), optimizer, donate=donate))
    params = torch.zeros((), dtype=D)
    state, out = TrainState(params, optimizer.init(params), torch.zeros((), dtype=torch.int64)), []
    for number, batch in enumerate(batches(many)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            state, metrics = step(state, batch)
        out.append(optree.tree_map(torch.clone, metrics, namespace=NAMESPACE))
    return state, out


RUN = [*CALM, (9.0, 2.0), (1.0, 2.0), (1.0, 60.0), (1.05, NAN), (1.05, 2.1), (NAN, 2.1), (1.05, 2.0)]
SPIKES = [8, 10, 11, 13]
"""Of which a loss, a norm, and one of each that is not finite."""


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_training_step_passes_the_loss_and_counts(donate):
    """A learning rate that is a function of the step goes by the updates that were made, in groups too."""
    rates = [1.0 / (n + 1) for n in range(20)]
    inner = optim.by_path(optim.adamw(), (lambda path, leaf: True, optim.sgd(rates.__getitem__)))
    state, metrics = trained(optim.skip_spikes(inner, 8), RUN, donate=donate)
    taken = [n for n in range(len(RUN)) if n not in SPIKES]
    assert [n for n in range(len(RUN)) if metrics[n]["skipped"] > (metrics[n - 1]["skipped"] if n else 0)] == SPIKES
    assert [each["updates"][1].item() for each in metrics][-1] == len(taken)
    assert_trees_close(
        state.params, -sum(torch.tensor(rates[k] * RUN[n][1], dtype=D) for k, n in enumerate(taken)), rtol=1e-12
    )
    assert (state.step, state.opt_state.skipped) == (len(RUN), len(SPIKES))
    assert metrics[8]["loss"] == 9.0
    known = [pair for pair in RUN if math.isfinite(sum(pair))][-8:]
    assert_trees_close(state.opt_state.recent, torch.tensor(known, dtype=D).t())


def plainly(params, batch):
    return mean_of_rows(params, batch).value


def of_two(params, batch):
    return {"rows": mean_of_rows(params, batch), "twice": Mean(2 * plainly(params, batch) * len(batch), len(batch))}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("loss_fn", "options", "factor"),
    [(plainly, {}, 1), (of_two, {}, 3), (plainly, {"nonfinite": "drop"}, 1)],
    ids=["a number", "several means", "dropping"],
)
def test_the_loss_of_a_training_step_is_what_metrics_say(loss_fn, options, factor, scaled):
    optimizer = optim.skip_spikes(optim.sgd(1.0), 8)
    optimizer = optim.dynamic_loss_scale(optimizer, init_scale=3.0) if scaled else optimizer
    loss_fn = optim.scaled_loss(loss_fn) if scaled else loss_fn
    step = gradacc.train_step(gradacc.accumulate_and_value(loss_fn, microbatch_size=1, **options), optimizer)
    batch = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, NAN]], dtype=D)[: 3 if options else 2]
    state, metrics = step(TrainState(torch.zeros((), dtype=D), optimizer.init(torch.zeros((), dtype=D))), batch)
    recent = (state.opt_state.inner if scaled else state.opt_state).recent
    assert_trees_close(recent[:, -1], torch.stack([metrics["loss"], metrics["grad_norm"]]), rtol=1e-6)
    assert_trees_close(recent[:, -1], factor * torch.tensor([2.0, 3.0], dtype=D), rtol=1e-6)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_inside_of_a_loss_scale(donate):
    """The same decisions as without one; what overflows does not enter."""
    plain, expected = trained(optim.skip_spikes(optim.clip_by_global_norm(optim.sgd(1.0), 0.5), 8), RUN)
    state, metrics = trained(scaled_spikes(init_scale=4.0, growth_interval=3), RUN, scaled=True, donate=donate)
    for mine, theirs in zip(metrics, expected, strict=True):
        assert (mine["skipped"], mine["updates"]) == (theirs["skipped"], theirs["updates"])
        assert_trees_close((mine["loss"], mine["grad_norm"]), (theirs["loss"], theirs["grad_norm"]))
    assert_trees_close(state.params, plain.params)
    assert_trees_equal(state.opt_state.inner.recent, plain.opt_state.recent)
    assert metrics[-1]["loss_scale"] > 4
    assert (state.opt_state.skipped, state.opt_state.inner.skipped) == (1, 3)


def test_a_loss_for_a_loss_scale_by_hand():
    """It is that of ``scale * loss``, as the gradients are; where none is taken, it is an error before anything is written."""
    params, grads = torch.zeros(2), torch.full((2,), 8.0)
    spikes = optim.dynamic_loss_scale(optim.skip_spikes(optim.sgd(1.0), 4), init_scale=4.0)
    _, state = spikes.step(params, grads, spikes.init(params), loss=torch.tensor(12.0, dtype=torch.bfloat16))
    assert_trees_close(state.inner.recent[:, -1], torch.tensor([3.0, math.sqrt(8)], dtype=D), rtol=1e-6)
    plain = optim.dynamic_loss_scale(optim.sgd(1.0), init_scale=4.0)
    for optimizer, loss, message in (
        (
            plain,
            torch.tensor(12.0),
            "dynamic_loss_scale: step was given a loss, which the optimizer inside does not take",
        ),
        (spikes, 12.0, r"dynamic_loss_scale: loss must be a 0-dim floating tensor.*got 12.0 \(float\)"),
    ):
        state = optimizer.init(params)
        before = fingerprint((params, grads, state))
        with pytest.raises(TypeError, match=message):
            optimizer.step(params, grads, state, loss=loss, donate=True)
        assert fingerprint((params, grads, state)) == before


def bare(spikes):
    return optim.Optimizer(spikes.init, lambda *args, donate=False: spikes.step(*args, donate=donate))


def nested(spikes):
    def step(params, grads, state, *, donate=False):
        params, inner = spikes.step(params, grads, state["spikes"], donate=donate)
        return params, {"spikes": inner}

    return optim.Optimizer(lambda params: {"spikes": spikes.init(params)}, step)


@pytest.mark.parametrize("around", [bare, nested])
def test_a_training_step_whose_loss_does_not_reach_it(around):
    """By a wrapper of one's own, which passes it on as soon as it says so."""
    spikes = optim.skip_spikes(optim.sgd(1.0), 8)
    with pytest.raises(
        ValueError, match=r"that of a skip_spikes or has one inside.*loss does not reach.*takes_loss=True"
    ):
        trained(around(spikes), RUN)
    passing = optim.Optimizer(spikes.init, lambda *args, **kwargs: spikes.step(*args, **kwargs), takes_loss=True)
    assert_trees_equal(trained(passing, RUN)[0].params, trained(spikes, RUN)[0].params)


# Transforms, ranks


def test_under_vmap_each_member_is_judged_by_its_own_past():
    optimizer = optim.skip_spikes(optim.sgd(1.0, momentum=0.5), 8)
    runs = [RUN, [(10 * loss, norm) for loss, norm in RUN], [(1.0, 2.0)] * len(RUN)]
    step = gradacc.train_step(gradacc.accumulate_and_value(mean_of_rows, steps=2), optimizer)
    params = torch.zeros(len(runs), dtype=D)
    count = torch.zeros(len(runs), dtype=torch.int64)
    state = TrainState(params, torch.vmap(optimizer.init)(params), count)
    state = state._replace(opt_state=optree.tree_map(lambda leaf: leaf.clone(), state.opt_state, namespace=NAMESPACE))
    for batch in zip(*map(batches, runs), strict=True):
        state, metrics = torch.vmap(step)(state, torch.stack(batch))
    assert metrics["skipped"].tolist() == [4, 4, 0]
    for member, run in enumerate(runs):
        alone, _ = trained(optimizer, run)
        mine = optree.tree_map(lambda leaf, member=member: leaf[member], state, namespace=NAMESPACE)
        assert_trees_close(mine, alone)


@pytest.mark.parametrize("wrap", [torch.vmap, pytest.param(compiled, marks=pytest.mark.slow)], ids=["vmap", "compile"])
def test_nothing_is_given_away_under_a_transform(wrap):
    optimizer, grads = optim.skip_spikes(optim.sgd(1.0, momentum=0.5), 8), {"w": torch.randn(3, 2)}
    state = (torch.vmap(optimizer.init) if wrap is torch.vmap else optimizer.init)(grads)
    state = optree.tree_map(lambda leaf: leaf.clone(), state, namespace=NAMESPACE)
    before = fingerprint((grads, state))
    given, kept = (wrap(lambda *args, donate=donate: optimizer.step(*args, donate=donate)) for donate in (True, False))
    assert_trees_close(given(grads, grads, state), kept(grads, grads, state))
    assert fingerprint((grads, state)) == before


@pytest.mark.slow
def test_the_whole_step_is_one_graph():
    """With and without a spike, compiled once; so is a step that gets no loss."""
    expected = trained(optim.skip_spikes(optim.adamw(0.1), 8), RUN)
    assert_trees_close(trained(optim.skip_spikes(optim.adamw(0.1), 8), RUN, wrap=compiled), expected)
    optimizer = optim.skip_spikes(optim.sgd(1.0), 4)
    step = compiled(optimizer.step)
    here = there = (zeros(), optimizer.init(zeros()))
    for norm in (1.0, 1.1, 90.0, 1.0):
        grads = {"a": torch.full((2,), norm, dtype=D), "b": torch.ones((), dtype=D)}
        here, there = step(here[0], grads, here[1]), optimizer.step(there[0], grads, there[1])
    assert_trees_close(here, there)
    assert here[1].skipped == 1


def test_derivatives_go_through_a_step_that_is_taken():
    """With respect to the learning rate, under torch.func and in plain autograd; a skipped step has none."""
    state = after(CALM)[1]

    def moved(rate, norm, loss):
        optimizer = optim.skip_spikes(optim.sgd(rate), 8)
        return count_steps(zeros(), loss, norm, state, optimizer)[0]["b"]

    rate = torch.tensor(0.5, dtype=D)
    for norm, loss, slope in ((2.0, 1.0, 1.6), (90.0, 1.0, 0.0), (2.0, 9.0, 0.0)):
        args = (torch.tensor(norm, dtype=D), torch.tensor(loss, dtype=D))
        assert_trees_close(torch.func.grad(moved)(rate, *args), torch.tensor(slope, dtype=D))
        assert_trees_close(torch.func.grad(moved, argnums=(1, 2))(rate, *args)[1], torch.tensor(0.0, dtype=D))
    leaf = torch.tensor(2.0, dtype=D, requires_grad=True)
    moved(rate, leaf, 1.0 + 0 * leaf).backward()
    assert_trees_close(leaf.grad, torch.tensor(0.4, dtype=D))


def test_the_window_has_no_graph():
    """Of a loss or of gradients that have one: it would grow with every step."""
    optimizer, leaf = optim.skip_spikes(optim.sgd(1.0), 8), torch.tensor(2.0, dtype=D, requires_grad=True)
    for norm in (2.0, leaf):
        assert not count_steps(zeros(), 1.5 * leaf, norm, optimizer.init(zeros()), optimizer)[1].recent.requires_grad


def _on_ranks(group, loaders):
    optimizer = optim.skip_spikes(optim.sgd(1.0), 8)
    grad_fn = gradacc.accumulate_and_value(mean_of_rows, steps=2, sync=gradacc.all_reduce(group))
    step, params = gradacc.train_step(grad_fn, optimizer), torch.zeros((), dtype=D)
    state, skipped = TrainState(params, optimizer.init(params)), []
    for batch in loaders[torch.distributed.get_rank()]:
        state, metrics = step(state, batch)
        skipped.append(metrics["skipped"].item())
    return state, skipped


def test_a_spike_on_one_rank_is_skipped_by_all(pool):
    """Each rank has its own spikes, and not the same number of rows."""
    first, second = batches(RUN), [batch[:1] for batch in batches([*CALM, *[(1.0, 2.0)] * (len(RUN) - len(CALM))])]
    second[9] = torch.tensor([[500.0, 2.0]], dtype=D)
    (mine, skipped), (theirs, others) = pool.run(2, _on_ranks, [first, second])
    assert_trees_equal(tuple(mine), tuple(theirs))
    assert skipped == others
    assert [n for n, (a, b) in enumerate(zip([0, *skipped], skipped, strict=False)) if b > a] == sorted([*SPIKES, 9])


# Memory


@pytest.mark.parametrize("loss", [1.0, 9.0], ids=["taken", "skipped"])
def test_a_donated_step_is_made_in_the_parameters_memory(loss):
    """The loss is not given away: metrics have it."""
    optimizer, state = optim.skip_spikes(optim.adamw(0.1), 8), after(CALM)[1]
    params, value = zeros(), torch.tensor(loss, dtype=D)
    state = state._replace(inner=optim.adamw(0.1).init(params))
    held = [leaf.data_ptr() for leaf in params.values()]
    given = (params["a"], state.recent, state.inner.exp_avg["a"])
    new, moved = optimizer.step(params, zeros(), state, loss=value, donate=True)
    assert [leaf.data_ptr() for leaf in new.values()] == held
    assert (moved.skipped, value) == (loss > 2, loss)
    for leaf in given:
        with pytest.raises(ValueError, match="was given away to (skip_spikes|adamw).step"):
            leaf.sum()


@pytest.mark.parametrize("norm", [2.0, 90.0, NAN], ids=["taken", "a spike", "not finite"])
def test_a_step_changes_nothing(norm):
    optimizer, state, params = optim.skip_spikes(optim.sgd(1.0), 8), after(CALM)[1], zeros()
    before = fingerprint((params, state))
    new = count_steps(params, 1.0, norm, state, optimizer)
    assert fingerprint((params, state)) == before
    old = {leaf.data_ptr() for leaf in optree.tree_leaves((params, state), namespace=NAMESPACE)}
    assert old.isdisjoint(leaf.data_ptr() for leaf in optree.tree_leaves(new, namespace=NAMESPACE))


# Mistakes

REFUSED = {
    "class": (lambda: optim.skip_spikes(optim.sgd), TypeError, "the optimizer must be a gradacc.optim.Optimizer"),
    "torch": (lambda: optim.skip_spikes(torch.optim.SGD([torch.ones(1)])), TypeError, "from_torch.torch.optim.SGD"),
    "scaled": (
        lambda: optim.skip_spikes(optim.dynamic_loss_scale(optim.sgd(1))),
        ValueError,
        "the optimizer is a dynamic_loss_scale",
    ),
    "one": (lambda: optim.skip_spikes(optim.sgd(1), 1), ValueError, "window must be at least 2, .*got 1"),
    "none": (lambda: optim.skip_spikes(optim.sgd(1), 0), ValueError, "window must be at least"),
    "bool": (lambda: optim.skip_spikes(optim.sgd(1), True), TypeError, "window must be an int, got True"),
    "float": (lambda: optim.skip_spikes(optim.sgd(1), 128.0), TypeError, r"window must be an int, got 128.0 \(float\)"),
    "zero": (lambda: optim.skip_spikes(optim.sgd(1), 8, 0.0), ValueError, "sigma must be greater than 0, got 0.0"),
    "negative": (lambda: optim.skip_spikes(optim.sgd(1), sigma=-1), ValueError, "sigma must be finite.*got -1"),
    "nan": (lambda: optim.skip_spikes(optim.sgd(1), sigma=NAN), ValueError, "sigma must be finite.*got nan"),
    "infinite": (lambda: optim.skip_spikes(optim.sgd(1), sigma=INF), ValueError, "sigma must be finite.*got inf"),
    "text": (lambda: optim.skip_spikes(optim.sgd(1), sigma="6"), TypeError, "sigma must be a number, got a str"),
    "tensor": (lambda: optim.skip_spikes(optim.sgd(1), sigma=torch.tensor(6.0)), TypeError, "sigma must be a number"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_options_out_of_range(call, error, message):
    with pytest.raises(error, match=f"^skip_spikes: .*{message}"):
        call()


def _state(**fields):
    return optim.skip_spikes(optim.sgd(1.0), 8).init(zeros())._replace(**fields)


STATES = {
    "another's": (optim.skip_nonfinite(optim.sgd(1.0)).init(zeros()), TypeError, "state is a .*SkipState, where"),
    "inner": (
        optim.sgd(1.0).init(zeros()),
        TypeError,
        "state is a .*SgdState, where this optimizer's is a SpikesState",
    ),
    "another window": (
        optim.skip_spikes(optim.sgd(1.0), 64).init(zeros()),
        ValueError,
        "state.recent has a window of 64 steps, where this optimizer has window=8",
    ),
    "rows": (_state(recent=torch.zeros(3, 8, dtype=D)), TypeError, r"state.recent must be .*shape \(2, 8\), got"),
    "batched": (
        _state(recent=torch.zeros(2, 2, 8, dtype=D)),
        TypeError,
        "state.recent must.*torch.vmap the step over a state",
    ),
    "float32": (_state(recent=torch.zeros(2, 8)), TypeError, "state.recent must be .*float64.*got torch.float32"),
    "list": (_state(recent=[1.0] * 8), TypeError, "state.recent must be a tensor .*got a list"),
    "count": (_state(skipped=torch.ones(())), TypeError, "state.skipped must be a 0-dim tensor"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("norm", [1.0, NAN], ids=["taken", "skipped"])
@pytest.mark.parametrize(("state", "error", "message"), STATES.values(), ids=STATES)
def test_a_state_of_another_optimizer(state, error, message, norm, donate):
    optimizer, params = optim.skip_spikes(optim.sgd(1.0), 8), zeros()
    before = fingerprint((params, state))
    with pytest.raises(error, match=f"^skip_spikes: {message}"):
        count_steps(params, 1.0, norm, state, optimizer, donate=donate)
    with pytest.raises(error, match=f"^skip_spikes: {message}"):
        optimizer.check(params, state)
    assert fingerprint((params, state)) == before


LOSSES = {
    "number": (2.0, r"got 2.0 \(float\)"),
    "each": (torch.ones(3), r"got torch.float32, a tensor of shape \(3,\)"),
    "integer": (torch.tensor(2), "got torch.int64"),
    "complex": (torch.tensor(2j), "got torch.complex64"),
    "Mean": (Mean(torch.tensor(2.0), 1), "of a Mean, its .value.*got a gradacc._mean.Mean"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("loss", "message"), LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_none(loss, message, donate):
    optimizer, params, grads = optim.skip_spikes(optim.sgd(1.0), 8), zeros(), zeros()
    state = optimizer.init(params)
    before = fingerprint((params, grads, state))
    with pytest.raises(TypeError, match=f"^skip_spikes: loss must be a 0-dim floating tensor.*{message}"):
        optimizer.step(params, grads, state, loss=loss, donate=donate)
    assert fingerprint((params, grads, state)) == before


def test_what_takes_no_loss_says_so():
    with pytest.raises(TypeError, match="loss"):
        optim.sgd(1.0).step(zeros(), zeros(), optim.sgd(1.0).init(zeros()), loss=torch.ones(()))
