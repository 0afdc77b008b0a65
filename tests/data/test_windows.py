"""Windows: nothing dropped, nothing twice, and as many on every rank, whatever each rank's loader knows of itself."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, IterableDataset

import gradacc
from gradacc.data import windows
from tests.helpers import assert_trees_close, assert_trees_equal
from tests.workers import Failed


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Wrong(Unsized):
    """A loader whose len() is not what it yields."""

    def __init__(self, items, length):
        super().__init__(items)
        self.length = length

    def __len__(self):
        return self.length


class Broken(Unsized):
    """A loader that raises at its end."""

    def __iter__(self):
        yield from self.items
        raise OSError("the disk is gone")


class BrokenSized(Broken):
    def __len__(self):
        return len(self.items) + 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(7))


def generator(items):
    yield from items


KINDS = {"sized": list, "unsized": Unsized, "generator": generator}


# One process


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_nothing_is_dropped_and_nothing_comes_twice(n, steps, kind):
    found = list(windows(KINDS[kind](range(n)), steps))
    assert [item for window in found for item in window] == list(range(n))
    assert [len(window) for window in found[:-1]] == [steps] * (len(found) - 1)
    assert len(found) == math.ceil(n / steps)
    assert all(isinstance(window, list) for window in found)
    assert torch.utils._pytree.tree_map(lambda item: 2 * item, found) == [[2 * item for item in w] for w in found]


@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_the_length_is_the_number_of_windows(n):
    for steps in (1, 2, 7, 8):
        assert len(windows(range(n), steps)) == len(list(windows(range(n), steps)))


SCHEDULES = {
    "doubling": (lambda update: 2**update, [1, 2, 4, 8, 16]),
    "falling": (lambda update: max(4 - update, 1), [4, 3, 2] + [1] * 20),
    "constant": (lambda update: 3, [3] * 8),
    "as it is called": ([2, 1, 20].__getitem__, [2, 1, 20]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 15, 20])
@pytest.mark.parametrize(("schedule", "sizes"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_number_of_microbatches_is_a_schedule(schedule, sizes, n, kind):
    """`sizes` micro-batches, as long as there are any; the last window is what is left; again in each loop."""
    left, expected = list(range(n)), []
    for size in sizes:
        expected += [left[:size]] if left else []
        del left[:size]
    loader = windows(KINDS[kind](range(n)), schedule)
    assert list(loader) == expected
    if kind != "generator":
        assert list(loader) == expected
    if kind == "sized":
        assert len(loader) == len(expected)


def test_a_schedule_is_asked_only_for_windows_that_hold_something():
    asked = []

    def schedule(update):
        asked.append(update)
        return [2, 3][update]

    loader = windows(range(5), schedule)
    assert [list(window) for window in loader] == [[0, 1], [2, 3, 4]]  # list(loader) would ask for its len()
    assert asked == [0, 1]
    assert len(loader) == 2
    assert asked == [0, 1, 0, 1]


def test_what_becomes_of_a_window_does_not_matter_to_the_next_one():
    found = []
    for window in windows(range(5), 2):
        found.append(list(window))
        window.clear()
    assert found == [[0, 1], [2, 3], [4]]


BAD_SCHEDULES = {
    "zero": (0, ValueError, r"windows: steps\(1\) must be at least 1, got 0"),
    "negative": (-2, ValueError, r"windows: steps\(1\) must be at least 1, got -2"),
    "bool": (True, TypeError, r"windows: steps\(1\) must be an int, got True"),
    "float": (2.0, TypeError, r"windows: steps\(1\) must be an int, got 2.0"),
    "None": (None, TypeError, r"windows: steps\(1\) must be an int, got None"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_a_schedule_that_returns_no_number_of_microbatches(bad, error, message):
    loader = windows(range(5), lambda update: bad if update else 2)
    loop = iter(loader)
    assert next(loop) == [0, 1]
    with pytest.raises(error, match=message):
        next(loop)
    with pytest.raises(error, match=message):
        len(loader)


def test_loaders_of_torch():
    mapped = windows(DataLoader(torch.arange(7), batch_size=2), 3)
    assert len(mapped) == 2
    for _ in range(2):
        assert [[x.tolist() for x in window] for window in mapped] == [[[0, 1], [2, 3], [4, 5]], [[6]]]
    stream = windows(DataLoader(Stream(), batch_size=2), 3)
    for _ in range(2):
        assert [[x.tolist() for x in window] for window in stream] == [[[0, 1], [2, 3], [4, 5]], [[6]]]
    with pytest.raises(TypeError):
        len(stream)


def test_each_loop_reads_the_loader_anew_and_an_iterator_ends():
    shuffled = DataLoader(range(20), batch_size=1, shuffle=True)
    epochs = [[int(x) for window in windows(shuffled, 4) for x in window] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    once = windows(generator(range(3)), 2)
    assert list(once) == [[0, 1], [2]]
    assert list(once) == []


def test_it_reads_no_further_than_the_window():
    read = []

    def counted():
        for item in range(10):
            read.append(item)
            yield item

    loop = iter(windows(counted(), 3))
    assert next(loop) == [0, 1, 2]
    assert read == [0, 1, 2]


def test_nothing_is_asked_of_an_iterator_that_has_ended():
    class Once:
        def __init__(self):
            self.left = [0, 1, None]

        def __iter__(self):
            return self

        def __next__(self):
            item = self.left.pop(0)  # an IndexError where it is asked again
            if item is None:
                raise StopIteration
            return item

    assert list(windows(Once(), 3)) == [[0, 1]]


def test_a_loader_that_raises():
    loop = iter(windows(Broken(range(5)), 2))
    assert [next(loop), next(loop)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(loop)


@pytest.mark.parametrize(
    ("loader", "steps", "error", "message"),
    [
        ([], 0, ValueError, "windows: steps must be at least 1, got 0"),
        ([], -1, ValueError, "windows: steps must be at least 1, got -1"),
        ([], True, TypeError, "windows: steps must be an int, got True"),
        ([], 2.0, TypeError, "windows: steps must be an int, got 2.0"),
        ([], None, TypeError, "windows: steps must be an int, got None"),
        (None, 2, TypeError, "windows: the loader must be an iterable of micro-batches, got None"),
        (torch.ones(4, 2), 2, TypeError, r"iterable of micro-batches, got a tensor of shape \(4, 2\).*DataLoader"),
        ({"x": torch.ones(4)}, 2, TypeError, "iterable of micro-batches, got a dict"),
        ("text", 2, TypeError, "iterable of micro-batches, got a str"),
    ],
)
def test_mistakes(loader, steps, error, message):
    with pytest.raises(error, match=message):
        windows(loader, steps)


def test_a_loader_without_a_length_says_so():
    with pytest.raises(TypeError, match=r"windows: the loader has no len\(\)"):
        len(windows(Unsized([1]), 2))


@pytest.mark.parametrize("group", [3, "dp", [0, 1]])
def test_a_group_that_is_none(group):
    with pytest.raises((TypeError, RuntimeError), match="windows: .*group"):
        windows([], 2, group=group)


def test_without_a_group_this_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # which all_reduce() would refuse: here nothing was asked to talk
    assert list(windows(range(3), 2)) == [[0, 1], [2]]


# Ranks


def epochs(group, kind, items, steps):
    """Two epochs, and how many collectives the second one took."""
    loader = windows(KINDS[kind](items), steps, group=group)
    first = list(loader)
    with CommDebugMode() as communication:
        second = list(loader)
    return first, second, communication.get_total_counts()


SHARES = [(5, 5), (7, 2), (0, 4), (6, 0, 1), (0, 0), (1, 9, 0, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_ranks_yield_equally_many_windows(pool, shares, kind):
    answers = pool.run_each(len(shares), epochs, [(kind, list(range(n)), 2) for n in shares])
    number = math.ceil(max(shares) / 2)
    again = 0 if kind == "generator" else number
    for n, (first, second, collectives) in zip(shares, answers, strict=True):
        own = [list(range(n))[at : at + 2] for at in range(0, n, 2)]
        assert first == own + [[]] * (number - len(own))
        assert second == ([] if kind == "generator" else first)
        assert collectives == (1 if kind == "sized" else again + 1)


def mixed(group, kinds, items):
    return list(windows(KINDS[kinds[dist.get_rank()]](items), 2, group=group))


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kinds", [("sized", "unsized") * 2, ("generator", "sized") * 2], ids=" ".join)
def test_some_loaders_know_their_length(pool, shares, kinds):
    answers = pool.run_each(len(shares), mixed, [(kinds, list(range(n))) for n in shares])
    number = math.ceil(max(shares) / 2)
    for n, answer in zip(shares, answers, strict=True):
        assert len(answer) == number
        assert [item for window in answer for item in window] == list(range(n))


def growing(update):
    return [1, 3, 2, 4][update]


def scheduled(group, kinds, items, schedule):
    return list(windows(KINDS[kinds[dist.get_rank()]](items), schedule, group=group))


@pytest.mark.parametrize("shares", [(10, 1), (4, 6), (0, 5), (0, 0), (2, 9, 0, 4)], ids=str)
@pytest.mark.parametrize("kinds", [("sized",) * 4, ("unsized",) * 4, ("generator", "sized") * 2], ids=" ".join)
def test_ranks_keep_a_schedule_together(pool, shares, kinds):
    """Each cuts its own data alike; the rank with the most windows says how many there are."""
    answers = pool.run_each(len(shares), scheduled, [(kinds, list(range(n)), growing) for n in shares])
    alone = [list(windows(list(range(n)), growing)) for n in shares]
    number = max(map(len, alone))
    for answer, own in zip(answers, alone, strict=True):
        assert answer == own + [[]] * (number - len(own))


def bad_on_the_first(group, loader):
    """What came, what was raised; then whether the next loop works."""
    schedule = [2, 0 if dist.get_rank() == 0 else 2, 2].__getitem__
    found = []
    try:
        for window in windows(loader, schedule, group=group):
            found.append(window)
    except Exception as error:
        return found, f"{type(error).__name__}: {error}", list(windows([1, 2, 3], 2, group=group))
    return found, None, None


@pytest.mark.parametrize(
    ("loader", "before"), [(range(5), []), (Unsized(range(5)), [[0, 1]])], ids=["sized", "unsized"]
)
def test_a_bad_schedule_on_one_rank_is_an_error_on_all(pool, loader, before):
    """Before the first window where the windows are counted, otherwise when it is that window's turn."""
    bad, good = pool.run(2, bad_on_the_first, loader)
    assert bad[0] == good[0] == before
    assert bad[1] == "ValueError: windows: steps(1) must be at least 1, got 0"
    assert good[1].startswith(
        "RuntimeError: windows: no window on rank 1, because the loader (or steps) raised on rank 0"
    )
    assert bad[2] == good[2] == [[1, 2], [3]]


