"""clip_by_global_norm, skip_nonfinite and by_path, against the imperative loops that they replace."""

import math

import optree
import pytest
import torch

from gradacc import optim
from tests.helpers import assert_trees_close, assert_trees_equal, fingerprint
from tests.optim.cases import NAMESPACE, assert_same, compiled, gradients, leaves_of, parameters, trajectory

INNER = {
    "sgd": (lambda: optim.sgd(0.1, momentum=0.9), torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "adamw": (lambda: optim.adamw(0.1), torch.optim.AdamW, dict(lr=0.1, foreach=False)),
    "from_torch": (
        lambda: optim.from_torch(torch.optim.RMSprop, lr=0.1),
        torch.optim.RMSprop,
        dict(lr=0.1),
    ),
}


def _loop(cls, options, params, many, prepare):
    """Torch's own loop; `prepare(leaves)` between backward and step says whether to step."""
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    optimizer = cls(leaves, **options)
    out = []
    for grads in many:
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad.clone()
        if prepare(leaves):
            optimizer.step()
        out.append([leaf.clone() for leaf in leaves])
    return out


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, math.inf, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize(("inner", "cls", "options"), INNER.values(), ids=INNER)
def test_clipping_is_torchs_to_the_last_bit(inner, cls, options, max_norm, donate):
    params = parameters()
    many = [gradients(params) for _ in range(4)]
    optimizer = optim.clip_by_global_norm(inner(), max_norm)
    out, _ = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )

    def clip(leaves):
        torch.nn.utils.clip_grad_norm_(leaves, float(max_norm))
        return True

    assert_same(out, _loop(cls, options, params, many, clip))


@pytest.mark.parametrize("shape", [(3,), ()])
def test_clipping_of_several_dtypes_is_torchs(shape):
    params = [
        torch.randn(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    ]
    many = [gradients(params)]
    optimizer = optim.clip_by_global_norm(optim.sgd(0.1), 0.5)
    out, _ = trajectory(optimizer.step, params, many, optimizer.init(params))
    clip = lambda leaves: torch.nn.utils.clip_grad_norm_(leaves, 0.5) > 0  # noqa: E731
    assert_same(out, _loop(torch.optim.SGD, {"lr": 0.1, "foreach": False}, params, many, clip))


def _chain(lr=0.1):
    return optim.skip_nonfinite(optim.clip_by_global_norm(optim.adamw(lr), 0.5))


def _broken(params, value):
    grads = gradients(params)
    grads["w"][1, 2] = value
    return grads


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("inner", "cls", "options"), INNER.values(), ids=INNER)
def test_steps_with_a_nonfinite_gradient_are_skipped_and_counted(inner, cls, options, value, donate):
    params = parameters()
    many = [gradients(params), _broken(params, value), gradients(params), _broken(params, value), gradients(params)]
    optimizer = optim.skip_nonfinite(inner())
    out, state = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )

    def finite(leaves):
        return all(leaf.grad.isfinite().all() for leaf in leaves)

    assert_same(out, _loop(cls, options, params, many, finite))
    assert (state.skipped, state.inner.step) == (2, 3)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 3e38), (torch.float16, 65504), (torch.bfloat16, 3e38), (torch.complex64, 3e38)],
    ids=str,
)
def test_large_gradients_are_finite(dtype, largest):
    params = {"w": torch.zeros(4, dtype=dtype)}
    optimizer = optim.skip_nonfinite(optim.sgd(1e-6))
    _, state = optimizer.step(params, {"w": torch.full((4,), largest, dtype=dtype)}, optimizer.init(params))
    assert state.skipped == 0


def test_a_skipped_step_returns_memory_of_its_own():
    params = parameters()
    optimizer = _chain()
    state = optimizer.init(params)
    before = fingerprint((params, state))
    new, moved = optimizer.step(params, _broken(params, math.nan), state)
    assert_trees_equal((new, moved.inner), (params, state.inner))
    optimizer.step(new, gradients(params), moved, donate=True)
    assert fingerprint((params, state)) == before


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [(), optim.sgd(0.1).init(torch.ones(2)), optim.adam().init(torch.ones(3))],
    ids=["nothing", "another rule's", "of other shapes"],
)
@pytest.mark.parametrize("wrap", [optim.skip_nonfinite, optim.skip_spikes, optim.dynamic_loss_scale])
def test_the_inner_state_of_a_step_that_is_skipped(wrap, wrong, donate):
    """It is checked now, not when the first step is taken."""
    optimizer = wrap(optim.adam(0.1))
    params, grads = torch.ones(2), torch.tensor([1.0, math.inf])
    state = optimizer.init(params)._replace(inner=wrong)
    before = fingerprint((params, grads, state))
    with pytest.raises((TypeError, ValueError), match="adam: state"):
        optimizer.step(params, grads, state, donate=donate)
    assert fingerprint((params, grads, state)) == before


