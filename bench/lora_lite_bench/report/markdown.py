"""The tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lite_core.contract.text import plain

from ..comparing.caption import caption
from ..comparing.table import HEADS, TaskTable, cells


def markdown(made: Sequence[TaskTable]) -> str:
    return "\n".join(_table(table) for table in made)


def _table(table: TaskTable) -> str:
    lines = [
        _line(HEADS),
        _line([":--", *["--:"] * (len(HEADS) - 2), ":--"]),
        *(_line(cells(row)) for row in table.rows),
    ]
    return f"**{_cell(table.title)}**\n\n" + "\n".join(lines) + f"\n\n{_escaped(caption(table))}\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, texts))} |"


def _cell(text: str) -> str:
    return _escaped(plain(text))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
