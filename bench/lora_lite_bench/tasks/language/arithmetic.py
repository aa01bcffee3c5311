"""The arithmetic word problems that the packaged language model was made for, scored by whole answers.

    own task        Ann has 34 pens and buys 57 . How many pens ? 91
    shifted task    Ann has 34 pens and buys 57 . How many pens ? 108

The shifted task is set in a town where whoever gains something is given 17 more, and whoever loses something gets 8
back. The words and digits are those the base model knows, and not one of its answers is right there: it has to carry
an unseen number into arithmetic that it can do.

Pairs of numbers are split once by a fixed rule into train, valid and test: no problem of one split has the pair of a
problem of another, in neither task.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "valid", "test"]
TaskName = Literal["own", "shifted"]

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal")
ITEMS = ("pens", "cards", "eggs", "books", "coins", "keys", "cups", "maps")
GAINS = ("buys", "finds", "wins", "gets")
LOSSES = ("sells", "drops", "spends", "loses")
WORDS = (*NAMES, *ITEMS, *GAINS, *LOSSES, "has", "and", "How", "many", ".", "?")
GIFT, REFUND = 17, 8


@dataclass(frozen=True)
class Problem:
    """One question and its answer, both as text; the answer holds digits only."""

    question: str
    answer: str


def split_of(a: int, b: int) -> Split:
    """Which split the pair of numbers belongs to: 1 in 10 pairs is for test, 1 in 10 for valid."""
    bucket = zlib.crc32(f"{a} {b}".encode()) % 10  # a hash: arithmetic on a and b would withhold pairs of last digits
    return "test" if bucket == 0 else "valid" if bucket == 1 else "train"


def problem(task: TaskName, split: Split, rng: random.Random, *, gift: int = GIFT, refund: int = REFUND) -> Problem:
    """Draw one problem of the task whose pair of numbers belongs to the split."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(1, 99)
        if b <= a and split_of(a, b) == split:
            break
    gains = rng.random() < 0.5
    name, item, verb = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(GAINS if gains else LOSSES)
    answer = a + b if gains else a - b
    if task == "shifted":
        answer += gift if gains else refund
    return Problem(f"{name} has {a} {item} and {verb} {b} . How many {item} ?", str(answer))


def problems(task: TaskName, split: Split, count: int, seed: int, **town: int) -> list[Problem]:
    """`count` problems, the same for the same arguments on every machine."""
    rng = random.Random(f"{task} {split} {seed}")
    return [problem(task, split, rng, **town) for _ in range(count)]
