"""What was measured, as dicts for the file and as cells for the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..machine.timing import Sample, milliseconds, ratio
from .contestants import FROZEN, PEERS, theirs
from .growth import GrowthRow
from .layers import CellMeasured
from .starts import InitRow
from .steps import DECODED, KINDS, Measured

Row = dict[str, Any]
HEADS = (
    "method", "step ms", "/ PEFT", "/ PEFT wall", "/ frozen", "/ LoRA", "token ms", "/ PEFT", "/ frozen", "attach ms",
    "/ PEFT", "save ms", "/ PEFT", "load ms", "/ PEFT", "peak MB", "/ PEFT",
)  # fmt: skip
COLUMNS = (
    ("step_ms", 1), ("step_peft", 2), ("step_peft_wall", 2), ("step_frozen", 2), ("step_lora", 2), ("token_ms", 2),
    ("token_peft", 2), ("token_frozen", 2), ("attach_ms", 1), ("attach_peft", 2), ("save_ms", 1), ("save_peft", 2),
    ("load_ms", 1), ("load_peft", 2), ("peak_mb", 1), ("peak_peft", 2),
)  # fmt: skip
LYCORIS_HEADS = ("method", "step / LyCORIS", "token / LyCORIS", "attach / LyCORIS", "peak / LyCORIS")
LYCORIS_COLUMNS = (("step_lycoris", 2), ("token_lycoris", 2), ("attach_lycoris", 2), ("peak_lycoris", 2))
GROWTH_HEADS = ("growth", "attach ms", "/ PEFT", "token ms", "/ PEFT", "/ frozen", "step ms", "/ PEFT", "/ frozen")
GROWTH_COLUMNS = (
    ("attach_ms", 1), ("attach_peft", 2), ("token_ms", 3), ("token_peft", 2), ("token_frozen", 2), ("step_ms", 2),
    ("step_peft", 2), ("step_frozen", 2),
)  # fmt: skip
INIT_HEADS = ("start", "ms", "against", "ms", "ratio", "without forward", "error", "its error", "peak")
IMPORT_HEADS = ("in a new process", "ms")


@dataclass(frozen=True)
class ImportRow:
    """Milliseconds of processor time, the median of several new processes."""

    label: str
    ms: float


def compared(samples: Mapping[str, list[Sample]], label: str, which: int, reference: str = "", each: int = 1) -> Row:
    """Milliseconds of `label`, and its ratios to its twins, to the frozen model and to the row called `reference`."""
    if label not in samples:
        return {}
    row: Row = {"ms": milliseconds(samples[label], which) / each}
    others = {peer: theirs(label, peer) for peer in PEERS} | {"frozen": FROZEN, "lora": reference}
    for name, other in others.items():
        if other in samples and other != label:
            row[name] = ratio(samples[label], samples[other], which)
            row[f"{name}_wall"] = ratio(samples[label], samples[other], 0)
    return row


def step_rows(measured: Measured, which: int) -> list[Row]:
    frozen: Row = {"label": FROZEN, "peak_mb": measured.peak[FROZEN] / 1e6}
    for kind, each in (("step", 1), ("token", DECODED)):
        frozen[f"{kind}_ms"] = milliseconds(measured.samples[kind][FROZEN], which) / each
    rows = [frozen]
    for case in measured.cases:
        row: Row = {
            "label": case.label,
            "trainable": measured.trainable[case.label],
            "peak_mb": measured.peak[case.label] / 1e6,
        }
        for peer in PEERS:
            if (twin := theirs(case.label, peer)) in measured.peak:
                row[f"peak_{peer}"] = measured.peak[case.label] / measured.peak[twin]
        for kind in KINDS:
            each = DECODED if kind == "token" else 1
            made = compared(measured.samples[kind], case.label, which, case.reference, each)
            row |= {f"{kind}_{name}": value for name, value in made.items()}
        rows.append(row)
    return rows


def cell_heads(measured: CellMeasured) -> tuple[str, ...]:
    """Of one token µs of a forward pass; of more, ms of forward and backward."""
    heads = ["method"]
    for tokens in measured.samples:
        heads += ["1 token µs" if tokens == 1 else f"{tokens} tokens ms", "/ PEFT", "/ frozen", "/ floor"]
    return tuple(heads)


def cell_rows(measured: CellMeasured, which: int) -> list[Row]:
    rows: list[Row] = []
    for label in (FROZEN, *(case.label for case in measured.cases)):
        row: Row = {"label": label}
        for tokens, samples in measured.samples.items():
            made = compared(samples, label, which)
            if made:
                made["floor"] = made["ms"] / (1e3 * measured.floors[tokens][label])
            row |= {f"{tokens}_{name}": value for name, value in made.items()}
        rows.append(row)
    return rows


def cell_cells(row: Row, tokens: list[int]) -> list[str]:
    cells = [row["label"]]
    for number in tokens:
        scale, digits = (1e3, 0) if number == 1 else (1.0, 2)
        cells.append(f"{scale * row[f'{number}_ms']:,.{digits}f}" if f"{number}_ms" in row else "–")
        cells += [
            _number(row, f"{number}_{name}", digits) for name, digits in (("peft", 2), ("frozen", 2), ("floor", 1))
        ]
    return cells


def growth_row(grown: GrowthRow, which: int) -> Row:
    row: Row = {"label": f"{grown.case.label}, {grown.label}"}
    for kind, samples in grown.samples.items():
        row |= {f"{kind}_{name}": value for name, value in compared(samples, grown.case.label, which).items()}
    return row


def cells(row: Row, columns: tuple[tuple[str, int], ...] = COLUMNS) -> list[str]:
    return [row["label"], *(_number(row, key, digits) for key, digits in columns)]


def init_cells(row: InitRow) -> list[str]:
    return [
        row.label, f"{row.ours_ms:,.0f}", row.against, f"{row.theirs_ms:,.0f}", f"{row.ratio:.2f}",
        "–" if row.beyond is None else f"{row.beyond:.2f}", f"{row.our_error:.0e}", f"{row.their_error:.0e}",
        row.memory or "–",
    ]  # fmt: skip


def import_cells(row: ImportRow) -> list[str]:
    return [row.label, f"{row.ms:,.0f}"]


def _number(row: Row, key: str, digits: int) -> str:
    return f"{row[key]:,.{digits}f}" if key in row else "–"
