"""A batch by cost: every example once, the budget held, and the large batch's result, in its order."""

import inspect
import itertools
import pydoc
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gradacc
from gradacc.data import Reordered, token_budget
from tests.helpers import ENGINES, assert_trees_close, assert_trees_equal, eager, fingerprint, transformed

D = torch.float64
LENGTHS = (3, 9, 1, 4, 9, 2, 6, 5, 1, 7, 2)


def of_mask(batch):
    return batch["attention_mask"].sum(1)


def padded(lengths, width=None, seed=0):
    """A batch as a tokenizer makes it: real tokens are 1 to 19; and a number for each example."""
    width = max(lengths, default=1) if width is None else width
    mask = (torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]).long()
    ids = torch.randint(1, 20, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    labels = torch.where(mask == 1, ids % 7, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "score": torch.arange(len(lengths), dtype=D).sin(),
    }


class Encoder(nn.Module):
    """A transformer layer that does not see padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.qkv, self.mlp, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids, mask):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(F.layer_norm(x, (8,))).view(*ids.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).masked_fill(mask[:, None, None, :] == 0, -1e9)
        attended = scores.softmax(-1) @ v
        x = x + attended.transpose(1, 2).flatten(2)
        return self.head(x + self.mlp(x).tanh())


apply, PARAMS, _ = gradacc.functional(Encoder().double())


def loss_fn(params, batch):
    """A mean over tokens; aux: of each example a number and its features, and a count."""
    logits = apply(params, batch["input_ids"], batch["attention_mask"])
    own = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none").sum(1)
    pooled = (logits * batch["attention_mask"][..., None]).sum(1)
    loss = gradacc.Mean(own.sum() + (own * batch["score"]).sum(), batch["attention_mask"].sum())
    right = (logits.argmax(2) == batch["labels"]).sum()
    return loss, {"own": own, "pooled": pooled, "right": gradacc.Mean(right, loss.weight), "ids": batch["score"]}


def embed(params, batch):
    """One row for each example."""
    logits = apply(params, batch["input_ids"], batch["attention_mask"]) * batch["attention_mask"][..., None]
    return logits.sum(1) * batch["score"][:, None]


def cost(group, lengths):
    return len(group) * max(max(lengths[place] for place in group), 1)


def cuts(lengths, budget):
    """Costs of the groups of every cut of the sorted examples into as few as fit."""
    sizes = sorted((max(each, 1) for each in lengths), reverse=True)
    for number in range(1, len(sizes) + 1):
        found = []
        for ends in itertools.combinations(range(1, len(sizes)), number - 1):
            pairs = list(itertools.pairwise((0, *ends, len(sizes))))
            if all((high - low) * sizes[low] <= budget or high - low == 1 for low, high in pairs):
                found.append([(high - low) * sizes[low] for low, high in pairs])
        if found:
            return found
    raise AssertionError


def assignments(places):
    """Every way to put examples into groups."""
    if not places:
        yield []
        return
    for rest in assignments(places[1:]):
        yield [[places[0]], *rest]
        for n, group in enumerate(rest):
            yield [*rest[:n], [places[0], *group], *rest[n + 1 :]]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 40), st.integers(0, 3))
def test_every_example_once_within_the_budget_in_few_equal_groups(lengths, budget, more):
    batch = padded(lengths, max(lengths) + more)
    parts = token_budget(budget, of_mask)(batch)
    assert sorted(place for group in parts.order for place in group) == list(range(len(lengths)))
    costs = [cost(group, lengths) for group in parts.order]
    assert all(each <= budget or len(group) == 1 for each, group in zip(costs, parts.order, strict=True))
    best = cuts(lengths, budget)
    assert len(costs) == len(best[0])
    assert max(costs) == min(map(max, best))
    assert costs[0] >= len(parts.order[0]) * max(*lengths, 1)  # the longest come first
    for part, group in zip(parts, parts.order, strict=True):
        longest = max(*(lengths[place] for place in group), 1)
        assert part["input_ids"].shape == (len(group), min(longest, batch["input_ids"].size(1)))
        for name, leaf in part.items():
            expected = batch[name][list(group)]
            assert torch.equal(leaf, expected[:, :longest] if expected.ndim > 1 else expected)
            assert expected.ndim == 1 or not batch["attention_mask"][list(group)][:, longest:].any()


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 20))
def test_no_other_groups_are_fewer(lengths, budget):
    """Of all ways to put examples together, sorted or not."""
    fits = [
        len(groups)
        for groups in assignments(list(range(len(lengths))))
        if all(cost(group, lengths) <= budget or len(group) == 1 for group in groups)
    ]
    assert len(token_budget(budget, lambda ids: lengths)(torch.ones(len(lengths), 8)).order) == min(fits)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 60))
def test_groups_of_equal_lengths_differ_by_one(number, length, budget):
    sizes = [len(group) for group in token_budget(budget, lambda ids: [length] * number)(torch.ones(number, 5)).order]
    assert len(sizes) == -(-number // max(1, budget // length))
    assert max(sizes) - min(sizes) <= 1


def test_a_long_tail_is_in_groups_of_about_equal_cost():
    lengths = (torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 4).exp().long().clamp(1, 900).tolist()
    split = token_budget(8192, lambda ids: lengths, trim=None)
    costs = [cost(group, lengths) for group in split(torch.zeros(2000, 1)).order]
    assert max(costs) <= 8192
    assert min(costs) >= 0.75 * max(costs)
    assert sum(costs) <= 1.1 * sum(lengths)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 9, 12, 20, 1000])
@pytest.mark.parametrize("more", [0, 5])
def test_accumulate_is_the_large_batch_in_its_order(engine, budget, more):
    batch = padded(LENGTHS, 9 + more)
    large, aux = loss_fn(PARAMS, batch)
    expected = torch.func.grad(lambda params: loss_fn(params, batch)[0].value)(PARAMS)
    grad_fn = gradacc.accumulate_and_value(loss_fn, split=token_budget(budget, of_mask), has_aux=True)
    before = fingerprint(batch)
    grads, (value, found) = ENGINES[engine](lambda: grad_fn(PARAMS, batch))
    assert fingerprint(batch) == before
    assert_trees_close(grads, expected)
    assert_trees_close(value.value, large.value.detach())
    assert_trees_close(found, {**aux, "own": aux["own"].detach(), "pooled": aux["pooled"].detach()})


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("budget", [1, 12, 20, 1000])
def test_microbatch_is_the_function_with_derivatives(budget, backward):
    batch = padded(LENGTHS)
    batch["score"].requires_grad_()
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    inputs = [*params.values(), batch["score"]]
    pieces = gradacc.microbatch(embed, split=token_budget(budget, of_mask), in_dims=(None, 0), backward=backward)

    def derivatives(output):
        weights = torch.arange(output.numel(), dtype=D).cos().view(output.shape)
        first = torch.autograd.grad((weights * output.square()).sum(), inputs, create_graph=True)
        mixed = sum((grad * torch.arange(grad.numel(), dtype=D).sin().view(grad.shape)).sum() for grad in first)
        return output, first, torch.autograd.grad(mixed, inputs, allow_unused=True, materialize_grads=True)

    assert_trees_close(derivatives(pieces(params, batch)), derivatives(embed(params, batch)), atol=1e-12)
    with torch.no_grad():
        assert_trees_close(pieces(params, batch), embed(params, batch).detach())


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, in forward mode
def test_microbatch_under_transforms():
    batch = padded(LENGTHS)
    pieces = gradacc.microbatch(embed, split=token_budget(20, of_mask), in_dims=(None, 0))
    weights = torch.arange(len(LENGTHS), dtype=D).cos()[:, None]

    def total(func):
        def of(params, score):
            return (weights * func(params, {**batch, "score": score}).square()).sum()

        return torch.func.grad(of, argnums=(0, 1))(PARAMS, batch["score"])

    assert_trees_close(total(pieces), total(embed))
    given, direction = (batch["score"],), (weights[:, 0],)
    assert_trees_close(
        torch.func.jvp(lambda score: pieces(PARAMS, {**batch, "score": score}), given, direction),
        torch.func.jvp(lambda score: embed(PARAMS, {**batch, "score": score}), given, direction),
    )
    assert_trees_close(transformed(lambda: pieces(PARAMS, batch)), embed(PARAMS, batch).detach())


def test_microbatch_puts_outputs_together_in_every_way():
    batch = padded(LENGTHS)

    def func(batch):
        rows = batch["input_ids"].double().sum(1) * batch["score"]
        return {
            "rows": rows,
            "columns": rows * torch.arange(1, 3, dtype=D)[:, None],
            "mean": rows.mean(),
            "most": rows.amax(),
            "tokens": gradacc.Mean(batch["input_ids"].sum(), batch["attention_mask"].sum()),
            "name": "x",
        }

    way = {"rows": "concat", "columns": "concat", "mean": "mean", "most": "max", "tokens": "sum", "name": "concat"}
    dims = {**dict.fromkeys(way, 0), "columns": 1}
    found = gradacc.microbatch(func, split=token_budget(14, of_mask), out=way, out_dims=dims)(batch)
    expected = func(batch)
    assert found.pop("name") == expected.pop("name")
    assert_trees_close(found, expected)


def test_results_are_connected_to_parameters_that_require_grad():
    batch = padded(LENGTHS)
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    grad_fn = gradacc.accumulate(loss_fn, split=token_budget(20, of_mask), has_aux=True)
    _, aux = grad_fn(params, batch)
    weights = torch.arange(len(LENGTHS), dtype=D).cos()
    leaves = list(params.values())
    assert_trees_close(
        torch.autograd.grad((aux["own"] * weights).sum(), leaves),
        torch.autograd.grad((loss_fn(params, batch)[1]["own"] * weights).sum(), leaves),
    )


def test_over_a_batch_of_parameters():
    batch = padded(LENGTHS)
    grad_fn = gradacc.accumulate(loss_fn, split=token_budget(20, of_mask), has_aux=True)
    stacked = {name: torch.stack([leaf, leaf.cos()]) for name, leaf in PARAMS.items()}
    found, aux = torch.func.vmap(lambda params: (lambda grads, aux: (grads, aux["own"]))(*grad_fn(params, batch)))(
        stacked
    )
    for n in range(2):
        params = {name: leaf[n] for name, leaf in stacked.items()}
        grads, own = grad_fn(params, batch)
        assert_trees_close({name: leaf[n] for name, leaf in found.items()}, grads)
        assert_trees_close(aux[n], own["own"])


def test_over_a_batch_of_batches_lengths_are_not_known():
    batch = {name: torch.stack([leaf, leaf]) for name, leaf in padded(LENGTHS).items()}
    grad_fn = gradacc.accumulate(lambda params, batch: loss_fn(params, batch)[0], split=token_budget(20, of_mask))
    with pytest.raises(NotImplementedError, match=r"token_budget: under torch.vmap, length returned .* Pass steps="):
        torch.func.vmap(grad_fn, in_dims=(None, 0))(PARAMS, batch)
    known = gradacc.accumulate(
        lambda params, batch: loss_fn(params, batch)[0], split=token_budget(20, lambda _: LENGTHS)
    )
    with pytest.raises(NotImplementedError, match=r"under torch.vmap, batch\['attention_mask'\] is"):
        torch.func.vmap(known, in_dims=(None, 0))(PARAMS, batch)


def test_compiled_it_is_an_error_that_says_what_to_compile():
    def loss(w, batch):
        return gradacc.Mean((w * batch["input_ids"]).square().sum(), batch["attention_mask"].sum())

    batch, w = padded(LENGTHS), torch.ones((), dtype=D)
    split = token_budget(20, of_mask)
    expected = torch.func.grad(lambda w: loss(w, batch).value)(w)
    with pytest.raises(Exception, match=r"in a compiled function lengths are not known"):
        torch.compile(gradacc.accumulate(loss, split=split), fullgraph=True, backend="eager")(w, batch)
    torch._dynamo.reset()
    assert_trees_close(torch.compile(gradacc.accumulate(loss, split=split), backend="eager")(w, batch), expected)
    compiled = torch.compile(loss, dynamic=True, backend="eager")
    assert_trees_close(gradacc.accumulate(compiled, split=split)(w, batch), expected)


def test_without_values_lengths_must_be_ints():
    batch = {name: leaf.to("meta") for name, leaf in padded(LENGTHS).items()}
    with pytest.raises(
        NotImplementedError, match=r"length returned .* on meta without values .* Return a list of ints"
    ):
        token_budget(20, of_mask)(batch)
    parts = token_budget(20, lambda batch: LENGTHS)(batch)
    assert parts.order == token_budget(20, of_mask)(padded(LENGTHS)).order
    assert [part["input_ids"].shape for part in parts] == [
        part["input_ids"].shape for part in token_budget(20, of_mask)(padded(LENGTHS))
    ]
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="without values"):
        token_budget(20, of_mask)({"attention_mask": torch.ones(3, 4, dtype=torch.int64)})


def of_a_rank(group, lengths):
    batch = padded(lengths, seed=len(lengths)) if lengths else padded([9])
    batch = batch if lengths else {name: leaf[:0] for name, leaf in batch.items()}
    grad_fn = gradacc.accumulate_and_value(
        loss_fn, split=token_budget(12, of_mask), has_aux=True, sync=gradacc.all_reduce(group)
    )
    mean = gradacc.microbatch(
        lambda batch: (batch["score"], batch["score"].mean()),
        split=token_budget(12, of_mask),
        out=("concat", "mean"),
        sync=gradacc.all_reduce(group),
    )
    return batch, grad_fn(PARAMS, batch), mean(batch)


def test_ranks_of_any_lengths_are_their_union(pool):
    shares = [(9, 1, 2, 7), (), (3, 3, 9, 1, 5, 2)]
    answers = pool.run_each(3, of_a_rank, [(share,) for share in shares])
    batch = {name: torch.cat([own[name] for own, *_ in answers]) for name in answers[0][0]}
    expected = torch.func.grad(lambda params: loss_fn(params, batch)[0].value)(PARAMS)
    for own, (grads, (value, aux)), (score, mean) in answers:
        assert_trees_close(grads, expected)
        assert_trees_close(value.value, loss_fn(PARAMS, batch)[0].value.detach())
        assert_trees_close(aux["own"], loss_fn(PARAMS, own)[1]["own"].detach())
        assert_trees_equal(score, own["score"])
        assert_trees_close(mean, batch["score"].mean())


def test_several_means_with_counted_weights():
    batch = padded(LENGTHS)

    def loss(w, batch):
        tokens = (w * batch["input_ids"]).square() * batch["attention_mask"]
        return {
            "tokens": gradacc.Mean(tokens.sum(), batch["attention_mask"].sum()),
            "examples": gradacc.Mean((w * batch["score"]).square().sum(), len(batch["score"])),
        }

    def weights(batch):
        return {"tokens": batch["attention_mask"].sum(), "examples": len(batch["score"])}

    w = torch.ones((), dtype=D)
    expected = torch.func.grad(lambda w: sum(mean.value for mean in loss(w, batch).values()))(w)
    split = token_budget(12, of_mask)
    for options in ({}, {"weights": weights}):
        assert_trees_close(gradacc.accumulate(loss, split=split, **options)(w, batch), expected)


def test_an_encoder_of_transformers_under_a_contrastive_loss():
    """The embeddings of all examples meet in the loss: each must be at its own place."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=16)).double().eval()
    apply, params, _ = gradacc.functional(model)
    params = {name: leaf.requires_grad_() for name, leaf in params.items() if "pooler" not in name}
    batch = padded(LENGTHS)
    encoding = transformers.BatchEncoding({name: batch[name] for name in ("input_ids", "attention_mask")})

    def encode(params, encoding):
        states = apply({**model.state_dict(), **params}, **encoding).last_hidden_state
        return F.normalize((states * encoding["attention_mask"][..., None]).sum(1))

    def loss(encode):
        embeddings = encode(params, encoding)
        return F.cross_entropy(embeddings @ embeddings.mT + batch["score"], torch.arange(len(embeddings)).roll(1))

    pieces = gradacc.microbatch(encode, split=token_budget(20, of_mask), in_dims=(None, 0))
    leaves = list(params.values())
    assert_trees_close(torch.autograd.grad(loss(pieces), leaves), torch.autograd.grad(loss(encode), leaves), atol=1e-12)


def encode(params, batch):
    """Embeddings; and a row for each example that has no gradient."""
    return {"embedding": F.normalize(embed(params, {**batch, "score": batch["score"].cos()})), "score": batch["score"]}


def contrast(params, outputs, batch):
    """Every example against every other one, with what must be beside it in the batch."""
    logits = outputs["embedding"] @ outputs["embedding"].mT + outputs["score"] * batch["score"][:, None]
    loss = F.cross_entropy(logits, torch.arange(len(logits)).roll(1), reduction="sum")
    return gradacc.Mean(loss, len(logits)), {"score": outputs["score"], "own": batch["score"]}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 12, 20, 1000])
