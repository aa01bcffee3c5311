"""The parts of `lora-lite speed`: what each measures, and the tables that it makes of it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..machine.timing import counted
from .contestants import Settings, cases
from .growth import Sizes, growth
from .layers import Cell, measure_cell
from .starts import InitSettings, eva, pissa
from .steps import measure
from .tables import (
    GROWTH_COLUMNS,
    GROWTH_HEADS,
    HEADS,
    IMPORT_HEADS,
    INIT_HEADS,
    LYCORIS_COLUMNS,
    LYCORIS_HEADS,
    ImportRow,
    cell_cells,
    cell_heads,
    cell_rows,
    cells,
    growth_row,
    import_cells,
    init_cells,
    step_rows,
)

CLOCK = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
STATEMENTS = {
    "import torch": "import torch",
    "import lora_lite_core": "import lora_lite_core",
    "… and its attach": "import lora_lite_core as ll; ll.attach",
    "… and a list of all variants": "import lora_lite_core as ll; ll.list_variants()",
    "import peft": "import peft",
}


@dataclass(frozen=True)
class Section:
    """One table of the output, and what the file keeps of it."""

    part: str
    title: str
    heads: tuple[str, ...]
    cells: list[list[str]]
    data: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is measured; `asked` says that the variants were named by the user."""

    parts: tuple[str, ...]
    variants: list[str]
    asked: bool
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    modes: tuple[bool, ...]
    dtypes: tuple[str, ...]
    quick: bool


def _model(plan: Plan, settings: Settings, advance: Callable[[str], object]) -> Iterator[Section]:
    for dtype in plan.dtypes:
        sized = settings.with_(dtype=dtype)
        measured = measure(cases(plan.variants, sized), sized, advance)
        rows = step_rows(measured, counted(settings.device))
        data = {"rows": rows, "samples": measured.samples, "failed": measured.failed}
        title = f"{sized.layers} blocks of width {sized.hidden}, {sized.batch} × {sized.length} tokens, {dtype}"
        yield Section("model", title, HEADS, [cells(row) for row in rows], data, _notes(measured.failed))
        if beside := [row for row in rows if "step_lycoris" in row]:
            made = [cells(row, LYCORIS_COLUMNS) for row in beside]
            yield Section("model", f"{title}: beside LyCORIS", LYCORIS_HEADS, made, {"rows": beside})


def _notes(failed: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} did not run: {reason}" for name, reason in failed.items())


def _layers(plan: Plan, settings: Settings, advance: Callable[[str], object]) -> Iterator[Section]:
    tokens = sorted({*plan.tokens})
    for cell in [Cell(w, dtype, mode) for dtype in plan.dtypes for w in plan.widths for mode in plan.modes]:
        rows = cases(plan.variants, settings.with_(hidden=cell.width))
        measured = measure_cell(cell, rows, tokens, settings, advance)
        made = cell_rows(measured, counted(settings.device))
        data = {"rows": made, "samples": measured.samples, "floors": measured.floors, "failed": measured.failed}
        drawn = [cell_cells(row, tokens) for row in made]
        yield Section("layers", cell.title, cell_heads(measured), drawn, data, _notes(measured.failed))


def _growth(plan: Plan, settings: Settings, advance: Callable[[str], object]) -> Iterator[Section]:
    rows = cases(plan.variants if plan.asked else [], settings)
    sizes = Sizes((2, 4), (2, 4), (1, 2)) if plan.quick else Sizes()
    for dtype in plan.dtypes:
        grown = growth(rows, settings.with_(dtype=dtype), sizes, lambda: advance("growth"))
        made = [growth_row(row, counted(settings.device)) for row in grown]
        data = {"rows": made, "samples": {f"{row.case.label}, {row.label}": row.samples for row in grown}}
        failed = {name: reason for row in grown for name, reason in row.failed.items()}
        drawn = [cells(row, GROWTH_COLUMNS) for row in made]
        yield Section("growth", f"growth, {dtype}", GROWTH_HEADS, drawn, data, _notes(failed))


def _starts(plan: Plan, settings: Settings, advance: Callable[[str], object]) -> Iterator[Section]:
    initial = InitSettings(width=64, layers=2, rank=4, tokens=2048, rounds=1) if plan.quick else InitSettings()
    rows = [row for start in (eva, pissa) for row in start(initial, lambda: advance("starts"))]
    data = {"rows": [asdict(row) for row in rows]}
    yield Section("starts", "starts", INIT_HEADS, [init_cells(row) for row in rows], data)


def _imports(plan: Plan, settings: Settings, advance: Callable[[str], object]) -> Iterator[Section]:
    rows = imports(1 if plan.quick else 5, lambda: advance("imports"))
    data = {"rows": [asdict(row) for row in rows]}
    yield Section("imports", "imports", IMPORT_HEADS, [import_cells(row) for row in rows], data)


def imports(rounds: int, advance: Callable[[], object]) -> list[ImportRow]:
    samples: dict[str, list[float]] = {label: [] for label in STATEMENTS}
    for _ in range(rounds):
        for label, statement in STATEMENTS.items():
            command = [sys.executable, "-c", CLOCK.format(statement)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            samples[label].append(1e3 * float(done.stdout.split()[-1]))
            advance()
    return [ImportRow(label, statistics.median(times)) for label, times in samples.items()]


WORK: dict[str, Callable[[Plan, Any, Callable[[str], object]], Iterator[Section]]] = {
    "model": _model, "layers": _layers, "growth": _growth, "starts": _starts, "imports": _imports,
}  # fmt: skip
