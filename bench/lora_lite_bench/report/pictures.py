"""The pictures of one task: each a figure whose title says what is to be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..comparing.noise import LEVEL
from ..comparing.table import Row, TaskTable
from ..runs.methods import ANCHORS, FROZEN, REFERENCE
from .curves import losses, rates
from .spectra import spectra
from .style import ACCENT, FAINT, INK, colour, headline, in_order, name_points, new


def pictures(table: TaskTable) -> Iterator[tuple[str, str, Figure]]:
    """(file name, what it shows, figure) of each that the results are enough for."""
    drawn: list[tuple[str, str, Callable[[TaskTable], Figure | None]]] = [
        ("scores", "test scores with their intervals", scores),
        ("parameters", "score against trained parameters", parameters),
        ("rates", "validation loss against learning rate", rates),
        ("losses", "training loss", losses),
        ("costs", "time, memory and arithmetic", costs),
        ("forgetting", "score against what was forgotten", forgetting),
        ("spectra", "shifts of singular values and rotations of singular directions", spectra),
    ]
    for name, shows, draw in drawn:
        figure = draw(table)
        if figure is not None:
            yield name, f"{table.title}: {shows}", figure


def scores(table: TaskTable) -> Figure:
    rows = in_order(table.rows)
    figure, (axes,) = new(9.5, 1.9 + 0.33 * len(rows))
    reference = table.row(REFERENCE)
    if reference is not None:
        found = reference.main.test
        if math.isfinite(found.half):
            axes.axvspan(100 * found.low, 100 * found.high, color=ACCENT, alpha=0.09, lw=0)
        axes.axvline(100 * found.mean, color=ACCENT, lw=0.8, ls=":")
    for y, row in enumerate(rows):
        found = row.main.test
        half = found.half if math.isfinite(found.half) else 0.0
        single = [100 * value for value in row.main.by_seed().values()]
        axes.scatter(single, [y] * len(single), s=12, color=colour(row), alpha=0.35, lw=0)
        axes.errorbar(100 * found.mean, y, xerr=100 * half, fmt="o", color=colour(row), ms=6, capsize=3, lw=1.4)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colour(row))
    axes.set_xlabel("test score, %")
    axes.grid(axis="y", visible=False)
    axes.set_xlim(-2, 102)
    headline(
        figure,
        f"{table.task}: {_said(table)}",
        f"{table.steps} steps{_but(table)}; large dots: mean and {LEVEL:.0%} interval over seeds, small: single seeds. "
        f"Better and worse: by differences paired over seeds, so bars may overlap. Band: {REFERENCE}.",
    )
    return figure


def _but(table: TaskTable) -> str:
    """Who was trained for other steps."""
    rows = [row for row in table.rows if row.method != FROZEN and row.main.steps != table.steps]
    return f" ({', '.join(f'{row.label}: {row.main.steps:,}' for row in rows)})" if rows else ""


def _said(table: TaskTable) -> str:
    """How many methods can be told from the reference."""
    methods = [row for row in table.rows if row.method not in ANCHORS and row.against != row.label]
    differences = [(row, row.difference.get("defaults")) for row in methods]
    compared = [row for row, difference in differences if difference is not None and difference.count > 1]
    if not compared:
        alone = all(len(row.main.runs) == 1 for row in table.rows)
        return "test scores of one seed: the differences may be chance" if alone and methods else "test scores"
    words = [row.verdict() for row in compared]
    if len(words) == 1:
        word = {"not": "cannot be told from", "better": "is better than", "worse": "is worse than"}
        return f"{compared[0].label} {word[words[0].split()[0]]} {REFERENCE}"
    count = {word: sum(text.startswith(word) for text in words) for word in ("not", "better", "worse")}
    return (
        f"of {len(compared)} methods {count['not']} cannot be told from {REFERENCE}, "
        f"{count['better']} {'is' if count['better'] == 1 else 'are'} better, {count['worse']} worse"
    )


def parameters(table: TaskTable) -> Figure | None:
    rows = [row for row in table.rows if row.first.trainable]
    if not rows:
        return None
    figure, (axes,) = new(9.5, 6.2)
    points = [(float(row.first.trainable), 100 * row.main.test.mean, row) for row in rows]
    front: list[tuple[float, float, Row]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if point[2].method in ANCHORS:
            continue
        if not front or point[1] > front[-1][1]:
            front.append(point)
    axes.step([x for x, _, _ in front], [y for _, y, _ in front], where="post", color=FAINT, lw=6, zorder=1)
    for x, y, row in points:
        half = 100 * row.main.test.half
        axes.errorbar(x, y, yerr=half if math.isfinite(half) else 0, fmt="o", color=colour(row), ms=6, lw=1, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, at: f"{value:,.0f}"))
    axes.set_xlabel("trained parameters (log scale)")
    axes.set_ylabel("test score, %")
    axes.margins(0.1)
    axes.set_ylim(-3, 103)
    headline(
        figure,
        f"{table.task}: {_who_is_best([row for _, _, row in front], [row for _, _, row in points])}",
        "Grey steps: the Pareto front of mean scores, no variant with fewer parameters scores higher than those on it; "
        f"bars: {LEVEL:.0%} interval over seeds. Points whose bars reach the steps may belong to it.",
    )
    halves = [100 * row.main.test.half for _, _, row in points]
    name_points(axes, points, [half if math.isfinite(half) else 0.0 for half in halves])
    return figure


def _who_is_best(front: list[Row], rows: list[Row]) -> str:
    scores = [row.main.test.mean for row in rows if row.method not in ANCHORS]
    if not scores:
        return "the anchors alone"
    if len(set(scores)) == 1 < len(scores):
        return f"all methods score {100 * scores[0]:.1f} %"
    verb = "scores" if len(front) == 1 else "score"
    return f"for the parameters that they train, {_listed([row.label for row in front])} {verb} highest"


def costs(table: TaskTable) -> Figure | None:
    rows = [row for row in table.rows if row.costs and row.method != FROZEN]
    if not rows:
        return None
    rows.sort(key=lambda row: -row.costs.ratio if row.costs else 0)
    figure, axes = new(11.5, 1.9 + 0.3 * len(rows), 1, 3, sharey=True)
    kinds = (
        ("forward + backward, × the frozen model", lambda row: row.costs.ratio, "{:.2f}"),
        ("peak memory of a first step, MB", lambda row: row.costs.peak_mb, "{:,.1f}"),
        ("added MACs per token, thousands", lambda row: row.costs.added_macs_per_token / 1e3, "{:,.0f}"),
    )
    for one, (label, value, form) in zip(axes, kinds, strict=True):
        values = [value(row) for row in rows]
        bars = one.barh(range(len(rows)), values, color=[colour(row) for row in rows], alpha=0.85, height=0.66)
        one.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=9.5)
        one.set_xlim(0, max(max(values), 1e-9) * 1.2)
        one.set_xlabel(label)
        one.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False)
    axes[0].axvline(1, color=INK, lw=1, ls=":")
    fast = min(
        (row for row in rows if row.method not in ANCHORS), key=lambda r: r.costs.ratio if r.costs else 0, default=None
    )
    says = f"{table.task}: what a training step costs" + (
        f"; of the variants {fast.label} is fastest, {fast.costs.ratio:.2f} × the frozen model"
        if fast and fast.costs
        else ""
    )
    headline(
        figure,
        says,
        "Measured alone, turn by turn with the frozen model, whose backward pass reaches the embeddings. "
        "MACs: matrix products only.",
        105,
    )
    return figure


def forgetting(table: TaskTable) -> Figure | None:
    rows = [row for row in table.rows if row.forgets is not None and row.method != FROZEN]
    if len(rows) < 2:
        return None
    figure, (axes,) = new(9.5, 6.2)
    points = [(100 * (row.forgets or 0.0), 100 * row.main.test.mean, row) for row in rows]
    axes.scatter(
        [x for x, _, _ in points], [y for _, y, _ in points], color=[colour(row) for *_, row in points], s=42, zorder=3
    )
    axes.set_xlabel("forgotten of the base's own task, points (left is better)")
    axes.set_ylabel("test score, %")
    axes.margins(0.12)
    frozen = table.row(FROZEN)
    own = 100 * (frozen.first.own or 0.0) if frozen else 0.0
    axes.set_xlim(min(0.0, *(x for x, _, _ in points)) - 3, 1.15 * own)
    least, most = min(x for x, _, _ in points), max(x for x, _, _ in points)
    says = (
        f"{table.task}: learning it costs between {least:.0f} and {most:.0f} of the {own:.0f} points "
        "that the base had on its own task"
    )
    if least > 0.9 * own:
        says = (
            f"{table.task}: whatever learns it forgets the base's own task, "
            f"on which the frozen model scores {own:.0f} %"
        )
    headline(figure, says, "Up: learned more. Left: forgot less. The best corner is top left.")
    name_points(axes, points)
    return figure


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
