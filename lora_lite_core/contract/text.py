"""Text for people. What comes from files and packages of others is cut and escaped here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LINE, LINES = 1_000, 200  # of a message: more of it is left out
CELL, ROWS = 400, 1_000  # of a table

# What a terminal or a page would obey instead of showing: control characters (escape sequences begin with one), marks
# that turn the direction of writing, invisible ones, halves of surrogate pairs. Joiners (U+200C, U+200D) may stay.
_OBEYED = (
    r"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e0fff"
)
_IN_A_LINE = re.compile(f"[{_OBEYED}]")
_IN_A_TEXT = re.compile(f"(?![\n\t])[{_OBEYED}]")

_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")  # as package indexes have it
_VERSION = re.compile(r"[A-Za-z0-9.!+_-]{1,50}")
_VARIANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def plain(text: object, most: int = CELL) -> str:
    """`text` as one line of at most `most` characters (60 or more) that any terminal shows as it is."""
    return _cut(_IN_A_LINE.sub(_escape, _cut(_spelled(text), most)), most)


def paragraphs(text: object, most: int = LINES) -> str:
    """`text` with its line breaks, at most `most` lines, each as `plain` makes it."""
    lines = _cut(_spelled(text), most * LINE).split("\n")
    if len(lines) > most:
        head = most * 2 // 3
        lines = [*lines[:head], f"[… {len(lines) - most + 1:,} lines …]", *lines[len(lines) - most + head + 1 :]]
    return "\n".join(_cut(_IN_A_TEXT.sub(_escape, _cut(line, LINE)), LINE) for line in lines)


def told(error: BaseException) -> str:
    """`TypeError: what it says`, whatever the error is."""
    return f"{type(error).__name__}: {_spelled(error)}".removesuffix(": ")


def is_package_name(name: object) -> bool:
    """Can a package be called so? What is not a name is never shown as something to type."""
    return isinstance(name, str) and _PACKAGE.fullmatch(name) is not None


def is_version(text: object) -> bool:
    """Letters, digits and the signs of a version."""
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


def is_variant_name(name: object) -> bool:
    """ASCII letters, digits, _ and -: no name looks like another one, and none is read as more than a name."""
    return isinstance(name, str) and _VARIANT.fullmatch(name) is not None


def normal(name: str) -> str:
    """A package's name as package indexes compare it: `Lora_Lite.SVD` is lora-lite-svd."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A left-aligned text table with a rule under its head; long cells are cut, and rows after the first thousand."""
    given = list(rows)
    cells = [[plain(cell) for cell in row] for row in given[:ROWS]]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *([f"and {len(given) - ROWS:,} more"] if len(given) > ROWS else [])])


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _spelled(value: object) -> str:
    try:
        return str(value)
    except Exception:  # of a stranger's class
        return f"<{type(value).__name__}>"


def _cut(text: str, most: int) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= most:
        return text
    head = (most - 40) * 2 // 3
    tail = most - 40 - head
    return f"{text[:head]} [… {len(text) - head - tail:,} characters …] {text[len(text) - tail :]}"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
