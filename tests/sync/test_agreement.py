"""What ranks find alike at first use: 64 of them, which are threads, with real collectives between them."""

from unittest import mock

import pytest
import torch

from gradacc import _options, _tree, all_reduce
from gradacc._mean import Mean
from gradacc._parts import Average, Pieces, Total
from gradacc._sums import Sums
from gradacc._sync import agreement, layout
from gradacc._sync import bound as bounds
from gradacc._sync import group as groups
from tests.threads import on_threads

WORLD = 64
PARAMS = {"w": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def asked(rank_fn):
    """What ``rank_fn(rank, group)`` returned or raised on each rank, and how often all descriptions were gathered."""
    with mock.patch.object(groups, "exchange", side_effect=groups.exchange) as gathered:
        found = on_threads(WORLD, rank_fn)
    return found, gathered.call_count


def layout_of(kind):
    value = Average(torch.ones(()), torch.float32)
    aux = {
        "plain": None,
        "aux": {"hits": Total(Mean(torch.ones(()), 3), torch.float32), "each": Pieces([torch.ones(2)])},
    }
    return layout.of(Sums(value=value, aux=aux[kind], weight=1.0, unit=1.0, differentiated=True))


def agreed(rank, group, *, params=PARAMS, kind="plain", options=None, number=1, raises=False, order=()):
    own = _options.options("accumulate", sum, sync=all_reduce(overlap=bool(order)), **(options or {}))
    leaves, treedef = _tree.flatten(params)
    here = None if kind is None else layout_of(kind)
    caller = agreement.Caller("accumulate", group, number, "accumulate(loss)")
    if raises:
        caller.exchange(None)
        raise KeyError("its own")
    bound = bounds.bound(own, group, leaves, treedef, [p.dtype for p in leaves])
    mine = agreement.describe(own, bound, here, float(rank), order)
    return agreement.agree(own, caller, bound, mine, here)


def same(founds, kind):
    total = sum(range(WORLD))
    for found in founds:
        assert found.problem is None
        assert found.lasting
        assert found.shape == founds[0].shape
        assert found.agreement.plan == founds[0].agreement.plan
        assert layout.difference(found.agreement.layout, layout_of(kind)) is None
        assert total / 2 <= found.agreement.scale <= total * 2


@pytest.mark.parametrize("kind", ["plain", "aux"])
@pytest.mark.parametrize("having", [range(WORLD), [5, 40], [63]])
def test_ranks_that_are_alike(kind, having):
    """Nobody gathers descriptions; who has not seen a micro-batch is told the layout by one who has."""
    found, gathered = asked(lambda rank, group: agreed(rank, group, kind=kind if rank in having else None))
    assert gathered == 0
    same(found, kind)


def test_no_rank_has_seen_a_micro_batch():
    found, gathered = asked(lambda rank, group: agreed(rank, group, kind=None))
    assert gathered == 0
    assert all(each == agreement.Found(None) for each in found)


def test_the_order_is_that_of_a_rank_which_has_the_longest():
    def run(rank, group):
        return agreed(rank, group, order=(1, 0) if rank in (7, 9) else (0,))

    found, gathered = asked(run)
    assert gathered == 0
    same(found, "plain")


CHANGES = {
    "a shape": (
        {"params": {**PARAMS, "w": torch.ones(3, 2)}},
        "ValueError",
        r"\['w'\] is .* of shape \(2, 3\) on rank 0",
    ),
    "a name": (
        {"params": {"w": PARAMS["w"], "c": PARAMS["b"]}},
        "ValueError",
        r"is params\['b'\] on rank 0, params\['c'\] on",
    ),
    "an option": (
        {"options": {"reduction": "sum"}},
        "ValueError",
        "reduction='mean' on rank 0, reduction='sum' on rank 33",
    ),
    "what the loss returned": ({"kind": "aux"}, "problem", "ranks 0 and 33 differ: aux has the structure"),
    "the number of the call": (
        {"number": 2},
        "RuntimeError",
        "made different calls.*ranks 0, 1, 2, 3, 4, 5, 6, 7 and 55 more: accumulate\\(loss\\), call 1; "
        "rank 33: accumulate\\(loss\\), call 2",
    ),
    "an error": ({"raises": True}, "RuntimeError", "the call raised on rank 33 of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_rank_that_differs(change):
    """All of them say so, and in what."""
    options, kind, message = CHANGES[change]
    found, gathered = asked(lambda rank, group: agreed(rank, group, **(options if rank == 33 else {})))
    assert gathered == WORLD
    for rank, each in enumerate(found):
        if change == "an error" and rank == 33:
            assert isinstance(each, KeyError)
            continue
        error = each.problem if kind == "problem" else each
        assert type(error).__name__ == ("ValueError" if kind == "problem" else kind)
        with pytest.raises(type(error), match=message):
            raise error


def test_an_error_that_names_thousands_names_some():
    found, _ = asked(lambda rank, group: agreed(rank, group, number=1 + rank))
    for each in found:
        told = str(each)
        assert "rank 0: accumulate(loss), call 1; " in told
        assert "rank 7: accumulate(loss), call 8; 56 other answers in this group" in told


def test_all_ranks_have_raised():
    found, gathered = asked(lambda rank, group: agreed(rank, group, raises=True))
    assert gathered == WORLD
    assert all(isinstance(each, KeyError) for each in found)


def test_every_option_is_compared_or_of_a_rank_alone():
    """How a rank divides its own batch is its own affair; whatever else there is, and there may be more, ranks tell."""
    own = _options.options("accumulate", sum, sync=all_reduce())
    bound = bounds.Bound([], _tree.flatten(())[1], [], None, (), 0)
    told = {name for name, _ in agreement.describe(own, bound, None, 0.0, ()).options}
    alone = {"name", "steps", "microbatch_size", "split", "in_dims", "argnums"}
    assert told - {"compress", "overlap", "ordered"} == set(own._fields) - alone
