"""The table tells the truth: exact is exact, the usual loop is wrong where it is wrong, and memory goes down."""

from __future__ import annotations

import random

import pytest
import torch

from gradacc.demo.batch import pad
from gradacc.demo.proof import (
    STEPS,
    LossFn,
    Params,
    Proof,
    distance,
    exact,
    large_batch,
    mean_of_means,
    prove,
    table_head,
    table_row,
)
from gradacc.demo.settings import Settings
from gradacc.demo.train import build

from .conftest import TINY

LENGTHS = (48, 3, 7, 40, 2, 2, 48, 11, 5, 33, 2, 20, 48, 48, 9, 2)


@pytest.fixture(scope="module")
def problem() -> tuple[LossFn, Params]:
    model, state = build(Settings(model=TINY), torch.device("cpu"))
    return model.loss_fn, state.params


def batch(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    rng = random.Random(0)
    return pad([bytes(rng.randrange(256) for _ in range(length)) for length in lengths], torch.device("cpu"))


@pytest.fixture(scope="module")
def proof(problem: tuple[LossFn, Params]) -> Proof:
    return list(prove(*problem, batch()))[-1]


def test_exact_is_exact(problem: tuple[LossFn, Params], proof: Proof) -> None:
    assert tuple(row.steps for row in proof.rows) == STEPS
    assert max(row.exact.gradient_error for row in proof.rows) < 2e-6
    assert max(row.exact.loss_error for row in proof.rows) < 1e-6
    loss_fn, params = problem
    double = {name: value.double() for name, value in params.items()}
    for row in list(prove(loss_fn, double, batch()))[-1].rows:
        assert row.exact.gradient_error < 1e-13
        assert row.exact.loss_error < 1e-13


def test_the_usual_loop_is_wrong_on_ragged_pieces(proof: Proof) -> None:
    assert proof.rows[0].naive.gradient_error < 2e-6  # one micro-batch is the large batch
    assert all(row.naive.gradient_error > 1e-2 for row in proof.rows[1:])
    assert all(row.naive.gradient_error > 1e4 * row.exact.gradient_error for row in proof.rows[1:])


def test_the_usual_loop_is_right_on_equal_pieces(problem: tuple[LossFn, Params]) -> None:
    rows = list(prove(*problem, batch((20,) * 16), steps=(2, 4, 8)))[-1].rows
    assert max(row.naive.gradient_error for row in rows) < 2e-6
    assert max(row.naive.loss_error for row in rows) < 1e-6


def test_memory_goes_down_with_steps(proof: Proof) -> None:
    peaks = [row.exact.peak for row in proof.rows]
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[-1] < proof.peak / 3
    assert proof.rows[0].naive.peak == proof.peak
    assert all(row.exact.peak <= 1.02 * row.naive.peak for row in proof.rows)


def test_a_batch_smaller_than_the_steps(problem: tuple[LossFn, Params]) -> None:
    rows = list(prove(*problem, batch((9, 30, 4))))[-1].rows
    assert [row.sizes for row in rows] == [(3,), (2, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)]
    assert max(row.exact.gradient_error for row in rows) < 2e-6
    equal = list(prove(*problem, batch((20,) * 3), steps=(8,)))[-1].rows[0]
    assert equal.naive.gradient_error < 2e-6


def test_the_proof_grows_row_by_row(problem: tuple[LossFn, Params]) -> None:
    assert [len(proof.rows) for proof in prove(*problem, batch((9, 30, 4)), steps=(1, 3))] == [0, 1, 2]


def test_the_three_ways_are_three(problem: tuple[LossFn, Params]) -> None:
    loss_fn, params = problem
    calls: list[int] = []

    def counted(params: Params, tokens: torch.Tensor) -> object:
        calls.append(len(tokens))
        return loss_fn(params, tokens)

    for make, sizes in (
        (large_batch(counted), [16]),
        (exact(counted, 3), [6, 5, 5]),
        (mean_of_means(counted, 3), [6, 5, 5]),
    ):
        calls.clear()
        make(params, batch())
        assert calls == sizes


def test_distance() -> None:
    a = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor(5.0)}
    b = {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor(0.0)}
    assert distance(a, b) == pytest.approx((9 + 16 + 25) ** 0.5 / 4)
    assert distance(b, b) == 0


def test_the_printed_table(proof: Proof) -> None:
    assert f"{proof.tokens} bytes" in table_head(proof)
    assert proof.tokens == sum(length - 1 for length in LENGTHS)
    for row in proof.rows:
        cells = table_row(row).split()
        assert cells[0] == str(row.steps)
        assert float(cells[1]) == pytest.approx(row.exact.gradient_error, rel=0.1)
        assert float(cells[4]) == pytest.approx(row.naive.gradient_error, rel=0.1)
        assert float(cells[6]) == pytest.approx(row.naive.peak / 2**20, abs=0.06)
