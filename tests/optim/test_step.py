"""One step of training as a whole: vmapped, compiled, and how much it copies, donated or not."""

import optree
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from gradacc import TrainState, optim, train_step
from tests.helpers import NAMESPACE, assert_trees_close, fingerprint, some_slow
from tests.optim.cases import compiled, gradients, leaves_of, matrices

D = torch.float64


def _loss(params, batch):
    return (torch.tanh(batch @ params["w"] + params["b"]) - 1).square().mean()


def _params():
    return {"w": torch.randn(3, dtype=D), "b": torch.randn((), dtype=D)}


def _begin(optimizer, params):
    return TrainState(params, optimizer.init(params), torch.zeros((), dtype=torch.int64))


GRAD_FN = gradacc.accumulate_and_value(_loss, steps=3)
RULES = {
    "sgd": lambda lr: optim.sgd(lr, momentum=0.9),
    "adamw": optim.adamw,
    "clipped, skipping": lambda lr: optim.skip_nonfinite(optim.clip_by_global_norm(optim.adam(lr), 0.1)),
    "groups": lambda lr: optim.by_path(optim.adamw(lr), (lambda path, leaf: leaf.ndim == 0, optim.sgd(lr))),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_ensemble_with_a_learning_rate_each(rule):
    """vmap of three whole steps over a stack of states is each member's own three steps."""
    rates = torch.tensor([0.01, 0.1, 0.5], dtype=D)
    batches = [torch.randn(7, 3, dtype=D) for _ in range(3)]
    states = [_begin(rule(0.1), _params()) for _ in rates]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *states, namespace=NAMESPACE)

    def train(lr, state):
        step = train_step(GRAD_FN, rule(lr))
        for batch in batches:
            state, metrics = step(state, batch)
        return state, metrics

    together = torch.vmap(train)(rates, stacked)
    for member, (rate, state) in enumerate(zip(rates, states, strict=True)):
        mine = optree.tree_map(lambda leaf, member=member: leaf[member], together, namespace=NAMESPACE)
        assert_trees_close(mine, train(rate.item(), state), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", some_slow(["sgd", "groups", "clipped, skipping"], "sgd"))
def test_the_whole_step_is_one_graph(rule):
    """Three steps, the second with a gradient that is not finite, compiled once."""
    rate = optim.schedule(torch.optim.lr_scheduler.LinearLR, 0.1, length=5)
    optimizer = RULES[rule](rate)
    step = train_step(GRAD_FN, optimizer)
    traced = compiled(step)
    expected = actual = _begin(optimizer, _params())
    for number in range(3):
        batch = torch.randn(7, 3, dtype=D)
        if number == 1 and rule == "clipped, skipping":
            batch[2, 1] = torch.nan
        expected, metrics = step(expected, batch)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            actual, traced_metrics = traced(actual, batch)
        assert_trees_close(actual, expected, rtol=1e-12, atol=1e-14)
        assert_trees_close(traced_metrics, metrics, rtol=1e-12, atol=1e-14)
    if rule == "clipped, skipping":
        assert actual.opt_state.skipped == 1


class Copies(TorchDispatchMode):
    """The bytes that are copied to new memory, and the bytes of the new tensors of more than one element."""

    def __init__(self):
        super().__init__()
        self.copied = self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves_of((args, kwargs)) if _is_large(leaf)}
        out = func(*args, **kwargs or {})
        for leaf in leaves_of(out):
            if _is_large(leaf) and leaf.untyped_storage().data_ptr() not in given:
                size = leaf.untyped_storage().nbytes()
                self.made += size
                self.copied += size if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy) else 0
        return out


def _is_large(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 1


def _size(tree):
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves_of(tree) if _is_large(leaf))


def _torch(name, **options):
    return optim.from_torch(getattr(torch.optim, name), **options)


def _groups():
    return optim.by_path(optim.adamw(0.1), (lambda path, leaf: "'a'" in path, _torch("AdamW", foreach=True)))


