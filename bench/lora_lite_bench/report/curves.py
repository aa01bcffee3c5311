"""Small multiples, one panel a method: validation loss over the rates, training loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..comparing.table import Row, TaskTable
from ..runs.methods import ANCHORS, REFERENCE
from .style import ACCENT, FAINT, colour, headline, new

ACROSS = 4
NEIGHBOURS = 3.5  # a grid of two points a decade: rates less than this factor apart


def rates(table: TaskTable) -> Figure | None:
    """The sweep: a line for each length of run, short runs thin, the rate that was reported marked."""
    rows = [row for row in table.rows if len({lr for lr, _ in row.curve}) > 1]
    if not rows:
        return None
    shortest = {row.label: min(steps for _, steps in row.curve) for row in rows}
    gap = (math.nan, math.nan)
    others = [point for row in rows for point in (*_at(row, shortest[row.label]), gap)]  # one line, for many panels

    def draw(axes: Axes, row: Row) -> None:
        axes.plot(*zip(*others, strict=True), color=FAINT, lw=0.8, zorder=1)
        for size, steps in enumerate(sorted({steps for _, steps in row.curve}), 1):
            points = _at(row, steps)
            axes.plot(
                *zip(*points, strict=True), "o-", color=colour(row), ms=2 + 1.6 * size, lw=0.6 + 0.5 * size, zorder=3
            )
            if row is rows[0]:
                words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": colour(row)}
                axes.annotate(f"{steps} steps", points[-1], (6, -3), **words)
        axes.axvline(row.main.lr, color=ACCENT, lw=1, ls=":", zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")

    titles = [f"{row.label}: {row.main.lr:.2g}" for row in rows]
    figure = _panels(rows, titles, draw, "learning rate (log)", "validation loss (log)")
    low, high = min(row.main.lr for row in rows), max(row.main.lr for row in rows)
    says = f"the best rates lie between {low:.2g} and {high:.2g}, so one rate for all would be unfair"
    if low == high:
        says = f"the best rate is {low:.2g}" + (" for all" if len(rows) > 1 else "")
    elif high < NEIGHBOURS * low:
        says = f"the best rates, {low:.2g} and {high:.2g}, are neighbours in the grid"
    headline(
        figure,
        f"{table.task}: {says}",
        "First seed. Grey: the other methods' shortest runs. Short runs (small dots) try all rates, the best go on to "
        "longer ones (larger dots). Dotted and beside the name: the rate with the best validation score, the mean over "
        "seeds, of the longest runs. Rates at which training fell apart have no point.",
        105,
    )
    return figure


def _at(row: Row, steps: int) -> list[tuple[float, float]]:
    return sorted(
        (lr, loss) for (lr, count), loss in row.curve.items() if count == steps and math.isfinite(loss) and loss < 1e3
    ) or [(math.nan, math.nan)]


def losses(table: TaskTable) -> Figure | None:
    rows = [row for row in table.rows if row.first.losses]
    if not rows:
        return None
    means = {row.label: _mean_losses(row) for row in rows}
    lora = table.row(REFERENCE)
    reference = means.get(lora.label) if lora else None

    def draw(axes: Axes, row: Row) -> None:
        if reference is not None:
            axes.plot(reference, color=ACCENT, lw=1, alpha=0.5)
        for run in row.main.runs.values():
            axes.plot(run.losses, color=FAINT, lw=0.6, zorder=1)
        axes.plot(means[row.label], color=colour(row), lw=1.6, zorder=3)
        axes.set_yscale("log")

    figure = _panels(rows, [row.label for row in rows], draw, "step", "training loss (log)")
    quick = min(
        (row for row in rows if row.method not in ANCHORS),
        key=lambda row: means[row.label][len(means[row.label]) // 2 :][0],
        default=rows[0],
    )
    headline(
        figure,
        f"{table.task}: half-way through, of the variants {quick.label} has the lowest training loss",
        f"Dark: mean over seeds, smoothed over five steps; grey: single seeds; orange: {REFERENCE}. "
        "All see the same batches.",
        105,
    )
    return figure


def _mean_losses(row: Row) -> list[float]:
    runs = [run.losses for run in row.main.runs.values()]
    length = min(map(len, runs))
    mean = [sum(run[n] for run in runs) / len(runs) for n in range(length)]
    return [sum(part) / len(part) for part in (mean[max(0, n - 4) : n + 1] for n in range(length))]


def _panels(rows: Sequence[Row], titles: Sequence[str], draw: Callable[[Axes, Row], None], x: str, y: str) -> Figure:
    down = -(-len(rows) // ACROSS)
    across = min(ACROSS, len(rows))
    figure, axes = new(11.5, 1.6 + 2.1 * down, down, across, sharex=True, sharey=True)
    for one, row, title in zip(axes, rows, titles, strict=False):
        draw(one, row)
        one.set_title(title, fontsize=11.5, fontweight="bold", loc="left", color=colour(row), parse_math=False)
    for one in axes[len(rows) :]:
        one.set_axis_off()
    for axis in (one for panel in axes for one in (panel.xaxis, panel.yaxis)):
        if axis.get_scale() == "log":
            _number(axis)
    for n, one in enumerate(axes):
        if n + across >= len(rows):
            one.set_xlabel(x)
            one.tick_params(labelbottom=True)
        if n % across == 0:
            one.set_ylabel(y)
    return figure


def _number(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, also where it spans less than a decade, and few where it spans several."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5) if decades > 0.5 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(lambda value, at: f"{value:g}")
    axis.set_minor_locator(NullLocator())
