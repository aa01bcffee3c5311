"""The tables of one task for the terminal: scores, then costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from lora_lite_core.contract.text import plain

from ..comparing.caption import caption, costs_caption
from ..comparing.table import COSTS, HEADS, SCORES, TaskTable, cells


def terminal_tables(table: TaskTable) -> Iterator[Table]:
    rows = [cells(row) for row in table.rows]
    yield _table(rows, SCORES, table.title, caption(table))
    if any(row.costs for row in table.rows):
        yield _table(rows, COSTS, f"{table.task}: costs", costs_caption(table))


def _table(rows: Sequence[tuple[str, ...]], columns: Sequence[int], title: str, below: str) -> Table:
    """Columns that are empty for all methods are left out."""
    shown = [n for n in columns if any(row[n] != "–" for row in rows)]
    made = Table(title=Text(plain(title)), caption=Text(below))  # brackets in them are no markup
    made.title_style, made.title_justify, made.caption_justify = "bold", "left", "left"
    for n in shown:
        made.add_column(HEADS[n], justify="left" if n in (0, len(HEADS) - 1) else "right")
    for row in rows:
        made.add_row(*(Text(plain(row[n])) for n in shown))
    return made
