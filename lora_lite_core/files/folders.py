"""Which file a path means: itself, the adapter in the folder of a model (as `save_pretrained` and checkpoints of a
Trainer hold it), or one in a repository of a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..attached.model_hooks.saving import FOLDER, adapter_path
from ..contract.errors import AdapterFileError, did_you_mean, listed
from ..contract.text import plain, told
from ..discovery.entry_points import entries
from .adapter_file import inspect

GROUP, HUB = "lora_lite.hubs", "huggingface"  # entry points: fetch(repo_id, name) -> path of the file on this machine
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.safetensors)", re.ASCII)


def file_of(path: str | os.PathLike[str], name: str) -> str | os.PathLike[str]:
    """The adapter file that a path means. "user/name", where no such file or folder is here, is fetched from the hub by
    an installed package. Raises AdapterFileError."""
    if not isinstance(path, (str, os.PathLike)) or os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return adapter_in(path, name)
    if isinstance(path, str) and REPOSITORY.fullmatch(path) and not os.path.lexists(path):
        return _fetched(path, name)
    return path


def _fetched(repo_id: str, name: str) -> Path:
    hub = next((entry for entry in entries(GROUP, objects=True) if entry.name == HUB and not entry.problem), None)
    if hub is None:
        raise AdapterFileError(
            f"there is no file or folder {plain(repo_id)} here\n  if it is a repository on the Hugging Face hub, type: "
            "pip install lora-lite-transformers, and load it again"
        )
    try:
        fetch: Callable[[str, str], str | os.PathLike[str]] = hub.load()
        return Path(fetch(repo_id, name))
    except AdapterFileError:
        raise
    except Exception as error:
        raise AdapterFileError(
            f"there is no file or folder {plain(repo_id)} here, and {plain(hub.package.name)} cannot fetch a "
            f"repository of that name: {plain(told(error).partition(chr(10))[0], 300)}"
        ) from error


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
    if not found and (Path(folder) / "adapter_config.json").is_file():
        raise AdapterFileError(f"{plain(folder)} is a folder of PEFT's; type: import_peft(model, '{plain(folder)}')")
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