def test_through_a_loss_over_the_whole_batch(engine, budget):
    batch = padded(LENGTHS)
    grad_fn = gradacc.accumulate(contrast, through=encode, split=token_budget(budget, of_mask), has_aux=True)
    grads, aux = ENGINES[engine](lambda: grad_fn(PARAMS, batch))
    expected = torch.func.grad(lambda params: contrast(params, encode(params, batch), batch)[0].value)(PARAMS)
    assert_trees_close(grads, expected, atol=1e-12)
    assert_trees_equal(aux, {"score": batch["score"], "own": batch["score"]})


def of_a_rank_through(group, lengths):
    batch = padded(lengths, 9, seed=len(lengths))
    grad_fn = gradacc.accumulate(
        lambda *args: contrast(*args)[0],
        through=encode,
        split=token_budget(12, of_mask),
        sync=gradacc.all_reduce(group),
    )
    return batch, grad_fn(PARAMS, batch)


def test_through_over_ranks(pool):
    answers = pool.run_each(3, of_a_rank_through, [((9, 1, 2, 7),), ((),), ((3, 3, 8, 1, 5, 2),)])
    batch = {name: torch.cat([own[name] for own, _ in answers]) for name in answers[0][0]}
    expected = torch.func.grad(lambda params: contrast(params, encode(params, batch), batch)[0].value)(PARAMS)
    for _, grads in answers:
        assert_trees_close(grads, expected, atol=1e-12)


