r"""Final answers in the forms that models and data sets write them: `#### 1,234`, \boxed{}, "The answer is: $12.50"."""

from __future__ import annotations

from fractions import Fraction

import pytest
from lora_lite_bench.tasks.gsm8k.final_answers import RULES, answer_of, number, same

WORKED = "48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (WORKED, "72"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.", "1234567"),
        ("#### -3", "-3"),
        ("#### $1,200.00", "1200"),
        ("So there are 4.\n#### 4\nThe answer is: 4", "4"),
        ("The answer is: $12.50", "12.5"),
        ("The answer is: $12.50.", "12.5"),
        ("The answer is: \\$45", "45"),
        ("the answer is 18 dollars.", "18"),
        ("The final answer is: 60 km/h", "60"),
        ("The answer is: 5%", "5"),
        ("The answer is: 50\\%", "50"),
        ("The answer is: .5", "1/2"),
        ("The answer is: 3/4", "3/4"),
        ("The answer is: 20 / 14", "10/7"),
        ("The answer is: \\frac{3}{4}", "3/4"),
        ("The answer is: $-\\dfrac{1}{2}$", "-1/2"),
        ("The answer is: −7", "-7"),
        ("The answer is: 7\n\nQuestion: and Ben? Think step by step.\nAnswer: The answer is: 9", "7"),
        ("The answer is: 7\nI hope that this helps 100 people!", "7"),
        ("so it is equal to $4^2 = \\boxed{16}$.", "16"),
        ("so it is $4^2 = \\boxed{16}$.The answer is: 16", "16"),
        ("The answer is $\\boxed{1,000,000}$", "1000000"),
        ("that is \\boxed{\\frac{1}{2}}", "1/2"),
        ("The answer is: 12 \\text{ apples}", "12"),
        ("She has 5 + 6 = 11 apples", "11"),
        ("She pays $3.", "3"),
    ],
)
def test_numbers(text: str, value: str) -> None:
    found = answer_of(text)
    assert found is not None
    assert number(found) == Fraction(value)
    assert same(found, value)
    assert not same(found, "987")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 2\\sqrt{3}", "2\\sqrt{3}"),
        ("The answer is: x^2+1.", "x^2+1"),
        ("The answer is: 12:30", "12:30"),
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 5 x 3", "5 x 3"),
        ("The answer is: 1,5", "1,5"),
        ("The answer is: Monday", "Monday"),
    ],
)
def test_what_is_no_number_is_compared_as_text(text: str, answer: str) -> None:
    assert answer_of(text) == answer
    assert number(answer) is None
    assert same(answer, f" {answer.upper()}. ")
    assert not same(answer, "15")


@pytest.mark.parametrize("text", ["", "I do not know", "The answer is:", "\\boxed{"])
def test_no_answer_is_never_right(text: str) -> None:
    assert answer_of(text) is None
    assert not same(None, None)
    assert not same(answer_of(text), "1")


@pytest.mark.parametrize(
    ("text", "stated", "strict", "flexible"),
    [
        (WORKED, "72", "72", "72"),
        ("The answer is: 1/2", "1/2", None, "2"),
        ("It costs $1,234.", None, None, "1,234"),
        ("#### 5\nThe answer is: 6 or 7", "6 or 7", "5", "7"),
        ("\\boxed{8} of 9", "8", None, "9"),
        ("nothing", None, None, None),
    ],
)
def test_rules_by_name(text: str, stated: str | None, strict: str | None, flexible: str | None) -> None:
    found = {rule: answer_of(text, rule) for rule in RULES}
    first = stated if stated is not None else flexible
    assert found == {"any": first, "stated": stated, "strict-match": strict, "flexible-extract": flexible}
