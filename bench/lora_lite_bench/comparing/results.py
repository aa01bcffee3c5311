"""The results file: one JSON line a run, whole or not there; read again, it says what need not be run again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lora_lite_core.contract.errors import LoraLiteError
from lora_lite_core.contract.text import plain, told

from ..machine.forks import cores
from ..runs.costing import Costs
from ..runs.methods import ANCHORS
from ..runs.run import Job, Result, variant_of, versions
from ..tasks import task_distribution
from .kinds import check

KINDS: dict[str, type[Result] | type[Costs]] = {"run": Result, "costs": Costs}
START = '{"kind": "'
PACKAGES = ("lora-lite-core", "lora-lite-bench", "torch", "transformers")


class ResultsError(LoraLiteError):
    """A file that holds no results of `lora-lite bench`, or damaged ones."""


@dataclass
class Record:
    """One line: what was run, what came out, and where. `code` is `Job.code`, "" where the line does not say it."""

    job: Job
    outcome: Result | Costs
    environment: dict[str, str] = field(default_factory=dict)
    time: str = ""
    key: str = ""
    code: tuple[str, str] = ("", "")

    @property
    def kind(self) -> str:
        return "run" if isinstance(self.outcome, Result) else "costs"


def key_of(job: Job, kind: str) -> str:
    text = json.dumps({"kind": kind, **job.key()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(job: Job) -> dict[str, str]:
    """Versions and machine, without any name of a place or a person."""
    own = [task_distribution(job.task)]
    if job.method not in ANCHORS:
        own.append(variant_of(job).distribution)
    machine = {"system": f"{platform.system()} {platform.machine()}", "processor": processor()}
    if torch.cuda.is_available():
        machine["processor"] += f", {torch.cuda.get_device_name()}"
    return {**versions(*PACKAGES, *sorted({*own} - {*PACKAGES})), **machine, "cores": str(cores())}


def processor() -> str:
    """Its name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2] for line in lines if line.startswith("model name")), platform.processor())
    return plain(found.strip(), 100)


class ResultsFile:
    """The lines of a file by key. Raises ResultsError for what is no such file, or cannot be added to.

    writes  false in all but one of several processes on the same runs: they keep the lines in memory
    cut     a half line at the end of the file, of a run that was killed while it wrote; it is taken off
    asked   the keys of what this process has looked for or added
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes, self.cut = path, writes, b""
        self.records: dict[str, Record] = {}
        self.asked: set[str] = set()
        if path.is_dir():
            raise ResultsError(f"{plain(path)} is a folder; give a file in it, as {plain(path / 'results.jsonl')}")
        if path.exists() and not path.is_file():  # a device is read without end, a pipe waits
            raise ResultsError(f"{plain(path)} is a device or a pipe; give a file: --out FILE")
        if writes and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ResultsError(f"{plain(path)} cannot be written to; give another place: --out FILE")
        if path.exists():
            self.records = {record.key: record for record in read([path])}
            self._mend(path.read_bytes())

    def _mend(self, whole: bytes) -> None:
        last = whole[whole.rfind(b"\n") + 1 :]
        if begun(last.decode(errors="replace")):
            self.cut = last
            if self.writes:
                os.truncate(self.path, len(whole) - len(last))
        elif last and self.writes:  # whole, without its end: somebody edited the file
            self._write(b"\n")

    def known(self, job: Job, kind: str) -> Record | None:
        """What the file has of a job: "run" or "costs"."""
        self.asked.add(key := key_of(job, kind))
        return self.records.get(key)

    def append(self, job: Job, outcome: Result | Costs) -> Record:
        kind = "run" if isinstance(outcome, Result) else "costs"
        record = Record(job, outcome, environment(job), time.strftime("%Y-%m-%dT%H:%M:%S%z"), key_of(job, kind))
        record.code = job.code()
        line = {"kind": kind, "key": record.key, "time": record.time, "job": asdict(job), kind: asdict(outcome)}
        text = json.dumps({**line, "environment": record.environment, "code": record.code}, allow_nan=False) + "\n"
        self.records[record.key] = record
        self.asked.add(record.key)
        if self.writes:
            self._write(text.encode())
            self._forget(record.key)
        return record

    def _write(self, line: bytes) -> None:
        """All of it, in one write where the system takes it in one; or nothing. Raises ResultsError."""
        size = self.path.stat().st_size if self.path.exists() else 0
        done = 0
        try:
            with self.path.open("ab", buffering=0) as file:
                while done < len(line):
                    done += file.write(line[done:])
                os.fsync(file.fileno())
        except OSError as error:
            if done and self.path.stat().st_size == size + done:
                os.truncate(self.path, size)
            raise ResultsError(
                f"{plain(self.path)} cannot be added to: {told(error)}; what was in it is kept, and when that "
                "is mended the same command goes on from there"
            ) from error

    def unfinished(self, job: Job) -> Path:
        """The folder beside the file in which a run keeps states to go on from, until its line is there."""
        return self._unfinished() / key_of(job, "run")

    def _unfinished(self) -> Path:
        return self.path.with_name(self.path.name + ".unfinished")

    def _forget(self, key: str) -> None:
        shutil.rmtree(self._unfinished() / key, ignore_errors=True)
        if self._unfinished().is_dir() and not any(self._unfinished().iterdir()):
            self._unfinished().rmdir()


def read(paths: Iterable[Path], tell: Callable[[str], object] = str) -> list[Record]:
    """The records of all files, of each key the last. A last line that was cut off while it was written is left out,
    which `tell` is told. Raises ResultsError."""
    found: dict[str, Record] = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{plain(path)} cannot be read: {told(error)}") from error
        lines = text.split("\n")
        if lines[-1] and begun(lines[-1]):
            lines.pop()
            tell(f"{plain(path)}: the last line was cut off while it was written; it is left out")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            record = _record(line, f"{plain(path)}, line {number}")
            found[record.key] = record
    return list(found.values())


def begun(line: str) -> bool:
    """Whether it is the beginning of a line as they are written here, and no whole one."""
    if not line.startswith(START[: len(line)]):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _record(line: str, place: str) -> Record:
    try:
        read = json.loads(line, parse_constant=_no_number)
        kind = read["kind"]
        job, outcome = Job(**read["job"]), KINDS[kind](**read[kind])
        task, method = map(str, read.get("code", ("", "")))
        found = dict(read["environment"]), str(read["time"]), str(read["key"])
        for cls, values in ((Job, read["job"]), (KINDS[kind], read[kind]), (Record, {"environment": found[0]})):
            check(cls, values)
        return Record(job, outcome, *found, (task, method))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResultsError(
            f"{place} is no result of `lora-lite bench` of this version: {plain(told(error))}"
        ) from error
