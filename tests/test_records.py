"""Batches as people have them: mappings of any class and dataclasses are the dict that they are, in every form of a call."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gradacc
from gradacc import _tree
from tests.helpers import assert_trees_close, some_slow

D = torch.float64
W = torch.linspace(-1, 1, 3, dtype=D)
X = torch.arange(18, dtype=D).view(6, 3).sin()


class Sub(dict):
    """A dict subclass."""


class User(collections.UserDict):
    """What transformers' are."""


class Chain(collections.ChainMap):
    """A Mapping that is neither."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str
    none: None = None
    number: int = 3


@dataclasses.dataclass(slots=True)
class Slots:
    x: torch.Tensor
    name: str
    none: None = None
    number: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.number = 3


ITEMS = {"x": X, "name": "a lone string", "none": None, "number": 3}
BATCHES = {
    "BatchEncoding": transformers.BatchEncoding(ITEMS),
    "BatchFeature": transformers.BatchFeature(ITEMS),
    "dict subclass": Sub(ITEMS),
    "Counter": collections.Counter(ITEMS),
    "UserDict": User(ITEMS),
    "ChainMap": Chain(ITEMS),
    "proxy": types.MappingProxyType(ITEMS),
    "dataclass": Frozen(X, "a lone string"),
    "with slots": Slots(X, "a lone string"),
}


def get(batch: Any, key: str) -> Any:
    return getattr(batch, key) if dataclasses.is_dataclass(batch) else batch[key]


def loss_of(cls):
    def loss(w, batch):
        assert type(batch) is cls
        if not dataclasses.is_dataclass(batch):
            assert list(batch) == list(ITEMS)
        assert get(batch, "name") == "a lone string"
        assert get(batch, "none") is None
        return (get(batch, "x") @ w).square().mean() * get(batch, "number")

    return loss


LARGE = torch.func.grad(lambda w: (X @ w).square().mean() * 3)(W)


@pytest.mark.parametrize("name", BATCHES)
def test_every_form_of_a_call(name):
    batch = BATCHES[name]
    loss, w = loss_of(type(batch)), W
    assert_trees_close(gradacc.accumulate(loss, steps=4)(w, batch), LARGE)
    assert_trees_close(gradacc.accumulate(loss, microbatch_size=4)(w, batch), LARGE)
    assert_trees_close(gradacc.accumulate(loss)(w, [batch, batch]), LARGE)
    acc = gradacc.accumulator(loss)
    assert_trees_close(acc.finalize(acc.update(acc.init(w), w, batch))[0], LARGE)
    batched = torch.func.vmap(gradacc.accumulate(loss, steps=2), (0, None))(torch.stack([w, w]), batch)
    assert_trees_close(batched, torch.stack([LARGE, LARGE]))
    whole = gradacc.accumulate(lambda w, x, batch: loss(w, batch) + 0 * x.sum(), steps=2, in_dims=(None, 0, None))
    assert_trees_close(whole(w, X, batch), LARGE)
    assert get(batch, "x") is X


@pytest.mark.parametrize("name", BATCHES)
def test_without_steps_it_is_one_batch(name):
    with pytest.raises(TypeError, match="the batch must be an iterable of micro-batches, got .*Pass steps="):
        gradacc.accumulate(loss_of(type(BATCHES[name])))(W, BATCHES[name])


@pytest.mark.parametrize("name", some_slow(["BatchEncoding", "dict subclass", "dataclass"], "BatchEncoding"))
def test_compiled(name):
    batch = BATCHES[name]
    grad_fn = gradacc.accumulate(lambda w, b: (get(b, "x") @ w).square().mean() * get(b, "number"), steps=2)
    grad_fn(W, batch)
    assert_trees_close(torch.compile(grad_fn, backend="aot_eager", fullgraph=True)(W, batch), LARGE)


def test_lists_of_strings_stay_an_error():
    batch = transformers.BatchEncoding({"x": X, "text": ["a", "b", "c", "d", "e", "f"]})
    with pytest.raises(TypeError, match=r"args\[1\]\['text'\] is a list of 6 items \(strings\)"):
        gradacc.accumulate(lambda w, b: (b["x"] @ w).mean(), steps=2)(W, batch)


def test_paths_are_as_one_would_write_them():
    tree = {"a": Frozen(X, "x"), "b": User(c=X)}
    assert _tree.paths(_tree.flatten(tree)[1], "tree") == [
        "tree['a'].x",
        "tree['a'].name",
        "tree['a'].number",
        "tree['b']['c']",
    ]
    prefix = Frozen(0, None, None, None)
    grad_fn = gradacc.accumulate(lambda w, b: (b.x @ w).square().mean() * b.number, steps=2, in_dims=(None, prefix))
    assert_trees_close(grad_fn(W, Frozen(X, "x")), LARGE)


def test_parameters_may_be_one_too():
    @dataclasses.dataclass
    class Params:
        w: torch.Tensor
        b: torch.Tensor

    grads = gradacc.accumulate(lambda p, x: (x @ p.w + p.b).square().mean(), steps=3)(Params(W, W[0]), X)
    expected = torch.func.grad(lambda p: (X @ p["w"] + p["b"]).square().mean())({"w": W, "b": W[0]})
    assert type(grads) is Params
    assert_trees_close(vars(grads), expected)


def test_what_an_encoding_holds_beside_its_tensors_is_left_behind():
    """It is of all examples: of a part it would be wrong."""
    encodings = [types.SimpleNamespace(n_sequences=1)] * 6
    batch = transformers.BatchEncoding({"x": X}, encoding=encodings)
    seen = []
    gradacc.accumulate(lambda w, b: seen.append(b.encodings) or (b["x"] @ w).mean(), steps=2)(W, batch)
    assert seen == [None, None]
    assert batch.encodings is encodings


class Picky(dict):
    def __init__(self, x, *, more):
        super().__init__(x=x)


class Renames(dict):
    def __init__(self, items):
        super().__init__({f"own {key}": value for key, value in items.items()})


@pytest.mark.parametrize(
    ("batch", "why"),
    [(Picky(X, more=1), "missing 1 required keyword"), (Renames({"x": X}), r"it has the keys \['own own x'\]")],
    ids=["constructor", "keys"],
)
def test_a_mapping_that_cannot_be_made_of_its_items(batch, why):
    with pytest.raises(
        TypeError, match=f"a part of a .*, a mapping, is made as {type(batch).__name__}.*{why}.* Pass dict"
    ):
        gradacc.accumulate(lambda w, b: (next(iter(b.values())) @ w).mean(), steps=2)(W, batch)


class Graphs:
    """As PyTorch Geometric's Batch is: opaque, with a number of its own."""

    def __init__(self, x):
        self.x = x


