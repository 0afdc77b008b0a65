"""The streaming form: the bits of `accumulate_and_value`'s loop, states that are values, and what is refused."""

import copy
import functools
import pickle
from typing import NamedTuple

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

import gradacc
from gradacc import Mean
from tests.helpers import ENGINES, NAMESPACE, assert_trees_close, assert_trees_equal, fingerprint, some_slow, value_of
from tests.laws.losses import CASES

D = torch.float64


def mean(params, x):
    return torch.tanh(x @ params["w"] + params["b"]).square().mean()


def summed(params, x):
    return torch.tanh(x @ params["w"] + params["b"]).square().sum()


def positive(params, x):
    """Over the entries that are positive: of a micro-batch without one, the weight is 0."""
    return Mean((torch.tanh(x @ params["w"] + params["b"]).square().sum(1) * (x[:, 0] > 0)).sum(), (x[:, 0] > 0).sum())


def counted(params, x):
    return Mean(summed(params, x), len(x))


def with_aux(params, x):
    each = torch.tanh(x @ params["w"] + params["b"]).sum(1)
    aux = {
        "each": each,
        "mean": each.mean(),
        "hits": Mean((each > 0).sum(), len(each)),
        "per class": (Mean(x.sum(0), torch.full((3,), len(x))), Mean(each.sum(), float(len(each)))),
    }
    return mean(params, x), aux


def partial(params, x):
    """Reaches ``b`` only where there are two examples or more."""
    return (x @ params["w"]).square().mean() + (params["b"].sum() if len(x) > 1 else 0.0)


LOSSES = {
    "mean": (mean, {}),
    "sum": (summed, {"reduction": "sum"}),
    "Mean": (positive, {}),
    "Mean of numbers": (counted, {}),
    "aux": (with_aux, {"has_aux": True}),
    "aux of a sum": (lambda p, x: (summed(p, x), with_aux(p, x)[1]), {"has_aux": True, "reduction": "sum"}),
    "accumulated in float64": (mean, {"dtype": D}),
    "some parameters now and then": (partial, {}),
}


