"""``load(path, tree)`` after ``save(path, tree)`` is ``tree``, bit for bit, also after a process was killed in between."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

import gradacc
from gradacc import Mean, TrainState
from gradacc.checkpoint import load, save
from tests.checkpoint.cases import Node, Pair, blank, entries, same
from tests.helpers import some_slow


def optimized(optimizer):
    """A state after two steps."""
    params = {"w": torch.randn(3, 2), "b": [torch.randn(2), torch.randn(())]}
    state = TrainState(params, optimizer.init(params))
    step = gradacc.train_step(
        gradacc.accumulate_and_value(lambda p, x: (x @ p["w"] + p["b"][0]).square().mean() + p["b"][1] ** 2, steps=2),
        optimizer,
    )
    for _ in range(2):
        state, _ = step(state, torch.randn(4, 3))
    return state, step


@pytest.mark.parametrize(
    "optimizer",
    [
        gradacc.optim.sgd(lr=0.1),
        gradacc.optim.sgd(lr=0.1, momentum=0.9),
        gradacc.optim.adamw(lr=lambda step: 0.1 / (step + 1)),
        gradacc.optim.skip_nonfinite(gradacc.optim.clip_by_global_norm(gradacc.optim.adam(lr=0.1), 1.0)),
        gradacc.optim.skip_spikes(gradacc.optim.adamw(lr=0.1), window=2),
        gradacc.optim.from_torch(torch.optim.RMSprop, lr=0.1),
    ],
)
def test_training_goes_on_from_there(optimizer, tmp_path):
    state, step = optimized(optimizer)
    save(tmp_path, state)
    x = torch.randn(4, 3)
    loaded = load(tmp_path, blank(state))
    assert same(loaded, state)
    assert same(step(loaded, x), step(state, x))


def test_structure(tmp_path):
    tree = {
        "a": (1, [torch.ones(2), None], {}),
        "b": Pair(Mean(torch.ones(()), 2.0), Node({"x": torch.zeros(1)})),
        3: {"3": ()},
    }
    save(str(tmp_path), tree)
    found = load(str(tmp_path), blank(tree))
    assert same(found, tree)
    assert isinstance(found["b"].second, Node)
    tied = torch.ones(2)
    save(tmp_path, [tied, tied])
    one, other = load(tmp_path, [tied, tied])
    assert one.data_ptr() != other.data_ptr()
    save(tmp_path, None)
    assert load(tmp_path, None) is None


def test_the_last_one_counts_and_is_alone(tmp_path):
    for number in range(3):
        save(tmp_path, {"a": torch.tensor(number), "only once": 1} if number == 0 else {"a": torch.tensor(number)})
    assert load(tmp_path, {"a": torch.tensor(0)})["a"] == 2
    assert len(entries(tmp_path)) == 2


def test_the_data_are_a_checkpoint_of_torch(tmp_path):
    """One that torch's own `load` reads."""
    save(tmp_path, {"a": {"w": torch.arange(3.0)}, "n": 1})
    (data,) = tmp_path.glob("data-*")
    found = {"['a']['w']": torch.zeros(3)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=data, no_dist=True)
    assert found["['a']['w']"].tolist() == [0, 1, 2]


# What is left out


def test_what_is_left_out_stays_dots(tmp_path):
    state, _ = optimized(gradacc.optim.adam(lr=0.1))
    save(tmp_path, {"train": state, "train2": 5})
    found = load(tmp_path, {"train": TrainState(blank(state.params), ..., ...), "train2": ...})
    assert same(found["train"].params, state.params)
    assert found["train"].opt_state is found["train2"] is ...
    assert load(tmp_path, {"train": ..., "train2": 0, "more": ...})["train2"] == 5
    with pytest.raises(ValueError, match=r"tree\['train2'\] \(int\) was saved, but is not in like"):
        load(tmp_path, {"train": ...})
    with pytest.raises(TypeError, match=r"tree\['x'\] is a .*ellipsis"):
        save(tmp_path, {"x": ...})


# Death


def run(*arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.checkpoint.killed", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("carried", some_slow([0, 1], 1))
def test_stopped_between_micro_batches(tmp_path, carried):
    """SIGKILL anywhere in windows of micro-batches, in a loss, in a save: what comes out is the run that was left alone."""
    first, *began, deaths = map(int, run("window", str(tmp_path / "c"), str(carried)).split())
    assert first == began[0] == 0
    assert began == sorted(began)
    assert len(began) == deaths + 1 > 10
    assert {seen % 4 for seen in began} == {0, 1, 2, 3}


def test_a_process_killed_anywhere_in_a_save(tmp_path):
    """SIGKILL before each thing that it does to the folder: the old checkpoint is there, or the new one."""
    assert int(run("everywhere", str(tmp_path / "c"))) >= 15


def test_a_rank_killed_anywhere_in_a_save(tmp_path):
    """The same with each of two ranks; the other one is told."""
    assert int(run("ranks", str(tmp_path / "c"))) >= 20


@pytest.mark.slow
def test_processes_killed_at_random_moments(tmp_path):
    """The same at 25 moments of the clock, after a first save each: no checkpoint that was complete is lost."""
    assert int(run("anytime", str(tmp_path / "c"), "25")) >= 25


def test_a_process_that_is_stopped_in_a_save(tmp_path):
    """Another one is told who saves, and nothing changes; when the first has been killed, its lock is gone."""
    assert int(run("held", str(tmp_path / "c"))) >= 10


def test_two_jobs_that_save_into_one_folder(tmp_path):
    """Each saves, or is told of the other; what is there is always one of theirs, all of it."""
    saved, refused, replaced, *other = map(int, run("rivals", str(tmp_path / "c"), "3").split())
    assert min(saved, refused, other[0], other[1]) > 0
    assert replaced + other[2] > 0


def test_a_reader_beside_a_writer(tmp_path):
    """One that comes between finds the next checkpoint, not an error."""
    save(tmp_path, [torch.full((5000,), 0.0), 0])
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            save(tmp_path, [torch.full((5000,), float(number)), number])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 200
        while len(seen) < 100 or len(set(seen)) < 4:
            assert time.monotonic() < deadline
            tensor, number = load(tmp_path, [torch.zeros(5000), 0])
            assert bool((tensor == number).all())
            seen.append(number)
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen)
