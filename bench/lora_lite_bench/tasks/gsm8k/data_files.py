"""The files of `--data DIR`: as one names them by hand, and as the hub's repositories lay them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain

from ..lookup import TaskError

KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet"}  # what datasets calls them
NAME = r"(?:{stems})(?P<shard>[-_.]?\d+(?:-of-0*(?P<of>\d+))?)?\.(?P<kind>jsonl|json|parquet)(?P<packed>\.gz)?"


def files_of(folder: Path, file: str, also: str = "") -> tuple[str, list[Path]]:
    """What datasets calls the kind of the files, and the files: DIR/gsm8k/test.jsonl, or numbered as
    test-00000-of-00002.parquet, perhaps in DIR/gsm8k/main or data; in any of KINDS, perhaps with .gz. Others, as
    test-old.jsonl, are no part of it. Raises TaskError for none, several forms, and empty or missing ones.

    file  "gsm8k/test"
    also  another name for its last part
    """
    above, _, stem = file.partition("/")
    pattern = re.compile(NAME.format(stems="|".join(map(re.escape, filter(None, (stem, also))))))
    places = [folder / above, folder / above / "main", folder / above / "data"]
    there = [one for place in places if place.is_dir() for one in place.iterdir()]
    found = [(one, match) for one in there if (match := pattern.fullmatch(one.name)) and one.is_file()]
    found.sort(key=lambda pair: (len(pair[0].name), pair[0].name))
    files = [one for one, _ in found]
    if not files:
        names = sorted(str(one.relative_to(folder)) for one in there or folder.iterdir())
        raise TaskError(
            f"--data {plain(folder)} has no {file}.jsonl (or .json, .parquet; with .gz, too); "
            f"it has {plain(listed(names, 8)) if names else 'nothing'}"
        )
    if len({(one.parent, match["kind"], match["packed"], match["shard"] is None) for one, match in found}) > 1:
        names = [str(one.relative_to(folder)) for one in files]
        raise TaskError(f"--data {plain(folder)} has {file} in more than one form: {plain(listed(names, 8))}; keep one")
    _check_whole(files, [int(match["of"]) for _, match in found if match["of"]])
    return KINDS[found[0][1]["kind"]], files


def _check_whole(files: Sequence[Path], totals: Sequence[int]) -> None:
    """Of files that say how many they are, all are there; each holds something."""
    if totals and set(totals) != {len(files)}:
        said = " and ".join(map(str, sorted(set(totals))))
        raise TaskError(
            f"{plain(files[0].parent)} has {plain(listed([one.name for one in files], 4))}: {len(files)} of {said}; "
            "put all of them there, and no others"
        )
    for one in files:
        with one.open("rb") as opened:
            begin = opened.read(1000)
        if begin.startswith(b"version https://git-lfs"):
            raise TaskError(f"{plain(one)} only says where Git LFS keeps the file; type there: git lfs pull")
        if len(begin) < 1000 and not begin.strip(b"\xef\xbb\xbf[] \t\r\n"):
            raise TaskError(f"{plain(one)} is empty")