def params_of(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return {"w": torch.randn(3, 2, generator=g).to(dtype), "b": torch.randn(2, generator=g).to(dtype), "none": None}


def windows(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(n, 3, generator=g).to(dtype) for n in (2, 1, 4, 1)]
    masked, empty = -x[0].abs(), x[0][:0]
    return {
        "nothing": [],
        "an empty one": [empty],
        "empty ones": [empty, empty],
        "weight 0": [masked],
        "one": [x[2]],
        "several": x,
        "empty first": [empty, *x],
        "weight 0 first": [masked, *x],
        "empty and weight 0 between": [x[1], empty, masked, x[2], empty],
    }


def stream(acc, params, window):
    return functools.reduce(lambda state, x: acc.update(state, params, x), window, acc.init(params))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("window", windows())
def test_the_bits_of_the_loop(window, name, dtype, donate):
    loss, options = LOSSES[name]
    params, parts = params_of(dtype), windows(dtype)[window]
    grad_fn = gradacc.accumulate_and_value(loss, split=iter, **options)
    acc = gradacc.accumulator(loss, donate=donate, **options)
    try:
        expected = grad_fn(params, parts)
    except ValueError as error:  # nothing says what aux is
        assert options.get("has_aux")
        assert not any(len(part) for part in parts)
        with pytest.raises(ValueError, match=str(error)[-40:]):
            acc.finalize(stream(acc, params, parts))
        return
    actual = acc.finalize(stream(acc, params, parts))
    assert_trees_equal(actual, expected)
    one, other = (optree.tree_leaves(result, namespace=NAMESPACE) for result in (actual, expected))
    assert list(map(type, one)) == list(map(type, other))


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_loop_with_models(name, engine):
    case = CASES[name]()
    parts = [case.batch(n, n) for n in (2, 0, 3, 1)]
    acc = gradacc.accumulator(case.loss, has_aux=True, **case.options)
    actual = ENGINES[engine](lambda: acc.finalize(stream(acc, case.params, parts)))
    assert_trees_equal(
        actual,
        ENGINES[engine](
            lambda: gradacc.accumulate_and_value(case.loss, has_aux=True, **case.options)(case.params, parts)
        ),
    )


def test_arguments_are_those_of_the_loss():
    def loss(x, scale, a, b, *, power):
        return scale * ((x * a).sum(1) + b["b"]).pow(power).mean()

    x, a, b = torch.rand(4, 2, dtype=D), torch.rand(2, dtype=D), {"b": torch.rand((), dtype=D)}
    acc = gradacc.accumulator(loss, argnums=(2, -1))
    state = acc.init((a, b))
    for part in x.split(3):
        state = acc.update(state, part, 2.0, a, b, power=3)
    expected = torch.func.grad_and_value(loss, argnums=(2, 3))(x, 2.0, a, b, power=3)
    assert_trees_close(acc.finalize(state), expected)


def test_in_dims_say_what_counts():
    def loss(w, x, y):
        return (w * x).square().mean() + y.mean()

    x, y, w = torch.rand(2, 5, dtype=D), torch.rand(5, 1, dtype=D), torch.rand((), dtype=D)
    acc = gradacc.accumulator(loss, in_dims=(None, 1, 0))
    state = acc.update(acc.update(acc.init(w), w, x[:, :3], y[:3]), w, x[:, 3:], y[3:])
    assert_trees_close(acc.finalize(state), torch.func.grad_and_value(loss)(w, x, y))
    with pytest.raises(TypeError, match=r"number of examples cannot be told: its tensors have sizes \[3, 5\]"):
        acc.update(state, w, x[:, :3], y)


def test_as_a_decorator():
    @gradacc.accumulator(reduction="sum")
    def acc(w, x):
        return (w * x).sum()

    assert isinstance(acc, gradacc.Accumulator)
    assert acc.finalize(acc.update(acc.init(torch.ones(())), torch.ones(()), torch.arange(4.0)))[0] == 6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_that_is_passed_in_changes_and_results_are_fresh(name, engine):
    loss, options = LOSSES[name]
    params, x = params_of(), windows()["several"]
    acc = gradacc.accumulator(loss, **options)
    a, b = (ENGINES[engine](lambda part=part: stream(acc, params, part)) for part in (x[:2], x[2:]))
    before = fingerprint((params, x, a, b))
    results = [
        ENGINES[engine](lambda: acc.update(a, params, x[3])),
        ENGINES[engine](lambda: acc.update(a, params, -x[0].abs())),
        ENGINES[engine](lambda: acc.merge(a, b)),
        ENGINES[engine](lambda: acc.finalize(a)),
        ENGINES[engine](lambda: acc.finalize(a)),
    ]
    assert_trees_equal(results[-1], results[-2])
    assert fingerprint((params, x, a, b)) == before
    for result in results[-2:]:  # writing into what finalize returned changes nothing either
        for leaf in optree.tree_leaves(result, namespace=NAMESPACE):
            if isinstance(leaf, Tensor):
                leaf.zero_()
    assert fingerprint((params, x, a, b)) == before


def pointers(state):
    return {path: leaf.data_ptr() for path, leaf in state.grads.items() if isinstance(leaf, Tensor)}


def test_donated_memory_is_used_again():
    params, x = params_of(), windows()["several"]
    kept, acc = gradacc.accumulator(mean), gradacc.accumulator(mean, donate=True)
    state = acc.update(acc.init(params), params, x[0])
    here = pointers(state)
    for part in x[1:]:
        state = acc.update(state, params, part)
        assert pointers(state) == here
    there = pointers(other := acc.update(acc.init(params), params, x[0]))
    merged = pointers(state := acc.merge(state, other))
    assert merged in (here, there)
    grads, value = acc.finalize(state)
    assert {key: grads[key].data_ptr() for key in ("w", "b")} == merged
    expected = kept.merge(stream(kept, params, x), kept.update(kept.init(params), params, x[0]))
    assert_trees_equal((grads, value), kept.finalize(expected))
    assert not pointers(kept.update(expected, params, x[0])).items() & pointers(expected).items()


def test_donated_memory_that_is_shared_is_copied():
    """A sum's gradient is one number, expanded, in the functional engine; and a state's tensors may be views."""
    w, x = torch.ones(3, dtype=D), torch.arange(2.0, dtype=D)

    def loss(w, x):
        return w.sum() * x.mean()

    acc = gradacc.accumulator(loss, donate=True)
    state = ENGINES["functional"](lambda: acc.update(acc.init(w), w, x))
    assert_trees_close(acc.finalize(acc.update(state, w, x + 1))[0], torch.ones(3, dtype=D))
    expanded, whole = torch.empty_strided((3,), (0,), dtype=D), torch.ones(6, dtype=D)
    expanded[:1] = 0.5
    for grads in (expanded, whole[:3]):
        before = grads.clone()
        state = acc.update(acc.init(w), w, x)
        other = acc.update(gradacc.AccumulatorState(grads, state.sums, state.facts), w, x)
        assert_trees_close(other.grads, before + 0.5)
    assert whole.eq(1).all()


def test_donated_gradients_that_are_one_tensor_are_added_to_once():
    """The functional engine's of ``a + b``: one tensor in two places of the state."""
    params, x = {"a": torch.ones(2, 3, dtype=D), "b": torch.ones(2, 3, dtype=D)}, torch.rand(2, 3, dtype=D)

    def loss(p, x):
        return (x * (p["a"] + p["b"])).square().mean()

    acc, pure = gradacc.accumulator(loss, donate=True), gradacc.accumulator(loss)
    made = lambda: ENGINES["functional"](lambda: acc.update(acc.init(params), params, x))  # noqa: E731
    assert_trees_close(acc.finalize(acc.update(made(), params, x)), pure.finalize(pure.update(made(), params, x)))
    assert_trees_close(acc.finalize(acc.merge(made(), made())), pure.finalize(pure.merge(made(), made())))
    one = made()
    assert_trees_close(acc.finalize(acc.merge(one, one)), pure.finalize(pure.merge(made(), made())))


def test_gradaccs_own_errors_are_not_taken_for_the_losss():
    """An empty micro-batch whose loss raises says nothing; one that returns what it must not is told."""
    acc = gradacc.accumulator(lambda w, x: ((w * x).sum(), x.sum()))
    with pytest.raises(TypeError, match="has_aux"):
        acc.update(acc.init(torch.ones(2)), torch.ones(2), torch.ones(0, 2))


def test_an_error_in_the_loss_leaves_the_state_as_it_was():
    params, x = params_of(), windows()["several"]

    def loss(params, x):
        value = mean(params, x)
        if (x == 7).all():
            raise RuntimeError("of the loss")
        value.register_hook(lambda grad: 1 / 0 if (x == 8).all() else None)
        return value

    acc = gradacc.accumulator(loss)
    state = stream(acc, params, x[:2])
    before = fingerprint(state)
    for number, error in ((7.0, RuntimeError), (8.0, ZeroDivisionError)):
        with pytest.raises(error):
            acc.update(state, params, torch.full_like(x[0], number))
        assert fingerprint(state) == before
    assert_trees_equal(acc.finalize(acc.update(state, params, x[2])), gradacc.accumulate_and_value(loss)(params, x[:3]))


def test_a_loss_that_fails_without_examples():
    """It is asked only for the types that it returns, and need not answer."""

    def loss(w, x):
        return (w * x).mean() + x.max()

    acc, w = gradacc.accumulator(loss), torch.ones(())
    state = acc.update(acc.init(w), w, torch.ones(0))
    assert acc.finalize(state)[1].isnan()
    assert_trees_equal(acc.finalize(acc.update(state, w, torch.ones(2))), (torch.tensor(1.0), torch.tensor(2.0)))


def test_what_an_empty_micro_batch_says_is_forgotten():
    """As soon as there is another one: here it is of another kind, and has other aux."""

    def loss(w, x):
        if not len(x):
            return Mean((w * x).sum(), 0), {}
        return (w * x).mean(), {"mean": x.mean()}

    acc, w, x = gradacc.accumulator(loss, has_aux=True), torch.ones(()), torch.ones(2)
    empty = acc.update(acc.init(w), w, x[:0])
    expected = gradacc.accumulate_and_value(loss, has_aux=True)(w, [x[:0], x])
    one = acc.update(acc.init(w), w, x)
    for state in (acc.update(empty, w, x), acc.merge(empty, one), acc.merge(one, empty)):
        assert_trees_equal(acc.finalize(state), expected)


def test_parameters_may_change_in_the_meantime():
    acc = gradacc.accumulator(lambda w, x: (w * x).square().mean())
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    state = acc.update(acc.update(acc.init(one), one, torch.ones(1)), two, torch.ones(1))
    assert_trees_equal(acc.finalize(state), (torch.tensor(3.0), torch.tensor(2.5)))


def test_before_the_first_micro_batch():
    params = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "z": torch.ones(2, dtype=torch.complex64)}
    for reduction in ("mean", "sum"):
        acc = gradacc.accumulator(mean, reduction=reduction)
        state = acc.init(params)
        assert sum(leaf.untyped_storage().nbytes() for leaf in optree.tree_leaves(state, namespace=NAMESPACE)) == 8
        grads, value = acc.finalize(state)
        assert_trees_equal(grads, {key: torch.zeros_like(leaf) for key, leaf in params.items()})
        assert value.isnan() if reduction == "mean" else value == 0


