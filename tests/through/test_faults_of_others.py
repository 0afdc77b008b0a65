"""Gradients that others' cached losses have got wrong without a word, each beside a copy of the algorithm that has the fault.

The list is of sentence-transformers' pull request 3862, and what it repairs. `ByHand` is the algorithm (Gao et al. 2021) as one
writes it, in two halves as theirs: `forward` encodes without a graph and differentiates the loss, the function that it returns
encodes again. A check that does not tell the faulty copy from the right one says nothing, so each test has both.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import gradacc
from tests.helpers import assert_trees_close, fingerprint, living_tensors

SIZE = 3
CPU = [(torch.get_rng_state, torch.set_rng_state)]
"""How each generator's state is had, and set."""


def params():
    generator = torch.Generator().manual_seed(1)
    w, v = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 6))
    return {"w": w, "v": v, "scale": torch.tensor(1.5, dtype=torch.float64)}


def batch(seed=2):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (5, 6))
    return {"x": x, "y": y, "mask": torch.arange(1, 6) <= torch.tensor([5, 2, 3, 1, 4, 5, 2])[:, None]}


def encode(params, batch):
    return {"x": torch.tanh(batch["x"] @ params["w"]), "y": torch.tanh(batch["y"] @ params["v"])}


def dropping(params, batch):
    return {key: F.dropout(leaf, 0.5) for key, leaf in encode(params, batch).items()}


def without_prompt(params, batch):
    """Leaves the first token out, in the mask that it is given: which tells how long a text is."""
    batch["mask"][:, 0] = False
    return encode(params, {**batch, "x": batch["x"] * batch["mask"]})


def wide(params, batch):
    """A little more or less of ``x`` is another gradient."""
    return {"x": torch.sin(40 * (batch["x"] @ params["w"]).to(torch.float64)), "y": batch["y"] @ params["v"]}


def contrastive(params, outputs, batch):
    logits = params["scale"] * outputs["x"] @ outputs["y"].to(outputs["x"].dtype).T
    return F.cross_entropy(logits, torch.arange(len(logits)))


def of_y_alone(params, outputs, batch):
    return params["scale"] * outputs["y"].std(0).log().sum()


def ranges_of_size(batch):
    return [(begin, min(begin + SIZE, len(batch["x"]))) for begin in range(0, len(batch["x"]), SIZE)]


def ranges_of_tokens(batch, budget=6):
    """As many texts as have so many tokens."""
    ranges, begin, tokens = [], 0, 0
    for n, length in enumerate(batch["mask"].sum(1).tolist()):
        if tokens + length > budget and n > begin:
            ranges.append((begin, n))
            begin, tokens = n, 0
        tokens += length
    return [*ranges, (begin, len(batch["mask"]))]


class Case(NamedTuple):
    encode: Callable[..., Any] = encode
    loss: Callable[..., Any] = contrastive
    ranges: Callable[..., Any] = ranges_of_size
    around: Callable[[], Any] = contextlib.nullcontext

    def split(self, batch):
        return [part(batch, *each) for each in self.ranges(batch)]


def part(batch, begin, end):
    return {key: leaf[begin:end] for key, leaf in batch.items()}


def leaves_of(params):
    return {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}


class ByHand:
    """What one half tells the other belongs to one call; with two of the faults, to this object."""

    def __init__(self, case, fault=None, generators=CPU):
        self.case, self.fault, self.generators = case, fault, generators
        self.states, self.last = [], None

    def forward(self, params, batch):
        """Gradients by the outputs; ``pull()`` adds those by the parameters to ``.grad``."""
        ranges, outputs = self.case.ranges(batch), []
        states = self.states if self.fault == "leaked state" else []
        with torch.no_grad():
            for each in ranges:
                states.append(self.state())
                outputs.append(self.case.encode(params, part(batch, *each)))
        leaves = [{key: leaf.requires_grad_() for key, leaf in one.items()} for one in outputs]
        whole = {key: torch.cat([one[key] for one in leaves]) for key in leaves[0]}
        self.case.loss(params, whole, batch).backward()
        call = (params, batch, ranges, states, [{key: leaf.grad for key, leaf in one.items()} for one in leaves])
        self.last = call

        def pull():
            self.pull(*(self.last if self.fault == "two forwards before one backward" else call))
            self.states = []

        return pull

    def pull(self, params, batch, ranges, states, cotangents):
        if self.fault == "ranges recomputed":
            ranges = self.case.ranges(batch)
        for n, (each, state, own) in enumerate(zip(ranges, states, cotangents, strict=False)):
            after = self.state()
            if self.fault != "generator not replayed":
                self.rewind(state)
            outputs = self.case.encode(params, part(batch, *each))
            self.rewind(after)
            if self.fault == "all but the last dropped" and n + 1 < len(ranges):
                continue
            self.surrogate(outputs, own).backward()

    def state(self):
        return [get() for get, _ in self.generators]

    def rewind(self, states):
        for (_, set), state in zip(self.generators, states, strict=True):
            set(state)

    def surrogate(self, outputs, cotangents):
        """A number whose gradient is that of the loss, of one micro-batch."""
        pairs = [(outputs[key], cotangent) for key, cotangent in cotangents.items() if cotangent is not None]
        if self.fault == "unused output":
            pairs = zip(outputs.values(), [cotangent for _, cotangent in pairs], strict=False)
        rows = [each for pair in pairs for each in zip(*pair, strict=self.fault != "ranges recomputed")]
        return sum((out.double() * cotangent.double()).sum() for out, cotangent in rows)


