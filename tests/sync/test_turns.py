"""Ranks whose calls differ: every one of them gets an error that names the calls, and the next ones go on."""

import functools
import signal
import sys
import threading
import time
import types
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode

import gradacc
from gradacc import _sums
from gradacc._sync import channel as channels
from gradacc._sync.sending import Sending


class Own(Exception):
    """The user's."""


def attempt(call):
    """What it returns, as numbers; or its error."""
    try:
        result = call()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return (result[0] if isinstance(result, tuple) else result).tolist()


def squares(w, x):
    return (w * x).square().mean() / 2


def absolute(w, x):
    return (w * x).abs().mean()


def ones(rank, rows=2, size=3):
    """Where ``w`` is 1, the gradient of `squares` over ranks 0 to W - 1, of 2 rows each, is (1 + … + W²) / W / size."""
    return torch.full((rows, size), 1.0 + rank)


def of_scale(group, overlap):
    """The weight of a call that failed is no scale of the next one: rank 0 raises in call 2 of 3."""
    current = [0]

    def loss(w, x):
        if dist.get_rank(group) == 0 and current[0] == 1:
            raise Own("in the loss")
        return gradacc.Mean((w * x).sum(), 4 if current[0] else 1)

    grad_fn = gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group, overlap=overlap))
    answers = []
    for number in range(3):
        current[0] = number
        answers.append(attempt(lambda: grad_fn(torch.ones(1), torch.full((1, 1), 4.0 if current[0] else 1.0))))
    return answers


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_agreed_changes_on_all_ranks_or_none(pool, overlap):
    for rank, answers in enumerate(pool.run(2, of_scale, overlap)):
        assert answers[0] == answers[2] == [1.0]
        assert answers[1].startswith("RuntimeError" if rank else "Own")


def before_there_is_a_link(group):
    grad_fn = gradacc.accumulate(squares, steps=2, sync=gradacc.all_reduce(group))
    acc = gradacc.accumulator(squares, sync=gradacc.all_reduce(group))
    rank, w = dist.get_rank(group), torch.ones(3)

    def finalize(good):
        return acc.finalize(acc.update(acc.init(w), w, ones(rank)) if good else w)

    kinds = {
        "dtype": lambda good: grad_fn(w if good else w.long(), ones(rank)),
        "module": lambda good: grad_fn(w if good else torch.nn.Linear(1, 1), ones(rank)),
        "arguments": lambda good: grad_fn(*((w, ones(rank)) if good else (w,))),
        "state": finalize,
    }
    return {
        name: [attempt(lambda n=n, call=call: call(n != 1 or rank != 1)) for n in range(4)]
        for name, call in kinds.items()
    }


@pytest.mark.parametrize("world", [2, 3])
def test_what_raises_before_it_knows_anything_is_told_in_any_call(pool, world):
    """In the second call, when there is no exchange any more."""
    right = [sum((1 + rank) ** 2 for rank in range(world)) / world / 3] * 3
    for rank, answers in enumerate(pool.run(world, before_there_is_a_link)):
        for name, (first, bad, *later) in answers.items():
            assert [first, *later] == [pytest.approx(right)] * 3, name
            if rank == 1:
                assert bad.startswith(("TypeError", "ValueError")), name
            else:
                assert "because the call raised on rank 1 of process group" in bad, name


def numbers_that_do_not_fit(group):
    rank, current = dist.get_rank(group), [0]

    def loss(w, x):
        return squares(w, x), gradacc.Mean(x.sum(), 10**400 if rank and current[0] == 1 else 1)

    grad_fn = gradacc.accumulate(loss, steps=1, has_aux=True, sync=gradacc.all_reduce(group))
    answers = []
    for number in range(3):
        current[0] = number
        answers.append(attempt(lambda: grad_fn(torch.ones(3), ones(rank))))
    return answers


def test_an_aux_that_cannot_be_packed(pool):
    one, other = pool.run(2, numbers_that_do_not_fit)
    assert one[::2] == other[::2] == [pytest.approx([5 / 6] * 3)] * 2
    assert "because the call raised on rank 1" in one[1]
    assert other[1].startswith("TypeError: accumulate: aux is a Mean of")