def test_a_parameter_that_was_not_reached_has_no_buffer():
    acc, params = gradacc.accumulator(partial), params_of()
    state = acc.update(acc.init(params), params, torch.ones(1, 3))
    assert set(pointers(state)) == {"w"}
    assert set(pointers(acc.update(state, params, torch.ones(2, 3)))) == {"w", "b"}


def states():
    """After 0, 1, 2, ... micro-batches."""
    for name, (loss, options) in LOSSES.items():
        acc = gradacc.accumulator(loss, **options)
        for window in windows().values():
            yield name, acc, stream(acc, params_of(), window)


def test_states_are_pytrees_of_dense_tensors():
    for name, acc, state in states():
        leaves, treedef = optree.tree_flatten(state, namespace=NAMESPACE)
        assert all(type(leaf) is Tensor and leaf.layout is torch.strided for leaf in leaves), name
        again = optree.tree_unflatten(treedef, leaves)
        assert optree.tree_structure(again, namespace=NAMESPACE) == treedef
        assert hash(treedef) == hash(optree.tree_structure(again, namespace=NAMESPACE))
        same, spec = torch_pytree.tree_flatten(state)
        assert [id(leaf) for leaf in same] == [id(leaf) for leaf in leaves]
        assert torch_pytree.tree_structure(torch_pytree.tree_unflatten(same, spec)) == spec
        if state.sums.value is not None or not state.facts.has_aux:
            assert_trees_equal(acc.finalize(again), acc.finalize(state))


