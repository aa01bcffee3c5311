"""A whole comparison: which methods on which tasks with which sweeps, carried out into a results file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

from rich.progress import Progress, TaskID

import lora_lite_core as ll

from .costing import measure
from .methods import ANCHORS, FROZEN, REFERENCE, config_for, fitting, matched_rank, parameters_of
from .results import ResultsFile, key_of
from .run import Job, Result, calibration, fresh
from .sweep import GRID, Plan, Settings, plan
from .tasks import Task, make_task
from .tasks.lookup import task_class
from .workers import drive, quiet, workers

SIZES = {  # where a sweep begins; it goes on past the edges
    "quick": Settings(rates=GRID[4:6], beyond=0, finalists=1),
    "short": Settings(rates=GRID[3:7]),
    "full": Settings(rates=GRID[2:], race=100),  # all seeds
}


@dataclass
class Comparison:
    """What `lora-lite bench` was asked for. `size` is "quick", "short" or "full"."""

    tasks: tuple[str, ...]
    knobs: dict[str, Any]
    methods: tuple[str, ...]
    files: dict[str, str]
    fields: dict[str, Any]
    seeds: tuple[int, ...]
    steps: int | None
    lr: float | None
    sweep: bool
    anchors: bool
    size: str
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return replace(SIZES[self.size], seeds=self.seeds)

    def carry_out(self, file: ResultsFile, count: int, progress: Progress) -> dict[str, str]:
        """Run all that the file lacks, `count` jobs side by side; then measure costs alone, then, of a full comparison,
        run what has matched parameter counts. Returns why methods failed, by name. Raises LoraLiteError for what can be
        known to be wrong beforehand."""
        quiet()
        made = {name: self._task(name) for name in self.tasks}
        for name, task in list(made.items()):
            status = progress.add_task(f"{name}: getting its model ready", total=None)
            try:
                task.prepare()
            except ll.LoraLiteError as error:  # of several tasks the others are still compared
                if len(made) == 1:
                    raise
                self.failures[f"task {name}"] = str(error)
                del made[name]
            progress.remove_task(status)
        jobs = [job for name, task in made.items() for job in self._jobs(name, task)]
        with workers(count) as submit:
            self._run(jobs, file, submit, progress, "runs")
            if self.size == "full":
                matched = [job for job in jobs for job in self._matched(job, made[job.task])]
                self._run(matched, file, submit, progress, "runs with matched parameters")
        self._measure(jobs, file, progress)
        return self.failures

    def _task(self, name: str) -> Task:
        cls = task_class(name)
        small = {"quick": cls.QUICK, "short": cls.SHORT, "full": {}}[self.size]
        steps = {"steps": self.steps} if self.steps else {}
        return make_task(name, {**small, **self._knobs(name), **steps})

    def _knobs(self, name: str) -> dict[str, Any]:
        """Those that this task has, where several tasks are compared; all, to be refused, of a single one."""
        known = {knob.name for knob in dataclass_fields(task_class(name))}
        return {knob: value for knob, value in self.knobs.items() if knob in known or len(self.tasks) == 1}

    def _jobs(self, name: str, task: Task) -> Iterator[Job]:
        """One of each method, to be planned: the seed and the rate come later."""
        set_knobs = {knob.name: getattr(task, knob.name) for knob in dataclass_fields(task) if knob.name != "steps"}
        changed = {knob: value for knob, value in set_knobs.items() if value != getattr(type(task), knob)}
        first = Job(name, changed, "", {}, self.seeds[0], 0.0, task.steps)
        for method in self.methods:
            fields = fitting(task, method, self.fields)
            own = {} if self.steps or self.size == "quick" else ll.get_variant(method).bench
            label = " ".join([method, *(f"{key}={value}" for key, value in self.fields.items())])
            file, steps = self.files.get(method, ""), int(own.get("steps", task.steps))
            yield replace(first, method=method, fields=fields, steps=steps, label=label, file=file)
        for method in ANCHORS if self.anchors else ():
            yield replace(first, method=method, label=method)

    def _stated(self, job: Job) -> float | None:
        if job.method in ANCHORS:
            return None
        return self.lr or (None if self.sweep else ll.get_variant(job.method).bench.get("lr"))

    def _run(self, jobs: list[Job], file: ResultsFile, submit: Any, progress: Progress, what: str) -> None:
        plans: dict[int, Plan] = {n: plan(job, self.settings, self._stated(job)) for n, job in enumerate(jobs)}
        total = sum(expected_steps(job, self.settings, self._stated(job)) for job in jobs)
        bar: TaskID = progress.add_task(what, total=total)

        def told(job: Job, outcome: Result | Exception) -> None:
            progress.update(bar, advance=job.steps, description=f"{what}: {job.task} {job.method}")
            if isinstance(outcome, Exception):
                known = isinstance(outcome, (ll.LoraLiteError, RuntimeError))
                self.failures[job.label or job.method] = str(outcome) if known else repr(outcome)

        drive(plans, file, submit, told)
        progress.update(bar, completed=total, description=what)

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
            if job.label not in self.failures and key_of(job, "costs") not in file.records:
                file.append(job, measure(job))
            progress.update(bar, advance=1)


def expected_steps(job: Job, settings: Settings, stated: float | None) -> int:
    """About how many training steps a plan takes, for the remaining time."""
    if job.method == FROZEN:
        return 0
    whole = job.steps * len(settings.seeds)
    if stated:
        return whole
    short = job.steps // 4 * (len(settings.rates) + 1) + job.steps // 2 * (len(settings.rates) // 2 + 2)
    race = job.steps * min(settings.race, len(settings.seeds)) * (settings.finalists - 1)
    return short + whole + race
