"""Plain autograd through ``grad_fn``: as through `torch.func.grad`, or an error; nothing is a constant without a word."""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradacc
from gradacc import Mean, TrainState, train_step
from tests.helpers import assert_trees_close, assert_trees_equal, large
from tests.workers import Failed

D = torch.float64
X = torch.arange(14, dtype=D).view(7, 2).sin()
W = torch.tensor([0.3, -0.7], dtype=D)


def mean(w, x):
    return torch.tanh(x @ w).square().mean()


def tokens(w, x):
    return Mean((torch.tanh(x @ w) * (x[:, 0] > 0)).sum(), (x[:, 0] > 0).sum())


def penalty(w, x):
    """Of the gradient with respect to the examples."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(x @ w).sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


def ours(loss: Callable[..., Any]) -> Callable[..., Tensor]:
    return gradacc.accumulate(loss, steps=3)


def theirs(loss: Callable[..., Any]) -> Callable[..., Tensor]:
    return torch.func.grad(large(loss))


def leaf(tensor: Tensor = W) -> Tensor:
    return tensor.clone().requires_grad_()


def maml(make, loss):
    """The gradient of the loss after two inner steps, and its own gradient."""
    w, grad_fn = leaf(), make(loss)
    adapted = w - 0.1 * grad_fn(w, X)
    adapted = adapted - 0.1 * grad_fn(adapted, X)
    (first,) = torch.autograd.grad(mean(adapted, X), w, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), w)


def backward(make, loss):
    """``.backward()``, after one step."""
    w = leaf()
    mean(w - 0.1 * make(loss)(w, X), X).backward()
    return w.grad


def through_the_batch(make, loss):
    x = leaf(X)
    return torch.autograd.grad(make(loss)(W, x).square().sum(), x)


def a_batch_of_the_parameters(make, loss):
    """Derivatives with respect to one argument that another is computed from are not counted twice."""
    w = leaf()
    return torch.autograd.grad(make(loss)(w, X * w).square().sum(), w)


def jacobian(make, loss):
    return torch.autograd.functional.jacobian(lambda w: make(loss)(w, X), W)


def hessian(make, loss, vectorize=False):
    return torch.autograd.functional.hessian(lambda w: make(loss)(w, X).square().sum(), W, vectorize=vectorize)


def vectorized(make, loss):
    return hessian(make, loss, vectorize=True)


def hyperparameters(make, loss):
    """Closed over: a leaf, and what is computed from one; the parameters depend on it, too."""
    w, rate = leaf(), leaf(torch.tensor(0.2, dtype=D))
    scale = rate.exp()
    grad_fn = make(lambda w, x: _times(loss(w * scale, x), rate))
    adapted = w - rate * grad_fn(w, X)
    first = torch.autograd.grad(mean(adapted - grad_fn(adapted, X * rate), X), [w, rate], create_graph=True)
    return first, torch.autograd.grad(sum(grad.square().sum() for grad in first), [w, rate])


def _times(value, factor):
    return Mean(value.total * factor, value.weight) if isinstance(value, Mean) else value * factor


def an_argument_closed_over(make, loss):
    """A pull towards the parameters that the call is given: its derivative has both parts."""
    w = leaf()
    grad_fn = make(lambda v, x: _plus(loss(v, x), ((v - w) ** 3 + v * w.sin()).sum()))
    return torch.autograd.grad(grad_fn(w, X).square().sum(), w)


def _plus(value, number):
    return Mean(value.total + number * value.weight, value.weight) if isinstance(value, Mean) else value + number


def in_a_thread(make, loss):
    """A context variable does not say in there that a loss is running; that its parameters require grad does."""
    if make is theirs:
        return torch.func.grad(lambda w: make(loss)(w, X).square().sum())(W)

    def outer(w, x):
        found = []
        thread = threading.Thread(target=lambda: found.append(make(loss)(w, x).square().sum()))
        thread.start()
        thread.join()
        return found[0]

    return gradacc.accumulate(outer, steps=1)(W, X)


THROUGH = [
    maml,
    backward,
    through_the_batch,
    a_batch_of_the_parameters,
    jacobian,
    hessian,
    vectorized,
    hyperparameters,
    an_argument_closed_over,
    in_a_thread,
]


@pytest.mark.parametrize("loss", [mean, tokens])
@pytest.mark.parametrize("derivative", THROUGH)
def test_equal_to_torch_func(derivative, loss):
    assert_trees_close(derivative(ours, loss), derivative(theirs, loss))


def test_numerically():
    """First and second derivatives against finite differences; of values and aux, too."""

    def loss(p, x):
        return mean(p["a"] * p["b"], x), {"each": x @ p["a"], "sum": Mean((x @ p["b"]).sum(), len(x))}

    def call(a, b, x):
        grads, (value, aux) = gradacc.accumulate_and_value(loss, steps=3, has_aux=True)({"a": a, "b": b}, x)
        return grads["a"], grads["b"], value, aux["each"], aux["sum"].total

    arguments = leaf(), leaf(W.cos()), leaf(X)
    assert torch.autograd.gradcheck(call, arguments, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("way", ["list", "split", "microbatch_size"])
def test_all_ways_to_split(way):
    w = leaf()
    grads = {
        "list": lambda: gradacc.accumulate(mean)(w, [X[:3], X[3:]]),
        "split": lambda: gradacc.accumulate(mean, split=lambda x: (x[i : i + 2] for i in range(0, 7, 2)))(w, X),
        "microbatch_size": lambda: gradacc.accumulate(mean, microbatch_size=3)(w, X),
    }[way]()
    expected = torch.autograd.grad(theirs(mean)(w, X).sum(), w)
    assert_trees_close(torch.autograd.grad(grads.sum(), w), expected)


class TestDetached:
    """Nothing requires grad, or nobody asks: plain tensors."""

    def is_detached(self, *results: Tensor) -> bool:
        return not any(result.requires_grad or result.grad_fn is not None for result in results)

    def test_where_no_argument_requires_grad(self):
        assert self.is_detached(*gradacc.accumulate_and_value(mean, steps=3)(W, X))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_where_grad_mode_is_disabled(self, mode):
        with mode():
            results = gradacc.accumulate_and_value(mean, steps=3)(leaf(), leaf(X))
        assert self.is_detached(*results)

    def test_parameters_of_a_module_that_is_used_and_not_trained(self):
        teacher = nn.Linear(2, 2).double()
        assert self.is_detached(*gradacc.accumulate_and_value(lambda w, x: mean(w, teacher(x)), steps=3)(W, X))

    def test_leaves_that_the_loss_makes_itself(self):
        grads, value = gradacc.accumulate_and_value(penalty, steps=3)(W, X)
        assert self.is_detached(grads, value)

        def by_hand(w, x):
            return ((1 - torch.tanh(x @ w).square()).square() * w.square().sum()).mean()

        assert_trees_close((grads, value), torch.func.grad_and_value(by_hand)(W, X))

    def test_a_state_of_such_a_loss(self):
        init, update, _, finalize = gradacc.accumulator(penalty)
        state = copy.deepcopy(update(update(init(W), W, X[:3]), W, X[3:]))
        assert self.is_detached(*finalize(state))

    def test_training_steps_of_such_a_loss(self):
        """No step holds the one before, and donation works."""
        optimizer = gradacc.optim.adam(0.1)
        step = train_step(gradacc.accumulate_and_value(penalty, steps=3), optimizer, donate=True)
        state = TrainState(W.clone(), optimizer.init(W))
        for _ in range(2):
            memory = state.params.data_ptr()
            state, metrics = step(state, X)
            assert self.is_detached(state.params, *metrics.values())
            assert state.params.data_ptr() == memory

    def test_integers(self):
        def loss(w, x):
            return mean(w, x), (x > 0)

        grads, (value, aux) = gradacc.accumulate_and_value(loss, steps=3, has_aux=True)(leaf(), X)
        assert grads.requires_grad
        assert value.requires_grad
        assert not aux.requires_grad

    def test_a_training_step_of_a_modules_own_parameters(self):
        """Nothing of one step is alive in the next; the values are those of parameters that do not require grad."""
        module = nn.Linear(2, 1).double()

        def loss(params, x):
            return torch.func.functional_call(module, params, (x,)).square().mean()

        optimizer = gradacc.optim.adam(0.1)
        step = train_step(gradacc.accumulate_and_value(loss, steps=3), optimizer)
        params = dict(module.named_parameters())
        state = TrainState(params, optimizer.init(params))
        detached = TrainState({name: p.detach() for name, p in params.items()}, optimizer.init(params))
        for _ in range(2):
            state, metrics = step(state, X)
            detached, _ = step(detached, X)
            assert self.is_detached(*state.params.values(), *metrics.values())
        assert_trees_equal(state.params, detached.params)


def test_results_may_be_changed_in_place():
    w = leaf()
    grads, value = gradacc.accumulate_and_value(mean, steps=3)(w, X)
    grads.mul_(2)
    value.add_(1)
    assert_trees_close(torch.autograd.grad(grads.sum(), w), torch.autograd.grad(2 * theirs(mean)(w, X).sum(), w))


def test_results_that_crossed_may_be_changed_in_place(pool):
    """They are views of what crossed; changing one leaves what was saved of another valid."""
    pool.run(2, changed_in_place)


def changed_in_place(group):
    params = {"w": leaf(), "b": leaf(W[0])}

    def loss(p, x):
        return mean(p["w"], x) * p["b"]

    for overlap in (False, True):
        sync = gradacc.all_reduce(group, overlap=overlap)
        grads, value = gradacc.accumulate_and_value(loss, steps=2, sync=sync)(params, X)
        expected = {name: 2 * grad.detach() for name, grad in grads.items()}
        saved = grads["b"].square()
        grads["w"].mul_(2)
        assert grads["w"].requires_grad
        with pytest.raises(RuntimeError, match="with sync= that is not possible"):
            saved.backward()
        grads["b"].mul_(2)
        value.add_(1)
        assert_trees_equal({name: grad.detach() for name, grad in grads.items()}, expected)


def test_random_numbers_are_drawn_as_before():
    """And what is drawn afterwards is not."""

    def loss(w, x):
        return nn.functional.dropout(x @ w, 0.5).square().mean()

    def derivative(make):
        torch.manual_seed(0)
        w = leaf()
        grads = make(loss)(w, X)
        torch.rand(5)
        state = torch.get_rng_state()
        found = torch.autograd.grad(grads.sum(), w)
        assert torch.equal(torch.get_rng_state(), state)
        return found

    assert_trees_close(derivative(lambda f: gradacc.accumulate(f, steps=1)), derivative(torch.func.grad))


def test_autocast_is_as_before():
    w, x = torch.randn(3, 2, requires_grad=True), X.float()

    def loss(w, x):
        y = nn.functional.linear(x, w)
        kinds.append(y.dtype)
        return y.float().square().mean()

    kinds: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradacc.accumulate(loss, steps=2)(w, x)
    torch.autograd.grad(grads.sum(), w)
    assert kinds == [torch.bfloat16] * 4


def test_a_micro_batch_of_inference():
    with torch.inference_mode():
        x = X.clone()
    w = leaf()
    expected = torch.autograd.grad(theirs(mean)(w, X).sum(), w)
    assert_trees_close(torch.autograd.grad(ours(mean)(w, x).sum(), w), expected)


class TestErrors:
    """Of the backward pass: what a second run cannot do."""

    def check(self, result: Tensor, message: str, *others: Tensor) -> None:
        with pytest.raises(RuntimeError, match=message):
            (result.sum() + sum(others)).backward()

    def test_an_iterator(self):
        self.check(gradacc.accumulate(mean)(leaf(), iter([X[:3], X[3:]])), "its batch was a list_iterator.*as a list")

    def test_an_argument_that_has_changed(self):
        w, x = leaf(), X.clone()
        grads = ours(mean)(w, x)
        x.add_(1)
        self.check(grads, "modified by an inplace operation")
        grads = ours(mean)(w, X)
        with torch.no_grad():
            w.add_(1)
        self.check(grads, "modified by an inplace operation")

    def test_random_numbers_of_ones_own(self):
        generator = torch.Generator()

        def loss(w, x):
            return ((x @ w) * torch.rand(len(x), generator=generator, dtype=D)).square().mean()

        self.check(ours(loss)(leaf(), X), "^accumulate: .*the value was 0.* and is 0.* now")

    @pytest.mark.parametrize("number", [float, torch.tensor])
    def test_a_weight_that_has_changed(self, number):
        weight = [number(6.0)]
        grads = ours(lambda w, x: Mean((x @ w).square().sum(), weight[0]))(leaf(), X)
        weight[0] = number(60.0)
        self.check(grads, r"the number behind it \(1, .* was 18.0 and is 180.0 now")

    def test_aux_that_has_changed(self):
        factor = [1.0]
        grad_fn = gradacc.accumulate(lambda w, x: (mean(w, x), {"a": mean(w, x) * factor[0]}), steps=3, has_aux=True)
        _, aux = grad_fn(leaf(), X)
        factor[0] = 2.0
        self.check(aux["a"], r"the number behind it \(1, ")

    def test_a_closed_over_tensor_while_no_argument_requires_grad(self):
        rate = leaf(torch.tensor(0.2, dtype=D))
        result = ours(lambda w, x: mean(w, x) * rate)(W, X)
        self.check(result, r"closes over a tensor that requires grad \(of shape \(\)\).*as an argument", rate.square())

    def test_activation_checkpointing(self):
        grads = ours(lambda w, x: checkpoint(mean, w, x, use_reentrant=False))(leaf(), X)
        self.check(grads, "saved tensor hooks")

    def test_a_graph_that_was_freed(self):
        grads, value = gradacc.accumulate_and_value(mean, steps=3)(leaf(), X)
        value.backward()
        self.check(grads, "a second time")

    def test_sync(self, pool):
        with pytest.raises(Failed, match="with sync= that is not possible: the other ranks.*no_grad"):
            pool.run(2, through_ranks)


def through_ranks(group):
    gradacc.accumulate(mean, steps=2, sync=gradacc.all_reduce(group))(leaf(), X).sum().backward()


class TestStreaming:
    """A state keeps no micro-batches: a backward pass through it, or through what comes of it, is an error."""

    MESSAGE = "^accumulator: .*a state keeps no micro-batches.*no_grad"

    def test_a_state(self):
        init, update, merge, finalize = gradacc.accumulator(mean)
        w = leaf()
        one, other = update(init(w), w, X[:3]), update(init(W), W, X[3:])
        assert other.grads.grad_fn is None
        for state in (one, update(one, W, X[3:]), merge(one, other), merge(other, one)):
            grads, value = finalize(state)
            for result in (grads.sum(), value):
                with pytest.raises(RuntimeError, match=self.MESSAGE):
                    torch.autograd.grad(result, w, retain_graph=True, allow_unused=True)

    @pytest.mark.parametrize("donate", [False, True])
    def test_its_numbers(self, donate):
        """Those of parameters that do not require grad, bit for bit; grad mode may change from one call to the next."""

        def run(w, modes):
            init, update, merge, finalize = gradacc.accumulator(mean, donate=donate)
            state = init(w)
            for mode, part in zip(modes, (X[:2], X[2:4], X[4:]), strict=True):
                with torch.set_grad_enabled(mode):
                    state = update(state, w, part)
            with torch.no_grad():
                return finalize(merge(state, init(w)))

        expected = run(W, [True, True, True])
        for modes in ([True, True, True], [True, False, True], [False, False, False]):
            results = run(leaf(), modes)
            assert_trees_equal(results, expected)
            assert not any(result.requires_grad for result in results)

    def test_under_no_grad_a_state_can_be_copied(self):
        init, update, *_ = gradacc.accumulator(mean)
        w = leaf()
        with torch.no_grad():
            state = update(init(w), w, X)
        assert_trees_equal(copy.deepcopy(state).grads, state.grads)


def test_nothing_outlives_the_results():
    """The arguments are held by the results, and by nothing else."""
    w, x = leaf(), X.clone()
    held = weakref.ref(x)
    results = ours(mean)(w, x)
    del x
    assert held() is not None
    del results
    assert held() is None


def test_what_a_loss_makes_dies_with_its_micro_batch():
    """Its leaves, too: the inputs of one micro-batch are alive at a time."""
    made: list[weakref.ref[Tensor]] = []

    def loss(w, x):
        x = x.clone().requires_grad_()
        assert all(ref() is None for ref in made)
        made.append(weakref.ref(x))
        return mean(w, x)

    gradacc.accumulate(loss, steps=3)(W, X)
    assert len(made) == 3