EDGES = {
    "one example": (5,),
    "no tokens": (0, 0, 0),
    "some without tokens": (0, 4, 0, 0, 2),
    "one that is longer than the budget": (40, 3, 2, 8),
    "all longer than the budget": (40, 41, 39),
    "equal ones": (4, 4, 4, 4, 4, 4, 4),
}


@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES)
def test_edges(lengths):
    batch = padded(lengths)

    def loss(w, batch):
        own = ((w * batch["input_ids"]) * batch["attention_mask"]).square().sum(1)
        return own.sum() / max(len(own), 1), own

    w = torch.ones((), dtype=D)
    expected = torch.func.grad(loss, has_aux=True)(w, batch)
    found = gradacc.accumulate(loss, split=token_budget(10, of_mask), has_aux=True)(w, batch)
    assert_trees_close(found, expected)


@pytest.mark.parametrize("run", [eager, transformed])
def test_an_empty_batch_is_one_empty_micro_batch(run):
    batch = {name: leaf[:0] for name, leaf in padded([3, 2]).items()}
    (part,) = token_budget(10, of_mask)(batch)
    assert_trees_equal(part, batch)
    grad_fn = gradacc.accumulate_and_value(loss_fn, split=token_budget(10, of_mask), has_aux=True)
    by_steps = gradacc.accumulate_and_value(loss_fn, steps=2, has_aux=True)
    assert_trees_equal(run(lambda: grad_fn(PARAMS, batch)), run(lambda: by_steps(PARAMS, batch)))
    pieces = gradacc.microbatch(embed, split=token_budget(10, of_mask), in_dims=(None, 0))
    assert run(lambda: pieces(PARAMS, batch)).shape == (0, 7)