def changing(group):
    """3 and 3, then 3 and 1, of 5."""
    answers = iter([3, 3, 3, 1, 1])
    found = []
    try:
        for window in windows(range(5), lambda update: next(answers), group=group):
            found.append(window)
    except ValueError as error:
        return found, str(error)
    return found, None


def test_a_schedule_that_changes_its_mind_drops_nothing_silently(pool):
    for found, error in pool.run(2, changing):
        assert found == [[0, 1, 2], [3]]
        assert error.startswith("windows: the loader's len() is 5, but it yields more")
        assert error.endswith("or steps returned less than when the windows were counted")


def forms_of_a_group(group):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    items = range(1 + 2 * dist.get_rank())
    found = [list(windows(items, 2, group=form)) for form in (group, mesh, mesh["dp"])]
    return (
        found,
        list(windows(items, 2)),
        list(windows(items, 2, group=dist.new_group([dist.get_rank()], use_local_synchronization=True))),
    )


def test_a_group_is_named_as_for_all_reduce(pool):
    for rank, (found, without, alone) in enumerate(pool.run(2, forms_of_a_group)):
        own = list(windows(range(1 + 2 * rank), 2))
        assert found == [own + [[]] * (1 - rank)] * 3
        assert without == alone == own


def length(group):
    return len(windows([1, 2, 3], 2, group=group))


