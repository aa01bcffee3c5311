"""The results file in bad times: a line cut off, a full disk, no permission, somebody else's file."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import ResultsError, ResultsFile, read
from lora_lite_bench.comparing.sweep import Plan
from lora_lite_bench.comparing.workers import drive
from lora_lite_bench.runs.run import Job, Result

JOB = Job("shifted", {}, "ia3", {}, seed=0, lr=0.0, steps=100)
QUICK = ["--quick", "--jobs", "1", "--no-anchors", "--lr", "0.01", "--steps", "8"]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become longer, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_has_no_room_is_not_there_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path)
    file.append(JOB, Result(valid=0.5))
    before = path.read_bytes()
    with room_for(len(before) + 100), pytest.raises(ResultsError, match="cannot be added to: OSError: .*is kept"):
        file.append(Job("shifted", {}, "lora", {}, 0, 0.1, 9), Result(valid=0.6))
    assert path.read_bytes() == before
    file.append(Job("shifted", {}, "lora", {}, 0, 0.1, 9), Result(valid=0.6))
    assert len(read([path])) == 2


def test_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("my notes", '{"kind": 3}', "one\ntwo"):
        path.write_text(text, encoding="utf-8")
        done = CliRunner().invoke(bench, ["ia3", *QUICK, "--out", str(path)])
        assert done.exit_code == 1
        assert "line 1 is no result of `lora-lite bench` of this version" in done.output
        assert path.read_text(encoding="utf-8") == text


def test_a_last_line_without_its_end_is_kept_and_a_half_one_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(JOB, Result(valid=0.5))
    line = path.read_bytes()
    for cut, kept in ((1, 1), (2, 0), (len(line) - 3, 0)):
        path.write_bytes(line[:-cut])
        assert len(read([path])) == kept
        file = ResultsFile(path)
        assert bool(file.cut) == (not kept)
        assert path.read_bytes() == line * kept
    path.write_bytes(line + line[:40])
    assert len(ResultsFile(path).records) == 1
    assert path.read_bytes() == line


def test_a_place_that_cannot_be_written_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*arguments: object) -> None:
        raise AssertionError("a run was begun")

    monkeypatch.setattr("lora_lite_bench.comparing.workers.run", trained)
    page = tmp_path / "r.html"
    for out, message in (
        (tmp_path, "is a folder; give a file in it"),
        (page, "would be the report's own name; give another, as"),
    ):
        done = CliRunner().invoke(bench, ["ia3", *QUICK, "--out", str(out)])
        assert done.exit_code != 0
        assert message in " ".join(done.output.split())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ResultsError, match="r.jsonl cannot be written to; give another place: --out FILE"):
        ResultsFile(tmp_path / "r.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lr", ["0", "-1", "nan", "inf"])
def test_rates_that_are_none(lr: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(bench, ["ia3", *QUICK[:4], "--lr", lr, "--out", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 2
    assert "is no learning rate; give one above 0, as in --lr 1e-3" in " ".join(done.output.split())


def test_where_no_run_is_finished_the_reason_is_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("lora_lite_bench.comparing.workers.run", broken)
    done = CliRunner().invoke(bench, ["ia3", *QUICK, "--out", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 1
    assert "ia3 failed: no luck" in done.output
    assert not isinstance(done.exception, ResultsError)


def test_lines_say_of_which_code_they_are(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResultsFile(path).append(JOB, Result())
    assert json.loads(path.read_text(encoding="utf-8"))["code"] == list(JOB.code())
    (record,) = read([path])
    assert record.code == JOB.code()
    assert all(len(part) == 12 for part in record.code)


def test_a_process_that_was_killed_ends_its_runs_with_a_reason(tmp_path: Path) -> None:
    """All jobs that were begun fail then, and the pool takes no more: what is finished is kept all the same."""
    told: dict[str, str] = {}
    done: Future[Result] = Future()
    done.set_result(Result(valid=0.5))

    def submit(job: Job, place: Path) -> Future[Result]:
        if job.method == "ia3":
            return done
        raise BrokenProcessPool("a process was killed")

    def plan(method: str) -> Plan:
        yield [replace(JOB, method=method)]

    file = ResultsFile(tmp_path / "r.jsonl")
    plans = {method: plan(method) for method in ("ia3", "lora")}
    drive(plans, file, submit, lambda job, outcome: told.update({job.method: str(outcome)}))
    assert told["lora"] == "a process was killed"
    assert [record.job.method for record in read([file.path])] == ["ia3"]


def test_a_knob_that_none_of_several_tasks_has(tmp_path: Path) -> None:
    both = ["ia3", "--task", "shifted", "--task", "facts", *QUICK, "--out", str(tmp_path / "r.jsonl")]
    done = CliRunner().invoke(bench, [*both, "--knob", "gifts=3"])
    assert done.exit_code == 1
    assert "no task of shifted, facts has a knob 'gifts'; did you mean 'gift'?; knobs: model, dtype" in done.output
