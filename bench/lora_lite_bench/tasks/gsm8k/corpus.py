"""The texts: MetaMathQA for training, GSM8K for the rest, from the hub or from files of the same columns."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_lite_core.contract.text import plain, told

from ..cache import cache_folder
from ..contents import contents
from ..lookup import TaskError
from . import final_answers
from .data_files import files_of

LONGEST = 1300  # characters of a query and its response together: longer ones are left out, as in PEFT's comparison
Part = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Source:
    """Where a set of texts is: on the hub and, under DIR, in files; and its columns. `also` is the hub's file."""

    repository: str
    subset: str | None
    split: str
    file: str
    columns: tuple[str, str]
    also: str = ""


TRAIN = Source("meta-math/MetaMathQA", None, "train", "metamath/train", ("query", "response"), "MetaMathQA-395K")
VALID = Source("openai/gsm8k", "main", "train", "gsm8k/train", ("question", "answer"))
TEST = Source("openai/gsm8k", "main", "test", "gsm8k/test", ("question", "answer"))
SOURCES: dict[Part, Source] = {"train": TRAIN, "valid": VALID, "test": TEST}


@dataclass(frozen=True)
class Text:
    """A question and its worked answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """The texts of a part, and what is to be known of those that it had (see `Task.notes`)."""

    texts: tuple[Text, ...]
    notes: tuple[str, ...]


def texts(part: Part, data: str) -> tuple[Text, ...]:
    """Of `read`."""
    return read(part, data).texts


@lru_cache(maxsize=6)
def read(part: Part, data: str) -> Corpus:
    """All texts of a part, in the order in which they are used before any seed: "train" without long and empty ones;
    "valid" is GSM8K's training set in the order of PEFT's comparison, which validates on its first 50. Raises
    TaskError: a problem without its question or its final answer is none, and no score could be told from its.

    data  a folder with files, or "" for the hub
    """
    source = SOURCES[part]
    rows = _from_folder(Path(data), source) if data else _from_hub(source)
    if lacking := [name for name in source.columns if name not in rows.column_names]:
        raise TaskError(
            f"{source.file} of task 'gsm8k' has no column {' and no '.join(lacking)}; it has "
            f"{plain(', '.join(rows.column_names))}, and needs {' and '.join(source.columns)}"
        )
    found = _texts(rows, source)
    if part == "train":
        return _lessons(found)
    notes = _check_problems(found, source)
    if part == "valid":
        order = np.arange(len(found))
        np.random.RandomState(0).shuffle(order)
        found = [found[n] for n in order]
    return Corpus(tuple(found), notes)


def _lessons(every: list[Text]) -> Corpus:
    """Those that are trained on."""
    (query, response), notes = TRAIN.columns, list[str]()
    reasons: dict[str, Callable[[Text], bool]] = {
        f"have an empty {query} or {response}": lambda text: not (text.question.strip() and text.answer.strip()),
        f"are longer than {LONGEST:,} characters": lambda text: len(f"{text.question} {text.answer}") > LONGEST,
    }
    found = list(enumerate(every, 1))
    for reason, is_so in reasons.items():
        out = [number for number, text in found if is_so(text)]
        found = [(number, text) for number, text in found if not is_so(text)]
        said = f"{TRAIN.file}: {len(out):,} of {len(every):,} texts {reason}"
        if not found:
            raise TaskError(f"task 'gsm8k': nothing would be trained: {'; '.join([*notes, said])}")
        notes += [f"{said}, row {out[0]:,} is the first: they are left out"] if out else []
    return Corpus(tuple(text for _, text in found), tuple(notes))


def _check_problems(found: list[Text], source: Source) -> tuple[str, ...]:
    """What is to be said of problems and their references. Raises TaskError for some that are none."""
    question, answer = source.columns
    of, answers = f"of {len(found):,}", [final_answers.reference_of(text.answer) for text in found]
    if empty := [n for n, text in enumerate(found, 1) if not text.question.strip()]:
        raise TaskError(
            f"{source.file} of task 'gsm8k': {len(empty):,} {of} have an empty {question}, row {empty[0]:,} is the "
            "first; fill it in, or take the row out"
        )
    if unanswered := [n for n, one in enumerate(answers, 1) if one is None]:
        raise TaskError(
            f"{source.file} of task 'gsm8k': {len(unanswered):,} {of} have no final answer, row {unanswered[0]:,} is "
            f"the first; the {answer} of GSM8K ends with a line as '#### 12'"
        )
    words = [n for n, one in enumerate(answers, 1) if one is not None and final_answers.number(one) is None]
    if not words:
        return ()
    first = f"row {words[0]:,} is the first: {plain(repr(answers[words[0] - 1]), 60)}"
    return (f"{source.file}: {len(words):,} {of} final answers are no numbers and are compared as text, {first}",)


def files(data: str) -> list[Path]:
    """Those that all parts are read from, of a folder. Raises TaskError."""
    return [file for source in SOURCES.values() for file in files_of(Path(data), source.file, source.also)[1]]


def _texts(rows: Any, source: Source) -> list[Text]:
    try:
        pairs = list(zip(*(rows[name][:] for name in source.columns), strict=True))  # not row by row
    except UnicodeDecodeError as error:
        raise TaskError(f"{source.file} of task 'gsm8k' is not in UTF-8: {told(error)}") from error
    for number, pair in enumerate(pairs, 1):
        for name, value in zip(source.columns, pair, strict=True):
            if not isinstance(value, str):
                raise TaskError(
                    f"{source.file} of task 'gsm8k', row {number:,}: {name} is {plain(value, 60)}, and text is needed"
                )
    if not pairs:
        raise TaskError(f"{source.file} of task 'gsm8k' holds no text")
    return [Text(*pair) for pair in pairs]


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise TaskError("task 'gsm8k' needs datasets; type: pip install 'lora-lite-bench[gsm8k]'") from error
    datasets.disable_progress_bars()
    return datasets


def _from_folder(folder: Path, source: Source) -> Any:
    """What is in the folder's files; what datasets keeps of them is found again by their contents, not their time."""
    if not folder.is_dir():
        raise TaskError(f"--data {plain(folder)} is not a folder{_wanted()}")
    try:
        kind, files = files_of(folder, source.file, source.also)
    except TaskError as error:
        raise TaskError(f"{error}{_wanted()}") from error
    datasets = _datasets()
    names = [glob.escape(str(file)) for file in files]
    cache = str(cache_folder() / "datasets" / contents(files))
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=cache)
    except Exception as error:
        of = plain(", ".join(file.name for file in files))
        raise TaskError(f"{plain(files[0].parent)}: {of} cannot be read: {plain(_reason(error))}{_wanted()}") from error


def _reason(error: BaseException) -> str:
    """What the first of the errors says: datasets wraps the one that names the row."""
    while error.__cause__ is not None:
        error = error.__cause__
    return told(error)


def _from_hub(source: Source) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset(source.repository, source.subset, split=source.split)
    except Exception as error:
        raise TaskError(f"{source.repository} cannot be had from the hub: {told(error)}{_wanted()}") from error


def _wanted() -> str:
    """What can be typed where there is no network."""
    files = "\n".join(f"    DIR/{one.file}.jsonl    {', '.join(one.columns)}" for one in SOURCES.values())
    return (
        f"\n  without a network, give --data DIR with these files, one JSON object a line, and their columns:\n{files}"
    )
