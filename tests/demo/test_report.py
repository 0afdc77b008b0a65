"""The page says nothing that was not measured."""

from gradacc.demo.record import Record
from gradacc.demo.report import render
from gradacc.demo.train import Metrics


def test_nothing_is_claimed_of_nothing(settings):
    record = Record(settings, "real text", "a machine")
    assert "Every gradient" not in render(record)
    assert "large batch" not in render(record)


def test_no_more_micro_batches_than_pieces(settings):
    record = Record(settings._replace(steps=100), "real text", "a machine")
    record.history.append(Metrics(1, 2.0, 2.9, 10, 0.1, 1.0, 0.1, 100.0))
    assert "Every gradient was accumulated over 8 micro-batches." in render(record)
