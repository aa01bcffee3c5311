"""What can be said of a difference: paired over seeds, with its interval, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds it at LEVEL (Student's t over seeds); infinite for a single seed."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    count = len(values)
    if count < 2:
        return Interval(statistics.fmean(values), math.inf, count)
    error = statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error, count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Of the differences at the seeds that both have: the same batches and, of the same method, the same start."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def verdict(difference: Interval | None, reference: str) -> str:
    """In words, in points of the score. All seeds equal (a task that both solve, or neither) is no difference."""
    if difference is None:
        return f"no seed in common with {reference}"
    if difference.count < 2:
        return f"one seed: cannot be compared with {reference}"
    low, mean, high = (100 * value for value in (difference.low, difference.mean, difference.high))
    span = f"{low:+.1f} to {high:+.1f}"
    if low <= 0 <= high:
        return f"not distinguishable from {reference} ({span})"
    return f"{'better' if mean > 0 else 'worse'} than {reference} by {abs(mean):.1f} ({span})"
