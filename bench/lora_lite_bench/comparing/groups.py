"""Which records belong together: one table for a task, its knobs and a number of steps; one row for a method as it was
configured. Results of older code do not mix with those of the newest, or of the one that a command has asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..runs.methods import FROZEN
from ..runs.run import Job, Result
from .results import Record
from .sweep import HALF, QUARTER, shortened


@dataclass
class Group:
    """The records of one table. `left_out` is how many there are of other code."""

    steps: int
    records: list[Record]
    left_out: int = 0


def groups(records: Iterable[Record], asked: Collection[str] = ()) -> list[Group]:
    """One for each task, knobs and number of steps of whole runs. What has no steps (costs, the frozen base), and what
    was trained for steps of its own (BENCH), is in each of its task and knobs.

    asked  keys whose code goes before code that ran later
    """
    alike: dict[str, list[Record]] = {}
    for record in records:
        alike.setdefault(f"{record.job.task} {_spelled(record.job.knobs)}", []).append(record)
    found = list[Group]()
    for some in alike.values():
        newest = _newest(some, 0, asked)
        for method in dict.fromkeys(record.job.method for record in newest):
            mine = [record for record in newest if record.job.method == method]
            kept = {id(record) for record in _newest(mine, 1, asked)}
            newest = [record for record in newest if record.job.method != method or id(record) in kept]
        left = len(some) - len(newest)
        found += [Group(steps, [r for r in newest if _belongs(r, steps)], left) for steps in _lengths(newest)]
    return found


def _newest(records: Sequence[Record], part: int, asked: Collection[str]) -> list[Record]:
    """Those of the code that ran last, or was asked for: of the task (part 0) or of the method (1). Lines that do not
    say of which code they are stay."""
    known = [record for record in records if record.code[part]]
    if not known:
        return list(records)
    last = max(enumerate(known), key=lambda found: (found[1].key in asked, _moment(found[1]), found[0]))[1].code[part]
    return [record for record in records if record.code[part] in ("", last)]


def _moment(record: Record) -> float:
    try:
        return datetime.strptime(record.time, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def _lengths(records: Sequence[Record]) -> list[int]:
    """Of the whole runs; of those with steps of their own where there are no others; 0 of a frozen base alone."""
    whole = [record.job for record in records if record.job.whole and isinstance(record.outcome, Result)]
    trained = [job for job in whole if job.method != FROZEN]
    found = [job.steps for job in trained if not job.own_steps] or [job.steps for job in trained]
    return list(dict.fromkeys(found)) or ([0] if whole else [])


def _belongs(record: Record, steps: int) -> bool:
    job = record.job
    if not isinstance(record.outcome, Result) or job.method == FROZEN or job.own_steps:
        return True
    return job.steps == steps if job.whole else job.steps in (shortened(steps, QUARTER), shortened(steps, HALF))


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each row by what it is called: the job's label, and behind it the fields in which methods of one
    label differ (two experiments, or protocols, may configure the same method)."""
    labels: dict[str, list[Record]] = {}
    for record in records:
        labels.setdefault(record.job.label or record.job.method, []).append(record)
    rows: dict[str, list[Record]] = {}
    for label, mine in labels.items():
        configured = {_spelled(r.job.fields): r.job.fields for r in mine if r.job.column == "defaults"}
        names = {name for fields in configured.values() for name in fields}
        differ = sorted(n for n in names if len({_spelled(fields.get(n)) for fields in configured.values()}) > 1)
        for fields in configured.values():
            more = [setting(name, _short(fields[name])) for name in differ if name in fields]
            rows[" ".join([label, *more])] = [record for record in mine if _configured(record.job, fields)]
    return rows


def _configured(job: Job, fields: dict[str, Any]) -> bool:
    """Whether the job is of a method with these fields, but for the rank of one with a matched rank."""
    if job.column == "defaults":
        return _spelled(job.fields) == _spelled(fields)
    return _spelled({**job.fields, "r": 0}) == _spelled({**fields, "r": 0})


def setting(name: str, value: object) -> str:
    """As it stands in titles and labels: what is empty is spelled, too."""
    return f"{name}={str(value) or repr(value)}"


def _short(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) and value else value


def _spelled(value: object) -> str:
    """The same text before and after a file."""
    return json.dumps(value, sort_keys=True, default=str)
