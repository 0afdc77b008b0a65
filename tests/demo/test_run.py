"""A whole run: the report, the metrics, and every way to end early. In this process, on a tiny model."""

from __future__ import annotations

import functools
import json
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from gradacc.demo import cli, interrupt, plots
from gradacc.demo import run as running
from gradacc.demo import train as training
from gradacc.demo.corpus import load
from gradacc.demo.interrupt import interrupts
from gradacc.demo.proof import prove
from gradacc.demo.record import Record
from gradacc.demo.run import run
from gradacc.demo.sample import samples
from gradacc.demo.settings import DemoError, Settings
from gradacc.demo.train import build, held_out_bits_per_byte, train


def never() -> bool:
    return False


def exploding(iteration: int, iterations: int) -> float:
    """In the place of `lr_share`: the third update throws the parameters to where the loss overflows."""
    return 1e30 if iteration == 2 else 1.0


def read(settings: Settings) -> tuple[str, list[dict[str, float]]]:
    lines = (settings.out / "metrics.jsonl").read_text("utf-8").splitlines()
    return (settings.out / "report.html").read_text("utf-8"), [json.loads(line) for line in lines]


class Page(HTMLParser):
    """Collects what a browser would load, which elements are left open, and the text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                self.loads.append(value or "")
            if name == "style":
                self.loads += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import", data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def check_is_complete_by_itself(html: str) -> Page:
    page = Page(html)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(address.startswith(("#", "data:")) for address in page.loads), page.loads
    assert html.count("<!DOCTYPE") == 1  # the SVGs' own would name an address
    return page


PICTURES = {name: getattr(plots, name) for name in ("error_plot", "memory_plot", "loss_plot")}


@pytest.fixture
def whole_report(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of the table, and the pictures, which `hasten` leaves out."""
    monkeypatch.setattr(running, "prove", prove)
    for name, picture in PICTURES.items():
        monkeypatch.setattr(plots, name, picture)


@pytest.mark.usefixtures("whole_report")
def test_a_run_leaves_its_report_and_metrics(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, never) == 0
    html, metrics = read(settings)
    page = check_is_complete_by_itself(html)
    assert page.tags.count("svg") == 3
    assert [line["iteration"] for line in metrics] == list(range(1, 7))
    assert set(metrics[0]) == {
        "iteration", "loss", "bits_per_byte", "tokens", "lr", "grad_norm", "seconds", "tokens_per_second"
    }  # fmt: skip
    output = capsys.readouterr().out
    rows = re.findall(
        r"^ +([12348])  +(\S+e\S+) +(\S+e\S+) +([\d.]+)  +(\S+e\S+) +(\S+e\S+) +([\d.]+) *$", output, re.M
    )
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "8"]
    for _, *cells in rows:
        assert all(f"<td>{cell}</td>" in html for cell in cells)
    before, after = re.findall(r"([\d.]+) bits per byte before, ([\d.]+) after 6", output)[0]
    assert f"{before} → {after}" in page.text
    assert output.endswith(f"report:  {settings.out / 'report.html'}\nmetrics: {settings.out / 'metrics.jsonl'}\n")
    given = re.findall(r"^--- given (.*), the model writes:$", output, re.M)
    assert len(given) == 3
    assert html.count("<pre>") == 3
    assert "<b>" not in re.sub(r"<pre><b>|<div class=\"fact\"><b>", "", html)  # text that looks like HTML is escaped


