"""What installed packages say of themselves: name, version, requirements, and their entry points of a group.

Read here, not by importlib_metadata, which finds the packages: there one package whose files are damaged, endless or
missing ends the listing of all.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import HeaderParser
from functools import reduce
from pathlib import Path
from typing import Any

from importlib_metadata import distributions

from ..contract.text import is_package_name, is_variant_name, is_version, normal, plain, told
from ..contract.untrusted_input import read_regular

MOST = 1_000_000  # bytes of a metadata file
MOST_ENTRIES = 100  # of one package in one group
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_OBJECT = re.compile(rf"{_MODULE.pattern}(:{_MODULE.pattern})?")


@dataclass(frozen=True)
class Package:
    """An installed package. `problem` says why nothing of it can be used, or is ""."""

    name: str
    version: str = ""
    requires: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Entry:
    """`name = value` of a package, or what could not be read (then `name` may be ""). `problem` as in Package."""

    name: str
    value: str
    package: Package = field(default_factory=lambda: Package(""))
    problem: str = ""

    def load(self) -> Any:
        """What the value names: a module, or an object in it. Whatever the import raises comes through."""
        module, _, path = self.value.partition(":")
        return reduce(getattr, filter(None, path.split(".")), importlib.import_module(module))


def entries(group: str, *, objects: bool = False) -> list[Entry]:
    """The entry points of a group, of each package that the interpreter finds first under its name.

    objects  values may name an object of a module (`package.module:thing`), not a module alone
    """
    found: dict[str, list[Any]] = {}
    lost: list[Entry] = []
    try:
        for number, distribution in enumerate(distributions()):
            key = normal(_folder_name(distribution)[0]) or f"?{number}"  # an egg in a zip has no folder of that kind
            found.setdefault(key, []).append(distribution)
    except Exception as error:  # of a finder that somebody has installed
        lost = [Entry("", "", problem=f"installed packages cannot be listed to the end: {plain(told(error))}")]
    return [entry for same in found.values() for entry in _of_package(_first_whole(same), group, objects)] + lost


def _first_whole(same: list[Any]) -> Any:
    """The first of one name, unless it is a folder that an uninstall has left."""
    return same[0] if len(same) == 1 else next((one for one in same if not _package(one).problem), same[0])


def _of_package(distribution: Any, group: str, objects: bool) -> Iterator[Entry]:
    try:
        text = _text(distribution, "entry_points.txt")
    except (OSError, ValueError) as error:
        yield Entry("", "", Package(*_folder_name(distribution)), f"its entry_points.txt cannot be read: {_why(error)}")
        return
    lines = list(dict.fromkeys(_lines(text, group)))
    if not lines:
        return
    package = _package(distribution)
    if len(lines) > MOST_ENTRIES:
        yield Entry("", "", package, f"it names {len(lines):,} in {group}, where {MOST_ENTRIES} are the most")
    names = [name for name, _ in lines]
    for name, value in lines[:MOST_ENTRIES]:
        problem = package.problem or _problem(name, value, objects)
        if not problem and names.count(name) > 1:
            problem = f"its package names '{name}' more than once"
        yield Entry(name, value, package, problem)


def _lines(text: str, group: str) -> Iterator[tuple[str, str]]:
    """The (name, value) pairs of a section; a line without = has no value."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == group and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def _problem(name: str, value: str, objects: bool) -> str:
    if not is_variant_name(name):
        return f"{plain(repr(name), 100)} is no name; use ASCII letters, digits, _ and -"
    if not (_OBJECT if objects else _MODULE).fullmatch(value):
        hint = "" if objects or ":" not in value else "; an entry point names the module alone, without ':…'"
        return f"{plain(repr(value), 100)} names no module{hint}"
    top = re.split(r"[.:]", value, maxsplit=1)[0]
    return "__main__ is the program that runs, no module of a package" if top == "__main__" else ""


def _package(distribution: Any) -> Package:
    name, version = _folder_name(distribution)
    try:
        text = _text(distribution, "METADATA", "PKG-INFO")
    except (OSError, ValueError) as error:
        return Package(name, version, problem=f"its METADATA cannot be read: {_why(error)}")
    head = HeaderParser().parsestr(re.split(r"\r?\n\r?\n", text, maxsplit=1)[0])
    said = plain(head.get("Name", ""), 100).strip()
    if not said:
        return Package(name, version, problem="it has no METADATA with its name: install the package again")
    version = head.get("Version", "") or version
    requires = tuple(plain(line, 1000) for line in head.get_all("Requires-Dist", ()))
    problem = ""
    if not is_package_name(said):
        problem = f"{plain(repr(said), 100)} is no name of a package"
    elif name and normal(said) != normal(name):
        problem = f"its METADATA calls it {said}, its folder {plain(name, 100)}"
    return Package(said, version if is_version(version) else "(no version)", requires, problem)


def _folder_name(distribution: Any) -> tuple[str, str]:
    """Name and version by the folder (`name-1.0.dist-info`), which importlib_metadata keeps to itself."""
    stem, dot, kind = str(getattr(distribution, "_path", "")).replace("\\", "/").rpartition("/")[2].rpartition(".")
    if not dot or kind not in ("dist-info", "egg-info"):
        return "", ""
    name, _, version = stem.partition("-")
    return name, version


def _text(distribution: Any, *names: str) -> str:
    """The first of these files that there is, up to a million bytes; "" where there is none. Raises OSError, and
    ValueError for what is no UTF-8."""
    folder = getattr(distribution, "_path", None)
    for name in names:
        if isinstance(folder, Path):
            try:
                text = read_regular(folder / name, MOST, cut=name != "entry_points.txt").decode(
                    "utf-8", "strict" if name == "entry_points.txt" else "replace"
                )
            except (FileNotFoundError, NotADirectoryError):
                continue
        else:  # in a zip, or of another finder
            try:
                text = distribution.read_text(name) or ""
            except Exception as error:
                raise ValueError(told(error)) from None
        if text:
            return text
    return ""


def _why(error: Exception) -> str:
    return plain(getattr(error, "strerror", None) or error, 200)
