"""Whose a draw is, by its shape."""

import pytest

from gradacc.random import _rule


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 1, 1), (8, 8), (8, 0)])
def test_of_examples(shape):
    assert _rule.is_of_examples("rand", shape, 8)


@pytest.mark.parametrize("shape", [(), (5,), (5, 7), (3, 16)])
def test_of_nothing_in_the_batch(shape):
    assert not _rule.is_of_examples("rand", shape, 8)


@pytest.mark.parametrize(
    ("shape", "n", "why"),
    [
        ((16, 3), 8, "16 is 2 times the number of examples"),
        ((96, 5, 5), 8, "96 is 12 times"),
        ((5, 8, 3), 8, "8 is the number of examples, but not at dim 0"),
        ((1, 3), 8, "one for all examples"),
        ((1,), 0, "one for all examples"),
        ((5, 3), 1, "of a batch of one nobody can tell whether 5"),
        ((5, 1), 1, "of a batch of one"),
    ],
)
def test_in_doubt(shape, n, why):
    with pytest.raises(ValueError, match=f"keyed: rand draws numbers of shape .*{why}"):
        _rule.is_of_examples("rand", shape, n)


def test_of_one_example_and_of_none():
    assert _rule.is_of_examples("rand", (1, 3), 1)
    assert not _rule.is_of_examples("rand", (), 1)
    assert _rule.is_of_examples("rand", (0, 3), 0)
    assert not _rule.is_of_examples("rand", (4,), 0)


def test_what_is_shared_in_one_split_is_of_examples_in_no_other_but_by_chance():
    """So that a split gives the large batch's draws or an error: but where a size is by chance the number of examples."""
    for size in range(2, 13):
        of = set()
        for n in range(1, 25):
            try:
                of.add((_rule.is_of_examples("rand", (size,), n), n))
            except ValueError:
                continue
        assert {n for examples, n in of if examples} == {size}
