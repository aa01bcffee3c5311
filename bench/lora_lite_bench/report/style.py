"""How the pictures look: one accent for the reference, grey for the anchors, labels at the points themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any

import adjustText  # pyright: ignore[reportMissingTypeStubs]
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..comparing.table import Row
from ..runs.methods import ANCHORS, REFERENCE

INK, ACCENT, GREY, FAINT = "#1f2933", "#c2410c", "#8a94a0", "#d5dae0"
LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # names are others' words
    "figure.dpi": 110,
    "savefig.dpi": 150,
}


def colour(row: Row) -> str:
    return ACCENT if row.method == REFERENCE else GREY if row.method in ANCHORS else INK


def new(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure without a window, and its axes in reading order."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [one for line in axes for one in line]


def headline(figure: Figure, says: str, small: str, width: int = 88) -> None:
    """What is to be seen, and below it how to read it."""
    text = f"{fill(says, width)}\n"
    figure.suptitle(text, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK, parse_math=False)
    figure.supxlabel(fill(small, int(width * 1.45)), x=0.01, ha="left", fontsize=9.5, color="#5b6672", parse_math=False)


def name_points(axes: Axes, points: Iterable[tuple[float, float, Row]]) -> None:
    """Each method's name beside its point, moved until none covers another."""
    points = list(points)
    texts = [axes.text(x, y, row.method, fontsize=10.5, color=colour(row), parse_math=False) for x, y, row in points]
    adjustText.adjust_text(
        texts,
        x=[x for x, _, _ in points],
        y=[y for _, y, _ in points],
        ax=axes,
        expand=(1.15, 1.5),
        arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6},
    )


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Best at the top of a picture whose y axis goes up."""
    return list(reversed(rows))