def test_what_is_shown_is_of_the_trained_parameters(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []

    def keep(record: Record) -> str:
        records.append(record)
        return ""

    monkeypatch.setattr(running, "render", keep)
    assert run(settings, never) == 0
    cpu, corpus = torch.device("cpu"), load(settings.data, settings.model.context)
    model, state = build(settings, cpu)
    *_, (trained, _) = train(settings, model.loss_fn, state, corpus.train, cpu)
    found = [held_out_bits_per_byte(model.loss_fn, at.params, corpus.held_out, cpu) for at in (state, trained)]
    assert [records[0].held_out[0], records[0].held_out[-1]] == [(0, found[0]), (6, found[1])]
    logits = functools.partial(model.apply, trained.params)
    assert records[0].samples == samples(logits, corpus.held_out, settings.model.context, settings.seed, cpu)


def test_a_second_run_replaces_the_first(settings: Settings) -> None:
    assert run(settings, never) == 0
    assert run(settings._replace(iterations=2, seed=1), never) == 0
    html, metrics = read(settings)
    assert len(metrics) == 2
    assert html.count("</html>") == 1


def test_no_iterations_give_the_table_alone(settings: Settings) -> None:
    assert run(settings._replace(iterations=0), never) == 0
    html, metrics = read(settings)
    assert check_is_complete_by_itself(html).tags.count("svg") == 2
    assert metrics == []


def test_ctrl_c_in_training_keeps_what_was_reached(settings: Settings) -> None:
    def third_iteration() -> bool:
        path = settings.out / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= 3

    assert run(settings, third_iteration) == running.INTERRUPTED
    html, metrics = read(settings)
    assert len(metrics) == 3
    page = check_is_complete_by_itself(html)
    assert "Ended by Ctrl-C after 3 of 6 iterations." in page.text
    assert page.tags.count("svg") == 3
    assert "after 3 iterations" in page.text  # held-out text was measured once more


@pytest.mark.usefixtures("whole_report")
def test_ctrl_c_in_the_table_keeps_its_rows(settings: Settings) -> None:
    asked: list[int] = []

    def second_row() -> bool:
        asked.append(1)
        return len(asked) == 3  # the large batch, steps 1, steps 2

    assert run(settings, second_row) == running.INTERRUPTED
    html, metrics = read(settings)
    page = check_is_complete_by_itself(html)
    assert metrics == []
    assert page.tags.count("svg") == 2
    assert "Ended by Ctrl-C after 0 of 6 iterations." in page.text


def test_a_second_ctrl_c_only_writes_the_report(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "samples", interrupted)
    assert run(settings, never) == running.INTERRUPTED
    html, metrics = read(settings)
    assert "Ended by Ctrl-C after 6 of 6 iterations." in check_is_complete_by_itself(html).text
    assert len(metrics) == 6


def test_the_first_ctrl_c_is_a_question_the_second_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)  # the same one, passed on twice
        monkeypatch.setattr(interrupt, "DEBOUNCE_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_reading_writes_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.data
    ordinary = running.load

    def load(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return ordinary(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "load", load)
    assert cli.main(["demo", "--data", str(settings.data.parent), "--out", str(settings.out)]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "gradacc demo: ended by Ctrl-C before there was anything to report\n"
    assert not settings.out.exists()


def test_the_time_limit(settings: Settings) -> None:
    assert run(settings._replace(seconds=0.0), never) == 0
    html, metrics = read(settings)
    assert "Ended after 1 of 6 iterations, at the time limit of 0 s" in Page(html).text
    assert len(metrics) == 1


@pytest.mark.usefixtures("whole_report")
def test_divergence_ends_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "lr_share", exploding)
    assert run(settings, never) == running.DIVERGED
    html, metrics = read(settings)
    assert "Training diverged at iteration 4" in check_is_complete_by_itself(html).text
    assert [line["grad_norm"] is None for line in metrics] == [False, False, False, True]


def test_what_was_asked_for_is_in_the_report(settings: Settings) -> None:
    odd = settings._replace(steps=3, lr=1.25e-3, seed=77, iterations=1)
    run(odd, never)
    text = Page(read(odd)[0]).text
    for name, value in {"--steps": 3, "--batch-size": 8, "--iterations": 1, "--lr": 0.00125, "--seed": 77}.items():
        assert f"{name}{value}" in text
    assert f"torch {torch.__version__}" in text
    assert str(Path.home()) not in text


def test_a_disk_that_is_full(settings: Settings) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    settings.out.mkdir()
    (settings.out / "metrics.jsonl").symlink_to(full)
    with pytest.raises(DemoError, match=r"metrics.jsonl cannot be written: No space left on device"):
        run(settings, never)
