"""An accumulator's state, whatever it has seen, is loaded with any other state of that accumulator as ``like``."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as torch_pytree
from torch import Tensor

import gradacc
from gradacc import Mean, TrainState, _state_text, _structure, _tree
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import same
from tests.workers import SIZE


class Metrics(NamedTuple):
    """A node of aux."""

    a: Any
    b: Any


@dataclass
class Record:
    """A node of aux, registered with torch, with a field that may be None."""

    loss: Any
    rows: Any = None


torch_pytree.register_dataclass(Record)


class Secret:
    """A node of aux that holds more than its children."""

    def __init__(self, child, known):
        self.child, self.known = child, known


torch_pytree.register_pytree_node(Secret, lambda x: ([x.child], x.known), lambda xs, known: Secret(*xs, known))

PARAMS = {
    "w": torch.linspace(-1, 1, 3, dtype=torch.float64), "late": torch.ones(2, dtype=torch.bfloat16),
    "nothing": None, "c": [torch.tensor(1 + 2j)], "never": torch.ones(1),
}  # fmt: skip


def plain(params, x):
    late = params["late"].float().sum() if len(x) == 2 else 0.0
    return (x @ params["w"]).square().mean() + (params["c"][0] * 1j).real + late


def mean(params, x):
    return Mean(plain(params, x) * len(x), torch.tensor(len(x)))


def half(params, x):
    return plain(params, x).to(torch.bfloat16)


def with_aux(params, x):
    loss = plain(params, x)
    seen = Mean(x.sum(0), 2.5)
    aux = {
        "mean": loss.detach(),
        3: Metrics(x[:, 0].clone(), (Mean(x.sum().float(), len(x)), [None, {}, seen])),
        ("x", None): Record(Mean(x.sum(), True)),
    }
    return Mean(loss * len(x), len(x)), aux


ACCUMULATORS = {
    "mean over examples": gradacc.accumulator(plain),
    "sum": gradacc.accumulator(plain, reduction="sum"),
    "Mean": gradacc.accumulator(mean),
    "half": gradacc.accumulator(half),
    "dtype": gradacc.accumulator(plain, dtype=torch.float64),
    "aux": gradacc.accumulator(with_aux, has_aux=True),
    "argnums": gradacc.accumulator(lambda x, params: plain(params, x), argnums=(1,)),
}


def rows(n: int) -> Tensor:
    return torch.arange(3.0 * n, dtype=torch.float64).view(n, 3).sin()


def states(name: str) -> dict[str, Any]:
    """As a process could have been killed with."""
    init, update, merge, _ = ACCUMULATORS[name]
    start = init((PARAMS,) if name == "argnums" else PARAMS)

    def more(state: Any, n: int) -> Any:
        return update(state, rows(n), PARAMS) if name == "argnums" else update(state, PARAMS, rows(n))

    one = more(start, 3)
    return {
        "init": start, "empty": more(start, 0), "one": one, "all": more(one, 2), "first all": more(start, 2),
        "merged": merge(more(one, 1), more(start, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_any_state_is_like_any_other(name, tmp_path):
    """Saved between any two micro-batches, and loaded by a process that knows no more than ``init(params)``."""
    found = states(name)
    known = found if name in ("aux", "Mean") else {"init": found["init"], "all": found["all"]}
    for n, saved in enumerate(found.values()):
        folder = tmp_path / str(n)
        train = TrainState(PARAMS, {"m": torch.ones(2)}, 3)
        save(folder, {"train": train, "window": saved, "rng": torch.get_rng_state()})
        for like in known.values():
            before = _state_text.to_text(like)
            loaded = load(folder, {"train": train, "window": like, "rng": torch.zeros_like(torch.get_rng_state())})
            assert loaded["window"].facts == saved.facts
            assert same(loaded["window"], saved)
            assert same(loaded["train"], train)
            assert _state_text.to_text(like) == before
        _, update, _, finalize = ACCUMULATORS[name]
        args = (rows(2), PARAMS) if name == "argnums" else (PARAMS, rows(2))
        assert same(finalize(update(loaded["window"], *args)), finalize(update(saved, *args)))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (), (3,), (1, 3)])
def test_strides_are_a_tensors_usual_ones(tmp_path, shape):
    """Of a placeholder they would be 0, which autograd warns of in the next update."""
    w = torch.ones(shape)
    init, update, _, finalize = gradacc.accumulator(lambda w, x: (w * x).square().mean())
    save(
        tmp_path / "some", update(init(w), w, torch.ones(2)[:, None]) if shape == (1,) else update(init(w), w, w[None])
    )
    state = load(tmp_path / "some", init(w))
    assert state.grads.stride() == w.stride()
    state = update(state, w, w[None])
    assert finalize(state)[0].stride() == w.stride()
    unused = gradacc.accumulator(lambda p, x: (p["v"] * x).square().mean())
    both = {"v": torch.ones(()), "w": w}
    grads, _ = unused.finalize(unused.update(unused.init(both), both, torch.ones(2)))
    assert grads["w"].stride() == w.stride()


def test_classes_of_aux_come_back(tmp_path):
    found = states("aux")
    save(tmp_path, found["all"])
    aux = load(tmp_path, found["init"]).sums.aux
    assert type(aux) is dict
    assert type(aux[3]) is Metrics
    assert aux[3].b[1][:2] == [None, {}]
    assert type(aux["x", None]) is Record
    assert aux["x", None].rows is None
    assert same(aux[3].a, found["all"].sums.aux[3].a)


def test_what_is_not_the_state_of_that_accumulator(tmp_path):
    for name, other, message in (
        (
            "sum",
            "mean over examples",
            r"like\['s'\] is a state of an accumulator with reduction='mean', .*'sum' was saved",
        ),
        (
            "dtype",
            "mean over examples",
            r"like\['s'\] is a state of an accumulator with dtype=None, .*=torch.float64 was",
        ),
        (
            "aux",
            "mean over examples",
            r"like\['s'\] is a state of an accumulator with has_aux=False, .*=True was saved",
        ),
    ):
        for when in ("init", "all"):
            save(tmp_path / "c", {"s": states(name)[when]})
            with pytest.raises(ValueError, match=f"load: the checkpoint .*/c does not fit: {message}"):
                load(tmp_path / "c", {"s": states(other)["init"]})
    init = ACCUMULATORS["sum"].init
    save(tmp_path / "c", {"s": states("sum")["all"]})
    for change, message in (
        (
            {"w": torch.ones(4, dtype=torch.float64)},
            r"is of params\['w'\] float64 \(4,\), but float64 \(3,\) was saved",
        ),
        ({"w": torch.ones(3)}, r"is of params\['w'\] float32 \(3,\), but float64 \(3,\) was saved"),
        ({"c": []}, r"is of params\['c'\]\[0\] none, but complex64 \(\) was saved"),
        ({"more": torch.ones(1)}, r"is of params\['more'\] float32 \(1,\), but none was saved"),
    ):
        with pytest.raises(ValueError, match=rf"does not fit: like\['s'\] {message}"):
            load(tmp_path / "c", {"s": init({**PARAMS, **change})})
    with pytest.raises(ValueError, match=r"like\['s'\] was not saved"):
        load(tmp_path / "c", {"s": 1})
    with pytest.raises(
        ValueError, match=r"tree\['s'\].grads\['c'\]\[0\] \(complex64 \(\)\) was saved, but is not in like"
    ):
        load(tmp_path / "c", {"s": None})
    assert load(tmp_path / "c", {"s": ...}) == {"s": ...}
    save(tmp_path / "c", {"s": None})
    with pytest.raises(ValueError, match=r"like\['s'\].sums.weight was not saved"):
        load(tmp_path / "c", {"s": states("sum")["init"]})


def test_aux_of_a_class_that_cannot_be_told(tmp_path):
    """A state that has seen one micro-batch knows it."""

    @dataclass
    class Local:
        n: Any

    torch_pytree.register_dataclass(Local)
    for make, message in (
        (
            lambda n: {"x": Secret(n, "?")},
            r"holds a tests.checkpoint.test_states.Secret, and only a tree of the same",
        ),
        (
            Local,
            r"holds a tests.checkpoint.test_states.*<locals>.Local, which is no class of trees that this process has",
        ),
        (lambda n: {frozenset("a"): n}, "has the key frozenset"),
    ):
        init, update, _, finalize = gradacc.accumulator(
            lambda w, x, make=make: ((w * x).mean(), make(Mean(x.sum(), 1))), has_aux=True
        )
        w = torch.ones(())
        state = update(init(w), w, torch.ones(2))
        later = update(state, w, torch.ones(3))
        if "key" in message:
            with pytest.raises(TypeError, match=message):
                save(tmp_path, later)
            continue
        save(tmp_path, later)
        with pytest.raises(ValueError, match=f"does not fit: like {message}.*; pass a state after one update"):
            load(tmp_path, init(w))
        grads, (value, aux) = finalize(load(tmp_path, state))
        assert (grads, value) == (1, 1)
        assert next(leaf for leaf in _tree.flatten(aux)[0] if isinstance(leaf, Tensor)) == 5


def test_a_checkpoint_from_before_facts_were_saved(tmp_path, monkeypatch):
    from gradacc.checkpoint import _leaves

    found = states("aux")
    with monkeypatch.context() as patch:
        patch.setattr(_leaves, "facts", lambda tree: {})
        save(tmp_path, {"s": found["all"]})
    assert same(load(tmp_path, {"s": found["all"]})["s"], found["all"])
    with pytest.raises(ValueError, match=r"tree\['s'\].*was saved, but is not in like"):
        load(tmp_path, {"s": found["init"]})


def test_facts_that_somebody_made():
    """They name no class that is not a node of trees here, import nothing, and are told as what they are."""
    found = states("aux")
    text = _state_text.to_text(found["all"])
    for change in (
        "", "[]", "{}", "[" * 10_000, "3", text.replace('"facts"', '"fact"'), text.replace('"arrived"', '"arrive"'),
        text.replace("float64", "nn"), text.replace("float64", "load"), text.replace('"list"', '"set"'),
        text.replace("Metrics", "os.system"), text.replace('"Metrics"', '"pytest"'), text.replace('"Record"', '"Tensor"'),
        text.replace("tests.checkpoint.test_states", "antigravity"), text.replace("tests.checkpoint.test_states", ""),
        text.replace("[3]", "[-3]"), text.replace('"rows"', '"__class__"'), text.replace('"loss"', '"_"'),
    ):  # fmt: skip
        assert change != text
        with pytest.raises(ValueError, match="."):
            _state_text.from_text(found["init"], change)
    with pytest.raises(ValueError, match="no class of trees that this process has imported"):
        _structure._class("os", "system")
    with pytest.raises(ValueError, match="no class of trees that this process has imported"):
        _structure._class("pathlib", "Path")


def test_batched_states(tmp_path):
    init, update, _, finalize = ACCUMULATORS["Mean"]
    params = {name: param for name, param in PARAMS.items() if param is not None}
    stacked = torch.func.vmap(lambda x: update(init(params), params, x))(torch.stack([rows(3), rows(3) + 1]))
    save(tmp_path, stacked)
    found = load(tmp_path, init(params))
    assert same(found, stacked)
    assert same(torch.func.vmap(finalize)(found), torch.func.vmap(finalize)(stacked))


def save_and_load_on_ranks(group, path):
    """Rank 0 has seen nothing, the others one micro-batch each; none knows what the others have."""
    rank = dist.get_rank()
    mine = states("aux")["one" if rank else "init"]
    train = TrainState(PARAMS, {}, 7)
    save(path, {"train": train, "ranks": {rank: {"window": mine}}})
    init = ACCUMULATORS["aux"].init(PARAMS)
    like = {"train": train, "ranks": {r: {"window": init} if r == rank else ... for r in range(SIZE)}}
    found = load(path, like)["ranks"][rank]["window"]
    return same(found, mine), json.loads(_state_text.to_text(found))["facts"]["arrived"]


def test_each_rank_has_its_own(pool, tmp_path):
    assert pool.run(SIZE, save_and_load_on_ranks, str(tmp_path)) == [(True, rank > 0) for rank in range(SIZE)]
    init = ACCUMULATORS["aux"].init(PARAMS)
    found = load(tmp_path, {"train": TrainState(PARAMS, {}, 0), "ranks": {r: {"window": init} for r in range(SIZE)}})
    assert same(found["ranks"][1]["window"], states("aux")["one"])
    assert same(found["ranks"][0]["window"], init)
