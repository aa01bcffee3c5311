"""The tasks: right answers, clean splits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from lora_lite_bench.tasks import make_task
from lora_lite_bench.tasks.language.arithmetic import GAINS, GIFT, LOSSES, REFUND, WORDS, problems, split_of


@pytest.mark.parametrize("task", ["own", "shifted"])
def test_answers(task: str) -> None:
    for p in problems(task, "test", 300, seed=0):
        words = p.question.split()
        a, verb, b = int(words[2]), words[5], int(words[6])
        assert (verb in GAINS) != (verb in LOSSES)
        expected = a + b if verb in GAINS else a - b
        if task == "shifted":
            expected += GIFT if verb in GAINS else REFUND
        assert p.answer == str(expected)
        assert all(word.isdigit() or word in WORDS for word in words)


def test_no_pair_is_in_two_splits() -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for split in ("train", "valid", "test"):
        for p in problems("shifted", split, 2000, seed=1):
            words = p.question.split()
            seen.setdefault((words[2], words[6]), set()).add(split)
    assert all(len(splits) == 1 for splits in seen.values())


def test_splits_have_their_shares_and_all_last_digits() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(1, a + 1)]
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        chosen = [pair for pair in pairs if split_of(*pair) == split]
        assert abs(len(chosen) / len(pairs) - share) < 0.015
        assert {(a % 10, b % 10) for a, b in chosen} == {(i, j) for i in range(10) for j in range(10)}


def test_same_arguments_same_problems() -> None:
    assert problems("own", "train", 20, seed=3) == problems("own", "train", 20, seed=3)
    assert problems("own", "train", 20, seed=3) != problems("own", "train", 20, seed=4)


def test_teacher_forcing_counts_what_generation_counts() -> None:
    """Whole answers that are each token's first choice, and those that greedy generation writes."""
    from lora_lite_bench.runs.scoring import score
    from lora_lite_bench.tasks.language.base_model import exact_match

    task = make_task("facts", {"facts": 2, "test_count": 40})
    model, tokenizer = task.load()
    assert score(task, model, tokenizer, "own") == exact_match(model, tokenizer, problems("own", "test", 40, seed=0))
    shifted = make_task("shifted", {"test_count": 40})
    assert score(shifted, model, tokenizer, "test") == 0


@pytest.mark.parametrize("name", ["shifted", "facts"])
def test_training_batches_depend_on_the_seed_alone(name: str) -> None:
    task = make_task(name, {})
    _, tokenizer = task.load()

    def first(split: str, seed: int) -> list[list[int]]:
        return next(iter(task.batches(tokenizer, split, seed)))["input_ids"].tolist()  # type: ignore[arg-type]

    assert first("train", 1) == first("train", 1) != first("train", 2)
    assert first("valid", 1) == first("valid", 2) != first("test", 1)


def test_facts_are_recalled_from_what_was_trained() -> None:
    """Nothing else could answer: each question has one answer, in training and when it is asked."""
    task = make_task("facts", {"facts": 40})
    halves = [{p.question: p.answer for p in task.held_out(split)} for split in ("valid", "test")]  # type: ignore[attr-defined]
    assert [len(half) for half in halves] == [20, 20]
    assert not halves[0].keys() & halves[1].keys()
    trained = {p.question: p.answer for _ in range(20) for p in task.drawn(random.Random(_))}  # type: ignore[attr-defined]
    assert trained == halves[0] | halves[1]
    assert make_task("facts", {"draw": 1}).held_out("test") != make_task("facts", {}).held_out("test")  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), [("order", 0.95), ("digits", 0.85)])
def test_models_made_here(name: str, own: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, good at their own task, no good at the new one, which LoRA learns."""
    from lora_lite_bench.runs.run import Job, run
    from lora_lite_bench.runs.scoring import score

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = make_task(name, {})
    task.prepare()
    (folder,) = (tmp_path / "lora-lite-bench").iterdir()
    before = folder.stat().st_mtime_ns
    task.prepare()
    assert folder.stat().st_mtime_ns == before
    model, processor = task.load()
    new, old = score(task, model, processor, "test"), score(task, model, processor, "own")
    assert new is not None
    assert old is not None
    assert old > own
    result = run(Job(name, {}, "lora", {}, 0, 1e-2, 100))
    assert result.test is not None
    assert result.test > new + 0.2
    assert result.reload_error is not None
    assert result.reload_error < 1e-5
