"""Fault injection: an operation is interrupted at every line of the library that it runs, one line per run.

The interruption is raised by a trace function, as a KeyboardInterrupt that comes between two lines. After each the
model, the process and the files must be exactly as before, or exactly as after an operation that nobody interrupted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from .whole_state import Known, content, differences, files_in, output_when_trained, process, restore, state

Operation = Callable[[Any, Path], Any]


class Interrupted(KeyboardInterrupt):
    """What is raised, to tell it from one that somebody typed."""


@dataclass
class Case:
    """One operation, and how its outcome is looked at.

    model       what it starts from, made once and copied for every run; files that it needs go into the folder
    operate     the operation; its own lines count as well, so that a with-block is interrupted at its borders, too
    further     what a model on which it has succeeded is good for; mostly the way back
    leads_back  whether `further` gives exactly the model that was there before
    stays       whether the operation itself leaves the model as it was, as a with-block does
    """

    model: Callable[[Path], nn.Module]
    operate: Operation
    further: Operation = lambda model, folder: None
    leads_back: bool = False
    stays: bool = False


class Lines:
    """A trace function that calls visit(number, frame) before every line of the library, and of other code that is
    named: code objects, and prefixes of modules' names."""

    def __init__(self, visit: Callable[[int, FrameType], None], *also: CodeType | str) -> None:
        self.visit, self.number = visit, 0
        self._prefixes = ("lora_lite", *(one for one in also if isinstance(one, str)))
        self._wanted = {one: True for one in also if isinstance(one, CodeType)}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._wanted:
            self._wanted[code] = str(frame.f_globals.get("__name__")).startswith(self._prefixes)
        return self._line if self._wanted[code] else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.number += 1
            self.visit(self.number, frame)
        return self._line

    def run(self, function: Callable[[], Any]) -> Any:
        previous = sys.gettrace()
        sys.settrace(self)
        try:
            return function()
        finally:
            sys.settrace(previous)


def place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"


class Bench:
    """A case made ready: fresh copies of its model and files, and the two states that are allowed."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = case.model(folder)
        self.files = {path: path.read_bytes() for path in files_in(folder)}
        for _ in range(2):  # the first run imports modules and fills caches
            model, known = self.fresh()
            self.before = state(model, known, folder)
            self.returned = case.operate(model, folder)
            self.after = state(model, known, folder)
            self.trained = output_when_trained(model)
            case.further(model, folder)
            self.beyond = state(model, known, folder)
        assert not case.leads_back or self.beyond == self.before, differences(self.beyond, self.before)

    def fresh(self) -> tuple[nn.Module, Known]:
        for path in files_in(self.folder):
            if path not in self.files:
                path.unlink()
        for path, data in self.files.items():
            path.write_bytes(data)
        model = copy.deepcopy(self.model)
        return model, Known(model)

    def interrupted(self, at: int) -> tuple[str, str]:
        """Run the operation up to line event number `at`: its place ("" when there are not so many), and what is wrong
        after it."""
        model, known = self.fresh()
        where, error, unseen = "", None, []

        def visit(number: int, frame: FrameType) -> None:
            nonlocal where
            if number == at:
                where = place(frame)
                raise Interrupted

        hook, sys.unraisablehook = sys.unraisablehook, lambda found: unseen.append(repr(found.exc_value))
        try:
            Lines(visit, self.case.operate.__code__).run(lambda: self.case.operate(model, self.folder))
        except BaseException as raised:
            error = raised.with_traceback(None)
        finally:
            sys.unraisablehook = hook
        if not where and error is None:
            return "", ""
        return where, self.verdict(model, known, error) or ", ".join(f"nobody sees {one}" for one in unseen)

    def verdict(self, model: nn.Module, known: Known, error: BaseException | None) -> str:
        """What is wrong after an interruption, or ""."""
        if not isinstance(error, Interrupted):
            return f"the interruption became {error!r}"
        try:
            found = state(model, known, self.folder)
        except Exception as failed:
            left = [key for key, value in process().items() if value != self.before[key]]
            return f"not even a model: {', '.join(left)} {type(failed).__name__}: {failed}"
        allowed = ["before"] if self.case.stays else ["before", "after"]
        if all(found != getattr(self, label) for label in allowed):
            far = [(label, differences(found, getattr(self, label))) for label in allowed]
            return "not as {}: {}".format(*min(far, key=lambda pair: len(pair[1])))
        again = found == self.before
        try:
            if not again and output_when_trained(model) != self.trained:
                return "as after, but trained values do not act"
            if again and not same(self.case.operate(model, self.folder), self.returned):
                return "as before, but returns something else when done again"
            if not again:
                self.case.further(model, self.folder)
        except Exception as failed:
            return f"as {'before' if again else 'after'}, but stuck: {type(failed).__name__}: {failed}"
        far = differences(state(model, known, self.folder), self.after if again else self.beyond)
        return far and f"as {'before, but not when done again' if again else 'after, but not one step further'}: {far}"


def same(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or content(one) == content(other)


def injections(bench: Bench) -> Iterator[tuple[int, str, str]]:
    """(number of the line event, its place, what is wrong or "") of every interruption."""
    for at in count(1):
        before = process()
        try:
            where, wrong = bench.interrupted(at)
        finally:
            restore(before)
        if not where:  # it has run to its end
            return
        yield at, where, wrong


def check(case: Case, folder: Path) -> None:
    bench = Bench(case, folder)
    found = list(injections(bench))
    wrong = [f"{at} {where}: {what}" for at, where, what in found if what]
    if case.stays and (far := differences(bench.after, bench.before)):
        wrong.insert(0, f"0, without an interruption: not as before: {far}")
    assert len(found) > 10
    assert not wrong, f"{len(wrong)} of {len(found)} interruptions left a mixed state\n" + "\n".join(wrong[:10])
