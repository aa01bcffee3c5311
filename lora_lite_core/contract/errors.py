"""The typed errors. Each message says what was given, what exists, and what to type."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from itertools import islice

from .text import paragraphs


class LoraLiteError(Exception):
    """Base of every error that lora-lite raises on purpose.

    Its message may quote what a file or a package says: what a terminal would obey is escaped, and the text is cut.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(paragraphs(part) if isinstance(part, str) else part for part in args))

    def __str__(self) -> str:
        # KeyError's own __str__ would show the repr of the message, with \n escaped.
        return str(self.args[0]) if self.args else ""


class UnknownVariant(LoraLiteError, KeyError):
    """No installed package provides the variant."""


class MissingPlugin(UnknownVariant, AttributeError):
    """The variant or config class is known or asked for, but the package that provides it is not installed."""


class BrokenPlugin(LoraLiteError, ImportError):
    """A variant module cannot be imported or does not keep the contract."""


class AmbiguousVariant(LoraLiteError):
    """Two packages claim one name, or one name could mean two variants."""


class ConfigError(LoraLiteError, TypeError, ValueError):
    """A config has an unknown field or a value that makes no sense."""


class TargetError(LoraLiteError, ValueError):
    """The patterns, layers or roles of a config do not select what they ask for."""


class UnsupportedLayer(LoraLiteError, TypeError):
    """A layer cannot carry this adapter."""


class AdapterNameError(LoraLiteError, ValueError):
    """An adapter name is invalid, taken, or not attached."""


class ModelStateError(LoraLiteError, RuntimeError):
    """The model is compiled, sharded, wrapped or without weights, so that the call would go wrong silently."""


class CalibrationError(LoraLiteError, ValueError):
    """Calibration data is missing, not wanted, or cannot be read as often as needed."""


class MergeError(LoraLiteError, ValueError):
    """An adapter cannot be folded into the weights, or not be written in the format that is asked for."""


class BaseMismatch(LoraLiteError, ValueError):
    """The adapter file was made on another base model."""


class AdapterFileError(LoraLiteError, ValueError):
    """The file is not a complete lora-lite adapter that fits this model."""


# What a config's field that holds one value takes, by its annotation.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
    "str": ((str,), "a string"),
}


def wanted(annotation: object, value: object) -> str:
    """What a field with that annotation (`int`, `float | None` …) holds, or "" where the value is that, or where the
    annotation is of another kind. True is no number, and nan and infinity are no finite ones."""
    kind, _, optional = str(getattr(annotation, "__name__", annotation)).partition(" | ")
    if kind not in _KINDS or optional not in ("", "None") or (optional and value is None):
        return ""
    types, words = _KINDS[kind]
    fits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
    if fits and not (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return words + (", or None" if optional else "")


def closest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known words most like `word`, best first; case is ignored. Looks at 5,000 of them, and at none for a word
    that nobody has typed."""
    if len(word) > 200:
        return []
    by_lower = {name.lower(): name for name in islice(known, 5000) if len(name) <= 200}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, count, 0.6)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the empty string when nothing is near."""
    found = closest(word, known)
    return f"; did you mean '{found[0]}'?" if found else ""


def listed(names: Iterable[object], most: int = 8) -> str:
    """The names, comma separated, shortened after `most` of them."""
    words = [str(name) for name in names]
    if not words:
        return "none"
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
