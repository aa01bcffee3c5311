"""Words of others in titles, captions and file names, and results files that are damaged: nothing odd is done with them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import Record, ResultsError, ResultsFile
from lora_lite_bench.comparing.table import TaskTable, tables
from lora_lite_bench.report.command import report
from lora_lite_bench.report.markdown import markdown
from lora_lite_bench.report.terminal import terminal_tables
from lora_lite_bench.runs.methods import FROZEN
from lora_lite_bench.runs.run import Job, Result
from rich.console import Console

JOB = Job("shifted", {}, "lora", {}, seed=0, lr=0.01, steps=48, label="lora")


def table_of(*jobs: Job, notes: str = "") -> TaskTable:
    result = Result(test=0.5, valid=0.5, valid_loss=1.0, trainable=3, notes=[notes] if notes else [])
    (table,) = tables(Record(job, result, key=str(job)) for job in jobs)
    return table


def in_terminal(table: TaskTable) -> str:
    console = Console(width=300)
    with console.capture() as caught:
        for one in terminal_tables(table):
            console.print(one)
    return caught.get()


@pytest.mark.parametrize("words", ["[INST] {query} [/INST]", "[red]{query}", "[/bold]"])
def test_brackets_are_no_markup(words: str) -> None:
    """A prompt of Llama's ended a command in a MarkupError, after all was trained."""
    label = f"lora {words}"
    shown = in_terminal(table_of(replace(JOB, knobs={"prompt": words}, label=label), notes=f"note {words}"))
    assert f"prompt={words}" in shown
    assert f"note {words}." in shown
    assert label in shown


def test_control_characters_and_tags_are_shown_as_they_are_spelled() -> None:
    label = "lora \x1b[31m<script>"
    table = table_of(replace(JOB, label=label, knobs={"prompt": "a\nb\x1b[2J"}))
    for text in (in_terminal(table), markdown([table])):
        assert "\x1b" not in text
        assert r"\x1b[31m" in text.replace("\\\\", "\\")
    assert "<script>" not in markdown([table])


def test_titles_without_empty_places() -> None:
    assert table_of(JOB).title == "shifted, 48 steps"
    assert table_of(replace(JOB, knobs={"between": "", "data": "d"})).title == "shifted (between='', data=d), 48 steps"
    assert table_of(replace(JOB, method=FROZEN, steps=0)).title == "shifted, not trained"
    fields = [{"bias": "", "target_names": ()}, {"bias": "all", "target_names": ["q", "v"]}]
    labels = [row.label for row in table_of(*(replace(JOB, fields=one) for one in fields)).rows]
    assert labels == ["lora bias='' target_names=()", "lora bias=all target_names=q,v"]


def test_a_task_named_like_a_path_stays_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = ResultsFile(tmp_path / "r.jsonl")
    file.append(JOB, Result(test=0.5, valid=0.5, valid_loss=1.0, trainable=3, losses=[1.0, 0.5]))
    text = file.path.read_text(encoding="utf-8")
    for name in ("../../up", "/tmp/abs", "a/b"):
        file.path.write_text(text.replace('"task": "shifted"', f'"task": "{name}"'), encoding="utf-8")
        done = CliRunner().invoke(report, ["r.jsonl", "--png", "pictures"])
        assert done.exit_code == 0, done.output
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert made
    assert all(name.count("/") == 1 and name.startswith("pictures/") for name in made)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("run", "test", "0.5", "test is '0.5', and not float | None"),
        ("run", "rank", 1.5, "rank is 1.5, and not int | None"),
        ("run", "trainable", True, "trainable is True, and not int"),
        ("run", "losses", ["a"], r"losses is ['a'], and not list[float]"),
        ("run", "notes", None, "notes is None, and not list[str]"),
        ("run", "examples", {"test": "x"}, "examples is {'test': 'x'}, and not dict[str, int]"),
        ("run", "spectrum", {"a": 3}, "spectrum is {'a': 3}, and not dict"),
        ("job", "seed", "1", "seed is '1', and not int"),
        ("job", "lr", None, "lr is None, and not float"),
        ("job", "knobs", [1], "knobs is [1], and not dict[str"),
        ("job", "method", ["a"], "method is ['a'], and not str"),
        ("job", "label", "\x1b[31m" * 9 + "a", ""),
        ("environment", "a", {"b": 1}, "environment is {"),
        ("run", "test", float("nan"), "NaN is no number of JSON"),
    ],
)
def test_values_of_another_type_are_refused_by_line(
    part: str, name: str, value: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ended in tracebacks, or stood in the table."""
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    file = ResultsFile(tmp_path / "r.jsonl")
    file.append(JOB, Result(test=0.5, valid=0.5, valid_loss=1.0, trainable=3))
    line = json.loads(file.path.read_text(encoding="utf-8"))
    line[part][name] = value
    file.path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    done = CliRunner().invoke(report, [str(file.path), "--html", str(tmp_path / "r.html")])
    assert "\x1b" not in done.output
    if message:
        said = "line 1 is no result of `lora-lite bench` of this version: "
        assert done.exit_code == 1
        assert said in done.output
        assert message in done.output.partition(said)[2]


def test_lines_too_deep_and_lines_cut_off_are_told(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    file.append(JOB, Result(test=0.5, valid=0.5, valid_loss=1.0, trainable=3))
    text = file.path.read_text(encoding="utf-8")
    file.path.write_text(text + text[:50], encoding="utf-8")
    done = CliRunner().invoke(report, [str(file.path), "--markdown", str(tmp_path / "r.md")])
    assert done.exit_code == 0
    assert f"{file.path}: the last line was cut off while it was written; it is left out" in done.stderr
    file.path.write_text('{"kind": "run", "run": ' + "[" * 100_000 + "\n", encoding="utf-8")
    done = CliRunner().invoke(report, [str(file.path), "--markdown", str(tmp_path / "r.md")])
    assert done.exit_code == 1
    assert "line 1 is no result of `lora-lite bench` of this version: RecursionError" in done.output


def test_what_is_no_file_is_not_read_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(ResultsError, match="is a device or a pipe; give a file: --out FILE"):
            ResultsFile(path)


def test_a_path_with_brackets_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in a MarkupError where a half line was taken off."""
    monkeypatch.chdir(tmp_path)
    Path("a[").mkdir()
    out = Path("a[/b].jsonl")
    out.write_text('{"kind": "run', encoding="utf-8")
    done = CliRunner().invoke(bench, ["ia3", "--set", "rank=3", "--out", str(out)])
    assert f"{out}: the last line was cut off" in done.output
    assert "no field 'rank'" in done.output