def another_order(group, sizes, first_use):
    """The others: a, b, a, b; rank 1: a, a, b, b, or (at first use) b, a, a, b. And once more in order."""
    rank = dist.get_rank(group)
    grad_fns = [gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group)) for loss in (squares, absolute)]
    if not first_use:
        for which in (0, 1):
            grad_fns[which](torch.ones(sizes[which]), ones(rank, size=sizes[which]))
    order = (0, 1, 0, 1) if rank != 1 else (1, 0, 0, 1) if first_use else (0, 0, 1, 1)
    return [
        attempt(lambda which=which: grad_fns[which](torch.ones(sizes[which]), ones(rank, size=sizes[which])))
        for which in (*order, 0, 1)
    ]


@pytest.mark.parametrize("first_use", [False, True])
@pytest.mark.parametrize("sizes", [(3, 3), (3, 500)], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_two_grad_fns_in_another_order(pool, world, sizes, first_use):
    """Of one size (the sums would fit), and of two (their all-reduces would not even meet)."""
    answers = pool.run(world, another_order, sizes, first_use)
    a = pytest.approx([sum((1 + rank) ** 2 for rank in range(world)) / world / sizes[0]] * sizes[0])
    b = pytest.approx([sum(1 + rank for rank in range(world)) / world / sizes[1]] * sizes[1])
    differ = (0, 1) if first_use else (1, 2)
    for rank, own in enumerate(answers):
        for number, (answer, right) in enumerate(zip(own, (a, b, a, b, a, b), strict=True)):
            if number not in differ:
                assert answer == right
                continue
            assert answer.startswith("RuntimeError"), rank
            assert "ranks of process group" in answer
            assert "squares" in answer
            assert "absolute" in answer
            assert answer == answers[0][number]  # the same on every rank


def a_rank_is_alone_with_a_call(group, interrupted):
    """Rank 1 is interrupted, or makes a call inside a transform: both are told to nobody then."""
    rank, current = dist.get_rank(group), [0]

    def loss(w, x):
        if rank == 1 and current[0] == 1:
            signal.raise_signal(signal.SIGINT)
        return squares(w, x)

    grad_fn = gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group))
    answers = []
    for number in range(4):
        current[0] = number if interrupted else 0
        if rank == 1 and number == 1 and not interrupted:
            answers.append(
                attempt(lambda: torch.func.vmap(grad_fn, in_dims=(None, 0))(torch.ones(3), ones(rank)[None]))
            )
        else:
            answers.append(attempt(lambda: grad_fn(torch.ones(3), ones(rank))))
    return answers


def test_a_keyboard_interrupt_is_told_in_the_next_call(pool):
    answers = pool.run(3, a_rank_is_alone_with_a_call, True)
    for rank, own in enumerate(answers):
        assert [own[0], *own[2:]] == [pytest.approx([14 / 9] * 3)] * 3
        assert own[1].startswith("KeyboardInterrupt") if rank == 1 else "raised on rank 1 of" in own[1]


def interrupted_while_buckets_leave(group, where):
    """With overlap: after the first buckets have left, or when all have."""
    rank, current = dist.get_rank(group), [0]
    params = {n: torch.full((600, 600), 1 / 600) for n in range(4)}

    class Interrupted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if rank == 1 and current[0] == 2 and where == "backward":
                raise KeyboardInterrupt
            return grad

    def loss(params, x):
        x = Interrupted.apply(x @ params[0])
        for n in range(1, 4):
            x = x @ params[n]
        return x.square().mean()

    original = Sending.wait

    def wait(self, at):
        if rank == 1 and current[0] == 2 and where == "wait":
            current[0] = -1
            raise KeyboardInterrupt
        return original(self, at)

    grad_fn = gradacc.accumulate_and_value(loss, steps=2, sync=gradacc.all_reduce(group, overlap=True))
    answers = []
    with mock.patch.object(Sending, "wait", wait), mock.patch("gradacc._sync.wire.LARGE", 1 << 20):
        for number in range(5):
            current[0] = number
            try:
                answers.append(grad_fn(params, torch.ones(4, 600))[1].item())
            except (KeyboardInterrupt, RuntimeError) as error:
                answers.append(f"{type(error).__name__}: {error}")
    return answers


