"""Whatever tree `save` takes, `load` gives back in any process; what it cannot, it refuses, and the checkpoint stays."""

import enum
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gradacc import Mean, TrainState, _keys, _tree
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import Node, Pair, blank, entries, same
from tests.workers import SIZE


class Color(enum.Enum):
    RED = "red"
    BOTH = (1, "x")


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Opaque(enum.Enum):
    """Of values whose reprs are addresses."""

    ONE = object()


class Place(NamedTuple):
    row: int
    name: str


class Plain:
    """With object's repr."""


class Named:
    """With a repr of its own, which may say anything."""

    def __repr__(self):
        return "key"


class Batch(dict):
    """A tree that only torch's registry knows, as transformers' ``ModelOutput`` is registered."""


torch_pytree.register_pytree_node(
    Batch,
    lambda node: (list(node.values()), list(node)),
    lambda children, keys: Batch(zip(keys, children, strict=True)),
)

STABLE = [
    "a", "", "naïve", "a']['b", "\n\0\ud800", "🫨", b"bytes", 0, 1, -3, 10**30, True, False, None, 0.5, -0.0, math.inf,
    math.nan, 2j, (), (1, "x"), ((None,), 0.1), Place(1, "a"), Color.RED, Color.BOTH, Bits.A, Bits.A | Bits.B, torch.float32,
    torch.device("cpu"), torch.Size([2]),
]  # fmt: skip
UNSTABLE = [
    Plain(), Plain, len, frozenset(), frozenset("abc"), (1, frozenset("ab")), Opaque.ONE, Named(), Path("a"), range(3), ...,
    Place(1, Plain()),
]  # fmt: skip


@pytest.mark.parametrize("key", UNSTABLE, ids=[type(key).__name__ + str(n) for n, key in enumerate(UNSTABLE)])
def test_a_key_that_another_process_calls_otherwise(key, tmp_path):
    save(tmp_path / "c", {"old": 1})
    before = sorted((tmp_path / "c").rglob("*"))
    with pytest.raises(TypeError, match=rf"save: tree\['x'\] has the key {re.escape(repr(key))}, .*; use a str"):
        save(tmp_path / "c", {"x": {key: torch.ones(1)}})
    assert sorted((tmp_path / "c").rglob("*")) == before
    assert load(tmp_path / "c", {"old": 0}) == {"old": 1}
    with pytest.raises(TypeError, match="save: tree has the key"):
        save(tmp_path / "new", {key: {}})
    assert not (tmp_path / "new").exists()


def keyed() -> dict[str, Any]:
    """A tree for each key: some are equal."""
    return {str(index): {key: index} for index, key in enumerate(STABLE)}


def test_a_key_is_the_same_in_another_process(tmp_path):
    """With other hashes, and other addresses."""
    script = f"from tests.checkpoint.test_trees import *; save({str(tmp_path / 'c')!r}, keyed())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=200)
    assert load(tmp_path / "c", blank(keyed())) == keyed()


def test_a_key_is_the_same_in_another_version_of_python(tmp_path, monkeypatch):
    """Which escapes other characters: Python 3.11 this one, 3.12 not."""
    other = "['\\U0001fae8']" if "\\" not in repr("\U0001fae8") else "['\U0001fae8']"
    save(tmp_path, {"\U0001fae8": 3, "w": torch.ones(1)})
    manifest = tmp_path / "checkpoint.json"
    from gradacc.checkpoint import _folder

    body = _folder.read("load", tmp_path)
    for part in ("leaves", "values"):
        body[part] = {other if "w" not in key else key: value for key, value in body[part].items()}
    _folder.publish(tmp_path, body)
    assert other in body["leaves"]
    assert manifest.exists()
    assert load(tmp_path, {"\U0001fae8": 0, "w": torch.zeros(1)})["\U0001fae8"] == 3
    assert _keys.escaped("é\\n") == "\\xe9\\n"


def test_two_keys_of_one_repr(tmp_path):
    with pytest.raises(ValueError, match=r"save: two leaves are called tree\[nan\]; give dict keys different reprs"):
        save(tmp_path / "c", {float("nan"): 1, float("nan"): 2})
    assert not (tmp_path / "c").exists()


