"""The report as one HTML file that needs nothing else: tables, pictures, and where the numbers come from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lora_lite_core.contract.text import plain

from ..comparing.results import Record
from ..comparing.table import HEADS, TaskTable, caption, cells, tables
from .pictures import pictures

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #d5dae0; padding-top: 1.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e9ed; }
th { border-bottom: 2px solid #8a94a0; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
tr.reference td { color: #c2410c; } tr.anchor td { color: #6b7580; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; } .small { color: #5b6672; font-size: 14px; }
"""


def write_page(path: Path, records: Sequence[Record]) -> None:
    """Write the report; it replaces the file that was there only when it is whole."""
    made = tables(records)
    body = "".join(_section(table) for table in made)
    links = " · ".join(f'<a href="#t{n}">{_text(table.title)}</a>' for n, table in enumerate(made))
    for n, _ in enumerate(made):
        body = body.replace("<h2>", f'<h2 id="t{n}">', 1)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>lora-lite bench</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>Adapters compared</h1><p>{links}</p>{body}{_environments(records)}</body></html>\n"
    )
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _section(table: TaskTable) -> str:
    figures = "".join(
        f'<figure id="{name}-{_text(table.task)}"><img alt="{_text(shows)}" src="data:image/png;base64,'
        f'{base64.b64encode(png(figure)).decode()}"></figure>'
        for name, shows, figure in pictures(table)
    )
    return f"<h2>{_text(table.title)}</h2>{_table(table)}<p class='small'>{_text(caption(table))}</p>{figures}"


def _table(table: TaskTable) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in HEADS)
    body = "".join(
        f'<tr class="{row.kind}">{"".join(f"<td>{_text(cell)}</td>" for cell in cells(row))}</tr>' for row in table.rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _environments(records: Sequence[Record]) -> str:
    """Each machine and set of versions that results come from, and how many of them."""
    counts: dict[str, int] = {}
    for record in records:
        text = ", ".join(f"{name} {value}" for name, value in sorted(record.environment.items()))
        counts[text] = counts.get(text, 0) + 1
    times = sorted(record.time for record in records)
    lines = "".join(f"<li>{_text(text)} ({count} lines)</li>" for text, count in counts.items())
    span = f"{times[0]} to {times[-1]}" if times else "no results"
    return f"<h2>Where the numbers come from</h2><p>{_text(span)}</p><ul class='small'>{lines}</ul>"


def _text(value: object) -> str:
    return html.escape(plain(value))
