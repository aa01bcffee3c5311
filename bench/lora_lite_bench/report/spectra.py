"""What a method of singular triplets has done, layer by layer: shifts of the values, rotations of the directions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from matplotlib.figure import Figure

from ..comparing.table import TaskTable
from ..runs.model_state import Change
from .style import ACCENT, INK, headline, new


def spectra(table: TaskTable) -> Figure | None:
    row = next((row for row in table.rows if row.first.spectrum), None)
    return row and layer_by_layer(row.first.spectrum, f"{table.task}: {row.label}", "One row a layer, first seed.")


def layer_by_layer(found: Mapping[str, Change], who: str, rows: str) -> Figure:
    """What `changes` has found, by layer; `who` begins the headline, `rows` what stands below."""
    layers = list(found)[::-1]
    figure, axes = new(11.5, 2.2 + 0.26 * len(layers), 1, 2, sharey=True)
    shifts = [[100 * abs(value) for value in found[layer]["shift"]] for layer in layers]
    angles = [[math.degrees(value) for value in found[layer]["angle"]] for layer in layers]
    for one, values, label in (
        (axes[0], shifts, "shift of singular values |δS| / S, %"),
        (axes[1], angles, "rotation of singular directions, degrees"),
    ):
        for y, points in enumerate(values):
            if not points:
                continue
            low, middle, high = _tenths(points)
            one.plot([low, high], [y, y], color=INK, lw=2.5, alpha=0.3, solid_capstyle="round")
            one.plot(points, [y] * len(points), "|", color=INK, ms=5, alpha=0.15)
            one.plot(middle, y, "o", color=ACCENT, ms=5)
        one.set_xlabel(label)
        one.set_xlim(left=0)
        one.grid(axis="y", visible=False)
    axes[0].set_xlim(0, 1.3 * max((_tenths(points)[2] for points in shifts), default=1.0) or 1.0)
    axes[0].set_yticks(
        range(len(layers)), [layer.removeprefix("model.layers.") for layer in layers], fontsize=9, parse_math=False
    )
    headline(
        figure,
        _says(who, layers, shifts, angles),
        f"{rows} Orange: the median triplet (block); bar: from the 10th to the 90th percentile; ticks: all, those "
        "beyond the left picture's edge left out.",
        105,
    )
    return figure


def _says(who: str, layers: list[str], shifts: list[list[float]], angles: list[list[float]]) -> str:
    middles = [statistics.median(points) for points in shifts]
    most = layers[middles.index(max(middles))]
    text = f"{who} shifts singular values most in {most} (median {max(middles):.0f} %)"
    turned = [statistics.median(points) for points in angles if points]
    if turned:
        at = max(range(len(angles)), key=lambda n: statistics.median(angles[n]) if angles[n] else 0)
        text += f" and turns directions most in {layers[at]} ({max(turned):.0f}°)"
    return text


def _tenths(points: list[float]) -> tuple[float, float, float]:
    if len(points) < 2:
        return points[0], points[0], points[0]
    cut = statistics.quantiles(points, n=10, method="inclusive")
    return cut[0], statistics.median(points), cut[-1]