def test_states_can_be_pickled_and_copied():
    for _, acc, state in states():
        for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            assert_trees_equal(again, state)
            x = windows()["one"][0]
            assert_trees_equal(
                acc.finalize(acc.update(again, params_of(), x)), acc.finalize(acc.update(state, params_of(), x))
            )


@pytest.mark.parametrize("name", LOSSES)
def test_a_window_goes_on_from_a_checkpoint(name, tmp_path):
    """``like`` is a state after one micro-batch: of as many examples, where something is concatenated."""
    loss, options = LOSSES[name]
    params, x = params_of(), windows()["several"]
    acc = gradacc.accumulator(loss, **options)
    state = stream(acc, params, x[:2])
    gradacc.checkpoint.save(tmp_path / "window", state)
    like = acc.update(acc.init(params), params, torch.ones(3, 3))
    state = gradacc.checkpoint.load(tmp_path / "window", like)
    expected = gradacc.accumulate_and_value(loss, **options)(params, x)
    assert_trees_equal(acc.finalize(stream_on(acc, state, params, x[2:])), expected)


def stream_on(acc, state, params, window):
    return functools.reduce(lambda state, x: acc.update(state, params, x), window, state)


def both(acc, params, batches):
    """Everything there is, for transforms: updates, a merge, the end."""
    state = acc.init(params)
    for x in batches[:2]:
        state = acc.update(state, params, x)
    return acc.finalize(acc.merge(state, acc.update(acc.init(params), params, batches[2])))


BATCHED = {"mean": mean, "sum": summed, "Mean": positive, "Mean of numbers": counted}