def test_the_length_is_known_in_the_loop_only(pool):
    assert pool.run(1, length) == [2]
    with pytest.raises(Failed, match=r"TypeError: windows: with a group, .* len\(\) would have to wait"):
        pool.run(2, length)


def until_it_breaks(group, loader):
    """What came, what was raised; then whether the next loop works."""
    found = []
    try:
        for window in windows(loader, 2, group=group):
            found.append(window)
    except Exception as error:
        return found, f"{type(error).__name__}: {error}", list(windows([1, 2, 3], 2, group=group))
    return found, None, list(windows([1, 2, 3], 2, group=group))


@pytest.mark.parametrize(
    ("broken", "at"), [(Broken, 0), (Broken, 1), (Broken, 2), (Broken, 5), (BrokenSized, 0), (BrokenSized, 1)]
)
def test_a_loader_that_raises_on_one_rank(pool, at, broken):
    """The other rank hears of it wherever flags cross: before each window, or only before the first."""
    bad, good = pool.run_each(
        2, until_it_breaks, [(broken(range(at)),), (Unsized(range(9)) if broken is Broken else range(9),)]
    )
    own = list(range(at // 2 * 2))
    assert [item for window in bad[0] for item in window] == own
    assert bad[1] == "OSError: the disk is gone"
    assert good[0] == [[0, 1], [2, 3], [4, 5]][: at // 2]
    assert good[1].startswith(
        "RuntimeError: windows: no window on rank 1, because the loader (or steps) raised on rank 0 of process group"
    )
    assert bad[2] == good[2] == [[1, 2], [3]]


def test_a_loader_that_raises_later_raises_where_flags_do_not_cross(pool):
    bad, good = pool.run_each(2, until_it_breaks, [(BrokenSized(range(5)),), (range(5),)])
    assert bad[:2] == ([[0, 1], [2, 3]], "OSError: the disk is gone")
    assert good[:2] == ([[0, 1], [2, 3], [4]], None)


@pytest.mark.parametrize("items", [1, 3, 4])
def test_a_length_that_is_wrong(pool, items):
    less, right = pool.run_each(2, until_it_breaks, [(Wrong(range(items), 6),), (range(2),)])
    assert less[1] is None
    assert [item for window in less[0] for item in window] == list(range(items))
    assert len(less[0]) == len(right[0]) == 3
    more, right = pool.run_each(2, until_it_breaks, [(Wrong(range(2 + items), 2),), (range(2),)])
    assert more[0] == right[0] == [[0, 1]]
    assert more[1].startswith("ValueError: windows: the loader's len() is 2, but it yields more")


def token_loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"])
    return gradacc.Mean((y.square().sum(-1) * batch["mask"]).sum(), batch["mask"].sum())


def gradients(group, params, loader, steps):
    grad_fn = gradacc.accumulate_and_value(token_loss, sync=gradacc.all_reduce(group))
    return [grad_fn(params, window) for window in windows(loader, steps, group=group)]


@pytest.mark.parametrize("kind", ["sized", "unsized"])
@pytest.mark.parametrize("shares", [(5, 5), (7, 2), (0, 4), (3, 0, 6, 1)], ids=str)
def test_every_step_equals_one_process_with_the_union_of_the_windows(pool, shares, kind):
    g = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 4, generator=g, dtype=torch.float64)}

    def microbatch(length):
        return {
            "x": torch.randn(2, length, 3, generator=g, dtype=torch.float64),
            "mask": torch.rand(2, length, generator=g) < 0.7,
        }

    loaders = [[microbatch(1 + at % 4) for at in range(n)] for n in shares]
    answers = pool.run_each(len(shares), gradients, [(params, KINDS[kind](loader), 2) for loader in loaders])
    grad_fn = gradacc.accumulate_and_value(token_loss)
    for at in range(0, max(shares), 2):
        union = [part for loader in loaders for part in loader[at : at + 2]]
        expected = grad_fn(params, union)
        for answer in answers:
            assert_trees_close(answer[at // 2], expected)
            assert_trees_equal(answer[at // 2], answers[0][at // 2])
    assert all(len(answer) == math.ceil(max(shares) / 2) for answer in answers)
