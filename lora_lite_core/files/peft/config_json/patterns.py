"""Patterns of a stranger's folder, matched as PEFT does but without backtracking: none can keep us busy for ever.

Python's `re` needs 2ⁿ steps for `(a+)+$`; here every pattern takes a number of steps that is counted. Plain names are
compared as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ....contract.errors import AdapterFileError
from .fields import shown
from .pattern_graph import Graph, PatternRefused

LONGEST = 20_000  # characters of a pattern
STEPS = 4_000_000  # of all patterns of a folder, a second or two; more on models with many modules
_FIXED = re.compile(r"\^?(?:[\w.-]|\\[.-])+", re.ASCII)  # a name as it is written in patterns, by PEFT and by us


class Patterns:
    """The patterns of one folder and the steps that are left for them. What is given up is an AdapterFileError that
    names the field and the pattern: one that takes too long, is no regular expression, or uses an extension of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._steps = STEPS + 4 * sum(map(len, names))
        self._graphs: dict[tuple[str, bool], Graph] = {}
        self._names: dict[tuple[str, str], re.Pattern[str] | None] = {}

    def fullmatch(self, field: str, pattern: str, name: str) -> bool:
        """As `re.fullmatch(pattern, name)`."""
        return self._run(field, pattern, pattern, name, whole=True)

    def selects(self, field: str, ending: str, name: str) -> bool:
        """As `re.match(rf"(.*\\.)?({ending})$", name)`."""
        found = self._as_name(field, ending, "$", name)
        return self._run(field, ending, rf"(.*\.)?({ending})$", name) if found is None else found

    def contains(self, field: str, part: str, name: str) -> bool:
        """As `re.match(rf"(^|.*\\.){part}($|\\..*)", name)`."""
        found = self._as_name(field, part, r"(?:$|\.)", name)
        return self._run(field, part, rf"(^|.*\.){part}($|\..*)", name) if found is None else found

    def _as_name(self, field: str, pattern: str, end: str, name: str) -> bool | None:
        """Whether the pattern, from a dot on and up to this end, is in the name; None unless it only takes texts as
        long as it is written: then there is nothing to try, and Python's re can have it."""
        self._spend(1, field, pattern)
        if (end, pattern) not in self._names:
            fixed = len(pattern) <= LONGEST and _FIXED.fullmatch(pattern)
            self._spend(300, field, pattern)
            self._names[end, pattern] = re.compile(rf"(?:^|\.){pattern}{end}") if fixed else None
        compiled = self._names[end, pattern]
        return None if compiled is None else compiled.search(name) is not None

    def _run(self, field: str, written: str, pattern: str, name: str, *, whole: bool = False) -> bool:
        graph = self._graphs.get((pattern, whole))
        if graph is None:
            if len(pattern) > LONGEST:
                raise _refused(field, written, f"has more than {LONGEST:,} characters")
            try:
                graph = self._graphs[pattern, whole] = Graph(pattern, whole=whole)
            except PatternRefused as error:
                raise _refused(field, written, str(error)) from None
            self._spend(100 + 8 * (len(pattern) + len(graph.tests)), field, written)
        return graph.match(name, lambda steps: self._spend(steps, field, written))

    def _spend(self, steps: int, field: str, pattern: str) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise _refused(field, pattern, "takes too many steps, with what else is to be matched here")


def _refused(field: str, pattern: str, why: str) -> AdapterFileError:
    return AdapterFileError(
        f"{field}: the pattern {shown(pattern)} {why}; write the names of the modules there instead"
    )
