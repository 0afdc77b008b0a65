"""No hang without an end: ranks that differ, raise, are killed or stop; and a NaN reaches everybody."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch

import gradacc
from tests.helpers import some_slow

SECONDS = 10
"""The process group's timeout in tests with processes that die."""


class Pair(NamedTuple):
    """Parameters with two names."""

    a: torch.Tensor
    b: torch.Tensor


def outcome(group, params, sync_options, options):
    """What two calls gave or raised."""

    def loss(params, x):
        values = params.values() if isinstance(params, dict) else params
        return sum(p.double().sum() for p in values) * x.mean()

    grad_fn = gradacc.accumulate(loss, steps=2, sync=gradacc.all_reduce(group, **sync_options), **options)
    messages = []
    for _ in range(2):
        try:
            grad_fn(params, torch.ones(4, 1))
        except ValueError as error:
            messages.append(str(error))
    return messages


A, B = torch.ones(2, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"a": A, "b": B},
            {"a": A, "b": B.double()},
            r"ranks 0 and 1 differ: params\['b'\] is torch.float32 of shape \(4,\) on rank 0, torch.float64",
        ),
        (
            {"a": A, "b": B},
            {"a": A.t(), "b": B.double()},
            r"params\['a'\] is torch.float32 of shape \(2, 3\) on rank 0, torch.float32 of shape \(3, 2\) on rank 1",
        ),
        (
            {"a": A, "b": B},
            {"a": A, "c": B},
            r"the first parameter that differs is params\['b'\] on rank 0, params\['c'\] on rank 1",
        ),
        ({"a": A, "b": B}, {"a": A}, r"rank 0 has 2 parameters, params\['b'\] among them, the other 1"),
        ({"a": A}, {"a": A, "b": B}, r"rank 1 has 2 parameters, params\['b'\] among them, the other 1"),
        (Pair(A, B), (A, B), r"the first parameter that differs is params.a on rank 0, params\[0\] on rank 1"),
    ],
)
def test_ranks_that_differ_get_the_same_error(pool, first, second, message):
    """On every rank, the third one too, which agrees with the first; every time; and the pool goes on."""
    answers = pool.run_each(3, outcome, [(first, {}, {}), (second, {}, {}), (first, {}, {})])
    assert len({tuple(messages) for messages in answers}) == 1
    assert len(answers[0]) == 2
    assert all(re.search(message, text) for text in answers[0])
    assert "process group" in answers[0][0]
    assert pool.run(3, outcome, {"a": A}, {}, {}) == [[], [], []]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (({}, {"dtype": torch.float64}), "dtype=None on rank 0, dtype=torch.float64 on rank 1"),
        (({}, {"reduction": "sum"}), "reduction='mean' on rank 0, reduction='sum' on rank 1"),
        (({"overlap": True}, {}), "overlap=False on rank 0, overlap=True on rank 1"),
        (({"compress": torch.bfloat16}, {}), "compress=None on rank 0, compress=torch.bfloat16 on rank 1"),
    ],
)
def test_options_that_differ(pool, second, message):
    answers = pool.run_each(2, outcome, [({"a": A}, {}, {}), ({"a": A}, *second)])
    assert answers[0] == answers[1]
    assert all(message in text for text in answers[0])


def mixed(group):
    def loss(w, x):
        return gradacc.Mean((w * x).sum(), len(x)) if group.rank() else (w * x).mean()

    try:
        gradacc.accumulate(loss, steps=2, sync=gradacc.all_reduce(group))(torch.ones(3), torch.ones(4, 3))
    except ValueError as error:
        return str(error)


def test_losses_that_differ(pool):
    answers = pool.run(2, mixed)
    assert answers[0] == answers[1]
    assert "ranks 0 and 1 differ: loss_fn returned a tensor, and a Mean" in answers[0]


class Own(Exception):
    """The user's."""


def raising(group, bad_call, where, overlap):
    """Four calls, of which one raises on rank 1."""
    calls = []

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise Own("in backward")

    def loss(w, x):
        calls.append(1)
        number, microbatch = divmod(len(calls) - 1, 2)
        y = x @ w["a"] @ w["b"]
        if group.rank() == 1 and number == bad_call and microbatch == 1:
            if where == "loss":
                raise Own("in the loss")
            y = Broken.apply(x @ w["a"]) @ w["b"]
        return y.square().mean()

    grad_fn = gradacc.accumulate_and_value(loss, steps=2, sync=gradacc.all_reduce(group, overlap=overlap))
    params, answers = {"a": torch.ones(3, 600), "b": torch.ones(600, 2)}, []
    for call in range(4):
        calls[:] = [1] * (2 * call)
        try:
            answers.append(grad_fn(params, torch.ones(4, 3))[1].item())
        except (Own, RuntimeError) as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["loss", "backward"])
@pytest.mark.parametrize("bad_call", [0, 2])
def test_a_rank_that_raises(pool, bad_call, where, overlap):
    """Its own error there, an error that names it everywhere else; the calls before and after it are right."""
    answers = pool.run(3, raising, bad_call, where, overlap)
    for rank, calls in enumerate(answers):
        bad = calls.pop(bad_call)
        assert calls == [1800.0**2] * 3
        if rank == 1:
            assert bad == ("Own: in the loss" if where == "loss" else "Own: in backward")
        else:
            assert "because the call raised on rank 1 of process group" in bad


