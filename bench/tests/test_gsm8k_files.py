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
from lora_lite_bench.tasks import TaskError, make_task
from lora_lite_bench.tasks.gsm8k import corpus

from bench.tests.word_problems import write_data, write_model

pytestmark = pytest.mark.usefixtures("own_cache")
FILES = ("metamath/train", "gsm8k/train", "gsm8k/test")
TEST = "gsm8k/test.jsonl"


@pytest.fixture(autouse=True)
def read_anew() -> None:
    corpus.read.cache_clear()


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


def rows(count: int, **columns: Any) -> str:
    return "".join(json.dumps(columns) + "\n" for _ in range(count))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rows(1, question="a", answer="#### 3") + rows(1, question="a", answer=None), r"row 2: answer is None, and text is needed"),
        (rows(2, question=3, answer="#### 3"), r"row 1: question is 3, and text is needed"),
        (rows(1, question="a", answer="#### 3") + '{"question": "a"}\n', r"row 2: answer is None, and text is needed"),
        (rows(1, question="a", answer="#### 3") + rows(2, question=" ", answer="#### 3"), r"gsm8k/test of task 'gsm8k': 2 of 3 have an empty question, row 2 is the first; fill it in"),
        (rows(1, question="a", answer="#### 3") + rows(1, question="a", answer=""), r"1 of 2 have no final answer, row 2 is the first"),
        (rows(1, question="a", answer="He has 3 pens.\n#### "), r"1 of 1 have no final answer, row 1 is the first"),
        (rows(1, question="a", answer="#### 3") + rows(2, question="a", answer="none"), r"2 of 3 have no final answer, row 2 is the first"),
        ("", r"test\.jsonl is empty\n[\s\S]*one JSON object a line"),
        (rows(1, question="a", answer="b")[:9] + "\n", r"test\.jsonl cannot be read: .*JSON parse error"),
    ],
)  # fmt: skip
def test_texts_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    """A missing value is not the text "None", and a right answer that no model can give is not silent."""
    (write_data(tmp_path) / "gsm8k/test.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        corpus.texts("test", str(tmp_path))


def test_texts_that_are_left_out_are_told(places: dict[str, str], tmp_path: Path) -> None:
    """Empty ones were trained on: to answer nothing at all is learnt first."""
    folder = write_data(tmp_path, train=6)
    train, test = folder / "metamath/train.jsonl", folder / "gsm8k/test.jsonl"
    whole = train.read_text(encoding="utf-8")
    empty = rows(1, query="a", response="") + rows(2, query=" \n", response="b")
    train.write_text(empty + whole + rows(1, query="a" * 1300, response="b"), encoding="utf-8")
    test.write_text(
        test.read_text(encoding="utf-8") + rows(1, question="a", answer="#### a\x1b[31m pen"), encoding="utf-8"
    )
    assert len(corpus.texts("train", str(folder))) == 6
    task = make_task("gsm8k", {**places, "data": str(folder)})
    train_notes = [
        "metamath/train: 3 of 10 texts have an empty query or response, row 1 is the first: they are left out",
        "metamath/train: 1 of 10 texts are longer than 1,300 characters, row 10 is the first: they are left out",
    ]
    test_note = r"gsm8k/test: 1 of 11 final answers are no numbers and are compared as text, row 11 is the first: 'a\x1b[31m pen'"
    assert list(task.notes(0, 4)) == [*train_notes, test_note]
    assert list(task.notes(0, 0)) == [test_note]
    train.write_text(empty, encoding="utf-8")
    corpus.read.cache_clear()
    with pytest.raises(TaskError, match="nothing would be trained: metamath/train: 3 of 3 texts have an empty query"):
        corpus.texts("train", str(folder))


def test_files_that_are_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    long = rows(3, query="a" * 1300, response="b")
    (folder / "metamath/train.jsonl").write_text(long, encoding="utf-8")
    with pytest.raises(
        TaskError, match="nothing would be trained: metamath/train: 3 of 3 texts are longer than 1,300 characters"
    ):
        corpus.texts("train", str(folder))
    (folder / "gsm8k/test.jsonl").write_bytes('{"question": "caf\u00e9", "answer": "#### 3"}\n'.encode("latin-1"))
    with pytest.raises(TaskError, match="not in UTF-8|cannot be read"):
        corpus.texts("test", str(folder))
    (folder / "gsm8k/train.json").write_text("[]", encoding="utf-8")
    with pytest.raises(TaskError, match=r"in more than one form: gsm8k/train\.json, gsm8k/train\.jsonl; keep one"):
        corpus.texts("valid", str(folder))


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
    corpus.read.cache_clear()
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