def test_opaque_batches():
    def loss(w, graphs):
        return (graphs.x @ w).square().mean()

    def counted(w, graphs):
        return gradacc.Mean((graphs.x @ w).square().sum() * 3, len(graphs.x))

    with pytest.raises(TypeError, match=r"is a .*Graphs, which .*split=, and return gradacc.Mean\(loss_sum, number\)"):
        gradacc.accumulate(loss, steps=2)(W, Graphs(X))
    with pytest.raises(
        TypeError, match=r"it holds no tensor to count. Return gradacc.Mean\(loss_sum, number\) instead$"
    ):
        gradacc.accumulate(loss)(W, [Graphs(X)])
    assert_trees_close(gradacc.accumulate(counted)(W, [Graphs(X[:2]), Graphs(X[2:])]), LARGE)
    by_split = gradacc.accumulate(counted, split=lambda data: (Graphs(torch.stack(data[i : i + 4])) for i in (0, 4)))
    assert_trees_close(by_split(W, list(X)), LARGE)


class Pair(NamedTuple):
    sequences: PackedSequence
    y: torch.Tensor


@pytest.mark.parametrize("lengths", [[2, 2, 2], [6]], ids=str)
def test_packed_sequences(lengths):
    """Also of one sequence, which would go through by chance, cut along its time."""
    packed = pack_padded_sequence(torch.ones(max(lengths), len(lengths), 3, dtype=D), lengths)
    for batch in (packed, Pair(packed, X)):
        with pytest.raises(
            TypeError, match=r"args\[1\](.sequences)? is a PackedSequence.*iterable of packed micro-batches"
        ):
            gradacc.accumulate(lambda w, b: (b[0] @ w).mean(), steps=2)(W, batch)
    counted = gradacc.accumulate(lambda w, b: gradacc.Mean((b.data @ w).sum(), len(b.data)))
    assert_trees_close(counted(W, [packed, packed]), torch.ones(3, dtype=D))


@dataclasses.dataclass
class Linked:
    """Holds itself, as a trainer's parts do."""

    name: str
    other: Any = None


def test_an_object_that_holds_itself_is_passed_whole():
    linked = Linked("a")
    linked.other = {"back": linked}

    def loss(w, x, one, *, more):
        assert one is linked
        assert more["linked"] is linked
        return (x["x"] @ w).square().mean() * more["three"]

    grad_fn = gradacc.accumulate(loss, steps=2)
    assert_trees_close(grad_fn(W, {"x": X}, linked, more={"linked": linked, "three": 3}), LARGE)
    with pytest.raises(TypeError, match=r"args\[1\]\['linked'\] is a .*Linked, which cannot be split"):
        gradacc.accumulate(lambda w, b: (b["x"] @ w).mean(), steps=2)(W, {"x": X, "linked": linked})
