r"""Final answers, read off generated text by the rules of PEFT's method comparison and of lm-eval, compared as numbers.

Where a text goes on with another "Question:", that is no part of the answer (lm-eval's `until`). Then, by name:

    stated            what stands after the last "The answer is", "The final answer is" or "####", up to the end of its
                      line: the rule of PEFT's comparison. A \boxed{} counts as stated, too
    strict-match      the number after "####" and nothing else: lm-eval's filter of that name
    flexible-extract  the last number of the text: lm-eval's other filter
    any               what is stated; else the last number

Two answers are the same when both are numbers and equal (1,234 = 1234.0 = $1234, 1/2 = 0.5, 50% = 50), or the same
text, apart from spaces, dollars, a full stop at the end and upper case.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

STATED = re.compile(r"(?:the (?:final )?answer is:?|####)[ \t]*", re.I)
STRICT = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
VALUE = re.compile(rf"([-+]?)\(?({DIGITS})(?:\s*/\s*({DIGITS}))?\)?\s*%?(?:\s*[a-z][^\d]*)?")  # perhaps with a unit


def answer_of(text: str, rule: str = "any") -> str | None:
    """The final answer in a text; None where the rule, a key of RULES, finds none."""
    return RULES[rule](re.split(r"\n?Question:", text, maxsplit=1)[0].strip())


def reference_of(text: str) -> str | None:
    """The final answer in a worked one, by the rule "any"; None, too, where it announces an answer and gives none."""
    return None if STATED.search(text) and _stated(text) is None else answer_of(text)


def same(answer: str | None, reference: str | None) -> bool:
    """Whether both are answers, and the same one."""
    if answer is None or reference is None:
        return False
    numbers = number(answer), number(reference)
    return numbers[0] == numbers[1] if None not in numbers else _plain(answer) == _plain(reference)


def number(answer: str) -> Fraction | None:
    """The exact value of an answer that is a number or a fraction, perhaps with a unit behind it; None of others."""
    found = VALUE.fullmatch(FRACTION.sub(r"\1/\2", _plain(answer)).replace("−", "-"))
    if found is None:
        return None
    above, below = (Fraction(part.replace(",", "")) for part in (found[2], found[3] or "1"))
    return (-1 if found[1] == "-" else 1) * above / below if below else None


def _plain(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r" \1", text)
    return _trimmed(text).replace("$", "").replace("\\!", "").lower().strip()


def _trimmed(text: str) -> str:
    return text.replace("\\%", "%").replace("\\$", "$").lstrip(" \t$").rstrip(" \t.!?$%")


def _stated(text: str) -> str | None:
    ends = [found.end() for found in STATED.finditer(text)]
    line = text[ends[-1] :].strip().split("\n", 1)[0] if ends else None
    boxed = _boxed(text if line is None else line)
    if boxed is not None:
        return boxed
    return _trimmed(line) or None if line is not None else None


def _boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}, whose braces may hold others."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + len("\\boxed{") : place]
    return None


def _strict(text: str) -> str | None:
    found = STRICT.search(text)
    return found[1].rstrip(".,") if found else None


def _flexible(text: str) -> str | None:
    found = [one for one in NUMBER.findall(text) if any(c.isdigit() for c in one)]
    return found[-1].replace("$", "").rstrip(".,") if found else None


def _any(text: str) -> str | None:
    stated = _stated(text)
    return stated if stated is not None else _flexible(text)


RULES: dict[str, Callable[[str], str | None]] = {
    "any": _any,
    "stated": _stated,
    "strict-match": _strict,
    "flexible-extract": _flexible,
}
