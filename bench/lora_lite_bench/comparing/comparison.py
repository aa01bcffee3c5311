"""A whole comparison: which methods on which tasks with which sweeps, carried out into a results file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

from rich.progress import Progress, TaskID
from rich.text import Text

import lora_lite_core as ll
from lora_lite_core.contract.errors import did_you_mean, listed
from lora_lite_core.contract.text import plain

from ..machine.processes import processes
from ..runs.costing import measure
from ..runs.methods import ANCHORS, FROZEN, REFERENCE, config_for, fitting, known_fields, matched_rank, parameters_of
from ..runs.run import Job, Result, calibration, fresh
from ..tasks import Protocol, Task, TaskError, make_task, protocol_of, task_class
from .groups import setting
from .results import ResultsFile
from .sweep import GRID, Plan, Settings, plan
from .workers import drive, quiet, workers

SIZES = {  # where a sweep begins; it goes on past the edges
    "quick": Settings(rates=GRID[4:6], beyond=0, finalists=1),
    "short": Settings(rates=GRID[3:7]),
    "full": Settings(rates=GRID[2:]),
}


@dataclass
class Comparison:
    """What `lora-lite bench` was asked for. `size` is "quick", "short" or "full"; None is what the task's protocol
    says, or the size."""

    tasks: tuple[str, ...]
    knobs: dict[str, Any]
    methods: tuple[str, ...]
    files: dict[str, str]
    fields: dict[str, Any]
    seed: int | None
    seeds: int | None
    steps: int | None
    lr: float | None
    sweep: bool
    anchors: bool
    all_methods: bool
    size: str
    protocol: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    protocols: dict[str, Protocol | None] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # keys of the lines that it made, or found in the file

    def settings(self, task: str) -> Settings:
        """Of the sweeps on a task."""
        protocol = self.protocols[task]
        first = self.seed if self.seed is not None else protocol.seed if protocol else 0
        count = self.seeds or (2 if self.size == "quick" else protocol.seeds if protocol else 5)
        return replace(SIZES[self.size], seeds=tuple(range(first, first + count)))

    def carry_out(self, file: ResultsFile, count: int, progress: Progress) -> dict[str, str]:
        """Run all that the file lacks, `count` jobs side by side; then measure costs alone, then, of a full comparison,
        run what has matched parameter counts. Returns why methods failed, by name. Raises LoraLiteError for what can be
        known to be wrong beforehand."""
        self.asked = file.asked
        alone = any(task_class(name).ALONE for name in self.tasks)
        threads = None if alone else 1
        quiet(threads)
        self._check_knobs()
        self.protocols = {name: protocol_of(name, self.protocol, self._knobs(name)) for name in self.tasks}
        made = {name: self._task(name) for name in self.tasks}
        for name, task in list(made.items()):
            status = progress.add_task(f"{name}: getting its model ready", total=None)
            try:
                processes().main_first(task.prepare)
                for note in task.notes(self.settings(name).seeds[0], task.steps):
                    progress.console.print(Text(plain(f"{name}: {note}", 500)))
            except ll.LoraLiteError as error:  # of several tasks the others are still compared
                if len(made) == 1:
                    raise
                self.failures[f"task {name}"] = str(error)
                del made[name]
            progress.remove_task(status)
        jobs = [job for name, task in made.items() for job in self._jobs(name, task)]
        bar = Bar(progress)
        with workers(1 if alone or processes().count > 1 else count, bar.step, threads) as submit:
            self._run(jobs, file, submit, bar, "runs")
            if self.size == "full":
                matched = [job for job in jobs for job in self._matched(job, made[job.task])]
                self._run(matched, file, submit, bar, "runs with matched parameters")
        if processes().main:
            self._measure(jobs, file, progress)
        return self.failures

    def _task(self, name: str) -> Task:
        cls = task_class(name)
        protocol = self.protocols[name]
        small = {"quick": cls.QUICK, "short": cls.SHORT, "full": {}}[self.size]
        steps = {"steps": self.steps} if self.steps else {}
        return make_task(name, {**(protocol.knobs if protocol else {}), **small, **self._knobs(name), **steps})

    def _knobs(self, name: str) -> dict[str, Any]:
        """Those that this task has, where several tasks are compared; all, to be refused, of a single one."""
        known = {knob.name for knob in dataclass_fields(task_class(name))}
        return {knob: value for knob, value in self.knobs.items() if knob in known or len(self.tasks) == 1}

    def _check_knobs(self) -> None:
        """Of several tasks, one at least has each knob."""
        known = {knob.name: None for name in self.tasks for knob in dataclass_fields(task_class(name))}
        for knob in self.knobs if len(self.tasks) > 1 else ():
            if knob not in known:
                raise TaskError(
                    f"no task of {', '.join(self.tasks)} has a knob {plain(repr(knob))}"
                    f"{did_you_mean(knob, list(known))}; knobs: {listed(list(known), 40)}"
                )

    def _jobs(self, name: str, task: Task) -> Iterator[Job]:
        """One of each method, to be planned: the seed and the rate come later."""
        set_knobs = {knob.name: getattr(task, knob.name) for knob in dataclass_fields(task) if knob.name != "steps"}
        changed = {knob: value for knob, value in set_knobs.items() if value != getattr(type(task), knob)}
        first = Job(name, changed, "", {}, self.settings(name).seeds[0], 0.0, task.steps)
        protocol = self.protocols[name]
        experiment = protocol is not None and protocol not in task_class(name).PROTOCOLS.values()
        fixed = "r" in self.fields or experiment  # a rank that somebody has asked for is not cut
        for method in self._methods(protocol):
            given = protocol.fields_of(method, known_fields(method)) if protocol else {}
            fields = fitting(task, method, {**given, **self.fields}, fixed)
            stated = self.steps or "steps" in self.knobs or self.size == "quick" or protocol
            steps = task.steps if stated else int(ll.get_variant(method).bench.get("steps", task.steps))
            label = " ".join([method, *(setting(key, value) for key, value in self.fields.items())])
            yield replace(
                first,
                method=method,
                fields=fields,
                steps=steps,
                label=label,
                file=self.files.get(method, ""),
                own_steps=steps != task.steps,
            )
        anchors = ANCHORS if task.trains_whole() else (FROZEN,)
        for method in anchors if self.anchors else ():
            yield replace(first, method=method, label=method)

    def _methods(self, protocol: Protocol | None) -> tuple[str, ...]:
        """Those that were named; where none were, the protocol's that are installed, or all."""
        if not (self.all_methods and protocol and protocol.methods):
            return self.methods
        installed = {info.name for info in ll.list_variants() if info.state == "ok"}
        return tuple(method for method in protocol.methods if method in installed)

    def _stated(self, job: Job) -> float | None:
        protocol = self.protocols[job.task]
        if job.method in ANCHORS:
            return protocol.rate(job.method) if protocol and not self.sweep else None
        if self.lr or self.sweep:
            return self.lr
        return protocol.rate(job.method) if protocol else ll.get_variant(job.method).bench.get("lr")

    def _run(self, jobs: list[Job], file: ResultsFile, submit: Any, bar: Bar, what: str) -> None:
        settings = {job.task: self.settings(job.task) for job in jobs}
        plans: dict[int, Plan] = {n: plan(job, settings[job.task], self._stated(job)) for n, job in enumerate(jobs)}
        bar.begin(what, sum(expected_steps(job, settings[job.task], self._stated(job)) for job in jobs))

        def told(job: Job, outcome: Result | Exception) -> None:
            bar.ended(job.steps, f"{what}: {job.task} {job.method}")
            if isinstance(outcome, Exception):
                known = isinstance(outcome, (ll.LoraLiteError, RuntimeError))
                self.failures[job.label or job.method] = str(outcome) if known else repr(outcome)

        drive(plans, file, submit, told)
        bar.end()

    def _matched(self, job: Job, task: Task) -> Iterator[Job]:
        """The job with the rank that trains as much as the reference's default, where that is another rank."""
        if job.method in (*ANCHORS, REFERENCE) or job.method in self.failures or REFERENCE not in self.methods:
            return
        _, processor = fresh(task)
        data = calibration(task, processor, job.seed)
        wanted = parameters_of(task, REFERENCE, {})
        rank = matched_rank(task, job.method, {**job.fields}, wanted, data)
        if rank is not None and rank != getattr(config_for(task, job.method, job.fields), "r", None):
            yield replace(job, fields={**job.fields, "r": rank}, column="matched")

    def _measure(self, jobs: list[Job], file: ResultsFile, progress: Progress) -> None:
        bar = progress.add_task("costs, measured alone", total=len(jobs))
        for job in jobs:
            job = replace(job, lr=1e-3, steps=0)
            progress.update(bar, description=f"costs, measured alone: {job.task} {job.method}")
            if job.label not in self.failures and file.known(job, "costs") is None:
                file.append(job, measure(job))
            progress.update(bar, advance=1)


class Bar:
    """A progress bar over the training steps of all runs; of one that tells of single steps, these are seen at once."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.what, self.total, self.seen = progress, "", 0, 0
        self.task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        self.what, self.total, self.seen = what, total, 0
        self.task = self.progress.add_task(what, total=total)

    def step(self) -> None:
        """Of a run that goes on."""
        assert self.task is not None
        self.seen += 1
        self.progress.update(self.task, advance=1)

    def ended(self, steps: int, what: str) -> None:
        """A run of so many steps."""
        assert self.task is not None
        self.progress.update(self.task, advance=steps - self.seen, description=what)
        self.seen = 0

    def end(self) -> None:
        assert self.task is not None
        self.progress.update(self.task, completed=self.total, description=self.what)


def expected_steps(job: Job, settings: Settings, stated: float | None) -> int:
    """About how many training steps a plan takes, for the remaining time."""
    if job.method == FROZEN:
        return 0
    whole = job.steps * len(settings.seeds)
    if stated:
        return whole
    short = job.steps // 4 * (len(settings.rates) + 1) + job.steps // 2 * (len(settings.rates) // 2 + 2)
    return short + whole * settings.finalists
