"""`gradacc.accumulator(..., donate=True)`: a state that was given away cannot be used; the optimizers' are in `tests/optim`."""

import pytest
import torch
from torch import Tensor

import gradacc
from gradacc import Mean
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, fingerprint
from tests.optim.cases import compiled, leaves_of

D = torch.float64
GONE = r"this tensor was given away to accumulator.{} \(donate=True\).*Use what that call returned"


def loss(params, x):
    each = torch.tanh(x @ params["w"] + params["b"]).sum(1)
    aux = {"each": each, "mean": each.mean(), "hits": Mean((each > 0).sum(), len(each))}
    return Mean(each.square().sum(), (x[:, 0] > 0).sum()), aux


def parts():
    g = torch.Generator().manual_seed(3)
    params = {"w": torch.randn(3, 2, generator=g, dtype=D), "b": torch.randn(2, generator=g, dtype=D)}
    x = [torch.randn(4, 3, generator=g, dtype=D) for _ in range(3)]
    return params, [torch.cat([each[:, :1].abs(), each[:, 1:]], 1) for each in x]


ACC, PURE = gradacc.accumulator(loss, has_aux=True, donate=True), gradacc.accumulator(loss, has_aux=True)
CALLS = {
    "update": lambda acc, a, b, params, x: acc.update(a, params, x),
    "merge": lambda acc, a, b, params, x: acc.merge(a, b),
    "finalize": lambda acc, a, b, params, x: acc.finalize(a),
}


def begun(acc, params, x):
    return acc.update(acc.update(acc.init(params), params, x[0]), params, x[1])


@pytest.mark.parametrize("call", CALLS)
def test_a_state_that_was_given_away_cannot_be_used(call):
    """Its tensors neither, whoever holds them; what the call returned is what it is without donation."""
    params, x = parts()
    a, b = begun(ACC, params, x), begun(ACC, params, x[1:])
    given = leaves_of((a, b) if call == "merge" else a)
    result = CALLS[call](ACC, a, b, params, x[2])
    assert_trees_equal(result, CALLS[call](PURE, begun(PURE, params, x), begun(PURE, params, x[1:]), params, x[2]))
    before = fingerprint(result)
    assert {id(leaf) for leaf in leaves_of(result)}.isdisjoint(map(id, given))
    for leaf in given:
        with pytest.raises(ValueError, match=GONE.format(call)):
            leaf.sum()
    for again in CALLS:
        with pytest.raises(ValueError, match=GONE.format(call)):
            CALLS[again](ACC, a, begun(ACC, params, x), params, x[2])
    with pytest.raises(ValueError, match=GONE.format(call)):
        PURE.finalize(a)
    assert fingerprint(result) == before


def test_gradients_that_are_kept_are_not_changed_by_later_updates():
    params, x = parts()
    state = begun(ACC, params, x)
    kept = dict(state.grads)
    copied = {name: grad.clone() for name, grad in kept.items()}
    state = ACC.update(state, params, x[2])
    with pytest.raises(ValueError, match=GONE.format("update")):
        kept["w"].add(1)
    assert_trees_equal(copied, begun(PURE, params, x).grads)


def test_a_loss_that_raises_leaves_a_donated_state_to_go_on_with():
    """Before its backward pass nothing has been written."""
    params, x = parts()
    state, whole = begun(ACC, params, x), begun(PURE, params, x)

    def broken(params, x):
        raise RuntimeError("of the loss")

    before = fingerprint(state)
    with pytest.raises(RuntimeError, match="of the loss"):
        gradacc.accumulator(broken, has_aux=True, donate=True).update(state, params, x[2])
    assert fingerprint(state) == before
    after, expected = ACC.update(state, params, x[2]), PURE.update(whole, params, x[2])
    assert_trees_equal(ACC.finalize(after), PURE.finalize(expected))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("of the backward pass")


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_backward_pass_that_raises_in_the_middle_takes_the_state_with_it(engine):
    """Some gradients have been added to by then: going on would be silently wrong."""
    params, x = parts()

    def broken(params, x):
        return loss({"w": Failing.apply(params["w"]), "b": params["b"]}, x)

    acc = gradacc.accumulator(broken, has_aux=True, donate=True)
    state = begun(ACC, params, x)
    with pytest.raises(RuntimeError, match="of the backward pass"):
        ENGINES[engine](lambda: acc.update(state, params, x[2]))
    for again in CALLS:
        with pytest.raises(ValueError, match=GONE.format("update")):
            CALLS[again](ACC, state, begun(ACC, params, x), params, x[2])


def test_gradients_of_a_state_that_overlap_in_part_are_added_to_once():
    params, x = {"w": torch.ones(2, dtype=D), "b": torch.ones(2, dtype=D)}, torch.ones(1, dtype=D)

    def simple(params, x):
        return ((params["w"] + params["b"]) * x.mean()).sum()

    acc, pure = gradacc.accumulator(simple, donate=True), gradacc.accumulator(simple)

    def made():
        whole = torch.arange(3.0, dtype=D)
        held = pure.update(pure.init(params), params, x)
        return gradacc.AccumulatorState({"w": whole[:2], "b": whole[1:]}, held.sums, held.facts)

    assert_trees_equal(acc.finalize(acc.update(made(), params, x)), pure.finalize(pure.update(made(), params, x)))
    assert_trees_equal(acc.finalize(acc.merge(made(), made())), pure.finalize(pure.merge(made(), made())))
    assert_trees_equal(acc.finalize(made()), pure.finalize(made()))


def test_nothing_is_given_away_in_a_transform_or_while_dynamo_traces():
    params, x = parts()
    state = begun(ACC, params, x)
    before = fingerprint(state)
    expected = PURE.update(state, params, x[2])
    for run in (ENGINES["functional"], lambda func: compiled(lambda state: ACC.update(state, params, x[2]))(state)):
        found = run(lambda: ACC.update(state, params, x[2]))
        assert_trees_close(PURE.finalize(found), PURE.finalize(expected))
    assert fingerprint(state) == before


def test_an_update_costs_no_copy_and_the_old_state_no_memory():
    """The storage has one owner again, so that the next update is made in it, too."""
    params, x = parts()
    state = begun(ACC, params, x)
    places = {name: grad.untyped_storage()._cdata for name, grad in state.grads.items()}
    kept = []
    for part in x:
        kept.append(state)
        state = ACC.update(state, params, part)
        assert {name: grad.untyped_storage()._cdata for name, grad in state.grads.items()} == places
    with torch._C.DisableTorchFunctionSubclass():
        assert all(leaf.untyped_storage().nbytes() == 0 for leaf in leaves_of(kept) if isinstance(leaf, Tensor))
