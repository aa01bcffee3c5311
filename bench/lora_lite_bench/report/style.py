"""How the pictures look: one accent for the reference, grey for the anchors, labels at the points themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

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
    """What is to be seen, and below it how to read it. The last thing that is put on a figure but `name_points`."""
    text = f"{fill(says, width)}\n"
    figure.suptitle(text, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK, parse_math=False)
    figure.supxlabel(fill(small, int(width * 1.45)), x=0.01, ha="left", fontsize=9.5, color="#5b6672", parse_math=False)


def name_points(axes: Axes, points: Iterable[tuple[float, float, Row]], bars: Iterable[float] = ()) -> None:
    """Each method's name beside its point, where it covers no other name, no point and none of their bars (half their
    lengths are given), with a line to its point where it had to go further away. The figure has its headline and its
    limits already."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # so that the axes are where they will be
    dots = [(float(x), float(y), row) for x, y, row in points]
    at = axes.transData.transform([(x, y) for x, y, _ in dots])
    room = axes.get_window_extent(renderer)
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in at]
    for (x, y, _), half in zip(dots, bars, strict=False):
        (left, low), (_, high) = axes.transData.transform([(x, y - half), (x, y + half)])
        taken.append(Bbox.from_extents(left - 2, low, left + 2, high))
    for n in sorted(range(len(dots)), key=lambda n: -at[n][1]):
        x, y, row = dots[n]
        words: dict[str, Any] = {"fontsize": 10.5, "color": colour(row), "parse_math": False, "zorder": 5}
        text = axes.annotate(row.label, (x, y), (0, 0), textcoords="offset pixels", va="center", **words)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = text.get_window_extent(renderer)
        dx, dy = _free(at[n], size.width, size.height, taken, room)
        text.set_position((dx, dy))
        taken.append(_box(at[n], dx, dy, size.width, size.height))
        if abs(dy) > size.height or min(abs(dx), abs(dx + size.width)) > 3 * NEAR:
            end = dx if dx > 0 else min(dx + size.width, 0)
            line = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), (end, dy), textcoords="offset pixels", arrowprops=line)


NEAR = 10  # pixels between a point and its name


def _free(point: Any, width: float, height: float, taken: Sequence[Bbox], room: Bbox) -> tuple[float, float]:
    """How far from its point a name begins, in pixels: right of it, left of it, and so further up and down; of all
    places the first that is free, or the one that is covered least."""
    sides = [(NEAR, 0.0), (-NEAR - width, 0.0)]
    for step in range(1, 16):
        for away in (0.55 * step * height, -0.55 * step * height):
            sides += [(NEAR + 4 * step, away), (-NEAR - 4 * step - width, away), (-width / 2, away)]
    inside = [place for place in sides if _within(_box(point, *place, width, height), room)]

    def covered(place: tuple[float, float]) -> float:
        box = _box(point, *place, width, height)
        shared = (Bbox.intersection(box, other) for other in taken)
        return sum(found.width * found.height for found in shared if found is not None)

    places = inside or sides
    return next((place for place in places if not covered(place)), None) or min(places, key=covered)


def _box(point: Any, dx: float, dy: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(point[0] + dx, point[1] + dy - height / 2, width, height)


def _within(box: Bbox, room: Bbox) -> bool:
    return box.x0 >= room.x0 and box.x1 <= room.x1 and box.y0 >= room.y0 and box.y1 <= room.y1


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Best at the top of a picture whose y axis goes up."""
    return list(reversed(rows))