@pytest.mark.parametrize("name", BATCHED)
def test_vmap(name):
    loss, options = BATCHED[name], {"reduction": "sum"} if name == "sum" else {}
    acc = gradacc.accumulator(loss, **options)
    params = {"w": torch.randn(4, 3, 2, dtype=D), "b": torch.randn(4, 2, dtype=D)}
    x = [torch.randn(n, 3, dtype=D) for n in (2, 1, 3)]
    inside = torch.func.vmap(lambda p: both(acc, p, x))(params)
    states = torch.func.vmap(acc.init)(params)
    for part in x:
        states = torch.func.vmap(acc.update, in_dims=(0, 0, None))(states, params, part)
    outside = torch.func.vmap(acc.finalize)(states)
    each = [both(acc, {key: leaf[i] for key, leaf in params.items()}, x) for i in range(4)]
    for grads, value in (inside, outside):
        assert_trees_close(grads, {key: torch.stack([g[key] for g, _ in each]) for key in params})
        torch.testing.assert_close(value_of(value), torch.stack([value_of(v) for _, v in each]))


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_over_micro_batches(name):
    """Some of weight 0, next to others that are not."""
    loss, options = BATCHED[name], {"reduction": "sum"} if name == "sum" else {}
    acc, params = gradacc.accumulator(loss, **options), {"w": torch.randn(3, 2, dtype=D), "b": torch.randn(2, dtype=D)}
    x = [torch.randn(5, n, 3, dtype=D) for n in (2, 1, 3)]
    x[0][1] = -x[0][1].abs()
    x[2][1] = -x[2][1].abs()
    grads, value = torch.func.vmap(lambda *x: both(acc, params, x))(*x)
    each = [both(acc, params, [part[i] for part in x]) for i in range(5)]
    assert_trees_close(grads, {key: torch.stack([g[key] for g, _ in each]) for key in params})
    torch.testing.assert_close(value_of(value), torch.stack([value_of(v) for _, v in each]), equal_nan=True)


@pytest.mark.parametrize("name", BATCHED)
def test_derivatives_go_through(name):
    """A Hessian-vector product, through update, merge and finalize."""
    loss, options = BATCHED[name], {"reduction": "sum"} if name == "sum" else {}
    acc, params = gradacc.accumulator(loss, **options), {"w": torch.randn(3, 2, dtype=D), "b": torch.randn(2, dtype=D)}
    x = [torch.randn(n, 3, dtype=D) for n in (2, 1, 3)]

    def large(params):
        return value_of(loss(params, torch.cat(x)))

    def norm(grad):
        return lambda params: sum(leaf.square().sum() for leaf in grad(params).values())

    actual = torch.func.grad(norm(lambda params: both(acc, params, x)[0]))(params)
    assert_trees_close(actual, torch.func.grad(norm(torch.func.grad(large)))(params))


def test_states_move_between_engines():
    for loss, options in LOSSES.values():
        acc, params, x = gradacc.accumulator(loss, **options), params_of(D), windows(D)["several"]
        state = acc.init(params)
        for n, part in enumerate(x):
            update = functools.partial(acc.update, state, params, part)
            state = ENGINES["functional" if n % 2 else "eager"](update)
        assert_trees_close(acc.finalize(state), gradacc.accumulate_and_value(loss, **options)(params, x))


def test_states_of_both_engines_have_the_same_dtypes():
    """Of 0-dim tensors, too, which take a wider dtype from 0-dim numbers."""
    w, x = torch.ones(()), torch.rand(3, 2)

    def loss(w, x):
        value = (w * x).square().mean()
        return value, {"mean": value, "Mean": Mean(value, len(x)), "each": x.sum(1)}

    acc = gradacc.accumulator(loss, has_aux=True)
    eager, functional = (ENGINES[engine](lambda: stream(acc, w, [x, x[1:], x])) for engine in ("eager", "functional"))
    assert_trees_close(functional, eager, rtol=1e-6)
    merged = ENGINES["functional"](lambda: acc.merge(functional, acc.update(acc.init(w), w, x[:1])))
    assert_trees_close(merged, acc.merge(eager, acc.update(acc.init(w), w, x[:1])), rtol=1e-6)


