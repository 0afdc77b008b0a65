"""The table of heads in `docs/microbatch.md` is what running each cell gives."""

import os

import pytest

from benchmarks import heads
from tests.helpers import some_slow

TABLE = heads.read(heads.PAGE.read_text())
RUN_BESIDE = "Liger"
FAST = ("`F.linear_cross_entropy`", "checkpointed pieces", "`microbatch`")
CELLS = [(column, row) for column in heads.COLUMNS if column != RUN_BESIDE for row in heads.ROWS]


def test_the_table_is_whole():
    assert list(TABLE) == list(heads.COLUMNS)
    said = {"yes", "all logits", "error", "not offered", "wrong", "rounds each piece", "needs a GPU"}
    for cells in TABLE.values():
        assert list(cells) == list(heads.ROWS)
        assert set(cells.values()) <= said
    assert set(TABLE["`microbatch`"].values()) == {"yes"}


@pytest.mark.filterwarnings("ignore")  # other libraries' own: a cell tells what came of it
@pytest.mark.parametrize(("column", "row"), some_slow(CELLS, *(cell for cell in CELLS if cell[0] in FAST)))
def test_a_cell(column, row):
    assert heads.cell(column, row) == TABLE[column][row]


@pytest.mark.slow
def test_ligers_column():
    """In Triton's interpreter, where both are: `benchmarks.heads` says how."""
    if "LIGER" not in os.environ:
        pytest.skip("LIGER= names no folder with liger-kernel and triton; benchmarks/heads.py says how to make one")
    assert heads.column(RUN_BESIDE) == TABLE[RUN_BESIDE]
