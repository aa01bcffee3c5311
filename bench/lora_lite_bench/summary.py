"""From runs to the rows of the table: one row a variant, averaged over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .run import Result


def rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """The cells of the table, best test score first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.variant, []).append(result)
    ranked = sorted(groups.values(), key=lambda runs: -statistics.fmean(run.test for run in runs))
    return [_row(runs) for runs in ranked]


def standard_error(runs: Sequence[Result]) -> float:
    """Of the mean test score: over seeds when there are several, else that of the test problems of the one run."""
    if len(runs) == 1:
        return runs[0].test_error
    return statistics.stdev(run.test for run in runs) / math.sqrt(len(runs))


def _row(runs: Sequence[Result]) -> tuple[str, ...]:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(run, name) for run in runs)

    first = runs[0]
    return (
        first.variant,
        str(first.rank or "–"),
        f"{100 * mean('test'):.1f} ± {100 * standard_error(runs):.1f}",
        f"{100 * mean('valid'):.1f}",
        f"{first.trainable:,}",
        f"{first.added_macs_per_token:,.0f}",
        f"{mean('forward_ms'):.1f}",
        f"{mean('backward_ms'):.1f}",
        f"{mean('init_s'):.2f}",
        f"{mean('peak_mb'):.1f}",
        f"{max(run.reload_error for run in runs):.0e}".replace("0e+00", "0"),
    )