@pytest.mark.parametrize("where", ["backward", "wait"])
def test_an_interrupt_while_buckets_leave(pool, where):
    """Where all has been sent, the others have a result that this rank has not: they are told in the next call."""
    one, other = pool.run(2, interrupted_while_buckets_leave, where)
    for own in (one, other):
        assert own[:2] == [pytest.approx(1.0, rel=1e-5)] * 2
        assert own[4] == pytest.approx(1.0, rel=1e-5)
    assert other[2].startswith("KeyboardInterrupt")
    if where == "backward":
        assert "because the call raised on rank 1" in one[2]
        assert one[3] == other[3] == pytest.approx(1.0, rel=1e-5)
    else:
        assert one[2] == pytest.approx(1.0, rel=1e-5)
        assert "on rank 1 of process group" in one[3]
        assert "the call before this one raised" in one[3]
        assert one[3] == other[3]


def after_the_sums_have_come(group, ranks):
    grad_fn = gradacc.accumulate(squares, steps=1, sync=gradacc.all_reduce(group))
    rank, answers = dist.get_rank(group), []
    for number in range(4):
        fails = mock.patch.object(_sums, "finalize", side_effect=MemoryError if rank in ranks else Own)
        if number == 1 and rank in ranks:
            with fails:
                answers.append(attempt(lambda: grad_fn(torch.ones(3), ones(rank))))
        else:
            answers.append(attempt(lambda: grad_fn(torch.ones(3), ones(rank))))
    return answers


def test_a_rank_without_the_result_that_the_others_have(pool):
    """Its parameters may have gone apart from theirs: the next call says so on every rank, once."""
    answers = pool.run(3, after_the_sums_have_come, (2,))
    for rank, own in enumerate(answers):
        assert own[0] == own[3] == pytest.approx([14 / 9] * 3)
        assert own[1].startswith("MemoryError") if rank == 2 else own[1] == own[0]
        assert own[2] == answers[0][2]
        assert "on rank 2 of process group" in own[2]
    for own in pool.run(2, after_the_sums_have_come, (0, 1)):  # nobody has it: nothing is apart
        assert own[1].startswith("MemoryError")
        assert own[2] == own[3] == pytest.approx([5 / 6] * 3)


def mixed_up(group):
    """Another collective of as many bytes, on rank 1, in the middle of the others' call."""
    grad_fn = gradacc.accumulate(squares, steps=1, sync=gradacc.all_reduce(group))
    rank, sizes = dist.get_rank(group), []
    original = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda flat, **kw: (sizes.append(len(flat)), original(flat, **kw))[1]):
        grad_fn(torch.ones(3), ones(rank))
    if rank == 1:
        dist.all_reduce(torch.zeros(sizes[-1]), group=group)
    return [attempt(lambda: grad_fn(torch.ones(3), ones(rank))) for _ in range(3 + (rank == 0))][-4:]


def test_another_collective_in_the_place_of_a_call(pool):
    one, other = pool.run(2, mixed_up)
    assert one[0].startswith("RuntimeError")
    assert "is no record of a call: another collective" in one[0]
    assert one[1] == other[0]  # their numbers differ by then
    assert one[2:] == other[1:] == [pytest.approx([5 / 6] * 3)] * 2


def a_class_of_one_rank(group):
    rank = dist.get_rank(group)
    if rank == 0:
        module = types.ModuleType("only_here")
        module.Pair = type(NamedTuple("Pair", [("a", torch.Tensor)]).__name__, (_Pair,), {"__module__": "only_here"})
        module.Pair.__qualname__ = "Pair"
        sys.modules["only_here"] = module

    def loss(w, x):
        return squares(w, x), sys.modules["only_here"].Pair(gradacc.Mean(x.sum(), 1))

    grad_fn = gradacc.accumulate(loss, has_aux=True, sync=gradacc.all_reduce(group))
    answers = [attempt(lambda: grad_fn(torch.ones(3), iter([] if rank else [ones(0)]))) for _ in range(2)]
    plain = gradacc.accumulate(squares, sync=gradacc.all_reduce(group))
    return [*answers, attempt(lambda: plain(torch.ones(3), iter([ones(0)])))]


class _Pair(NamedTuple):
    a: torch.Tensor


