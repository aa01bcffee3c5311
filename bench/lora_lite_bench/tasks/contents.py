"""What files hold, by hash: with other contents at the same place a result is another result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

OF_MODELS = (".safetensors", ".bin", ".json", ".model", ".txt")  # what a folder of transformers is read from


def contents(files: Iterable[Path]) -> str:
    """A hash of the files' names and bytes; "" of no files."""
    found = [(file.name, _digest(file, *_state(file))) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12] if found else ""


def model_files(model: str) -> list[Path]:
    """Of a model that is a folder; none of one that is a name."""
    folder = Path(model)
    if not model or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in OF_MODELS and file.is_file())


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


@cache
def _digest(file: Path, *_state: int) -> str:
    """Of a file in this state: each is read once a process, weights of some GB in seconds."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            found.update(part)
    return found.hexdigest()
