"""The tasks: right answers, clean splits."""

from __future__ import annotations

import pytest
from lora_lite_bench.tasks import GAINS, GIFT, LOSSES, REFUND, WORDS, problems, split_of


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
