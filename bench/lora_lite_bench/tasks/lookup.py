"""Tasks by name: the entry points of the group `lora_lite.tasks`, and how their knobs are set."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_lite_core.contract.errors import LoraLiteError, did_you_mean, listed
from lora_lite_core.contract.text import plain, told
from lora_lite_core.discovery.entry_points import Entry, entries
from lora_lite_core.discovery.name_conflicts import state_of

from .interface import Protocol, Task
from .knobs import wrong

GROUP = "lora_lite.tasks"
HOMES: dict[str, str] = dict.fromkeys(("shifted", "facts", "order", "digits", "gsm8k"), "lora-lite-bench")


class TaskError(LoraLiteError):
    """A task that is not there, or cannot be used as asked."""


def task_names() -> list[str]:
    """The names that can be asked for, without importing any."""
    found = entries(GROUP, objects=True)
    return sorted({entry.name for entry in found if state_of(entry, found, HOMES)[0] == "ok"})


def small_task_names() -> list[str]:
    """Those that are compared together: not one that takes a whole machine, unless it cannot be told."""

    def small(name: str) -> bool:
        try:
            return not task_class(name).ALONE
        except TaskError:
            return True

    return [name for name in task_names() if small(name)]


def task_class(name: str) -> type[Task]:
    """The task of that name. Raises TaskError, which says what there is, or why it cannot be used."""
    found = entries(GROUP, objects=True)
    claims = [(entry, *state_of(entry, found, HOMES)) for entry in found if entry.name == name]
    if not claims:
        known = task_names()
        raise TaskError(
            f"no task is called {plain(repr(name))}{did_you_mean(name, known)}\n  tasks: {listed(known, 40)}"
        )
    entry, state, detail = next((claim for claim in claims if claim[1] == "ok"), claims[0])
    if state != "ok":
        raise TaskError(f"task '{plain(name)}' of {plain(entry.package.name)} is {state}: {detail}")
    return _imported(entry)


def make_task(name: str, knobs: Mapping[str, Any]) -> Task:
    """The task with these knobs. Raises TaskError for a knob that it does not have, or refuses."""
    cls = task_class(name)
    known = [field.name for field in fields(cls)]
    for knob in knobs:
        if knob not in known:
            raise TaskError(
                f"task '{name}' has no knob {plain(repr(knob))}{did_you_mean(knob, known)}; knobs: {listed(known, 40)}"
            )
    if reason := wrong(cls, knobs):
        raise TaskError(f"task '{name}': {reason}")
    try:
        return cls(**knobs)
    except Exception as error:
        raise TaskError(f"task '{name}' refuses {plain(dict(knobs))}: {told(error)}") from error


@contextmanager
def model_of(name: str) -> Generator[None]:
    """Around the reading of a model that was asked for. Raises TaskError where that fails."""
    try:
        yield
    except LoraLiteError:
        raise
    except Exception as error:
        place = "" if Path(name).exists() else ", and no folder of that name is here"
        raise TaskError(
            f"model {plain(name)} cannot be loaded{place}: {told(error)}\n"
            "  give --model FOLDER, with all that save_pretrained writes of a model and of its tokenizer"
        ) from error


def protocol_of(name: str, asked: str, knobs: Mapping[str, Any]) -> Protocol | None:
    """The task's protocol of that name, or the one in the folder of that name; without a name its first; None where it
    has none. Raises TaskError."""
    cls = task_class(name)
    if not asked:
        return next(iter(cls.PROTOCOLS.values()), None)
    if asked in cls.PROTOCOLS:
        return cls.PROTOCOLS[asked]
    if not Path(asked).is_dir():
        there = f"protocols: {listed(list(cls.PROTOCOLS))}, or a folder" if cls.PROTOCOLS else "it has no protocols"
        raise TaskError(
            f"task '{name}' has no protocol {plain(repr(asked))}{did_you_mean(asked, list(cls.PROTOCOLS))}; {there}"
        )
    try:
        return cls.protocol_in(Path(asked), knobs)
    except ValueError as error:
        raise TaskError(f"task '{name}': --protocol {plain(asked)}: {error}") from error


def source_of(cls: Any) -> Path | None:
    """The file that a class, or the module in `cls`, was read from."""
    try:
        return Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return None


def _imported(entry: Entry) -> type[Task]:
    about = f"task '{plain(entry.name)}' of {plain(entry.package.name)}"
    try:
        found = entry.load()
    except Exception as error:
        raise TaskError(f"{about} cannot be imported: {told(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TaskError(f"{about} is {plain(found)}; name a subclass of lora_lite_bench.tasks.Task")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise TaskError(f"{about} has no {', '.join(missing)}")
    return found


def task_distribution(name: str) -> str:
    """The package that a task comes from."""
    return next((entry.package.name for entry in entries(GROUP, objects=True) if entry.name == name), "")
