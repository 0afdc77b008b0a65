"""Training: it learns, the same way every time, and the split changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

import gradacc
from gradacc.demo.corpus import Corpus, load
from gradacc.demo.sample import SAMPLE_BYTES, generate, samples
from gradacc.demo.settings import Settings
from gradacc.demo.train import Metrics, build, held_out_bits_per_byte, lr_share, train


@pytest.fixture
def corpus(settings: Settings) -> Corpus:
    return load(settings.data, settings.model.context)


def trained(
    settings: Settings, corpus: Corpus, cpu: torch.device
) -> tuple[gradacc.TrainState, list[Metrics], tuple[float, float]]:
    model, state = build(settings, cpu)
    before = held_out_bits_per_byte(model.loss_fn, state.params, corpus.held_out, cpu)
    states, history = zip(*train(settings, model.loss_fn, state, corpus.train, cpu), strict=True)
    after = held_out_bits_per_byte(model.loss_fn, states[-1].params, corpus.held_out, cpu)
    return states[-1], list(history), (before, after)


def test_it_learns(settings: Settings, corpus: Corpus, cpu: torch.device) -> None:
    state, history, (before, after) = trained(settings._replace(iterations=60), corpus, cpu)
    assert before == pytest.approx(8, abs=0.1)  # a uniform guess over 257 tokens
    assert after < before - 3
    assert state.step == len(history) == 60
    assert [metrics.iteration for metrics in history] == list(range(1, 61))
    assert [metrics.lr for metrics in history] == pytest.approx([3e-3 * lr_share(at, 60) for at in range(60)])
    assert all(metrics.bits_per_byte == pytest.approx(metrics.loss / math.log(2)) for metrics in history)
    assert all(metrics.tokens > 0 < metrics.seconds for metrics in history)


def test_the_same_seed_gives_the_same_run(settings: Settings, corpus: Corpus, cpu: torch.device) -> None:
    def losses(settings: Settings) -> list[float]:
        return [metrics.loss for metrics in trained(settings, corpus, cpu)[1]]

    assert losses(settings) == losses(settings)
    assert losses(settings) != losses(settings._replace(seed=1))


def test_the_number_of_steps_changes_nothing(settings: Settings, corpus: Corpus, cpu: torch.device) -> None:
    whole = trained(settings._replace(steps=1), corpus, cpu)[1]
    for steps in (2, 3, 8):
        split = trained(settings._replace(steps=steps), corpus, cpu)[1]
        assert [metrics.loss for metrics in split] == pytest.approx([metrics.loss for metrics in whole], rel=1e-4)
        assert [metrics.tokens for metrics in split] == [metrics.tokens for metrics in whole]


def test_held_out_bits_do_not_depend_on_the_batch_size(settings: Settings, corpus: Corpus, cpu: torch.device) -> None:
    model, state = build(settings, cpu)
    found = [held_out_bits_per_byte(model.loss_fn, state.params, corpus.held_out, cpu, size) for size in (1, 7, 1000)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_the_learning_rate_rises_then_falls() -> None:
    shares = [lr_share(iteration, 100) for iteration in range(101)]
    assert shares[0] == pytest.approx(0.2)
    assert shares[4] == max(shares) == pytest.approx(1, abs=0.01)
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] == pytest.approx(0.05)


def test_samples_are_reproducible_text(settings: Settings, corpus: Corpus, cpu: torch.device) -> None:
    model, state = build(settings, cpu)

    def write(seed: int) -> list[tuple[str, str]]:
        return samples(lambda tokens: model.apply(state.params, tokens), corpus.held_out, 48, seed, cpu)

    assert write(0) == write(0)
    assert write(0) != write(1)
    held_out = [piece.decode(errors="replace") for piece in corpus.held_out]
    assert all(any(piece.startswith(prompt) for piece in held_out) for prompt, _ in write(0))


def test_padding_is_never_written(cpu: torch.device) -> None:
    seen: list[int] = []

    def only_padding(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape[1])
        logits = torch.full((*tokens.shape, 257), -1e9)
        logits[..., 256], logits[..., 65] = 1e9, 0.0
        return logits

    assert generate(only_padding, [b"Hi", b"Ho"], 16, torch.Generator(), cpu) == [b"A" * SAMPLE_BYTES] * 2
    assert max(seen) == 16
