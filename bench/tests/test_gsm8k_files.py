"""The files of the task gsm8k: the forms in which they are found, what is refused, and other contents at one place."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import ResultsFile, key_of, read
from lora_lite_bench.comparing.table import tables
from lora_lite_bench.runs.run import Job, Result
from lora_lite_bench.tasks import TaskError
from lora_lite_bench.tasks.gsm8k import corpus

from bench.tests.word_problems import write_data, write_model

pytestmark = pytest.mark.usefixtures("own_cache")
FILES = ("metamath/train", "gsm8k/train", "gsm8k/test")
TEST = "gsm8k/test.jsonl"


@pytest.fixture(autouse=True)
def read_anew() -> None:
    corpus.texts.cache_clear()


def changed(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    for name in FILES:
        path = folder / f"{name}.jsonl"
        path.write_bytes(change(path.read_bytes()))
    return folder


def as_the_hub_has_it(folder: Path) -> Path:
    import datasets

    for path in [folder / f"{name}.jsonl" for name in FILES]:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.unlink()
        if path.parent.name == "metamath":
            wide = [{**row, "original_question": row["query"]} for row in rows]
            (path.parent / "MetaMathQA-395K.json").write_text(json.dumps(wide, indent=1), encoding="utf-8")
        for subset in ("main", "socratic") if path.parent.name == "gsm8k" else ():
            (path.parent / subset).mkdir(exist_ok=True)
            few = datasets.Dataset.from_list(rows if subset == "main" else rows[:1])
            few.to_parquet(path.parent / subset / f"{path.stem}-00000-of-00001.parquet")
        (path.parent / "README.md").write_text("a card", encoding="utf-8")
    return folder


def packed(folder: Path) -> Path:
    for name in FILES:
        path = folder / f"{name}.jsonl"
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def with_others_beside(folder: Path) -> Path:
    for name in ("test.bak.jsonl", "test-old.jsonl", "testing.jsonl", "test.txt"):
        shutil.copy(folder / TEST, folder / "gsm8k" / name)
    return folder


def in_many(folder: Path) -> Path:
    for name in FILES:
        path = folder / f"{name}.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            path.with_name(f"{path.stem}-{number}.jsonl").write_text(line, encoding="utf-8")
        path.unlink()
    return folder


def in_an_odd_folder(folder: Path) -> Path:
    return folder.rename(folder.with_name("a [b] *"))


@pytest.mark.parametrize(
    "form",
    [
        as_the_hub_has_it,
        packed,
        with_others_beside,
        in_many,
        in_an_odd_folder,
        lambda folder: changed(folder, lambda text: b"\xef\xbb\xbf" + text),
        lambda folder: changed(folder, lambda text: b"\n" + text.replace(b"\n", b"\r\n\r\n") + b"  "),
    ],
    ids=["hub", "gz", "others", "many", "odd folder", "BOM", "blank lines"],
)
def test_forms(form: Callable[[Path], Path], places: dict[str, str], tmp_path: Path) -> None:
    folder = form(write_data(tmp_path / "data"))
    for part in corpus.SOURCES:
        assert corpus.texts(part, str(folder)) == corpus.texts(part, places["data"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.jsonl", b" \n\n", r"test\.jsonl is empty\n[\s\S]*one JSON object a line"),
        ("test.json", b"[\n]\n", r"test\.json is empty"),
        (
            "test.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS keeps the file; type there: git lfs pull",
        ),
        ("test-00001-of-00003.jsonl", b"{}", r"has test-00001-of-00003\.jsonl: 1 of 3; put all of them there"),
        ("test-old.jsonl", b"{}", r"no gsm8k/test\.jsonl \(or .*; it has gsm8k/test-old\.jsonl, gsm8k/train\.jsonl\n"),
    ],
)
def test_files_that_are_none(name: str, text: bytes, message: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (folder / TEST).unlink()
    (folder / "gsm8k" / name).write_bytes(text)
    with pytest.raises(TaskError, match=message):
        corpus.texts("test", str(folder))


def test_other_contents_at_the_same_place_are_another_result(tmp_path: Path) -> None:
    """Of data, even with the same size and time, and of a model; what is read is the new. No results are mixed."""
    data, model = write_data(tmp_path / "data"), write_model(tmp_path / "model")
    job = Job("gsm8k", {"data": str(data), "model": str(model)}, "lora", {}, 0, 1e-3, 8)
    file = ResultsFile(tmp_path / "r.jsonl")
    file.append(job, Result(test=0.25))
    first, old = key_of(job, "run"), corpus.texts("test", str(data))
    assert key_of(job, "run") == first
    (tmp_path / "data/notes.txt").write_text("no part of it", encoding="utf-8")
    assert key_of(job, "run") == first
    time = (data / TEST).stat()
    (data / TEST).write_bytes((data / TEST).read_bytes().replace(b"pens", b"cups"))
    os.utime(data / TEST, ns=(time.st_atime_ns, time.st_mtime_ns))
    second = key_of(job, "run")
    assert second != first
    assert file.unfinished(job).name == second
    corpus.texts.cache_clear()
    assert [text.question.replace("cups", "pens") for text in corpus.texts("test", str(data))] == [
        text.question for text in old
    ]
    assert "cups" in corpus.texts("test", str(data))[0].question
    file.append(replace(job, seed=1), Result(test=0.75))
    (table,) = tables(read([tmp_path / "r.jsonl"]))
    assert (list(table.rows[0].main.runs), table.left_out) == ([1], 1)
    write_model(tmp_path / "model", intermediate_size=32)
    assert key_of(job, "run") not in (first, second)


def test_a_home_that_no_shell_has_spelled_out(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments: list[Any] = ["--task", "gsm8k", "--model=~/m", "--data=~/d", "--out", str(tmp_path / "r.jsonl")]
    done = CliRunner().invoke(bench, ["lora", *arguments])
    assert re.search(rf"--data {re.escape(str(tmp_path))}/d is not a folder", done.output)