def test_micro_batches_are_made_one_at_a_time_and_again():
    parts = token_budget(12, of_mask)(padded(LENGTHS))
    iterator = iter(parts)
    first, second = next(iterator), next(iterator)
    assert first["input_ids"].data_ptr() != second["input_ids"].data_ptr()
    assert first["input_ids"].untyped_storage().nbytes() == first["input_ids"].numel() * 8  # it holds no more
    assert len(list(parts)) == len(list(parts)) == len(parts.order)


def test_what_is_no_tensor_goes_into_each():
    batch = {**padded(LENGTHS), "scale": 2.0, "name": "x", "nothing": None}
    for part in token_budget(12, of_mask)(batch):
        assert (part["scale"], part["name"], part["nothing"]) == (2.0, "x", None)


def test_length_may_change_its_batch():
    batch = padded(LENGTHS)
    keys = list(batch)
    token_budget(12, lambda batch: batch.pop("attention_mask").sum(1))(batch)
    assert list(batch) == keys


IDS = torch.tensor([[5, 3, 0, 0], [2, 7, 1, 4], [8, 0, 0, 0]])
OPTIONS = {
    "no budget": (dict(max_tokens=0), ValueError, "max_tokens must be at least 1, got 0"),
    "a negative budget": (dict(max_tokens=-5), ValueError, "max_tokens must be at least 1"),
    "a float": (dict(max_tokens=8.0), TypeError, "max_tokens must be an int"),
    "a bool": (dict(max_tokens=True), TypeError, "max_tokens must be an int"),
    "no function": (dict(length="attention_mask"), TypeError, "length must be a function of the batch"),
    "lengths": (dict(length=[1, 2]), TypeError, "length must be a function of the batch"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_checked_at_once(case):
    options, error, message = OPTIONS[case]
    with pytest.raises(error, match=f"token_budget: {message}"):
        token_budget(**{"max_tokens": 8, "length": len, **options})


RETURNED = {
    "floats": (torch.tensor([2.0, 4.0, 1.0]), TypeError, "length returned a tensor of shape \\(3,\\) of torch.float32"),
    "bools": (
        torch.tensor([True, True, False]),
        TypeError,
        "length returned .* of torch.bool; return an integer tensor of shape \\(3,\\)",
    ),
    "too few": (torch.tensor([2, 4]), ValueError, "length returned a tensor of shape \\(2,\\); return"),
    "of each position": (IDS, ValueError, "length returned a tensor of shape \\(3, 4\\)"),
    "a number": (3, TypeError, "length returned 3 \\(int\\)"),
    "nothing": (None, TypeError, "length returned None"),
    "a list of floats": ([2.0, 4, 1], TypeError, "length returned a list with 2.0 \\(float\\) in it"),
    "a long list": ([2, 4, 1, 1], ValueError, "length returned a list of 4 items"),
    "negative": (torch.tensor([2, 4, -1]), ValueError, "length returned -1 for example 2; a length is 0 or more"),
    "wider than the batch": ([2, 5, 1], ValueError, "length returned 5 for example 1, and batch, .* has 4 positions"),
    "too short": ([1, 4, 1], ValueError, "batch has more than one value at positions .* beyond the lengths"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_lengths_that_are_none(case):
    returned, error, message = RETURNED[case]
    with pytest.raises(error, match=f"token_budget: {message}"):
        gradacc.microbatch(lambda ids: ids.sum(1), split=token_budget(8, lambda ids: returned))(IDS)


def test_lengths_of_any_integers():
    for dtype in (torch.int32, torch.uint8, torch.int64):
        assert token_budget(4, lambda ids, dtype=dtype: (ids != 0).sum(1).to(dtype))(IDS).order == ((1,), (0, 2))


def test_padding_on_the_left_is_seen_or_not_cut():
    batch = padded(LENGTHS)
    left = {name: leaf.flip(1) if leaf.ndim == 2 else leaf for name, leaf in batch.items()}
    with pytest.raises(ValueError, match=r"batch\['attention_mask'\] has more than one .* Is the padding on the left"):
        token_budget(12, of_mask)(left)
    with pytest.raises(ValueError, match=r"batch has more than one value"):
        token_budget(12, lambda ids: (ids != 0).sum(1))(torch.tensor([[0, 0, 0, 4, 5, 6], [1, 2, 3, 4, 5, 6]]))

    def last(batch):  # the position behind the last token
        return (torch.arange(1, 10) * batch["attention_mask"]).amax(1)

    parts = token_budget(12, last)(left)
    assert {part["input_ids"].size(1) for part in parts} == {9}
    assert token_budget(12, last)(batch).order == token_budget(12, of_mask)(batch).order


BESIDE = {
    "features of another size": (torch.randn(11, 16), ValueError, "has size 9 along dim 1, and batch\\['beside'\\] 16"),
    "features of the same size": (torch.randn(11, 9), ValueError, "batch\\['beside'\\] has more than one value"),
    "an image": (torch.randn(11, 3, 9, 9), ValueError, "which of them"),
    "positions": (torch.arange(9).expand(11, 9), ValueError, "as position_ids do"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_no_token_is_never_cut(case):
    beside, error, message = BESIDE[case]
    batch = {**padded(LENGTHS), "beside": beside}
    with pytest.raises(error, match=message) as raised:
        token_budget(12, of_mask)(batch)
    assert "trim=" in str(raised.value)
    trim = {**dict.fromkeys(batch, 1), "beside": None}
    parts = token_budget(12, of_mask, trim=trim)(batch)
    for part, group in zip(parts, parts.order, strict=True):
        assert torch.equal(part["beside"], beside[list(group)])
        assert part["input_ids"].size(1) == max(LENGTHS[place] for place in group)
    for part in token_budget(12, of_mask, trim=None)(batch):
        assert part["input_ids"].size(1) == 9


def test_along_another_dimension():
    """Channels first; and padding of NaN is padding."""
    wave = torch.arange(24.0).view(3, 2, 4)
    wave[0, :, 2:] = wave[2, :, 1:] = float("nan")
    for part in token_budget(4, lambda wave: [2, 4, 1], trim=2)(wave):
        assert not part[0].isnan().any()
        assert part.size(1) == 2


TRIMS = {
    "the examples": (0, "trim has 0 .* for batch\\['x'\\]; an entry is a dimension, 1 or more"),
    "from behind": (-1, "trim has -1"),
    "a bool": ({"x": True}, "trim has True"),
    "another tree": ({"y": 1}, "is not a pytree prefix of the batch"),
}


@pytest.mark.parametrize("case", TRIMS)
def test_a_trim_that_is_none(case):
    trim, message = TRIMS[case]
    with pytest.raises(ValueError, match=message):
        token_budget(8, lambda batch: [2, 4, 1], trim=trim)({"x": IDS})


BATCHES = {
    "other sizes": (
        {"x": IDS, "y": torch.ones(2)},
        ValueError,
        "sizes along dim 0: batch\\['x'\\] has 3, batch\\['y'\\] has 2",
    ),
    "a 0-dim tensor": ({"x": IDS, "y": torch.ones(())}, TypeError, "batch\\['y'\\] is a tensor of shape \\(\\)"),
    "a sparse tensor": ({"x": IDS, "y": IDS.to_sparse()}, TypeError, "layout torch.sparse_coo"),
    "an array": ({"x": IDS, "y": IDS.numpy()}, TypeError, "batch\\['y'\\] is a numpy.ndarray"),
    "a list of numbers": ({"x": IDS, "y": [1, 2, 3]}, TypeError, "one item for each of the 3 examples"),
    "a list of examples": ([{"x": x, "y": x} for x in torch.ones(3, 3)], TypeError, "If each item is of one example"),
    "strings": ({"x": IDS, "y": ["a", "b"]}, TypeError, "\\(strings\\)"),
    "nothing": ({}, ValueError, "there is no tensor in the batch"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_of_which_no_examples_can_be_taken(case):
    batch, error, message = BATCHES[case]
    with pytest.raises(error, match=f"token_budget: .*{message}") as raised:
        token_budget(8, lambda batch: [2, 4, 1])(batch)
    assert "list of numbers" not in case or "in_dims" not in str(raised.value)


def test_a_row_for_each_token_is_an_error_that_says_what_to_return():
    batch = padded(LENGTHS)

    def tokens(params, batch):
        logits = apply(params, batch["input_ids"], batch["attention_mask"])
        return gradacc.Mean(logits.sum(), batch["attention_mask"].sum()), logits

    split = token_budget(12, of_mask)
    with pytest.raises(ValueError, match=r"aux has shape .* in another, .* reduce it to one row an example"):
        gradacc.accumulate(tokens, split=split, has_aux=True)(PARAMS, batch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"output is .* one row an example"):
            gradacc.microbatch(lambda batch: batch["input_ids"], split=split)(batch)
    with pytest.raises(
        ValueError, match=r"output has 9 rows of a micro-batch of 1 examples, .* Return one row an exam"
    ):
        gradacc.microbatch(lambda batch: batch["input_ids"].flatten(), split=split)(batch)


def test_examples_are_along_dim_0():
    batch = torch.ones(4, 3)
    split = token_budget(8, lambda x: [3, 3, 3, 3])
    message = "split put 2 examples into a micro-batch whose tensors have size 3 along the dimension that in_dims says"
    with pytest.raises(ValueError, match=f"accumulate: {message}"):
        gradacc.accumulate(lambda w, x: (w * x).mean(), split=split, in_dims=(None, 1))(torch.ones(()), batch)
    with pytest.raises(ValueError, match=f"microbatch: {message}"):
        gradacc.microbatch(lambda x: x.sum(0), split=split, in_dims=1)(batch)


def test_one_argument_is_split():
    x, y = IDS, torch.ones(3)
    split = token_budget(8, lambda ids: (ids != 0).sum(1))
    with pytest.raises(ValueError, match="one argument is divided"):
        gradacc.microbatch(lambda x, y: x.sum(1) * y, split=split)(x, y)
    with pytest.raises(ValueError, match="only the batch"):
        gradacc.accumulate(lambda w, x, y: (w * x).mean(), split=split, in_dims=(None, 0, 0))(torch.ones(()), x, y)
    both = token_budget(8, lambda pair: (pair[0] != 0).sum(1))
    assert torch.equal(gradacc.microbatch(lambda pair: pair[0].sum(1) * pair[1], split=both)((x, y)), x.sum(1) * y)


def test_what_is_reordered_may_be_the_batch_itself():
    batch = padded(LENGTHS)
    parts = token_budget(12, of_mask)(batch)
    assert isinstance(parts, Reordered)
    _, aux = gradacc.accumulate(loss_fn, has_aux=True)(PARAMS, parts)
    assert_trees_equal(aux["ids"], batch["score"])
    assert torch.equal(gradacc.microbatch(lambda batch: batch["score"])(parts), batch["score"])


MODULES = (
    "argparse ast asyncio bisect collections dataclasses datetime decimal email fractions functools heapq http.client inspect "
    "itertools json logging os pathlib random re socket statistics string subprocess textwrap threading unittest urllib.parse"
)


def docstrings() -> list[int]:
    """Of what these modules of the standard library define: lengths in words, up to 512 of them."""
    found: dict[str, None] = {}
    for module in map(pydoc.locate, MODULES.split()):
        things = [module, *(thing for name, thing in sorted(vars(module).items()) if not name.startswith("_"))]
        for cls in filter(inspect.isclass, things[:]):
            things += [thing for name, thing in sorted(vars(cls).items()) if not name.startswith("_")]
        docs = (getattr(thing, "__doc__", None) for thing in things)
        found.update(dict.fromkeys(doc for doc in docs if isinstance(doc, str) and doc.strip()))
    return [min(len(doc.split()), 512) for doc in found]


def test_the_page_s_figures():
    """Positions computed for 1024 docstrings, of Python 3.11; they differ a little from one to another."""
    lengths = docstrings()
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [lengths[place] for place in order[:1024]]
    assert (len(lengths), max(lengths)) == (1024, 512)
    costs = [cost(group, lengths) for group in token_budget(4096, lambda ids: lengths)(torch.ones(1024, 512)).order]
    in_their_order = [len(part) * max(part) for part in (lengths[n : n + 8] for n in range(0, 1024, 8))]
    assert max(costs) <= 4096
    rows = {
        "microbatch_size=8": (128, 1024 * 512),
        "the same, each cut to its longest example": (128, sum(in_their_order)),
        "split=token_budget(4096, length)": (len(costs), sum(costs)),
        "words": (None, sum(lengths)),
    }
    page = (Path(__file__).parents[2] / "docs" / "batches.md").read_text()
    for name, (number, total) in rows.items():
        (said,) = re.findall(rf"^\| `?{re.escape(name)}`? \|\s*(\d*)\s*\| ([\d,]+) \|$", page, re.MULTILINE)
        assert number is None or abs(int(said[0]) - number) <= 1
        assert int(said[1].replace(",", "")) == pytest.approx(
            total, rel=0.1 if sys.version_info[:2] == (3, 11) else 0.3
        )


def test_types() -> None:
    parts: Reordered = token_budget(8, lambda ids: (ids != 0).sum(1))(IDS)
    assert all(isinstance(part, Tensor) for part in parts)