def test_all_states_are_looked_at_before_the_first_optimizer_begins():
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    grads = {"w": torch.ones(2), "b": torch.ones(1)}
    optimizer = optim.by_path(optim.sgd(0.1), (lambda path, _: path == "params['w']", _chain()))
    state = optimizer.init(params)
    (plain, chain) = state.inner
    for wrong in (chain._replace(skipped=1), chain._replace(inner=())):
        before = fingerprint((params, grads))
        with pytest.raises(TypeError, match="state"):
            optimizer.step(params, grads, state._replace(inner=(plain, wrong)), donate=True)
        assert fingerprint((params, grads)) == before


def test_under_vmap_each_member_skips_and_clips_for_itself():
    rates = torch.tensor([0.1, 0.2, 0.3])
    params = torch.randn(3, 4)
    grads = torch.randn(3, 4)
    grads[1, 2] = math.nan

    def step(lr, p, g):
        optimizer = _chain(lr)
        return optimizer.step(p, g, optimizer.init(p))

    new, state = torch.vmap(step)(rates, params, grads)
    assert state.skipped.tolist() == [0, 1, 0]
    assert state.inner.step.tolist() == [1, 0, 1]
    for member in range(3):
        alone, _ = step(rates[member].item(), params[member], grads[member])
        assert_trees_close(new[member], alone, rtol=1e-6, atol=1e-7)


def test_under_compile():
    params = {"w": torch.randn(3, 5), "b": torch.randn(5)}
    many = [gradients(params), _broken(params, math.nan), gradients(params)]
    optimizer = optim.by_path(_chain(), (lambda path, leaf: leaf.ndim < 2, _chain(0.2)))
    expected, last = trajectory(optimizer.step, params, many, optimizer.init(params))
    out, state = trajectory(compiled(optimizer.step), params, many, optimizer.init(params))
    assert_same(out, expected, rtol=1e-6, atol=1e-6)
    assert_trees_close(state, last, rtol=1e-6, atol=1e-7)


def test_derivatives_go_through_the_norm():
    def clipped(grads):
        optimizer = optim.clip_by_global_norm(optim.sgd(1.0), 1.0)
        params = torch.zeros(3, dtype=torch.float64)
        return optimizer.step(params, grads, optimizer.init(params))[0]

    def formula(grads):
        return -grads / (grads.norm() + 1e-6)

    grads = torch.randn(3, dtype=torch.float64) + 3
    assert_trees_close(torch.func.jacrev(clipped)(grads), torch.func.jacrev(formula)(grads))


def _is_vector(path, leaf):
    return leaf.ndim < 2


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_parameter_groups_are_torchs(donate):
    params = parameters()
    many = [gradients(params) for _ in range(4)]
    seen = []

    def is_deep(path, leaf):
        seen.append(path)
        return "['deep']" in path and leaf.ndim == 1

    optimizer = optim.by_path(
        optim.adamw(0.1), (is_deep, optim.adamw(0.1, weight_decay=0.0)), (_is_vector, optim.sgd(1.0))
    )
    out, state = trajectory(
        lambda *args: optimizer.step(*args, donate=donate), params, many, optimizer.init(params), copied=True
    )
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    vector, number, empty, matrix, other = leaves
    theirs = torch.optim.AdamW(
        [{"params": [empty, matrix, other]}, {"params": [vector], "weight_decay": 0.0}], lr=0.1, foreach=False
    )
    second = torch.optim.SGD([number], lr=1.0)
    for mine, grads in zip(out, many, strict=True):
        for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
            leaf.grad = grad.clone()
        theirs.step()
        second.step()
        assert_same([mine], [leaves])
    assert seen[:2] == ["params['deep'][0]", "params['deep'][1][0]"]
    assert [sorted(inner.exp_avg) for inner in state.inner[:2]] == [
        ["params['deep'][1][1]", "params['t']", "params['w']"],
        ["params['deep'][0]"],
    ]


def test_a_default_may_be_left_without_parameters():
    params = {"b": torch.ones(2)}
    optimizer = optim.by_path(optim.adamw(0.1), (_is_vector, optim.sgd(1.0)))
    new, state = optimizer.step(params, params, optimizer.init(params))
    assert_trees_equal(new, {"b": torch.zeros(2)})
    assert state.inner[0] == ()


