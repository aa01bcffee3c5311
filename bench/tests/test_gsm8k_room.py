"""The task gsm8k where texts have more tokens than it takes: what is cut is said, and nothing is trained on nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.command import bench
from lora_lite_bench.comparing.results import read
from lora_lite_bench.runs.run import Job, run
from lora_lite_bench.tasks import TaskError, make_task
from lora_lite_bench.tasks.gsm8k import encoding

from bench.tests.word_problems import write_data

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = {"dtype": "float32", "batch_size": 4, "new_tokens": 12, "length": 96, "valid_count": 4, "test_count": 6}
LORA = {"r": 4, "target_names": ("down_proj$",)}
LONG = '{"query": "%s", "response": "The answer is: 3"}\n' % ("How many pens? " * 40)


@pytest.fixture
def task(places: dict[str, str]) -> Any:
    return make_task("gsm8k", {**places, **SMALL})


@pytest.fixture
def long_questions(tmp_path: Path) -> str:
    """Of the training set, every third; the others fit."""
    folder = write_data(tmp_path / "data", train=20)
    with (folder / "metamath/train.jsonl").open("a", encoding="utf-8") as file:
        file.write(LONG * 10)
    return str(folder)


def command(places: dict[str, str], out: Path, *more: str) -> Any:
    knobs = [part for name, value in SMALL.items() for part in ("--knob", f"{name}={value}")]
    named = ["--task", "gsm8k", "--model", places["model"], "--data", places["data"], "--out", str(out), "--steps", "8"]
    return CliRunner().invoke(bench, ["lora", *named, *knobs, "--no-anchors", *more])


def test_nothing_is_said_where_all_fit(task: Any) -> None:
    assert not task.notes(0, 100)


def test_texts_that_are_cut_are_counted(task: Any) -> None:
    (cut,) = replace(task, length=22, new_tokens=2).notes(0, 100)
    assert cut.startswith(
        "metamath/train: 64 of 64 drawn texts are longer than length=22 tokens and cut there; for all: --knob length="
    )
    (cut,) = replace(task, length=22, new_tokens=2, trained_on="all").notes(0, 3)
    assert "12 of 12 drawn texts" in cut, "those that three steps draw"
    longest = int(cut.rpartition("=")[2])
    assert not replace(task, length=longest, new_tokens=2, trained_on="all").notes(0, 3)


def test_texts_without_a_trained_token_are_passed_over(task: Any, long_questions: str) -> None:
    task = replace(task, data=long_questions)
    cut, passed = task.notes(0, 100)
    assert cut.startswith("metamath/train: 10 of 30 drawn texts are longer than length=96")
    assert passed.startswith(
        "metamath/train: 10 of 30 drawn texts have no token of the answer within length=96 and are passed over"
    )
    _, tokenizer = task.load()
    batches = task.batches(tokenizer, "train", 0)
    for _ in range(20):
        batch = next(batches)
        assert len(batch["labels"]) == 4
        assert encoding.learns(batch).all()
        assert not any("How many pens? How many" in text for text in tokenizer.batch_decode(batch["input_ids"]))


@pytest.mark.parametrize("length", [1, 9])
def test_where_nothing_would_be_trained_it_is_refused(length: int, task: Any) -> None:
    short = replace(task, length=length)
    message = (
        rf"nothing would be trained: no token of an answer lies within length={length} in any of 64 texts of "
        r"metamath/train, whose prompts have \d+ tokens or more; type: --knob length=\d+"
    )
    with pytest.raises(TaskError, match=message):
        short.notes(0, 100)
    with pytest.raises(TaskError, match="nothing would be trained"):
        next(short.batches(short.load()[1], "train", 0))
    with pytest.raises(TaskError, match="nothing would be trained: no token lies within length=1"):
        replace(task, length=1, trained_on="all").notes(0, 100)


def test_the_command_refuses_at_once(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite_bench.comparing.workers.run", lambda *_: pytest.fail("a run was begun"))
    done = command(places, tmp_path / "r.jsonl", "--knob", "length=8")
    assert done.exit_code == 1
    assert "task 'gsm8k': nothing would be trained" in done.output


def test_problems_without_room_for_an_answer(task: Any, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    with (folder / "gsm8k/test.jsonl").open("r+", encoding="utf-8") as file:
        kept = file.read()
        file.seek(0)
        file.write('{"question": "%s", "answer": "#### 3"}\n' % ("How many pens? " * 40) + kept)
    task = replace(task, data=str(folder), scored_at_once=6)
    (said,) = task.notes(0, 0)
    assert said.startswith(
        "gsm8k/test: 1 of 6 problems have less room than new_tokens=12 for the answer within length=96, 1 none at all, "
        "which count as wrong; for all: --knob length="
    )
    model, tokenizer = task.load()
    alone = replace(task, test_count=7).batches(tokenizer, "test", 0)
    prompts = next(iter(alone))["prompts"]
    written = encoding.generate(model, tokenizer, prompts, 96, 12)
    assert written[0] == ""
    assert written[1:] == encoding.generate(model, tokenizer, prompts[1:], 96, 12), "a long one takes no room of others"
    with pytest.raises(TaskError, match=r"none of 1 problems of gsm8k/test has room for an answer within length=96"):
        replace(task, test_count=1).notes(0, 0)


def test_a_validation_batch_without_a_label_has_no_loss(task: Any) -> None:
    model, tokenizer = task.load()
    batch = encoding.encode(tokenizer, ["Ann has 5 pens."], [" 5"], 4, all_in_loss=False)
    assert task.weight(batch) == 0
    assert torch.equal(task.loss(model, batch), torch.zeros(()))


def test_notes_are_kept_and_shown(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite_bench.report.page.pictures", lambda table: iter(()))
    done = command(places, tmp_path / "r.jsonl", "--knob", "length=22", "--knob", "new_tokens=2")
    assert done.exit_code == 0, done.output
    note = "metamath/train: 32 of 32 drawn texts are longer than length=22 tokens and cut there"
    assert f"gsm8k: {note}" in " ".join(done.stderr.split())
    assert note in " ".join(done.stdout.split())
    (record,) = (record for record in read([tmp_path / "r.jsonl"]) if record.kind == "run")
    assert record.outcome.notes[0].startswith(note)  # type: ignore[union-attr]
    assert note in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_run_refuses_too(places: dict[str, str]) -> None:
    with pytest.raises(TaskError, match="nothing would be trained"):
        run(Job("gsm8k", {**places, **SMALL, "length": 8}, "lora", LORA, 0, 1e-3, 4))