def loader_raises(group):
    def microbatches():
        yield torch.ones(2, 3)
        if group.rank() == 0:
            raise Own("no more data")

    grad_fn = gradacc.accumulate(lambda w, x: (w * x).mean(), sync=gradacc.all_reduce(group))
    try:
        grad_fn(torch.ones(3), microbatches())
    except (Own, RuntimeError) as error:
        return type(error).__name__


def test_an_iterable_that_raises(pool):
    assert pool.run(2, loader_raises) == ["Own", "RuntimeError"]


def nowhere(group):
    grad_fn = gradacc.accumulate(lambda w, x: x.mean(), steps=2, sync=gradacc.all_reduce(group))
    try:
        grad_fn(torch.ones(3), torch.ones(4, 3) if group.rank() else torch.ones(0, 3))
    except ValueError as error:
        return str(error)


def bad_parameters(group):
    grad_fn = gradacc.accumulate(lambda w, x: (w * x).mean(), steps=2, sync=gradacc.all_reduce(group))
    try:
        grad_fn(torch.ones(3, dtype=torch.int64 if group.rank() else torch.float32), torch.ones(4, 3))
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_parameters_that_are_none_on_one_rank(pool):
    other, own = pool.run(2, bad_parameters)
    assert other.startswith("RuntimeError") and "the call raised on rank 1" in other  # noqa: PT018
    assert own.startswith("TypeError") and "int64" in own  # noqa: PT018


def only_with_examples(group):
    """A loss that cannot be evaluated without examples."""
    grad_fn = gradacc.accumulate_and_value(
        lambda w, x: (w * x).max(1)[0].mean() + 0 * x.max(), steps=2, sync=gradacc.all_reduce(group)
    )
    x = torch.ones(4, 3) if group.rank() else torch.ones(0, 3)
    return [grad_fn(torch.ones(3), x)[1].item() for _ in range(2)]


def test_a_rank_without_examples_never_runs_the_loss(pool):
    assert pool.run(2, only_with_examples) == [[1.0, 1.0]] * 2


def test_a_loss_that_depends_on_no_parameter_on_any_rank(pool):
    answers = pool.run(2, nowhere)
    assert answers[0] == answers[1]
    assert "does not depend on any parameter" in answers[0]


def not_a_number(group, compress):
    def loss(w, x):
        return (w * x).square().mean()

    x = torch.ones(4, 3)
    if group.rank() == 1:
        x[0, 1] = torch.nan
    grad_fn = gradacc.accumulate_and_value(loss, steps=2, sync=gradacc.all_reduce(group, compress=compress))
    grads, value = grad_fn(torch.ones(3), x)
    return grads.isnan().tolist(), value.isnan().item()


@pytest.mark.parametrize("compress", [None, torch.bfloat16])
def test_a_nan_on_one_rank_reaches_all(pool, compress):
    assert pool.run(3, not_a_number, compress) == [([False, True, False], True)] * 3


def unpicklable(group):
    class Here(NamedTuple):
        number: torch.Tensor

    def loss(w, x):
        return (w * x).mean(), Here((w * x).mean()) if group.rank() else (w * x).mean()

    try:
        gradacc.accumulate(loss, steps=1, has_aux=True, sync=gradacc.all_reduce(group))(torch.ones(3), torch.ones(4, 3))
    except (TypeError, RuntimeError) as error:
        return str(error)


def test_aux_that_cannot_be_told(pool):
    other, own = pool.run(2, unpicklable)
    assert "the structure of aux, which cannot be pickled" in own
    assert "the call raised on rank 1" in other


def start(world, how):
    """Processes of their own, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.sync.faulty", how, str(SECONDS)]
    return [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(
    "how",
    some_slow(
        [
            "killed",
            "killed with overlap",
            "killed at first use",
            "killed while others gather",
            "killed while others pull",
            "stopped",
        ],
        "killed",
    ),
)
def test_a_rank_that_is_killed_or_stops(how):
    """SIGKILL or SIGSTOP in the middle of a step: every other rank ends with an error that names the group, in time."""
    processes = start(3, how)
    try:
        outputs = {rank: processes[rank].communicate(timeout=90) for rank in (0, 2)}
        for rank, (output, errors) in outputs.items():
            assert processes[rank].returncode == 3, errors
            _, seconds, message = output.split("|")
            assert "process group" in message
            assert f"failed on rank {rank}" in message
            assert "ranks [0, 1, 2]" in message
            assert float(seconds) < SECONDS + 5
        if how == "stopped":
            assert processes[1].poll() is None
        else:
            assert processes[1].wait(10) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_time_is_not_spent_waiting_for_a_dead_rank():
    """A killed rank's connection breaks at once; only one that is silent takes the whole timeout."""
    began = time.monotonic()
    processes = start(2, "killed")
    output, _ = processes[0].communicate(timeout=90)
    processes[1].communicate()
    assert float(output.split("|")[1]) < SECONDS / 2
    assert time.monotonic() - began < 60