@pytest.mark.parametrize("name", some_slow(["mean", "sum", "Mean", "Mean of numbers", "aux"], "aux"))
def test_compiled(name):
    """Two graphs of update, before anything arrived and after it, and then none more."""
    loss, options = LOSSES[name]
    if name == "aux":  # without what is concatenated, which grows
        loss = lambda p, x: (mean(p, x), {"hits": Mean((x > 0).sum(), len(x)), "mean": x.mean()})  # noqa: E731
    acc = gradacc.accumulator(loss, **options)
    torch.compiler.reset()
    update, finalize = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (acc.update, acc.finalize))
    params = {"w": torch.randn(3, 2, dtype=D), "b": torch.randn(2, dtype=D)}
    x = [torch.randn(4, 3, dtype=D) for _ in range(4)]
    state = update(update(acc.init(params), params, x[0]), params, x[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part in x[2:]:
            state = update(state, params, part)
    expected = gradacc.accumulate_and_value(loss, **options)(params, x)
    assert_trees_close(acc.finalize(state), expected)
    grads, value = finalize(state)
    assert_trees_close(grads, expected[0])
    if name == "aux":
        (value, aux), whole = value, expected[1][1]
        assert_trees_close((aux["hits"].value, aux["mean"]), (whole["hits"].value, whole["mean"]))
        expected = expected[0], expected[1][0]
    torch.testing.assert_close(value_of(value), value_of(expected[1]))


@pytest.mark.slow
def test_compiled_merge():
    acc, params, x = gradacc.accumulator(with_aux, has_aux=True), params_of(D), windows(D)["several"]
    a, b = stream(acc, params, x[:2]), stream(acc, params, x[2:])
    merged = torch.compile(acc.merge, fullgraph=True, backend="aot_eager")(a, b)
    assert_trees_close(acc.finalize(merged), acc.finalize(acc.merge(a, b)))


class Pair(NamedTuple):
    w: Tensor
    b: Tensor


class TestBadInput:
    params = params_of()
    x = torch.ones(2, 3)
    acc = gradacc.accumulator(mean)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (dict(donate=1), TypeError, r"donate must be True or False, got 1 \(int\)"),
            (dict(donate=None), TypeError, "donate must be True or False, got None"),
        ],
    )
    def test_of_the_factory(self, options, error, message):
        with pytest.raises(error, match=f"^accumulator: {message}"):
            gradacc.accumulator(mean, **options)

    def test_of_init(self):
        for bad, message in (
            (nn.Linear(1, 1), "is an nn.Module"),
            ({"w": torch.ones(2).int()}, r"params\['w'\] is a tensor of dtype torch.int32"),
            ({}, "holds no tensor"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^accumulator: .*{message}"):
                self.acc.init(bad)

    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            ((), ValueError, "argnums=0 does not fit a call with 0 positional arguments; call update"),
            ((params,), ValueError, r"no batch among .* Call update\(state, params, microbatch\)"),
            (
                ({**params, "w": torch.ones(3, 3)}, x),
                ValueError,
                r"params\['w'\] is torch.float32 of shape \(3, 3\), and in",
            ),
            (
                ({**params, "b": torch.ones(2, dtype=D)}, x),
                ValueError,
                r"params\['b'\] is torch.float64 of shape \(2,\)",
            ),
            (({**params, "c": torch.ones(2)}, x), ValueError, "params is of the structure"),
            ((Pair(params["w"], params["b"]), x), ValueError, "params is of the structure"),
            (
                ({**params, "w": torch.ones(3, 2).int()}, x),
                TypeError,
                r"params\['w'\] is a tensor of dtype torch.int32",
            ),
        ],
    )
    @pytest.mark.parametrize("seen", [0, 1])
    def test_of_update(self, seen, args, error, message):
        state = stream(self.acc, self.params, [self.x] * seen)
        with pytest.raises(error, match=f"^accumulator: .*{message}"):
            self.acc.update(state, *args)

    def test_what_is_not_a_state(self):
        state = self.acc.init(self.params)
        for call in (
            lambda: self.acc.update(self.params, self.params, self.x),
            lambda: self.acc.merge(state, self.params),
            lambda: self.acc.merge((state, state), state),
            lambda: self.acc.finalize(self.params),
        ):
            with pytest.raises(
                TypeError, match="^accumulator: (state|a|b) must be a state that init, update or merge returned, got"
            ):
                call()

    @pytest.mark.parametrize("options", [{"reduction": "sum"}, {"dtype": D}, {"has_aux": True}])
    def test_states_of_another_accumulator(self, options):
        state = gradacc.accumulator(mean, **options).init(self.params)
        for call in (
            lambda: self.acc.update(state, self.params, self.x),
            lambda: self.acc.merge(self.acc.init(self.params), state),
            lambda: self.acc.finalize(state),
        ):
            with pytest.raises(
                ValueError, match=f"^accumulator: the state is of an accumulator with {next(iter(options))}="
            ):
                call()

    @pytest.mark.parametrize("seen", [0, 1])
    def test_states_of_other_parameters(self, seen):
        state = stream(self.acc, self.params, [self.x] * seen)
        for other, message in (
            ({"w": torch.ones(3, 2), "b": torch.ones(1), "none": None}, r"b\['b'\] is torch.float32 of shape \(1,\)"),
            ({"w": torch.ones(3, 2), "b": torch.ones(2, dtype=D), "none": None}, r"b\['b'\] is torch.float64"),
            ({"w": torch.ones(3, 2), "none": None}, "b is of the structure"),
        ):
            with pytest.raises(ValueError, match=f"^accumulator: {message}"):
                self.acc.merge(state, self.acc.init(other))

    def test_states_of_other_losses(self):
        def of(loss):
            acc = gradacc.accumulator(loss, has_aux=True)
            return acc, acc.update(acc.init(self.params), self.params, self.x)

        def returns(value, aux):
            return lambda p, x: (value(p, x), aux(x))

        acc, state = of(returns(mean, lambda x: {"a": x.mean()}))
        for loss, error, message in (
            (
                returns(counted, lambda x: {"a": x.mean()}),
                TypeError,
                "a tensor for one micro-batch and a Mean for another",
            ),
            (
                returns(lambda p, x: mean(p, x).double(), lambda x: {"a": x.mean()}),
                ValueError,
                "are torch.float32, and torch.float64",
            ),
            (returns(mean, lambda x: {"b": x.mean()}), ValueError, "aux has another structure"),
            (returns(mean, lambda x: {"a": x}), TypeError, r"aux\['a'\] is not of the same kind"),
        ):
            with pytest.raises(error, match=f"(?s)^accumulator: .*{message}"):
                acc.merge(state, of(loss)[1])

    def test_a_loss_that_changes_its_kind(self):
        acc = gradacc.accumulator(lambda p, x: mean(p, x) if len(x) > 1 else counted(p, x))
        state = acc.update(acc.init(self.params), self.params, self.x)
        with pytest.raises(TypeError, match="^accumulator: loss_fn returned a tensor for one micro-batch and a Mean"):
            acc.update(state, self.params, self.x[:1])

    def test_a_loss_that_does_not_depend_on_the_parameters(self):
        acc = gradacc.accumulator(lambda p, x: x.mean())
        state = acc.update(acc.init(self.params), self.params, self.x)
        with pytest.raises(ValueError, match="^accumulator: the loss does not depend on any parameter"):
            acc.finalize(state)

    def test_batched_states_outside_vmap(self):
        acc, w = gradacc.accumulator(lambda w, x: (w * x).mean()), torch.ones(3)
        states = torch.func.vmap(acc.update, in_dims=(None, 0, None))(acc.init(w[0]), w, self.x)
        for call in (lambda: acc.update(states, w[0], self.x), lambda: acc.finalize(states)):
            with pytest.raises(ValueError, match="^accumulator: the state's weight is .*goes on under vmap"):
                call()

    def test_states_that_were_tampered_with(self):
        state = self.acc.update(self.acc.init(self.params), self.params, self.x)
        grads = {**state.grads, "w": torch.ones(2)}
        bad = gradacc.AccumulatorState(grads, state.sums, state.facts)
        with pytest.raises(
            ValueError, match=r"^accumulator: state.grads\['w'\] is a tensor of shape \(2,\), of a parameter"
        ):
            self.acc.finalize(bad)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cut", [0, 2, 4])
