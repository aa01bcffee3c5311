"""What a check is: a function whose docstring is the promise, and one line on how to mend what breaks it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from .variant_under_test import CheckFailed, Subject


@dataclass(frozen=True)
class Check:
    """`name` without check_, the promise in one sentence, and the way to keep it."""

    name: str
    promise: str
    mend: str
    function: Callable[[Subject], None]

    def __call__(self, subject: Subject) -> None:
        """Raise CheckFailed when the variant breaks the promise, or fails in another way on the way there.

        What cannot be put on a model at all fails `attaches`; the other checks then say no more than that.
        """
        if self.name != "attaches" and not subject.attaches:
            raise CheckFailed(f"not tried: '{subject.variant.name}' cannot be attached and run; see `attaches`")
        try:
            self.function(subject)
        except Exception as error:
            seen = (
                str(error)
                if isinstance(error, CheckFailed)
                else f"{type(error).__name__}: {error}{_where(error, subject)}"
            )
            raise CheckFailed(
                f"'{subject.variant.name}' breaks a promise: {self.promise}\n  seen: {seen}\n  to mend: {self.mend}"
            ) from error


def _where(error: Exception, subject: Subject) -> str:
    """The last line of the variant's own file on the way to the error."""
    own = getattr(subject.variant.namespace, "__file__", None)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"\n  at: {lines[-1].filename}, line {lines[-1].lineno}: {lines[-1].line}" if lines else ""


CHECKS: dict[str, Check] = {}


def promise(mend: str) -> Callable[[Callable[[Subject], None]], Check]:
    """Make a check of a function check_…, and list it."""

    def register(function: Callable[[Subject], None]) -> Check:
        name = function.__name__.removeprefix("check_")
        CHECKS[name] = Check(name, " ".join((function.__doc__ or "").split()), mend, function)
        return CHECKS[name]

    return register
