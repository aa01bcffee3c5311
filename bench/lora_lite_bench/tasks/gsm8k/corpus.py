"""The texts: MetaMathQA for training, GSM8K for the rest, from the hub or from files of the same columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_lite_core.contract.text import plain, told

from ..cache import cache_folder
from ..lookup import TaskError

LONGEST = 1300  # characters of a query and its response together: longer ones are left out, as in PEFT's comparison
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Part = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Source:
    """Where a set of texts is: on the hub and, under DIR, in files; and its columns."""

    repository: str
    subset: str | None
    split: str
    file: str
    columns: tuple[str, str]


TRAIN = Source("meta-math/MetaMathQA", None, "train", "metamath/train", ("query", "response"))
VALID = Source("openai/gsm8k", "main", "train", "gsm8k/train", ("question", "answer"))
TEST = Source("openai/gsm8k", "main", "test", "gsm8k/test", ("question", "answer"))
SOURCES: dict[Part, Source] = {"train": TRAIN, "valid": VALID, "test": TEST}


@dataclass(frozen=True)
class Text:
    """A question and its worked answer."""

    question: str
    answer: str


@lru_cache(maxsize=6)
def texts(part: Part, data: str) -> tuple[Text, ...]:
    """All texts of a part, in the order in which they are used before any seed: "train" without long ones; "valid" is
    GSM8K's training set in the order of PEFT's comparison, which validates on its first 50. Raises TaskError.

    data  a folder with files, or "" for the hub
    """
    source = SOURCES[part]
    rows = _from_folder(Path(data), source) if data else _from_hub(source)
    if lacking := [name for name in source.columns if name not in rows.column_names]:
        raise TaskError(
            f"{source.file} of task 'gsm8k' has no column {' and no '.join(lacking)}; it has "
            f"{plain(', '.join(rows.column_names))}, and needs {' and '.join(source.columns)}"
        )
    pairs = zip(*(rows[name][:] for name in source.columns), strict=True)  # not row by row
    found = [Text(str(question), str(answer)) for question, answer in pairs]
    if part == "train":
        found = [text for text in found if len(f"{text.question} {text.answer}") <= LONGEST]
    if part == "valid":
        order = np.arange(len(found))
        np.random.RandomState(0).shuffle(order)
        found = [found[n] for n in order]
    if not found:
        raise TaskError(f"{source.file} of task 'gsm8k' holds no text")
    return tuple(found)


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise TaskError("task 'gsm8k' needs datasets; type: pip install 'lora-lite-bench[gsm8k]'") from error
    datasets.disable_progress_bars()
    return datasets


def _from_folder(folder: Path, source: Source) -> Any:
    """DIR/metamath/train.jsonl and the like; .json and .parquet, too, in several files or as the hub lays them out."""
    if not folder.is_dir():
        raise TaskError(f"--data {plain(folder)} is not a folder{_wanted()}")
    above, _, stem = source.file.partition("/")
    places = [folder / above, folder / above / "main", folder / above / "data"]
    files = [
        file
        for place in places
        for pattern in (f"{stem}.*", f"{stem}-*")
        for file in sorted(place.glob(pattern))
        if file.suffix in KINDS
    ]
    files = [file for file in files if file.suffix == files[0].suffix and file.parent == files[0].parent]
    if not files:
        raise TaskError(f"--data {plain(folder)} has no {source.file}.jsonl (or .json, .parquet){_wanted()}")
    datasets = _datasets()
    names = [str(file) for file in files]
    cache = str(cache_folder() / "datasets")
    try:
        return datasets.load_dataset(KINDS[files[0].suffix], data_files=names, split="train", cache_dir=cache)
    except Exception as error:
        raise TaskError(f"{plain(files[0])} cannot be read as {files[0].suffix[1:]}: {told(error)}") from error


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