def test_aux_of_a_class_that_another_rank_cannot_import(pool):
    for rank, (first, second, plain) in enumerate(pool.run(3, a_class_of_one_rank)):
        for answer in (first, second):
            if rank:
                assert answer.startswith("TypeError")
                assert "that of rank 0 cannot be read" in answer
            else:
                assert "because the call raised on ranks 1, 2" in answer
        assert plain == pytest.approx([1 / 3] * 3)


def in_turns(group, pattern, rounds):
    rank = dist.get_rank(group)
    sizes, losses = (3, 50), (squares, absolute)
    grad_fns = [gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group)) for loss in losses]
    counts = []
    for _ in range(rounds):
        for which in pattern:
            with CommDebugMode() as counter:
                grad_fns[which](torch.ones(sizes[which]), ones(rank, size=sizes[which]))
            counts.append(counter.get_total_counts())
    return counts


@pytest.mark.parametrize("pattern", [(0,), (0, 1), (0, 1, 1), (0, 0, 0, 0, 0, 1)], ids=str)
def test_several_in_turns_cost_one_collective_each(pool, pattern):
    """Once it is known what follows on what."""
    counts = pool.run(2, in_turns, pattern, 5)
    assert counts[0] == counts[1]
    assert counts[0][-2 * len(pattern) :] == [1] * 2 * len(pattern)


def a_skipped_call(group):
    """Rank 1 leaves the second of four windows out."""
    rank = dist.get_rank(group)
    grad_fn = gradacc.accumulate(squares, steps=1, sync=gradacc.all_reduce(group))
    windows = [torch.full((2, 3), float(n)) for n in range(4)]
    if rank == 1:
        del windows[1]
    answers = [attempt(lambda x=x: grad_fn(torch.ones(3), x)) for x in windows]
    if rank == 1:
        answers.append(attempt(lambda: grad_fn(torch.ones(3), torch.zeros(0, 3))))
    return answers


def test_a_skipped_call_is_a_call_with_the_next_window(pool):
    """Nothing says that it was one: the n-th call of a rank meets the n-th of the others, and is exact for what they hold."""
    one, other = pool.run(2, a_skipped_call)
    assert one == other
    assert one == [pytest.approx([value / 3] * 3) for value in (0.0, (1 + 4) / 2, (4 + 9) / 2, 9.0)]


class Loader:
    """Four micro-batches, of which the third is not to be had in the first epoch of rank 1."""

    def __init__(self, rank):
        self.rank, self.epoch = rank, 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.epoch += 1
        for number in range(4):
            if self.rank == 1 and self.epoch == 1 and number == 2:
                raise Own("no more data")
            yield ones(self.rank)


def a_loader_that_raises(group, calls):
    rank = dist.get_rank(group)
    grad_fn = gradacc.accumulate(squares, sync=gradacc.all_reduce(group))
    windows, epochs = gradacc.data.windows(Loader(rank), 1, group=group), []
    for _ in range(2):
        answers = []
        try:
            for window in windows:
                answers += [grad_fn(torch.ones(3), window).tolist() for _ in range(calls)]
        except (Own, RuntimeError) as error:
            answers.append(f"{type(error).__name__}: {error}")
        epochs.append(answers)
    return epochs


@pytest.mark.parametrize("calls", [1, 2])
def test_a_loader_that_raises_in_a_later_window(pool, calls):
    """The others are told in the call that this rank misses, and the next loop is in step."""
    right = pytest.approx([14 / 9] * 3)
    for rank, (first, second) in enumerate(pool.run(3, a_loader_that_raises, calls)):
        *before, error = first
        assert before == [right] * 2 * calls
        assert error.startswith("Own") if rank == 1 else "because the call raised on rank 1 of process group" in error
        assert second == [right] * 4 * calls