def grads_of(leaves):
    return {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}


def by_hand(case, fault=None):
    torch.manual_seed(0)
    leaves = leaves_of(params())
    with case.around():
        pull = ByHand(case, fault).forward(leaves, batch())
    with contextlib.nullcontext() if fault == "outside of autocast" else case.around():
        pull()
    return grads_of(leaves)


def in_one_graph(case):
    """The same micro-batches, none of them run again: the oracle."""
    torch.manual_seed(0)
    leaves, whole = leaves_of(params()), batch()
    with case.around():
        outputs = [case.encode(leaves, each) for each in case.split(whole)]
        joined = {key: torch.cat([one[key] for one in outputs]) for key in outputs[0]}
        case.loss(leaves, joined, whole).backward()
    return grads_of(leaves)


def ours(case):
    torch.manual_seed(0)
    grad_fn = gradacc.accumulate(case.loss, through=case.encode, split=case.split)
    with case.around():
        return grad_fn(params(), batch())


def distance(one, other):
    return max(((one[key] - leaf).norm() / max(leaf.norm(), 1e-3)).item() for key, leaf in other.items())


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def single(params):
    return {key: leaf.float() for key, leaf in params.items()}


def wide_in_bfloat16(params, batch):
    return wide(single(params), single(batch))


FAULTS = {
    "generator not replayed": Case(encode=dropping),
    "ranges recomputed": Case(encode=without_prompt, ranges=ranges_of_tokens),
    "all but the last dropped": Case(),
    "outside of autocast": Case(encode=wide_in_bfloat16, around=autocast),
    "unused output": Case(loss=of_y_alone),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_another_has(fault):
    case = FAULTS[fault]
    expected = in_one_graph(case)
    assert_trees_close(ours(case), expected, rtol=1e-10)
    assert distance(by_hand(case), expected) < 1e-10
    assert distance(by_hand(case, fault), expected) > 0.05


def test_two_calls_before_the_backward_pass_of_the_first():
    """Of results that are connected to the parameters, which is where there is one."""
    case = Case(encode=dropping)
    singly = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        singly.append(gradacc.accumulate(contrastive, through=dropping, microbatch_size=SIZE)(params(), batch(seed)))
    leaves, values = leaves_of(params()), []
    grad_fn = gradacc.accumulate_and_value(contrastive, through=dropping, microbatch_size=SIZE)
    for seed in (2, 3):
        torch.manual_seed(seed)
        values.append(grad_fn(leaves, batch(seed))[1])
    for value, expected in zip(values, singly, strict=True):
        actual = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        assert_trees_close(actual, expected, rtol=1e-10)
    for fault, fails in ((None, False), ("two forwards before one backward", True)):
        own, hand = [leaves_of(params()) for _ in range(2)], ByHand(case, fault)
        pulls = []
        for seed, leaves in zip((2, 3), own, strict=True):
            torch.manual_seed(seed)
            pulls.append(hand.forward(leaves, batch(seed)))
        for pull in pulls:
            pull()
        assert (distance(grads_of(own[0]), singly[0]) > 0.05) == fails


def test_backward_outside_of_the_autocast_that_the_call_was_in():
    """Of connected results, as a user of autocast is told to do."""
    case = FAULTS["outside of autocast"]
    leaves = leaves_of(params())
    with autocast():
        grad_fn = gradacc.accumulate_and_value(case.loss, through=case.encode, split=case.split)
        value = grad_fn(leaves, batch())[1]
    actual = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    assert_trees_close(actual, in_one_graph(case), rtol=1e-10)


def test_an_output_that_the_loss_does_not_use_is_not_encoded_again():
    calls = []

    def counted(key):
        def one(params, batch):
            calls.append(key)
            return encode(params, batch)[key]

        return one

    through = {key: counted(key) for key in "xy"}
    actual = gradacc.accumulate(of_y_alone, through=through, microbatch_size=SIZE)(params(), batch())
    assert_trees_close(actual, in_one_graph(Case(loss=of_y_alone)), rtol=1e-10)
    assert calls == ["x"] * 3 + ["y"] * 6


def test_nothing_is_left_of_a_call_that_failed():
    failing = []

    def loss(params, outputs, batch):
        if failing:
            raise ArithmeticError("this once")
        return contrastive(params, outputs, batch)

    expected, given = in_one_graph(Case(encode=dropping)), (params(), batch())
    grad_fn = gradacc.accumulate(loss, through=dropping, microbatch_size=SIZE)
    grad_fn(*given)
    before, living, known = fingerprint(given), living_tensors(), torch.is_autocast_enabled("cpu")
    failing.append(True)
    with pytest.raises(ArithmeticError):
        grad_fn(*given)
    failing.clear()
    left = living_tensors().keys() - living.keys()
    assert not left
    assert (fingerprint(given), torch.is_autocast_enabled("cpu")) == (before, known)
    torch.manual_seed(0)
    assert_trees_close(grad_fn(*given), expected, rtol=1e-10)
    for fault, fails in ((None, False), ("leaked state", True)):
        hand, leaves = ByHand(Case(encode=dropping, loss=loss), fault), leaves_of(params())
        failing.append(True)
        with pytest.raises(ArithmeticError):
            hand.forward(leaves, batch(3))
        failing.clear()
        torch.manual_seed(0)
        hand.forward(leaves, batch())()
        assert (distance(grads_of(leaves), expected) > 0.05) == fails
