"""Writing a folder in PEFT's layout: all files or none, and never one adapter's config beside another's weights.

Everything is written beside its place and synced first. A folder that holds an adapter already loses its config before
its weights are changed, and gets the new one last: whoever looks in between, or after a crash, finds no adapter. What
fails is undone at once, what a killed process has left by the next export to the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from importlib_metadata import version
from torch import Tensor, nn

from ...contract.errors import AdapterFileError, MergeError
from ..tensor_file.writing import write_tensors, write_whole
from .config_json.fields import CONFIG
from .folder_reading import PREFIX, REPORT, WEIGHTS
from .tensor_forms.for_all import TOP

PARTS = (WEIGHTS, REPORT, CONFIG)  # in the order in which they come into their places

try:
    import fcntl
except ImportError:  # Windows: two exports to one folder at the same moment are not kept apart there
    fcntl = None


def checked_folder(directory: str | os.PathLike[str]) -> Path:
    """A place for a folder in PEFT's layout, looked at before all work. Raises AdapterFileError."""
    with _typed(directory):
        folder = Path(directory)
        if not folder.parent.is_dir():
            raise AdapterFileError(f"folder {folder.parent} does not exist; make it first")
        if folder.exists() and not folder.is_dir():
            raise AdapterFileError(f"{folder} is a file; give a folder")
        if occupied := [part for part in PARTS if (folder / part).is_dir()]:
            raise AdapterFileError(f"{folder / occupied[0]} is a folder; a file is to be written there")
    return folder


def write_folder(
    folder: Path,
    model: nn.Module,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    report: Mapping[str, Any],
) -> None:
    """`tensors` by module path and PEFT's own name; `report` is what the folder says of itself beside PEFT's files.
    Raises AdapterFileError for all that the system refuses."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    kind = type(model)  # as PEFT says it where there is no task_type: its AutoPeftModel… load the base by it
    common = {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__} if base else None,
        "base_model_name_or_path": str(base) if base else None,
        "task_type": None,
        "inference_mode": True,
    }
    try:
        text = _json({**common, **fields})
    except ValueError as error:
        raise MergeError(f"PEFT's config cannot hold infinity or NaN: {fields}") from error
    held = {key if key.startswith(TOP) else PREFIX + key: tensor for key, tensor in tensors.items()}
    fresh = not checked_folder(folder).exists()
    with _typed(folder):
        folder.mkdir(exist_ok=True)
        try:
            with _alone_in(folder):
                _settle(folder)
                try:
                    _put(folder, text, held, _json({"core_version": version("lora-lite-core"), **report}))
                finally:
                    with suppress(OSError):  # then the next export does it
                        _settle(folder)
        except BaseException:
            if fresh:
                with suppress(OSError):
                    folder.rmdir()
            raise


@contextmanager
def _typed(directory: object) -> Generator[None]:
    try:
        yield
    except AdapterFileError:
        raise
    except (OSError, TypeError, ValueError) as error:  # a path may be none, or hold a NUL
        why = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"{directory} cannot be written: {why}") from error


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _put(folder: Path, text: str, tensors: Mapping[str, Tensor], report: str) -> None:
    new, old = _beside(folder, "new"), _beside(folder, "old")
    write_tensors(new[WEIGHTS], tensors, {"format": "pt"})
    write_whole(new[REPORT], [report.encode()])
    write_whole(new[CONFIG], [text.encode()])  # the last: see _settle
    for part in reversed(PARTS):
        with suppress(FileNotFoundError):
            os.replace(folder / part, old[part])
    for part in PARTS:
        os.replace(new[part], folder / part)


def _settle(folder: Path) -> None:
    """Undo an export that was begun and not finished, remove what is left of one that was: the config being in its
    place tells the one from the other. Can itself be cut off anywhere, and done again."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    if not (folder / CONFIG).is_file():
        for part in (REPORT, WEIGHTS):
            if new[CONFIG].is_file() and not new[part].is_file():  # what is there is the new one
                with suppress(FileNotFoundError):
                    os.replace(folder / part, new[part])
        for part in PARTS:
            if old[part].is_file():
                os.replace(old[part], folder / part)
    for path in (*reversed(new.values()), *old.values()):  # in this order, for the second condition
        path.unlink(missing_ok=True)


def _beside(folder: Path, kind: str) -> dict[str, Path]:
    return {part: folder / f".{part}.{kind}" for part in PARTS}


@contextmanager
def _alone_in(folder: Path) -> Generator[None]:
    """A lock on the folder, which the system takes back from a process that ends, however it does."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdapterFileError(f"{folder} is being written by another export; wait for that one") from None
        except OSError:  # a file system that has no locks
            pass
        yield
        with suppress(OSError):  # a file system that cannot
            os.fsync(handle)
    finally:
        os.close(handle)