def test_a_child_is_called_by_its_name_not_by_its_position(tmp_path):
    """Where one before it is None, or the node has other keys."""
    save(tmp_path, [Batch(logits=torch.ones(2)), Batch(loss=1, logits=2)])
    with pytest.raises(ValueError, match=r"like\[0\]\['loss'\] was not saved"):
        load(tmp_path, [Batch(loss=torch.ones(2)), Batch(loss=1, logits=2)])
    found = load(tmp_path, [Batch(logits=torch.zeros(2)), Batch(logits=0, loss=0)])
    assert found[1] == {"loss": 1, "logits": 2}
    save(tmp_path, Two(None, torch.ones(2)))
    with pytest.raises(ValueError, match=r"like\[<flat index 'first'>\] was not saved"):
        load(tmp_path, Two(torch.zeros(2), None))
    assert load(tmp_path, Two(None, torch.zeros(2))).second.tolist() == [1, 1]


class Two:
    """A dataclass to torch, whose fields that are None are not children."""

    def __init__(self, first, second):
        self.first, self.second = first, second


torch_pytree.register_dataclass(Two, field_names=["first", "second"], drop_field_names=[])


# Any tree


def taken_away():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: deprecated
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


TENSORS = {
    **{str(dtype)[6:]: torch.tensor([0.0, 1, 3]).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    )},
    "0-dim": torch.tensor(math.nan), "empty": torch.empty(2, 0), "conj": torch.tensor([1 + 2j]).conj(),
    "neg": torch.tensor([1 + 2j]).conj().imag, "transposed": torch.arange(6.0).view(2, 3).t(), "strided": torch.arange(9)[1::2],
    "expanded": torch.ones(1).expand(4), "parameter": nn.Parameter(torch.ones(2)),
    "graph": torch.ones(2, requires_grad=True) * 2, "float4": torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}  # fmt: skip
with torch.inference_mode():
    TENSORS["inference"] = torch.ones(2)
BAD = {
    "sparse": torch.eye(2).to_sparse(), "meta": torch.ones(2, device="meta"), "bytes": b"x", "complex": 1j, "set": {1},
    "function": len, "int4": torch.empty(2, dtype=torch.int4), "bits": torch.empty(2, dtype=torch.bits8),
    "no memory": taken_away(), "zero": torch._efficientzerotensor(3),
    "quantized": quantized(),
    "long": 10**4300, "longer": -(10**5000), "module": nn.Linear(1, 1), "batch": Plain(),
}  # fmt: skip


def leaf_called(name: str) -> Any:
    """By name: Hypothesis prints what it draws, and not every tensor can be printed."""
    return (TENSORS | BAD)[name]


VALUES = st.one_of(
    st.integers(),
    st.sampled_from([10**4299, -(10**4300 - 1)]),
    st.floats(),
    st.booleans(),
    st.text(),
    st.just("\ud800"),
)
LEAVES = st.one_of(st.sampled_from(sorted(TENSORS)).map(leaf_called), VALUES)


def containers(children: Any, keys: Any) -> Any:
    dicts = st.dictionaries(keys, children, max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.builds(Pair, children, children),
        st.builds(Mean, children, children),
        st.builds(Node, children),
        st.builds(Two, children, children),
        st.builds(TrainState, children, children, carry=children),
        st.dictionaries(st.text(max_size=2), children, max_size=2).map(Batch),
    )


KEYS = st.one_of(st.sampled_from(STABLE), st.text(max_size=3), st.integers(0, 2))
GOOD = st.recursive(st.one_of(LEAVES, st.none()), lambda inner: containers(inner, KEYS), max_leaves=8)
ANY = st.recursive(
    st.one_of(LEAVES, st.none(), LEAVES, st.sampled_from(sorted(BAD)).map(leaf_called)),
    lambda inner: containers(inner, st.one_of(KEYS, KEYS, st.sampled_from(UNSTABLE))),
    max_leaves=8,
)


def plain(tree: Any) -> Any:
    """What comes back: without graphs."""
    return _tree.map_tensors(torch.Tensor.detach, tree)


def elsewhere(tree: Any) -> Any:
    """The tree with keys and nodes of another process."""
    leaves, treedef = _tree.flatten(tree)
    there = pickle.loads(pickle.dumps(_tree.unflatten(treedef, range(len(leaves)))))
    indices, structure = _tree.flatten(there)
    return _tree.unflatten(structure, [leaves[index] for index in indices])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples, so that each is saved in the place of the one before."""
    return tmp_path_factory.mktemp("any") / "c"


@given(GOOD)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_good_tree_comes_back(folder, tree):
    save(folder, tree)
    like = blank(tree)
    found = load(folder, like)
    assert same(found, plain(tree))
    assert len(entries(folder)) == 2


@given(ANY)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_comes_back_or_is_refused(folder, tree):
    """And then the checkpoint that was there is as it was."""
    save(folder, {"old": torch.arange(3)})
    before = sorted(path for path in folder.rglob("*"))
    told = ""
    try:
        save(folder, tree)
    except (TypeError, ValueError) as error:
        told = str(error)
    if not told:
        assert same(load(folder, elsewhere(blank(tree))), plain(tree))
        return
    assert re.match(r"save: (tree|two leaves are called tree)", told)
    assert sorted(path for path in folder.rglob("*")) == before
    assert load(folder, {"old": torch.zeros(3, dtype=torch.int64)})["old"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("leaf", BAD.values(), ids=BAD)
def test_a_leaf_that_cannot_come_back(leaf, tmp_path):
    save(tmp_path, {"old": 1})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((TypeError, ValueError), match=r"save: tree\['x'\] is "):
        save(tmp_path, {"x": leaf})
    assert sorted(tmp_path.rglob("*")) == before


def test_inside_a_transform(tmp_path):
    def loss(x):
        with pytest.raises(TypeError, match=r"save: tree\['x'\] is a tensor inside torch.func.vmap or grad; call this"):
            save(tmp_path / "c", {"x": x})
        return x.sum()

    torch.func.grad(loss)(torch.ones(3))
    torch.func.vmap(loss)(torch.ones(3, 2))
    assert not (tmp_path / "c").exists()


def test_an_int_that_another_process_does_not_read(tmp_path):
    """This one has been told to."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(
            ValueError, match=r"save: tree\['n'\] is an int of 14285 bits, more than Python reads as digits"
        ):
            save(tmp_path / "c", {"n": 10**4300})
        assert not (tmp_path / "c").exists()
    finally:
        sys.set_int_max_str_digits(limit)


# Ranks

ONE_TREE = {
    "same": (lambda rank: {"x": [1, 2]}, None),
    "keys": (lambda rank: {"x": {rank: 1}, f"of {rank}": 2}, None),
    "none": (lambda rank: {"x": [1, 2] if rank == 0 else None, "y": None if rank < 2 else torch.ones(1)}, None),
    "ordered": (lambda rank: {"x": {"a": 1}} if rank else OrderedDict(x=OrderedDict(a=1)), None),
    "length": (
        lambda rank: {"x": [1, 2] if rank < 2 else [1, 2, 3]},
        r"\['x'\] .* ranks 0 and 2: a list of 2 and a list of 3",
    ),
    "no length": (lambda rank: {"x": [1] if rank else []}, r"\['x'\] .* ranks 0 and 1: a list of 0 and a list of 1"),
    "leaf": (lambda rank: {"x": {"a": 1} if rank == 2 else 1}, r"\['x'\] .* ranks 0 and 2: a leaf and a dict"),
    "tensor": (
        lambda rank: {"x": [torch.ones(2)] if rank == 1 else torch.ones(2)},
        r"\['x'\] .* ranks 0 and 1: a leaf and a list of 1",
    ),
    "class": (
        lambda rank: TrainState(1, 2) if rank else {"params": 1, "opt_state": 2},
        r" is not .* ranks 0 and 1: a dict and a TrainState of",
    ),
    "kind": (lambda rank: {"x": [1] if rank else {0: 1}}, r"\['x'\] .* ranks 0 and 1: a dict and a list of 1"),
}


def save_one_of(group, path, how):
    tree = ONE_TREE[how][0](torch.distributed.get_rank())
    try:
        save(path, tree)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("how", ONE_TREE)
def test_ranks_whose_trees_are_not_one(pool, how, tmp_path):
    """What no ``like`` could load is refused on every rank, and the checkpoint that was there stays."""
    save(tmp_path, {"old": 1})
    before = sorted(tmp_path.rglob("*"))
    message = ONE_TREE[how][1]
    for answer in pool.run(SIZE, save_one_of, str(tmp_path), how):
        assert (answer is None) if message is None else re.match("save: tree" + message, answer), answer
    if message is None:
        everything: Any = {}
        for rank in range(SIZE):
            for key, value in ONE_TREE[how][0](rank).items():
                if isinstance(value, dict):
                    everything.setdefault(key, {}).update(value)
                elif value is not None or key not in everything:
                    everything[key] = value
        assert same(load(tmp_path, blank(everything)), everything)
    else:
        assert sorted(tmp_path.rglob("*")) == before