def made_in_one_place(group, how):
    """Two closures of one piece of code: ``how`` rank 0 differs."""
    first, sync = dist.get_rank(group) == 0, gradacc.all_reduce(group)
    if how == "of a mesh":
        sync = gradacc.all_reduce(DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",)))

    def make(factor):
        return gradacc.accumulate(lambda w, x: factor * (w * x).mean(), steps=1, sync=sync)

    if how == "one more" and first:
        make(3.0)
    made = [make(1.0), make(100.0)]
    if how in ("called in another order", "of a mesh") and first:
        made.reverse()
    w, x = torch.ones(1), torch.ones(2, 1)
    return [attempt(functools.partial(grad_fn, w, x)) for _ in range(2) for grad_fn in made]


@pytest.mark.parametrize("how", ["alike", "called in another order", "of a mesh", "one more"])
def test_grad_fns_that_one_piece_of_code_makes_are_told_apart(pool, how):
    """By the order in which they were made: no rank gets a mixture of two."""
    answers = pool.run(2, made_in_one_place, how)
    assert answers[0] == answers[1]
    if how == "alike":
        assert answers[0] == [[1.0], [100.0]] * 2
        return
    for message in answers[0]:
        assert "made different calls" in message
        assert "that this rank made" in message
        assert "make as many of them, in the same order, on every rank. Every rank must" in message


def a_window_left_out(group, how):
    """Rank 1 goes on after an error of its own in window 2 of the first loop, or hands over iterators."""
    rank, sync = dist.get_rank(group), gradacc.all_reduce(group)
    grad_fn = gradacc.accumulate(squares, sync=sync)
    windows, loops = gradacc.data.windows([ones(rank)] * (4 if rank else 3), 1, group=group), []
    for loop in range(2):
        answers = []
        for number, window in enumerate(windows):
            if rank and number == 1 and not loop and how != "nothing":
                continue
            batch = functools.partial(iter, window) if how == "iterators" else lambda window=window: window
            answers += [attempt(lambda batch=batch: grad_fn(torch.ones(3), batch())) for _ in range(2)]
        if rank and not loop and how != "nothing":
            answers += [attempt(lambda: grad_fn(torch.ones(3), iter([ones(rank)]))) for _ in range(2)]
        loops.append(answers)
    return loops


@pytest.mark.parametrize("how", ["nothing", "left out", "iterators"])
def test_a_window_that_one_rank_leaves_out(pool, how):
    """It is told in every call of that loop that ranks make in different windows; the next loop is in step."""
    whole, last = pytest.approx([5 / 6] * 3), pytest.approx([4 / 3] * 3)
    for first, second in pool.run(2, a_window_left_out, how):
        assert second == [whole] * 6 + [last] * 2
        if how == "left out":
            assert first[:2] == [whole] * 2
            assert all("rank 0 in window 2, rank 1 in window 3" in each for each in first[2:4])
            assert all("rank 0 in window 3, rank 1 in window 4" in each for each in first[4:6])
            # rank 0's empty window meets a batch of rank 1 that is no window
            assert first[6:] == [last] * 2
        else:
            assert first[:6] == [whole] * 6
            assert len(first) == 8


def two_threads(group, first_use):
    """Rank 0 makes a second call while its first one waits for rank 1, in another thread; then both ranks go on."""
    rank, store = dist.get_rank(group), dist.distributed_c10d._get_default_store()
    grad_fns = [gradacc.accumulate(loss, steps=1, sync=gradacc.all_reduce(group)) for loss in (squares, absolute)]
    calls = [functools.partial(attempt, functools.partial(grad_fn, torch.ones(3), ones(rank))) for grad_fn in grad_fns]
    answers = [] if first_use else [call() for call in calls]
    key = f"a second thread, {first_use}"
    if rank == 0:
        thread = threading.Thread(target=lambda: answers.append(calls[0]()))
        thread.start()
        while channels.of(group)._sender is None:
            time.sleep(0.01)
        second = calls[1]()
        store.set(key, "")
        thread.join()
        answers.append(second)
    else:
        store.wait([key])
        answers += [calls[0](), calls[1]()]
    return answers + [call() for call in calls for _ in range(2)]


@pytest.mark.parametrize("first_use", [False, True])
def test_a_second_thread_in_the_middle_of_a_call(pool, first_use):
    """It gets an error, the first one its result; the others are told in their second call."""
    squared, abs_, extra = pytest.approx([5 / 6] * 3), pytest.approx([0.5] * 3), 0 if first_use else 2
    one, other = pool.run(2, two_threads, first_use)
    for answers in (one, other):
        assert answers[:extra] == [squared, abs_][:extra]
        assert answers[extra] == squared
        assert answers[extra + 2 :] == [squared, squared, abs_, abs_]
    assert "another thread of rank 0 is in the middle of a call in process group" in one[extra + 1]
    assert "because the call raised on rank 0" in other[extra + 1]
