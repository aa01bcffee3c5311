"""One regular expression as a graph of states, all of which are followed at once: a text takes a step per character.

Only what is a regular expression proper is read: no look-around, backreference, flag or possessive repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto


class At(Enum):
    """A test that takes no character: it holds between two of them."""

    ANYWHERE = auto()
    START = auto()
    END = auto()
    EDGE = auto()  # of a word
    INSIDE = auto()


Test = At | str | Callable[[str], object]  # between characters, one character, a set of them
Build = Callable[[int], int]  # the state to go to afterwards → the state to begin with

DEEPEST, LARGEST = 50, 20_000  # brackets in brackets, states
_BETWEEN = {"^": At.START, "\\A": At.START, "$": At.END, "\\Z": At.END, "\\b": At.EDGE, "\\B": At.INSIDE}
_REPEAT = re.compile(r"\*|\+|\?|\{([0-9]+)\}|\{([0-9]*),([0-9]*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P<[^\W\d]\w*>|(?!\?))")
_SET = re.compile(r"\[(\^?\]?(?:[^\]\\]|\\.)*)\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[dDwWsSafnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9a-zA-Z])", re.DOTALL)
_ANY = re.compile(".").fullmatch


class PatternRefused(ValueError):
    """Why a pattern is not run, as the rest of a sentence that begins with the pattern."""


class Graph:
    """A pattern, to be matched from the beginning of texts: up to their end with `whole`, else as far as it goes."""

    def __init__(self, pattern: str, *, whole: bool) -> None:
        self.whole = whole
        self.tests: list[Test] = []
        self.after: list[list[int]] = []
        self._moves: dict[tuple[frozenset[int], bool | None, str], tuple[frozenset[int], bool]] = {}
        self.end = self.add(At.ANYWHERE, [])
        self.start = frozenset([_Parser(pattern, self).build(self.end)])

    def add(self, test: Test, after: list[int]) -> int:
        """A new state: where the test holds, those `after` it follow."""
        if len(self.tests) == LARGEST:
            raise PatternRefused(f"needs more than {LARGEST:,} states")
        self.tests.append(test)
        self.after.append(after)
        return len(self.tests) - 1

    def match(self, text: str, spend: Callable[[int], None]) -> bool:
        """`spend` is told of every step, and may raise."""
        states, before = self.start, None
        for char in [*text, ""]:
            move = self._moves.get((states, before, char))
            if move is None:
                move = self._move(states, before, char, spend)
                if len(states) + len(move[0]) < 200:  # what is kept must stay small, too
                    self._moves[states, before, char] = move
            spend(1)
            states, ended = move
            if ended and (not self.whole or not char):
                return True
            before = _in_word(char)
        return False

    def _move(
        self, states: frozenset[int], before: bool | None, char: str, spend: Callable[[int], None]
    ) -> tuple[frozenset[int], bool]:
        """The states after the character ("" at the end of the text), and whether the pattern has ended before it."""
        edge = bool(before) is not _in_word(char)
        holds = {At.ANYWHERE: True, At.START: before is None, At.END: not char, At.EDGE: edge, At.INSIDE: not edge}
        reached, waiting, following = set(states), list(states), set[int]()
        while waiting:
            test, after = self.tests[state := waiting.pop()], self.after[state]
            spend(1 + len(after))
            if not isinstance(test, At):
                following.update(after if char and (test == char if isinstance(test, str) else test(char)) else ())
            elif holds[test]:
                waiting += [new for new in after if new not in reached]
                reached.update(after)
        return frozenset(following), self.end in reached


class _Parser:
    """Reads a pattern into builders of its states."""

    def __init__(self, pattern: str, graph: Graph) -> None:
        self.text, self.graph, self.place, self.depth = pattern, graph, 0, 0
        self.build = self._choice()
        if self.place < len(pattern):
            raise PatternRefused("closes a bracket that is not open")

    def _choice(self) -> Build:
        options = [self._sequence()]
        while self._next("|"):
            options.append(self._sequence())
        if len(options) == 1:
            return options[0]
        return lambda after: self.graph.add(At.ANYWHERE, [build(after) for build in options])

    def _sequence(self) -> Build:
        parts: list[Build] = []
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            parts.append(self._one())

        def build(after: int) -> int:
            for part in reversed(parts):
                after = part(after)
            return after

        return build

    def _one(self) -> Build:
        """One character, set, place or group, with how often it comes."""
        text, start = self.text, self.place
        if _REPEAT.match(text, start):
            raise PatternRefused("repeats nothing")
        if found := next((mark for mark in _BETWEEN if text.startswith(mark, start)), ""):
            self.place += len(found)
            if _REPEAT.match(text, self.place):
                raise PatternRefused("repeats what takes no character")
            return lambda after: self.graph.add(_BETWEEN[found], [after])
        if text[start] == "(":
            return self._repeated(self._group())
        test = self._test()
        return self._repeated(lambda after: self.graph.add(test, [after]))

    def _repeated(self, one: Build) -> Build:
        found = _REPEAT.match(self.text, self.place)
        if found is None:
            return one
        self.place = found.end()
        if not self._next("?") and _REPEAT.match(self.text, self.place):  # lazy or not, it matches the same texts
            raise PatternRefused("repeats a repeat")
        if any(len(number or "") > 6 for number in found.groups()):
            raise PatternRefused(f"needs more than {LARGEST:,} states")
        exactly, low, high = found.groups()
        signs = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        numbers = (int(exactly or low or 0), int(exactly or high) if exactly or high else None)
        least, most = signs.get(found[0], numbers)
        if most is not None and most < least:
            raise PatternRefused("comes at most fewer times than at least")

        def build(after: int) -> int:
            if most is None:
                loop = self.graph.add(At.ANYWHERE, [after])
                self.graph.after[loop].append(one(loop))
                after = loop
            done = after
            for _ in range(0 if most is None else most - least):
                after = self.graph.add(At.ANYWHERE, [one(after), done])
            for _ in range(least):
                after = self.graph.add(At.ANYWHERE, [one(after)])
            return after

        return build

    def _test(self) -> Test:
        char = self.text[self.place]
        kind = {"[": _SET, "\\": _ESCAPE}.get(char)
        if kind is None:
            self.place += 1
            return _ANY if char == "." else char
        found = kind.match(self.text, self.place)
        if found is None or (char == "[" and "--" in found[0]):
            raise PatternRefused("has a set or an escape that is not known here")
        self.place = found.end()
        if char == "\\":
            return re.compile(found[0]).fullmatch
        # Escaped is what Python's re keeps for operations on sets, and warns of.
        inner = re.sub(r"(\\.)|([\[&~|])", lambda part: part[1] or "\\" + part[2], found[1], flags=re.DOTALL)
        try:
            return re.compile(f"[{inner}]").fullmatch
        except re.error as error:
            raise PatternRefused(f"has a set that is wrong ({error})") from None

    def _group(self) -> Build:
        found = _GROUP.match(self.text, self.place)
        if found is None:
            raise PatternRefused("has look-around, a backreference, a flag or another extension")
        self.place, self.depth = found.end(), self.depth + 1
        if self.depth > DEEPEST:
            raise PatternRefused(f"has more than {DEEPEST} brackets in brackets")
        build = self._choice()
        if not self._next(")"):
            raise PatternRefused("opens a bracket that is not closed")
        self.depth -= 1
        return build

    def _next(self, char: str) -> bool:
        found = self.text.startswith(char, self.place)
        self.place += found
        return found


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_"
