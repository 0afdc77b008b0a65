"""What is said of lists of different lengths for which a ``grad_fn`` is compiled."""

import warnings

import pytest

from gradacc import _lengths


def said(note, *numbers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in numbers:
            note(number)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("numbers", [(), (4,), (4, 3), (4, 3, 4, 3, 3)])
def test_two_lengths_are_a_loop_and_its_end(numbers):
    assert not said(_lengths.lengths("accumulate"), *numbers)


def test_the_third_is_said_once():
    note = _lengths.lengths("accumulate")
    (message,) = said(note, 4, 16, 4, 8, 8, 2, 32)
    assert message.startswith("accumulate: compiled for lists of 4, 8 and 16 micro-batches.")


def test_each_function_has_its_own():
    first, second = _lengths.lengths("accumulate"), _lengths.lengths("accumulate")
    assert not said(first, 1, 2)
    assert not said(second, 3, 4)


def test_counting_passes_one_after_the_other():
    """What yields them may write the next one into the same memory."""
    events = []

    def parts():
        for n in range(3):
            events.append(f"made {n}")
            yield n

    for n in _lengths.counting(parts(), lambda number: events.append(f"{number} in all")):
        events.append(f"used {n}")
    assert events == ["made 0", "used 0", "made 1", "used 1", "made 2", "used 2", "3 in all"]