def test_wrappers_nest():
    """clip within a group sees that group alone; around the whole, everything."""
    params = {"w": torch.zeros(1, 1), "b": torch.zeros(1)}
    grads = {"w": torch.tensor([[30.0]]), "b": torch.tensor([40.0])}
    alone = optim.by_path(optim.sgd(1.0), (_is_vector, optim.clip_by_global_norm(optim.sgd(1.0), 1.0)))
    whole = optim.clip_by_global_norm(optim.by_path(optim.sgd(1.0), (_is_vector, optim.sgd(1.0))), 1.0)
    assert_trees_close(
        alone.step(params, grads, alone.init(params))[0],
        {"w": torch.tensor([[-30.0]]), "b": torch.tensor([-1.0])},
        rtol=1e-6,
    )
    assert_trees_close(
        whole.step(params, grads, whole.init(params))[0],
        {"w": torch.tensor([[-0.6]]), "b": torch.tensor([-0.8])},
        rtol=1e-6,
    )


REFUSED = {
    "class": (lambda: optim.skip_nonfinite(optim.sgd), TypeError, "skip_nonfinite: the optimizer must be a gradacc"),
    "torch's": (
        lambda: optim.clip_by_global_norm(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1.0),
        TypeError,
        r"gradacc.optim.from_torch\(torch.optim.SGD, \*\*options\) makes one",
    ),
    "negative norm": (lambda: optim.clip_by_global_norm(optim.sgd(1), -1.0), ValueError, "max_norm must be finite"),
    "NaN norm": (lambda: optim.clip_by_global_norm(optim.sgd(1), math.nan), ValueError, "max_norm must be finite"),
    "norm None": (
        lambda: optim.clip_by_global_norm(optim.sgd(1), None),
        TypeError,
        "max_norm must be a number, got None",
    ),
    "no pair": (lambda: optim.by_path(optim.sgd(1), optim.sgd(1)), TypeError, r"rules\[0\] must be a pair"),
    "no optimizer": (
        lambda: optim.by_path(optim.sgd(1), (_is_vector, 1)),
        TypeError,
        r"rules\[0\]\[1\] must be a grad",
    ),
    "default": (lambda: optim.by_path(_is_vector), TypeError, "by_path: the optimizer must be"),
    "no bool": (
        lambda: optim.by_path(optim.sgd(1), (lambda path, leaf: None, optim.sgd(1))).init(parameters()),
        TypeError,
        r"the predicate of rules\[0\] returned None for params\['deep'\]\[0\]",
    ),
    "no leaf": (
        lambda: optim.by_path(optim.sgd(1), (lambda path, leaf: "bais" in path, optim.sgd(1))).init(parameters()),
        ValueError,
        r"rules\[0\] takes none of the 5 parameters \(params\['deep'\]\[0\],",
    ),
    "other rules": (
        lambda: optim.by_path(optim.sgd(1), (_is_vector, optim.sgd(1))).step(
            parameters(), parameters(), optim.by_path(optim.sgd(1)).init(parameters())
        ),
        ValueError,
        "state is of 1 optimizers, not of these 2",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_wrapped_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


SHARING = {
    "clip": lambda: optim.clip_by_global_norm(optim.sgd(0.1), 0.5),
    "by_path": lambda: optim.by_path(optim.sgd(0.1), (lambda path, leaf: "'b'" in path, optim.adam(0.1))),
}


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_memory_that_is_shared_is_not_donated_twice(make):
    """Tied parameters, of two groups; gradients that are the parameters."""
    shared = torch.randn(4)
    tied = {"a": shared, "b": shared, "c": torch.randn(4)}
    for grads in (gradients(tied), tied):
        params, slopes = optree.tree_map(torch.clone, (tied, grads), namespace=NAMESPACE)
        optimizer = make()
        expected, _ = optimizer.step(params, slopes, optimizer.init(params))
        one = shared.clone()
        params = {"a": one, "b": one, "c": params["c"]}
        slopes = params if grads is tied else slopes
        new, _ = optimizer.step(params, slopes, optimizer.init(tied), donate=True)
        assert_trees_equal(new, expected)


WRAPPED = {
    "clip": lambda: optim.clip_by_global_norm(optim.adam(0.1), 1.0),
    "skip": lambda: optim.skip_nonfinite(optim.adam(0.1)),
    "by_path": lambda: optim.by_path(optim.adam(0.1), (_is_vector, optim.sgd(0.1))),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_step_changes_nothing(make):
    params = parameters()
    optimizer = make()
    state = optimizer.init(params)
    grads = gradients(params)
    before = fingerprint((params, grads, state))
    new = optimizer.step(params, grads, state)
    assert fingerprint((params, grads, state)) == before
    assert optree.tree_structure(new, namespace=NAMESPACE) == optree.tree_structure(
        (params, state), namespace=NAMESPACE
    )
