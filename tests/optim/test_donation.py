"""What is donated: memory that tensors share is written once, and what was given away cannot be used."""

import numpy as np
import optree
import pytest
import torch
from torch import nn

import gradacc
from gradacc import TrainState, optim, train_step
from tests.helpers import NAMESPACE, assert_trees_close, assert_trees_equal, fingerprint
from tests.optim.cases import compiled, leaves_of


class Descent:
    """A gradient transformation that updates its state in place."""

    def init(self, params):
        return optree.tree_map(torch.zeros_like, params, namespace=NAMESPACE)

    def update(self, updates, state, *, params=None, inplace=True):
        change = torch.Tensor.add_ if inplace else torch.add
        state = {name: change(state[name], grad) for name, grad in updates.items()}
        return {name: -0.1 * mean for name, mean in state.items()}, state


def _groups(inner):
    return optim.by_path(inner(), (lambda path, leaf: path not in ("params['a']", "params['bias']"), inner()))


OPTIMIZERS = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9, weight_decay=0.5, nesterov=True),
    "adamw": lambda: optim.adamw(0.1, weight_decay=0.5),
    "RMSprop": lambda: optim.from_torch(torch.optim.RMSprop, lr=0.1, momentum=0.9),
    "SGD nesterov foreach": lambda: optim.from_torch(
        torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True, foreach=True
    ),
    "from_torchopt": lambda: optim.from_torchopt(Descent()),
    "clipped": lambda: optim.clip_by_global_norm(optim.sgd(0.1, momentum=0.9), 0.5),
    "skipping": lambda: optim.skip_nonfinite(optim.adamw(0.1)),
    "skipping spikes": lambda: optim.skip_spikes(optim.clip_by_global_norm(optim.adamw(0.1), 0.5)),
    "groups": lambda: _groups(lambda: optim.adamw(0.1)),
    "groups of torch": lambda: _groups(lambda: optim.from_torch(torch.optim.Adam, lr=0.1)),
    "scaled": lambda: optim.dynamic_loss_scale(optim.sgd(0.1, momentum=0.9), init_scale=4.0),
    "all": lambda: optim.dynamic_loss_scale(optim.clip_by_global_norm(_groups(lambda: optim.adamw(0.1)), 0.5)),
}


def _twice_from_numpy():
    """Two storages over one memory."""
    numbers = np.arange(1.0, 4.0, dtype=np.float32)
    return torch.from_numpy(numbers)[:2], torch.from_numpy(numbers)[1:]


def _floats(n=3):
    return torch.arange(1.0, n + 1)


def _matrix():
    return _floats(12).view(4, 3)


OVERLAPS = {
    "partly": lambda: (lambda f: (f[:2], f[1:]))(_floats()),
    "partly, the later one first": lambda: (lambda f: (f[1:], f[:2]))(_floats()),
    "whole and part": lambda: (lambda f: (f, f[2:]))(_floats()),
    "part and whole": lambda: (lambda f: (f[1:2], f))(_floats()),
    "one tensor": lambda: (lambda f: (f, f))(_floats()),
    "a column and the matrix": lambda: (lambda m: (m[:, 1], m))(_matrix()),
    "a row and a column": lambda: (lambda m: (m[2], m[:, 2]))(_matrix()),
    "rows that overlap, transposed": lambda: (lambda m: (m[:3].t(), m[1:].t()))(_matrix()),
    "two columns": lambda: (lambda m: (m[:, 0], m[:, 2]))(_matrix()),
    "every second element": lambda: (lambda f: (f[::2], f[1::2]))(_floats(6)),
    "a window": lambda: (_floats(4).unfold(0, 2, 1), _floats(1)),
    "an expanded number": lambda: (_floats(1).expand(3), _floats(1)),
    "two storages": _twice_from_numpy,
}


def _copied(tree):
    return optree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree, namespace=NAMESPACE
    )


