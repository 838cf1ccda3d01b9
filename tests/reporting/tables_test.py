"""Cells as they are written, and the terminal's table."""

import io
import math

import pytest
from rich.console import Console

from olmax.reporting.estimates import Estimate
from olmax.reporting.tables import Column, Table, cell_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (1234567, "1,234,567"),
        (True, "yes"),
        (0.456, "0.46"),
        ("12 [x]", "12 [x]"),
        (Estimate(1.0, 0.25, 4), "1.00 ± 0.25"),
    ],
)
def test_cell_text(value, text):
    assert cell_text(value) == text


def test_columns_write_their_numbers():
    table = Table(["name", Column("change", 1, signed=True)], [["a", 2.345], ["b", -1]])
    assert table.texts() == [["a", "+2.3"], ["b", "-1"]]
    assert [column.align for column in table.columns] == ["left", "right"]


def test_rich_table_shows_every_cell_and_no_markup():
    out = io.StringIO()
    Console(file=out, width=80).print(Table(["x", "y"], [["[bold]", 3]], title="T").rich())
    assert "[bold]" in out.getvalue() and "3" in out.getvalue() and "T" in out.getvalue()


def test_ragged_row_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table(["x", "y"], [["a", 1], ["b"]])
