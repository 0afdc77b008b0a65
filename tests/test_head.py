"""The head of a language model by pieces of tokens: `docs/microbatch.md`, each loss as an equation.

What a user writes is a function of some tokens: their hidden states and labels, and the head's weight. The oracle is the same
function of all tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from tests.helpers import assert_trees_close

TOKENS, WIDTH, VOCABULARY = 23, 6, 31
IGNORED = -100


def cross_entropy(hidden, labels, weight):
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    return gradacc.Mean(loss, (labels != IGNORED).sum())


def softcapped(hidden, labels, weight):
    logits = 30 * torch.tanh(hidden @ weight.T / 30)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return gradacc.Mean(loss, (labels != IGNORED).sum())


def with_z_loss(hidden, labels, weight):
    logits, real = hidden @ weight.T, labels != IGNORED
    z = logits.logsumexp(1)[real].square().sum()
    loss = F.cross_entropy(logits, labels, reduction="sum") + 1e-2 * z
    return gradacc.Mean(loss, real.sum())


def smoothed(hidden, labels, weight):
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", label_smoothing=0.1)
    return gradacc.Mean(loss, (labels != IGNORED).sum())


def distilled(hidden, teacher, labels, weight, teachers_weight):
    ours, theirs = (hidden @ weight.T).log_softmax(1), (teacher @ teachers_weight.T).log_softmax(1)
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    real = labels != IGNORED
    return gradacc.Mean(each[real].sum(), real.sum())


def with_entropy(hidden, labels, weight):
    log_p, real = (hidden @ weight.T).log_softmax(1), labels != IGNORED
    entropy = -(log_p.exp() * log_p).sum(1)[real].sum()
    loss = F.nll_loss(log_p, labels, reduction="sum") - 0.01 * entropy
    return gradacc.Mean(loss, real.sum()), gradacc.Mean(entropy.detach(), real.sum())


def with_accuracy(hidden, labels, weight):
    logits, real = hidden @ weight.T, labels != IGNORED
    loss = F.cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    return gradacc.Mean(loss, real.sum()), gradacc.Mean(right, real.sum())


def policy_ratio(hidden, labels, old_log_p, advantages, weight):
    real = labels != IGNORED
    log_p = -F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    ratio = (log_p - old_log_p).exp()
    each = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return gradacc.Mean(-each[real].sum(), real.sum())


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels_of(tokens: int) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[[0, 3, 4, 5, 6, 7, 22]] = IGNORED
    return labels


# Of tokens, split; and passed whole. The first of each is differentiated, and the weight.
LOSSES = {
    cross_entropy: lambda y: ([y], []),
    softcapped: lambda y: ([y], []),
    with_z_loss: lambda y: ([y], []),
    smoothed: lambda y: ([y], []),
    distilled: lambda y: ([doubles(TOKENS, 3), y], [doubles(VOCABULARY, 3)]),
    with_entropy: lambda y: ([y], []),
    with_accuracy: lambda y: ([y], []),
    policy_ratio: lambda y: ([y, doubles(TOKENS) - 3, doubles(TOKENS)], []),
}


def case(loss):
    """The loss as a function of hidden states and the weight, by pieces and of all tokens, and both of these."""
    split, whole = LOSSES[loss](labels_of(TOKENS))
    in_dims = (0,) * (1 + len(split)) + (None,) * (1 + len(whole))

    def by_pieces(**options):
        pieces = gradacc.microbatch(loss, **{"microbatch_size": 4, "in_dims": in_dims, **options})
        return lambda hidden, weight: read(pieces(hidden, *split, weight, *whole))

    def of_all(hidden, weight):
        return read(loss(hidden, *split, weight, *whole))

    return by_pieces, of_all, doubles(TOKENS, WIDTH), doubles(VOCABULARY, WIDTH)


def read(output):
    """The loss's number, and what is beside it."""
    means = output if isinstance(output, tuple) else (output,)
    loss, *beside = [mean.value for mean in means]
    return loss, beside


