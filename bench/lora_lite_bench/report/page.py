"""The report as one HTML file that needs nothing else: tables, pictures, and where the numbers come from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lora_lite_core.contract.text import count, plain, told

from ..comparing.caption import caption, costs_caption
from ..comparing.results import Record, ResultsError
from ..comparing.table import COSTS, HEADS, SCORES, TaskTable, cells, tables
from .pictures import pictures

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #d5dae0; padding-top: 1.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e9ed; }
th { border-bottom: 2px solid #8a94a0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.words th:last-child, .words td:last-child { text-align: left; }
tr.reference td { color: #c2410c; } tr.anchor td { color: #6b7580; }
figure { margin: 2.5rem 0; } figcaption b { display: block; font-size: 18px; line-height: 1.3; }
img { width: 100%; min-width: 44rem; max-width: 72rem; height: auto; } .small { color: #5b6672; font-size: 14px; }
"""


def write_page(path: Path, records: Sequence[Record], asked: Collection[str] = ()) -> None:
    """Write the report; it replaces the file that was there only when it is whole. `asked` as of `tables`."""
    made = tables(records, asked)
    body = "".join(_section(table) for table in made)
    links = " · ".join(f'<a href="#t{n}">{_text(table.title)}</a>' for n, table in enumerate(made))
    for n, _ in enumerate(made):
        body = body.replace("<h2>", f'<h2 id="t{n}">', 1)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>lora-lite bench</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>Adapters compared</h1><p>{links}</p>{body}{_environments(records)}</body></html>\n"
    )
    write(path, page)


def write(path: Path, text: str) -> None:
    """The file appears whole, or stays as it was. Raises ResultsError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ResultsError(f"{plain(path)} cannot be written: {told(error)}") from error


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _section(table: TaskTable) -> str:
    figures = "".join(_figure(shows, figure) for _, shows, figure in pictures(table))
    costs = (
        f"{_table(table, COSTS)}<p class='small'>{_text(costs_caption(table))}</p>"
        if any(row.costs for row in table.rows)
        else ""
    )
    return (
        f"<h2>{_text(table.title)}</h2>{_table(table, SCORES)}<p class='small'>{html.escape(caption(table))}</p>"
        f"{costs}{figures}"
    )


def _figure(shows: str, figure: Figure) -> str:
    """The picture without its words, which are text of the page: they can be read on a small screen, too."""
    says, small = (" ".join(text.split()) for text in (figure.get_suptitle(), figure.get_supxlabel()))
    figure.suptitle("")
    figure.supxlabel("")
    return (
        f"<figure><figcaption><b>{_text(says)}</b></figcaption><div class='wide'><img alt=\"{_text(shows)}\" "
        f'src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}"></div>'
        f"<p class='small'>{_text(small)}</p></figure>"
    )


def _table(table: TaskTable, columns: Sequence[int]) -> str:
    """Of those columns that say something."""
    texts = [cells(row) for row in table.rows]
    shown = [n for n in columns if any(text[n] != "–" for text in texts)]
    head = "".join(f"<th>{_text(HEADS[n])}</th>" for n in shown)
    body = "".join(
        f'<tr class="{row.kind}">{"".join(f"<td>{_text(text[n])}</td>" for n in shown)}</tr>'
        for row, text in zip(table.rows, texts, strict=True)
    )
    kind = " class='words'" if shown[-1] == len(HEADS) - 1 else ""
    return f"<div class='wide'><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _environments(records: Sequence[Record]) -> str:
    """Each machine with its versions that results come from, and how many of them."""
    times = sorted(record.time for record in records)
    lines = "".join(
        f"<li>{_text(', '.join(f'{name} {value}' for name, value in sorted(found.items())))} "
        f"({count(lines, 'line')})</li>"
        for found, lines in environments(records)
    )
    span = f"{times[0]} to {times[-1]}" if times else "no results"
    return f"<h2>Where the numbers come from</h2><p>{_text(span)}</p><ul class='small'>{lines}</ul>"


def environments(records: Iterable[Record]) -> list[tuple[dict[str, str], int]]:
    """(versions and machine, lines) of each that there were. A line names the packages of its own task and method:
    what says nothing against each other is one."""
    found: list[tuple[dict[str, str], int]] = []
    for record in records:
        mine = record.environment
        for n, (known, lines) in enumerate(found):
            if all(known.get(name, value) == value for name, value in mine.items()):
                found[n] = {**known, **mine}, lines + 1
                break
        else:
            found.append((dict(mine), 1))
    return found


def _text(value: object) -> str:
    return html.escape(plain(value))
