"""The table at the end of a command: the runs that it asked for, whatever else is in its results file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import Record, ResultsFile, key_of
from lora_lite_bench.comparing.table import tables
from lora_lite_bench.runs.run import Job, Result
from lora_lite_bench.tasks.gsm8k import corpus, task

from bench.tests.word_problems import write_data

pytestmark = pytest.mark.usefixtures("own_cache")
JOB = Job("parity", {}, "lora", {}, seed=0, lr=0.01, steps=48)
SMALL = {"dtype": "float32", "batch_size": 2, "new_tokens": 2, "length": 96, "valid_count": 2, "test_count": 2}
TINY = ["--steps", "8", "--quick", "--jobs", "1", "--no-anchors", "--knob", "test_count=20", "--knob", "valid_count=10"]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))


def test_code_that_was_asked_for_goes_before_newer_code() -> None:
    def record(code: str, day: int, method: str = "lora") -> Record:
        time = f"2026-01-0{day}T00:00:00+0000"
        return Record(replace(JOB, method=method), Result(test=day / 10), {}, time, f"{code} {method}", (code, "m"))

    records = [record("a", 1), record("a", 1, "ia3"), record("b", 2)]
    assert [row.main.test.mean for table in tables(records) for row in table.rows] == [0.2]
    (table,) = tables(records, {"a lora"})
    assert {row.label: row.main.test.mean for row in table.rows} == {"lora": 0.1, "ia3": 0.1}
    assert table.left_out == 1
    assert table.holds({"a ia3"})
    assert not table.holds({"b lora"})


def test_a_file_knows_what_it_was_asked_for(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    job = Job("shifted", {}, "ia3", {}, seed=0, lr=0.1, steps=8)
    assert file.known(job, "run") is None
    record = file.append(job, Result())
    again = ResultsFile(file.path)
    assert not again.asked
    assert again.known(job, "run") == record
    assert again.asked == {key_of(job, "run")}


def test_the_first_data_again_are_the_ones_that_are_shown(places: dict[str, str], tmp_path: Path) -> None:
    """Nothing is run, all is in the file: the table is of the data that are there, not of those that came last."""
    data = write_data(tmp_path / "data")
    knobs = [part for name, value in SMALL.items() for part in ("--knob", f"{name}={value}")]
    named = ["--model", places["model"], "--data", str(data), "--out", str(tmp_path / "r.jsonl"), "--steps", "8"]
    arguments = ["ia3", "--task", "gsm8k", "--no-anchors", *named, *knobs]
    problems = data / "gsm8k/test.jsonl"
    first, tested = problems.read_bytes(), dict[str, str]()
    for name, lines in (("a", first), ("b", first.splitlines(keepends=True)[0]), ("a again", first)):
        problems.write_bytes(lines)
        corpus.read.cache_clear()
        task._notes.cache_clear()
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code == 0, done.output
        tested[name] = "Test % of 1 examples" if "Test % of 1 examples" in " ".join(done.stdout.split()) else "of 2"
    assert tested == {"a": "of 2", "b": "Test % of 1 examples", "a again": "of 2"}
    assert "4 lines" in done.stdout


def test_tables_of_other_settings_stay_on_the_page(tmp_path: Path) -> None:
    out: list[Any] = ["--lr", "0.01", "--out", str(tmp_path / "r.jsonl")]
    for gift in ("3", "4", "3"):
        done = CliRunner().invoke(bench, ["ia3", *TINY, *out, "--knob", f"gift={gift}"])
        assert done.exit_code == 0, done.output
        other = "4" if gift == "3" else "3"
        assert f"gift={gift}" in done.stdout
        assert f"gift={other}" not in done.stdout
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "gift=3" in page
    assert "gift=4" in page
    assert "with 1 other table" in done.stdout