def plainly(function, hidden, weight):
    """Value, what is beside it, gradients: by plain autograd."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, beside = function(hidden, weight)
    return loss.detach(), beside, torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_the_head_is_the_whole_s(loss, backward):
    by_pieces, of_all, hidden, weight = case(loss)
    assert_trees_close(plainly(by_pieces(backward=backward), hidden, weight), plainly(of_all, hidden, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_under_torch_func(loss):
    by_pieces, of_all, hidden, weight = case(loss)
    ours, theirs = (grad_and_value(f, argnums=(0, 1), has_aux=True) for f in (by_pieces(), of_all))
    assert_trees_close(ours(hidden, weight), theirs(hidden, weight))


def embedded(params, tokens):
    """Hidden states of a model whose embedding is the head's weight, too."""
    return torch.tanh(F.embedding(tokens, params["w"]) @ params["mix"])


@pytest.mark.parametrize("backward", ["recompute", "forward"])
@pytest.mark.parametrize("transform", ["accumulate", "grad of accumulate", "grad"])
def test_inside_a_loss_that_is_accumulated(transform, backward):
    """Micro-batches of sequences outside, pieces of tokens inside, a tied weight; micro-batches and pieces of no real token."""
    tokens = torch.randint(0, VOCABULARY, (5, 7))
    labels = torch.randint(0, VOCABULARY, (5, 7))
    labels[1], labels[2, 2:], labels[3] = IGNORED, IGNORED, IGNORED
    head = gradacc.microbatch(cross_entropy, microbatch_size=4, in_dims=(0, 0, None), backward=backward)

    def loss(params, batch, head=head):
        return head(embedded(params, batch[0]).flatten(0, 1), batch[1].flatten(), params["w"])

    params, batch = {"w": doubles(VOCABULARY, WIDTH), "mix": doubles(WIDTH, WIDTH)}, (tokens, labels)
    expected = grad_and_value(lambda params: loss(params, batch, cross_entropy).value)
    if transform == "grad":
        assert_trees_close(grad(lambda params: loss(params, batch).value)(params), expected(params)[0])
    elif transform == "accumulate":
        grads, mean = gradacc.accumulate_and_value(loss, steps=5)(params, batch)
        assert_trees_close((grads, mean.value), expected(params))
    else:
        accumulated = gradacc.accumulate(loss, steps=5)

        def norm(grad_fn):
            return lambda params: sum(leaf.square().sum() for leaf in grad_fn(params).values())

        ours = grad(norm(lambda params: accumulated(params, batch)))(params)
        assert_trees_close(ours, grad(norm(lambda params: expected(params)[0]))(params))


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("backward", ["recompute", "forward"])
def test_logits_of_all_tokens_never_exist(backward):
    hidden, labels = doubles(64, WIDTH), torch.randint(0, VOCABULARY, (64,))
    weight = doubles(VOCABULARY, WIDTH)
    head = gradacc.microbatch(cross_entropy, microbatch_size=8, in_dims=(0, 0, None), backward=backward)
    with LargestTensor() as largest:
        plainly(lambda hidden, weight: (head(hidden, labels, weight).value, []), hidden, weight)
    assert largest.elements == max(hidden.numel(), 8 * VOCABULARY)
    with LargestTensor() as largest:
        grad(lambda hidden: head(hidden, labels, weight).value)(hidden)
    assert largest.elements == max(hidden.numel(), 8 * VOCABULARY)


class Products(TorchDispatchMode):
    """Rows of the head's products."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[-1] == VOCABULARY:
            self.rows.append(len(result))
        return result


@pytest.mark.parametrize("ignored", [0, 17, TOKENS])
def test_ignored_tokens_are_dropped_before_the_head(ignored):
    """One line, the same equation: the head multiplies the real tokens only."""
    hidden, weight, labels = doubles(TOKENS, WIDTH), doubles(VOCABULARY, WIDTH), torch.randint(0, VOCABULARY, (TOKENS,))
    labels[:ignored] = IGNORED
    head = gradacc.microbatch(cross_entropy, microbatch_size=4, in_dims=(0, 0, None))

    def dropping(hidden, weight):
        real = labels != IGNORED
        return head(hidden[real], labels[real], weight).total, []

    def plain(hidden, weight):
        return cross_entropy(hidden, labels, weight).total, []

    assert_trees_close(plainly(dropping, hidden, weight), plainly(plain, hidden, weight))
    with Products() as products:
        plainly(dropping, hidden, weight)
    assert sum(products.rows) == TOKENS - ignored