def _begun(optimizer, params):
    """A state in the middle of a run, and gradients of no small norm."""
    params = _copied(params)
    grads = optree.tree_map(lambda leaf: 3.0 + leaf.cos(), params, namespace=NAMESPACE)
    _, state = optimizer.step(params, grads, optimizer.init(params))
    return grads, state


@pytest.mark.parametrize("pair", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_that_share_memory_are_updated_once(make, pair):
    """As the step that is given nothing updates them: each view from its own numbers."""
    optimizer, (a, b) = make(), pair()
    params = {"a": a, "b": b, "c": torch.ones(2)}
    grads, state = _begun(optimizer, params)
    expected = optimizer.step(params, grads, state)
    assert_trees_equal(optimizer.step(params, _copied(grads), _copied(state), donate=True), expected)


@pytest.mark.parametrize("pair", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_that_share_memory_are_changed_once(make, pair):
    """Clipped, decayed, unscaled."""
    optimizer, (a, b) = make(), pair()
    grads = {"a": a, "b": b, "c": torch.ones(2)}
    params = _copied(grads)
    _, state = _begun(optimizer, params)
    expected = optimizer.step(params, grads, state)
    assert_trees_equal(optimizer.step(params, grads, _copied(state), donate=True), expected)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_everything_in_one_memory(make, shift):
    """Parameters, gradients and the floats of a state begin ``shift`` elements apart, where each has three."""
    optimizer = make()
    params = {"a": torch.ones(3), "b": torch.ones(3)}
    _, state = _begun(optimizer, params)
    leaves, treedef = optree.tree_flatten((params, params, state), namespace=NAMESPACE)
    memory = torch.linspace(1.0, 2.0, shift * len(leaves) + 3)

    def given():
        own = memory.clone()
        return optree.tree_unflatten(
            treedef,
            [
                own[shift * i : shift * i + 3] if leaf.shape == (3,) and leaf.is_floating_point() else leaf.clone()
                for i, leaf in enumerate(leaves)
            ],
        )

    expected = optimizer.step(*given())
    assert_trees_equal(optimizer.step(*given(), donate=True), expected)


def test_views_that_only_touch_are_updated_where_they_are():
    """Of one flat tensor, as a module's parameters may be; transposed ones and slices of columns too."""
    flat, matrix = torch.ones(9), torch.ones(4, 3)
    params = {"a": flat[:2], "b": flat[2:8].view(3, 2).t(), "c": flat[8], "empty": flat[4:4], "column": matrix[:, 1]}
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["RMSprop"], OPTIMIZERS["from_torchopt"], OPTIMIZERS["groups"]):
        optimizer = make()
        grads, state = _begun(optimizer, params)
        held = [leaf.data_ptr() for leaf in leaves_of(params)]
        params, _ = optimizer.step(params, grads, state, donate=True)
        assert [leaf.data_ptr() for leaf in leaves_of(params)] == held
        assert_trees_equal(flat[:2], params["a"])


GONE = (
    r"^this tensor was given away to [a-z_.]*step \(donate=True\).*Use what that call returned.*clone\(\) beforehand$"
)
USES = {
    "an operation": lambda leaf: leaf + 1,
    "in place": lambda leaf: leaf.zero_(),
    "as another one's": lambda leaf: torch.ones(()).lerp(leaf, 0.1),
    "in a list": lambda leaf: torch._foreach_add([leaf], 1),
    "its shape": lambda leaf: leaf.shape,
    "its numbers": lambda leaf: leaf.tolist(),
    "NumPy": np.asarray,
    "a copy": lambda leaf: leaf.clone(),
    "a view": lambda leaf: leaf.detach(),
    "a Parameter": nn.Parameter,
}


@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["taken", "not finite"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_was_given_away_cannot_be_used(make, value):
    """Nor given again; and nothing that was returned is harmed."""
    optimizer = make()
    params = {"a": torch.ones(2, 2), "b": torch.ones(()), "c": torch.ones(0), "d": torch.ones(2, requires_grad=True)}
    grads, state = _begun(optimizer, params)
    grads["a"][1, 1] = value
    grads = {name: grad.detach() for name, grad in grads.items()}
    given = leaves_of((params, grads, state))
    new = optimizer.step(params, grads, state, donate=True)
    before = _copied(new)
    assert {id(leaf) for leaf in leaves_of(new)}.isdisjoint(map(id, given))
    for leaf in given:
        for use in USES.values():
            with pytest.raises(ValueError, match=GONE):
                use(leaf)
        assert "was given away to" in repr(leaf)
    for args in ((params, new[0], new[1]), (new[0], grads, new[1]), (new[0], new[0], state)):
        with pytest.raises(ValueError, match=GONE):
            optimizer.step(*args, donate=True)
    assert_trees_equal(new, before)


def test_a_tensor_that_was_given_away_holds_no_memory():
    params, optimizer = {"w": torch.ones(1000)}, optim.sgd(0.1)
    held, where = params["w"], params["w"].untyped_storage()._cdata
    new, _ = optimizer.step(params, {"w": torch.ones(1000)}, optimizer.init(params), donate=True)
    with torch._C.DisableTorchFunctionSubclass():
        assert held.untyped_storage().nbytes() == 0
    assert new["w"].untyped_storage()._cdata == where


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_modules_own_parameters_are_trained_in_place(make):
    """Whether `functional` returned their memory or they are given themselves: the module goes on, the dict does not."""
    module, optimizer = nn.Linear(2, 2), make()
    _, params, _ = gradacc.functional(module)
    grads, state = _begun(optimizer, params)
    new, state = optimizer.step(params, grads, state, donate=True)
    assert_trees_equal(new, dict(module.named_parameters()))
    with pytest.raises(ValueError, match=GONE):
        params["weight"].sum()
    own = dict(module.named_parameters())
    new, _ = optimizer.step(own, {name: torch.ones_like(leaf) for name, leaf in own.items()}, state, donate=True)
    assert_trees_equal(new, dict(module.named_parameters()))
    assert module(torch.ones(1, 2)).isfinite().all()


def _loss(params, batch):
    return (batch @ params["w"] - 1).square().mean()


GRAD_FN = gradacc.accumulate_and_value(_loss, steps=2)
BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def _start(optimizer):
    params = {"w": torch.linspace(0, 1, 3)}
    return TrainState(params, optimizer.init(params))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_average_of_parameters(make):
    """One that is the first step's dict, or holds its tensors, is an error; a clone is what it is without donation."""

    def averaged(donate, begin):
        optimizer = make()
        step, state = train_step(_grad_fn(optimizer), optimizer, donate=donate), _start(optimizer)
        average = begin(state.params)
        for _ in range(3):
            state, _ = step(state, BATCH)
            average = {name: leaf.lerp(state.params[name], 0.1) for name, leaf in average.items()}
        return average, state.params

    def cloned(params):
        return {name: leaf.clone() for name, leaf in params.items()}

    assert_trees_equal(averaged(True, cloned), averaged(False, cloned))
    for begin in (lambda params: params, dict):
        with pytest.raises(ValueError, match=GONE):
            averaged(True, begin)


def _grad_fn(optimizer):
    scaled = hasattr(optimizer.init({"w": torch.ones(3)}), "scale")
    return gradacc.accumulate_and_value(optim.scaled_loss(_loss), steps=2) if scaled else GRAD_FN


def test_a_state_is_given_away_once():
    optimizer = optim.adamw(0.1)
    step, state = train_step(GRAD_FN, optimizer, donate=True), _start(optimizer)
    after, _ = step(state, BATCH)
    before = fingerprint(after)
    for again in (state, after._replace(params=state.params), after._replace(opt_state=state.opt_state)):
        with pytest.raises(ValueError, match=GONE):
            step(again, BATCH)
    assert fingerprint(after) == before


OWN = {
    "in place": lambda params, grads, state, *, donate=False: (
        {name: leaf.sub_(grads[name]) if donate else leaf - grads[name] for name, leaf in params.items()},
        state,
    ),
    "not at all": lambda params, grads, state, *, donate=False: (params, state),
}


@pytest.mark.parametrize(
    "wrap", [lambda own: own, lambda own: optim.clip_by_global_norm(own, 1e6), optim.skip_nonfinite]
)
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_an_optimizer_of_ones_own(own, wrap):
    """That returns the tensors that it was given: they are other objects behind the step."""
    optimizer = wrap(optim.Optimizer(lambda params: {"kept": torch.ones(2)}, own))
    step, state = train_step(GRAD_FN, optimizer, donate=True), _start(optimizer)
    expected = _copied(train_step(GRAD_FN, optimizer)(state, BATCH)[0])
    given = leaves_of((state.params, state.opt_state))
    after, _ = step(state, BATCH)
    assert_trees_equal(after, expected)
    for leaf in given:
        with pytest.raises(ValueError, match="was given away to .*step"):
            leaf.sum()
    assert_trees_close(step(after, BATCH)[0].opt_state, expected.opt_state)


def test_aux_that_is_a_parameter_is_the_one_before_the_step():
    """Of a grad_fn that hands tensors through; and so its gradients and its value."""

    def grad_fn(params, batch):
        grads = {"w": torch.ones(3), "b": torch.ones(())}
        return grads, (params["b"], {"w": params["w"], "tail": params["w"][1:], "grads": grads, "name": "run"})

    params = {"w": torch.linspace(0, 1, 3), "b": torch.tensor(2.0)}
    optimizer = optim.sgd(1.0, weight_decay=0.5)
    _, expected = train_step(grad_fn, optimizer)(TrainState(params, optimizer.init(params)), None)
    expected = (
        _copied({name: value for name, value in expected.items() if name != "aux"}),
        _copied(expected["aux"] | {"name": torch.zeros(())}),
    )
    _, metrics = train_step(grad_fn, optimizer, donate=True)(TrainState(params, optimizer.init(params)), None)
    assert metrics["aux"].pop("name") == "run"
    aux = metrics.pop("aux")
    assert_trees_equal((metrics, aux | {"name": torch.zeros(())}), expected)


@pytest.mark.parametrize("donate", [False, True])
def test_nothing_is_lost_in_a_step_that_raises(donate):
    def broken(params, batch):
        raise RuntimeError("the loss broke")

    optimizer = optim.adamw(0.1)
    state = _start(optimizer)
    before = fingerprint(state)
    bad = state._replace(step="three")
    no_grads = lambda params, batch: ({"w": torch.ones(2)}, torch.zeros(()))  # noqa: E731
    for grad_fn, start, error in (
        (broken, state, RuntimeError),
        (no_grads, state, ValueError),
        (GRAD_FN, bad, TypeError),
        (GRAD_FN, state._replace(opt_state=()), TypeError),
    ):
        with pytest.raises(error):
            train_step(grad_fn, optimizer, donate=donate)(start, BATCH)
        assert fingerprint(state) == before


def test_a_graph_that_is_waiting_for_its_backward_pass_is_not_given_other_numbers():
    optimizer, params = optim.sgd(0.1), {"w": torch.ones(3)}
    held = {"w": params["w"].detach().requires_grad_()}
    waiting = _loss(held, BATCH) + held["w"].pow(3).sum()
    for _ in range(2):
        params, _ = optimizer.step(params, {"w": torch.ones(3)}, optimizer.init(params), donate=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            waiting.backward(retain_graph=True)


def test_nothing_is_given_away_where_nothing_is_written_in_place():
    """Under vmap, while Dynamo traces, and where the step is differentiated."""
    optimizer = optim.adamw(0.1)
    step, state = train_step(GRAD_FN, optimizer, donate=True), _start(optimizer)
    state = state._replace(step=torch.zeros((), dtype=torch.int64))
    before = fingerprint(state)
    expected, _ = train_step(GRAD_FN, optimizer)(state, BATCH)
    stacked = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), state, namespace=NAMESPACE)
    together, _ = torch.vmap(step, in_dims=(0, None))(stacked, BATCH)
    assert_trees_close(optree.tree_map(lambda leaf: leaf[1], together, namespace=NAMESPACE), expected, rtol=1e-5)
    assert_trees_close(compiled(step)(state, BATCH)[0], expected, rtol=1e-5)
    grads = {"w": torch.ones(3, requires_grad=True)}
    new, _ = optimizer.step(state.params, grads, state.opt_state, donate=True)
    new["w"].sum().backward()
    assert fingerprint(state) == before
    assert grads["w"].grad.isfinite().all()


@pytest.mark.parametrize("around", ["clip", "skip", "spikes", "groups", "scale"])
def test_nothing_is_given_away_where_an_optimizer_inside_is_differentiated(around):
    """By its learning rate: the graph is of what was given."""
    rate = torch.tensor(0.5, requires_grad=True)
    inner = optim.sgd(rate, weight_decay=1.0)
    optimizer = {
        "clip": lambda: optim.clip_by_global_norm(inner, 1e6),
        "skip": lambda: optim.skip_nonfinite(inner),
        "spikes": lambda: optim.skip_spikes(inner),
        "groups": lambda: optim.by_path(inner),
        "scale": lambda: optim.dynamic_loss_scale(inner, init_scale=1.0),
    }[around]()
    params, grads = {"w": torch.full((3,), 2.0)}, {"w": torch.ones(3)}
    new, _ = optimizer.step(params, grads, optimizer.init(params), donate=True)
    new["w"].sum().backward()
    assert_trees_close((rate.grad, params["w"]), (torch.tensor(-9.0), torch.full((3,), 2.0)))


def test_a_compiled_step_refuses_what_was_given_away():
    optimizer = optim.sgd(0.1)
    traced = compiled(train_step(GRAD_FN, optimizer, donate=True))
    state = _start(optimizer)._replace(step=torch.zeros((), dtype=torch.int64))
    traced(state, BATCH)
    train_step(GRAD_FN, optimizer, donate=True)(state, BATCH)
    with pytest.raises(Exception, match="was given away to sgd.step"):
        traced(state, BATCH)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_under_inference_mode(make):
    optimizer = make()
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    grads, state = _begun(optimizer, params)
    expected = optimizer.step(params, grads, state)
    with torch.inference_mode():
        new = optimizer.step(params, grads, state, donate=True)
    assert_trees_equal(new, expected)
    with pytest.raises(ValueError, match=GONE):
        params["a"].sum()


@pytest.mark.parametrize(
    "make", [lambda: optim.sgd(0.1, momentum=0.9), lambda: optim.adam(0.1), lambda: optim.adamw(0.1)]
)
@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.complex(torch.zeros(4), torch.ones(4)).conj().imag,
        lambda: torch.complex(torch.zeros(4), torch.ones(4)).conj(),
    ],
    ids=["negative", "conjugate"],
)
def test_a_parameter_that_its_memory_holds_otherwise(make, view):
    """Its memory holds the negative or the conjugate, which list kernels cannot write."""
    updated = []
    for params in ({"a": view(), "b": torch.ones(4)}, {"a": view().resolve_conj().resolve_neg(), "b": torch.ones(4)}):
        optimizer = make()
        grads = {"a": torch.ones_like(params["a"]), "b": torch.ones(4)}
        updated.append(optimizer.step(params, grads, optimizer.init(params), donate=True)[0])
    torch.testing.assert_close(updated[0], updated[1])
