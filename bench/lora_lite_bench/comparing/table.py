"""From records to tables: one row a method, one column of scores for its defaults, one for a matched rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runs.costing import Costs
from ..runs.methods import ANCHORS, FROZEN, MATCHED, REFERENCE
from ..runs.run import Job, Result
from .groups import Group, by_row, groups, setting
from .noise import Interval, interval, paired, verdict
from .results import Record
from .sweep import chosen, loss_of

HEADS = (
    "variant", "r", "test %", "matched r", "matched test %", "valid %", "rate", "trainable", "file kB", "MACs/token",
    "fwd ms", "bwd ms", "× frozen", "init s", "peak MB", "forgets %", "reload error", "seeds",
    f"against {REFERENCE}, points",
)  # fmt: skip
SCORES = (0, 1, 2, 3, 4, 5, 6, 7, 15, 17, 18)  # the columns of the terminal's first table
COSTS = (0, 7, 8, 9, 10, 11, 12, 13, 14, 16)  # and of its second


@dataclass
class Scores:
    """The whole runs of one method and column at the rate that validation chose."""

    lr: float
    steps: int
    runs: dict[int, Result]  # by seed

    @property
    def test(self) -> Interval:
        return interval([run.test or 0.0 for run in self.runs.values()])

    def by_seed(self) -> dict[int, float]:
        return {seed: run.test or 0.0 for seed, run in self.runs.items()}

    def mean(self, name: str) -> float | None:
        values = [value for run in self.runs.values() if (value := getattr(run, name)) is not None]
        return sum(values) / len(values) if values else None


@dataclass
class Row:
    """All that the tables and pictures say of one method on one task.

    label    what it is called: the method, with fields that were set
    against  the label of the row that it is compared with; "" where there is none
    """

    label: str
    method: str
    scores: dict[str, Scores] = field(default_factory=dict)  # by column
    curve: dict[tuple[float, int], float] = field(default_factory=dict)  # validation loss by (rate, steps), first seed
    costs: Costs | None = None
    forgets: float | None = None
    against: str = ""
    difference: dict[str, Interval | None] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """The fields in the label."""
        return self.label.removeprefix(self.method)

    @property
    def swept(self) -> bool:
        """Whether several rates were tried."""
        return len({lr for lr, _ in self.curve}) > 1

    @property
    def kind(self) -> str:
        return "reference" if self.method == REFERENCE else "anchor" if self.method in ANCHORS else "variant"

    @property
    def first(self) -> Result:
        return next(iter(self.main.runs.values()))

    @property
    def main(self) -> Scores:
        return self.scores["defaults"]

    def verdict(self, column: str = "defaults") -> str:
        if self.method == FROZEN:
            return "not trained"
        if self.against == self.label:
            return "the reference"
        return verdict(self.difference.get(column), self.against) if self.against else f"no {REFERENCE} here"


@dataclass
class TaskTable:
    """One task with its knobs, and its rows, best score first, anchors last. `left_out` counts lines of other code,
    `keys` are those of its whole runs."""

    task: str
    knobs: dict[str, Any]
    steps: int
    rows: list[Row]
    left_out: int = 0
    keys: frozenset[str] = frozenset()

    def holds(self, asked: Collection[str]) -> bool:
        """Whether one of its runs, but for the frozen base beside others, is among these."""
        return not self.keys.isdisjoint(asked)

    @property
    def title(self) -> str:
        knobs = ", ".join(setting(name, value) for name, value in self.knobs.items())
        steps = f"{self.steps} steps" if self.steps else "not trained"
        return f"{self.task}{f' ({knobs})' if knobs else ''}, {steps}"

    def row(self, method: str) -> Row | None:
        """Of a method, as little configured as there is one."""
        return min((row for row in self.rows if row.method == method), key=lambda row: row.suffix != "", default=None)


def tables(records: Iterable[Record], asked: Collection[str] = ()) -> list[TaskTable]:
    """One table for each task, knobs and number of steps that have whole runs: of the code that ran last, or of that of
    the keys that were `asked` for."""
    made = [_table(group) for group in groups(records, asked)]
    return [table for table in made if table.rows]


def _table(group: Group) -> TaskTable:
    rows = [row for row in (_row(label, records) for label, records in by_row(group.records).items()) if row.scores]
    job = group.records[0].job
    whole = [record for record in group.records if isinstance(record.outcome, Result) and record.job.whole]
    trained = [record for record in whole if record.job.method != FROZEN]
    keys = frozenset(record.key for record in trained or whole)
    table = TaskTable(job.task, job.knobs, group.steps, rows, group.left_out, keys)
    any_matched = any("matched" in row.scores for row in rows)
    frozen = next((row.first.own for row in rows if row.method == FROZEN), None)
    for row in rows:
        reference = _reference(row, table)
        own = row.main.mean("own")
        row.forgets = None if frozen is None or own is None else frozen - own
        if reference is not None:
            row.against = reference.label
            same = abs(row.first.trainable - reference.first.trainable) <= MATCHED * reference.first.trainable
            if any_matched and same and row.method not in ANCHORS:
                row.scores.setdefault("matched", row.main)
            theirs = reference.main.by_seed()
            row.difference = {column: paired(scores.by_seed(), theirs) for column, scores in row.scores.items()}
    rows.sort(key=lambda row: (row.method in ANCHORS, -row.main.test.mean))
    return table


def _reference(row: Row, table: TaskTable) -> Row | None:
    """What a row is compared with: the reference with the same fields, where it was run with them."""
    plain = table.row(REFERENCE)
    if row.method == REFERENCE:
        return plain
    return next((one for one in table.rows if one.method == REFERENCE and one.suffix == row.suffix), plain)


def _row(label: str, records: Sequence[Record]) -> Row:
    row = Row(label, records[0].job.method)
    first = min((r.job.seed for r in records if isinstance(r.outcome, Result)), default=0)
    for column in ("defaults", "matched"):
        of_rate: dict[float, dict[int, Result]] = {}
        steps = 0
        for job, outcome in _runs(records, column):
            if job.whole:
                of_rate.setdefault(job.lr, {})[job.seed] = outcome
                steps = max(steps, job.steps)
            if column == "defaults" and job.seed == first:
                row.curve[job.lr, job.steps] = loss_of(outcome)
        if of_rate:
            most = max(map(len, of_rate.values()))  # a rate with fewer seeds was not one that the sweep chose
            best = chosen({lr: list(runs.values()) for lr, runs in of_rate.items() if len(runs) == most})
            row.scores[column] = Scores(best, steps, dict(sorted(of_rate[best].items())))
    row.costs = next((r.outcome for r in records if isinstance(r.outcome, Costs)), None)
    return row if "defaults" in row.scores else Row(label, row.method)


def _runs(records: Sequence[Record], column: str) -> Iterable[tuple[Job, Result]]:
    return ((r.job, r.outcome) for r in records if isinstance(r.outcome, Result) and r.job.column == column)


def cells(row: Row) -> tuple[str, ...]:
    """The row under HEADS, as text."""
    main, matched, costs = row.main, row.scores.get("matched"), row.costs
    errors = [run.reload_error for run in main.runs.values() if run.reload_error is not None]
    return (
        row.label,
        _number(row.first.rank, "d"),
        score(main.test),
        _number(next(iter(matched.runs.values())).rank if matched else None, "d"),
        score(matched.test) if matched else "–",
        _number(main.mean("valid"), ".1f", 100),
        _number(main.lr or None, ".2g"),
        _number(row.first.trainable, ",d"),
        _number(row.first.file_bytes, ",.0f", 1e-3),
        _number(costs and costs.added_macs_per_token, ",.0f"),
        _number(costs and costs.forward_ms, ".1f"),
        _number(costs and costs.backward_ms, ".1f"),
        _number(costs and costs.ratio, ".2f"),
        _number(costs and costs.init_s, ".2f"),
        _number(costs and costs.peak_mb, ".1f"),
        _number(row.forgets, ".1f", 100),
        _number(max(errors) if errors else None, ".0e").replace("0e+00", "0"),
        str(len(main.runs)),
        row.verdict(),
    )


def score(found: Interval) -> str:
    spread = f" ± {100 * found.half:.1f}" if math.isfinite(found.half) else ""
    return f"{100 * found.mean:.1f}{spread}"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor if factor != 1 else value:{form}}"