COPYING = {
    "sgd": lambda: optim.sgd(0.1),
    "momentum": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: optim.adam(0.1, weight_decay=0.1),
    "adamw": lambda: optim.adamw(0.1, amsgrad=True),
    "clip": lambda: optim.clip_by_global_norm(optim.adamw(0.1), 0.1),
    "skip": lambda: optim.skip_nonfinite(optim.sgd(0.1, momentum=0.9)),
    "by_path": _groups,
    "all": lambda: optim.skip_nonfinite(optim.clip_by_global_norm(_groups(), 0.1)),
    "SGD": lambda: _torch("SGD", lr=0.1, momentum=0.9),
    "SGD foreach": lambda: _torch("SGD", lr=0.1, momentum=0.9, foreach=True),
    "Adam": lambda: _torch("Adam"),
    "AdamW foreach": lambda: _torch("AdamW", foreach=True),
    "AdamW fused": lambda: _torch("AdamW", fused=True),
    "Adagrad foreach": lambda: _torch("Adagrad", foreach=True),
    "RMSprop": lambda: _torch("RMSprop", momentum=0.9),
    "NAdam foreach": lambda: _torch("NAdam", foreach=True),
    "Muon": lambda: _torch("Muon"),
}


@pytest.mark.parametrize("make", COPYING.values(), ids=COPYING)
def test_without_donation_params_and_state_are_copied_once_and_with_it_nothing_is(make):
    """In the middle of a run; Muon copies what it orthogonalises, donated or not, imperative or not."""
    optimizer, params = make(), matrices()
    params, state = optimizer.step(params, gradients(params), optimizer.init(params))
    grads = gradients(params)
    own = 0
    if make is COPYING["Muon"]:
        with Copies() as own_copies:
            _imperative(torch.optim.Muon, params, grads)
        own = own_copies.copied
    with Copies() as copies:
        optimizer.step(params, grads, state)
    assert copies.copied == _size((params, state)) + own
    held = sorted(leaf.data_ptr() for leaf in leaves_of((params, state)) if _is_large(leaf))
    with Copies() as copies:
        new = optimizer.step(params, grads, state, donate=True)
    assert copies.copied == own
    assert sorted(leaf.data_ptr() for leaf in leaves_of(new) if _is_large(leaf)) == held


def _imperative(cls, params, grads, **options):
    leaves = [leaf.detach() for leaf in leaves_of(params)]
    optimizer = cls(leaves, **options)
    for leaf, grad in zip(leaves, leaves_of(grads), strict=True):
        leaf.grad = grad
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["single", "foreach"])
def test_a_donated_step_makes_no_more_memory_than_torchs(options):
    """Of any kind: of two steps of each, the second."""
    params = matrices()
    leaves = [leaf.clone() for leaf in leaves_of(params)]
    theirs = torch.optim.AdamW(leaves, lr=0.1, **options)
    for leaf, grad in zip(leaves, leaves_of(gradients(params)), strict=True):
        leaf.grad = grad
    theirs.step()
    with Copies() as imperative:
        theirs.step()
    for optimizer in (_torch("AdamW", lr=0.1, **options), optim.adamw(0.1)):
        moved, state = optimizer.step(params, gradients(params), optimizer.init(params))
        grads = gradients(params)
        with Copies() as functional:
            optimizer.step(moved, grads, state, donate=True)
        assert functional.made <= imperative.made


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("make", [RULES["sgd"], RULES["adamw"], lambda lr: _torch("AdamW", lr=lr, foreach=True)])
def test_the_whole_step_copies_what_its_optimizer_copies(make, donate):
    params = matrices()
    grads = gradients(params)
    optimizer = make(0.1)

    def grad_fn(params, batch):  # a donated step is given its gradients, too
        return optree.tree_map(torch.Tensor.detach, grads, namespace=NAMESPACE), torch.zeros(())

    step = train_step(grad_fn, optimizer, donate=donate)
    state, _ = step(TrainState(params, optimizer.init(params)), None)
    before = fingerprint(state)
    held = [leaf.data_ptr() for leaf in leaves_of(state.params)]
    with Copies() as copies:
        after, _ = step(state, None)
    assert copies.copied == (0 if donate else _size(state))
    if donate:
        assert [leaf.data_ptr() for leaf in leaves_of(after.params)] == held
    else:
        assert fingerprint(state) == before
        assert not set(held) & {leaf.data_ptr() for leaf in leaves_of(after.params)}
