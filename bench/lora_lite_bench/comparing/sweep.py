"""Which runs are made: a sweep of learning rates by successive halving, then every seed at the best rate.

Per method: every rate of the grid trains for a quarter of the steps on the first seed; when the best is the first or
last of the grid, the grid goes on on that side. The best half of the grid, and the rate below the best, train for half
of the steps, and on down while the lowest is the best: longer runs want lower rates. The best two of these train for
all steps on all seeds, and the one with the better mean validation score is reported; one that is out of reach after
the first seeds is left there. In the short runs best is the lowest validation loss. No test score decides anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..runs.methods import FROZEN
from ..runs.run import Job, Result

GRID = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-8, 0))  # half-decades from 1e-4 to 0.32
QUARTER, HALF = 4, 2
FIRST, OUT_OF_REACH = 2, 0.3  # seeds, and how much lower a mean validation score on them is not made up for
Round = list[Job]
Plan = Generator[Round, Sequence[Result], None]


@dataclass(frozen=True)
class Settings:
    """rates: the grid; beyond: how many half-decades it is continued at most; finalists: how many rates train for all
    steps."""

    rates: tuple[float, ...] = GRID
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    beyond: int = 4
    finalists: int = 2


def plan(job: Job, settings: Settings, stated_lr: float | None = None) -> Plan:
    """Yields rounds of jobs, and is sent their results in the same order.

    stated_lr  a rate that needs no sweep: the user's, or the module's own (BENCH)
    """
    if job.method == FROZEN:
        yield [replace(job, seed=settings.seeds[0], steps=0, lr=0.0)]
        return
    finalists = [stated_lr] if stated_lr else (yield from _sweep(job, settings))
    if len(finalists) > 1:
        finalists = [(yield from _race(job, finalists, settings.seeds))]
    yield [replace(job, lr=lr, seed=seed) for lr in finalists for seed in settings.seeds]


def _sweep(job: Job, settings: Settings) -> Generator[Round, Sequence[Result], list[float]]:
    short = replace(job, seed=settings.seeds[0], whole=False)
    losses: dict[float, float] = {}
    rates = list(settings.rates)
    while rates:
        results = yield [replace(short, lr=lr, steps=shortened(job.steps, QUARTER)) for lr in rates]
        losses |= {lr: loss_of(result) for lr, result in zip(rates, results, strict=True)}
        rates = [edge] if (edge := beyond(losses, settings)) else []
    best = sorted(losses, key=lambda lr: losses[lr])
    below = [step(best[0], -1)] if settings.beyond else []
    rates = list(dict.fromkeys([*best[: max(2, len(settings.rates) // 2)], *below]))
    longer: dict[float, float] = {}
    while rates:
        results = yield [replace(short, lr=lr, steps=shortened(job.steps, HALF)) for lr in rates]
        longer |= {lr: loss_of(result) for lr, result in zip(rates, results, strict=True)}
        lowest = min(longer)
        down = longer[lowest] == min(longer.values()) and 0 < settings.beyond > len(longer) - len(settings.rates)
        rates = [step(lowest, -1)] if down else []
    return sorted(longer, key=lambda lr: longer[lr])[: settings.finalists]


def _race(job: Job, finalists: Sequence[float], seeds: Sequence[int]) -> Generator[Round, Sequence[Result], float]:
    met: dict[float, list[Result]] = {lr: [] for lr in finalists}
    for some in (seeds[:FIRST], seeds[FIRST:]):
        runs = [replace(job, lr=lr, seed=seed) for lr in met for seed in some]
        for one, result in zip(runs, (yield runs), strict=True):
            met[one.lr].append(result)
        best = max(map(valid_of, met.values()))
        met = {lr: results for lr, results in met.items() if valid_of(results) > best - OUT_OF_REACH}
    return chosen(met)


def shortened(steps: int, by: int) -> int:
    """The steps of a short run."""
    return max(1, steps // by)


def step(lr: float, half_decades: int) -> float:
    """The rate so many half-decades further on the grid, by its two digits."""
    return float(f"{10 ** (round(2 * math.log10(lr) + half_decades) / 2):.2g}")


def beyond(losses: Mapping[float, float], settings: Settings) -> float | None:
    """The next rate outside of those tried when the best is at the edge; None when it is not, or far enough out."""
    if len(losses) < 2 or len(losses) >= len(settings.rates) + settings.beyond:
        return None
    best = min(losses, key=lambda lr: losses[lr])
    direction = {min(losses): -1, max(losses): 1}.get(best)
    return step(best, direction) if direction else None


def loss_of(result: Result) -> float:
    return math.inf if result.valid_loss is None else result.valid_loss


def valid_of(runs: Sequence[Result]) -> float:
    """The mean validation score of runs; 0 of one that was stopped."""
    return statistics.fmean(result.valid or 0.0 for result in runs)


def chosen(runs: Mapping[float, Sequence[Result]]) -> float:
    """The rate with the best mean validation score of whole runs; of equals, the lowest loss."""
    return max(runs, key=lambda lr: (valid_of(runs[lr]), -statistics.fmean(map(loss_of, runs[lr]))))
