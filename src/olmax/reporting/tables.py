"""A table that prints in a terminal and in a report from the same rows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, cast

from rich.table import Table as RichTable
from rich.text import Text as RichText

from olmax.reporting.estimates import Estimate

Cell = str | int | float | Estimate | None


def cell_text(value: Cell, digits: int = 2, *, signed: bool = False) -> str:
    """Text of one cell: thousands separated in integers, nothing measured is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, Estimate):
        return value.text(digits, signed=signed)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:+,}" if signed else f"{value:,}"
    if isinstance(value, float):
        return f"{value:{'+' if signed else ''},.{digits}f}"
    return value


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading and how its numbers are written."""

    heading: str
    digits: int = 2
    signed: bool = False
    align: Literal["left", "right"] = "right"


@dataclasses.dataclass
class Table:
    """Columns, rows of cells, and the rows to emphasise.

    A column given as a plain string is right-aligned with two digits, the first one left-aligned.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    caption: str = ""
    strong_rows: Sequence[int] = ()

    def __post_init__(self):
        self.columns = [
            column
            if isinstance(column, Column)
            else Column(column, align="left" if i == 0 else "right")
            for i, column in enumerate(self.columns)
        ]
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {number} has {len(row)} cells for "
                    f"{len(self.columns)} columns"
                )

    def texts(self) -> list[list[str]]:
        """The cells as written."""
        return [
            [
                cell_text(cell, column.digits, signed=column.signed)
                for cell, column in zip(row, cast(Sequence[Column], self.columns), strict=True)
            ]
            for row in self.rows
        ]

    def rich(self) -> RichTable:
        """For `rich.console.Console.print`."""
        table = RichTable(title=self.title or None, caption=self.caption or None)
        for column in cast(Sequence[Column], self.columns):
            table.add_column(RichText(column.heading), justify=column.align, no_wrap=True)
        for number, row in enumerate(self.texts()):
            style = "bold" if number in self.strong_rows else None
            table.add_row(*(RichText(text) for text in row), style=style)
        return table