def test_states_of_two_checkpoints_are_merged(name, cut, tmp_path):
    """Each half of a window in a folder of its own; the halves' merge is the window's."""
    loss, options = LOSSES[name]
    params, x = params_of(D), windows(D)["several"]
    acc = gradacc.accumulator(loss, **options)
    merged = acc.init(params)
    for folder, part in (("a", x[:cut]), ("b", x[cut:])):
        gradacc.checkpoint.save(tmp_path / folder, stream(acc, params, part))
        like = stream(acc, params, [torch.ones(sum(map(len, part)), 3, dtype=D)] if part else [])
        merged = acc.merge(merged, gradacc.checkpoint.load(tmp_path / folder, like))
    expected = gradacc.accumulate_and_value(loss, **options)(params, x)
    assert_trees_close(acc.finalize(merged), expected)


@pytest.mark.parametrize(
    "batch", [[torch.ones(2, 3)] * 2, [{"x": torch.ones(2, 3)}] * 2, (torch.ones(2, 3),)], ids=type
)
def test_several_micro_batches_in_one_update(batch):
    acc = gradacc.accumulator(lambda w, x: (x @ w).mean())
    w = torch.ones(3)
    with pytest.raises(TypeError) as caught:
        acc.update(acc.init(w), w, batch)
    (note,) = caught.value.__notes__
    assert f"args[1] is a {type(batch).__name__}" in note
    assert "one micro-batch; call update for each of several" in note
