"""Reading a folder that PEFT has saved, as a stranger's: regular files, opened once, of a size that fits the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...contract.errors import AdapterFileError
from ...contract.text import plain
from ...contract.untrusted_input import open_regular, parse_json
from ...layers.kinds.layer_kinds import layer_sizes
from ..tensor_file.reading import TensorFile, open_tensors
from .config_json.fields import CONFIG, first_of

WEIGHTS = "adapter_model.safetensors"
REPORT = "lora_lite_export.json"  # what our own exports say beside; PEFT and servers do not look at it
PREFIX = "base_model.model."
PICKLED = (
    "; a .bin is a pickle, which is not read, because it can run any program: where you trust it, open it with PEFT "
    "and type model.save_pretrained(folder), which writes safetensors"
)
MOST = 10_000_000  # bytes of a config


def read_folder(directory: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by module path and PEFT's own name, without its prefix. Raises AdapterFileError."""
    folder = Path(directory)
    config, state = _config(folder)
    with open_tensors(_there(folder, WEIGHTS)) as opened:
        _check_size(opened, model)
        held = opened.read()
    if _config(folder)[1] != state:
        raise AdapterFileError(f"{CONFIG} was replaced while the folder was read; try again")
    return config, _without_prefix(held)


def _config(folder: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The fields, and what tells the file from another one in its place."""
    path = _there(folder, CONFIG)
    try:
        with open_regular(path) as stream:
            found = os.fstat(stream.fileno())
            text = stream.read(MOST + 1)
        if len(text) > MOST:
            raise ValueError(f"more than {MOST:,} bytes")
        config = parse_json(text)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{CONFIG} cannot be read: {plain(getattr(error, 'strerror', None) or error)}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterFileError(f"{CONFIG} names no peft_type; it is not a PEFT adapter's")
    return config, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _there(folder: Path, part: str) -> Path:
    """The path of a part of the folder; AdapterFileError says what there is instead where it is missing."""
    if not os.path.lexists(folder / part):
        try:
            found = sorted(os.listdir(folder))
        except (OSError, ValueError):
            raise AdapterFileError(f"holds no {part}: there is no such folder") from None
        pickled = PICKLED if "adapter_model.bin" in found else ""
        raise AdapterFileError(
            f"holds no {part} (there: {first_of(found, 8)}{pickled}); give a folder that PEFT has saved"
        )
    return folder / part


def _check_size(opened: TensorFile, model: nn.Module) -> None:
    """No adapter has more numbers than full-rank factors of all layers and a copy of everything."""
    linear = [sizes for layer in model.modules() if (sizes := layer_sizes(layer))]
    numbers = 2 * sum(d_in * d_out for d_in, d_out in linear) + sum(p.numel() for p in model.parameters())
    most = 8 * (numbers + 1_000_000)
    if (size := sum(entry.end - entry.start for entry in opened.entries.values())) > most:
        raise AdapterFileError(
            f"{WEIGHTS} holds {size:,} bytes, and no adapter of this {type(model).__name__} has more than {most:,}"
        )


def _without_prefix(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, tensor in sorted(held.items()):
        if (name := key.removeprefix(PREFIX)) in tensors:
            raise AdapterFileError(f"{WEIGHTS} holds {first_of([name])} twice, with and without '{PREFIX}'")
        tensors[name] = tensor
    return tensors
