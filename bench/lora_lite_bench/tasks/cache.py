"""Base models that are made on this machine, once: trained from scratch in seconds, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lora-lite-bench, or ~/.cache/lora-lite-bench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-lite-bench"


def made(name: str, source: Path, make: Callable[[], PreTrainedModel]) -> Path:
    """The folder of the model that `make` makes; it is made when it is not there. Another text of `source`, the file
    that says how, is another model. All or nothing: a process that is killed leaves no folder of that name."""
    code = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{code}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(dir=folder.parent) as work:
            torch.manual_seed(0)
            place = Path(work) / "model"
            make().save_pretrained(place)
            try:
                place.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder
