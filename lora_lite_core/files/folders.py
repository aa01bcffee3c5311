"""Adapters in the folder of a model, as `save_pretrained` and checkpoints of a Trainer hold them."""

from __future__ import annotations

import os
from pathlib import Path

from ..attached.model_hooks.saving import FOLDER, adapter_path
from ..contract.errors import AdapterFileError, did_you_mean, listed
from ..contract.text import plain
from .adapter_file import inspect


def adapters_in(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The adapter files in a folder by name: those in its `adapters/`, or else those that lie in it."""
    inner = sorted((Path(folder) / FOLDER).glob("*.safetensors"))
    found = inner or [path for path in sorted(Path(folder).glob("*.safetensors")) if _is_adapter(path)]
    return {path.stem: path for path in found}


def adapter_in(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of that name in the folder, or the only one there is; AdapterFileError otherwise."""
    found = adapters_in(folder)
    if name in found:
        return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise AdapterFileError(
            f"{plain(folder)} holds no adapter: neither {plain(adapter_path(folder, name))} nor another\n"
            "  adapters are written by save(model, path), and by model.save_pretrained(folder) while they are attached"
        )
    raise AdapterFileError(
        f"{plain(folder)} holds {len(found)} adapters and none is called '{plain(name)}'"
        f"{did_you_mean(name, found)}\n  they are: {listed(map(plain, found))}\n"
        f"  give name='{plain(next(iter(found)))}', or the path of its file"
    )


def _is_adapter(path: Path) -> bool:
    try:
        inspect(path)
    except AdapterFileError:
        return False
    return True
