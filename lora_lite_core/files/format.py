"""The adapter file: safetensors with a JSON header. Reading the header needs no torch.

tensors    "<layer>.<bare name>", as model.layers.0.self_attn.q_proj.lora_A; bare whatever the adapter's name was
metadata   {"format": "lora-lite", "format_version": "1", "adapter": JSON of the fields of AdapterFile below}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..contract.errors import AdapterFileError, listed
from ..contract.text import count, table

FORMAT = "lora-lite"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """What a file says of itself.

    targets  {layer: {"d_in", "d_out", "storage", "overrides": {…}, "fingerprint": […] or None}}
    tensors  {key: (dtype as safetensors writes it, shape)}
    """

    path: Path
    variant: str
    config: dict[str, Any]
    targets: dict[str, dict[str, Any]]
    seed: int
    core_version: str
    plugin: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "path": str(self.path),
            "variant": self.variant,
            "config": self.config,
            "plugin": self.plugin,
            "core_version": self.core_version,
            "seed": self.seed,
            "targets": self.targets,
            "tensors": {key: {"dtype": dtype, "shape": list(shape)} for key, (dtype, shape) in self.tensors.items()},
        }

    def __str__(self) -> str:
        plugin = " ".join(part for part in self.plugin.values() if part) or "registered by hand"
        fields = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if key != "variant")
        numbers = sum(prod(shape) for _, shape in self.tensors.values())
        rows = []
        for name, target in self.targets.items():
            of_layer = {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.rpartition(".")[0] == name}
            shapes = " ".join(f"{bare}{list(shape)}:{dtype}" for bare, (dtype, shape) in of_layer.items())
            checked = "yes" if target["fingerprint"] else "no"
            own = " ".join(f"{key}={value}" for key, value in target["overrides"].items())
            rows.append((name, f"{target['d_in']} → {target['d_out']}", target["storage"], checked, own or "–", shapes))
        return (
            f"{self.path}: {self.variant} ({plugin}), {count(len(self.targets), 'layer')}, "
            f"{count(len(self.tensors), 'tensor')}, {numbers:,} numbers, {self.path.stat().st_size:,} bytes\n"
            f"config: {fields}\n"
            f"written by lora-lite-core {self.core_version}, seed {self.seed}\n\n"
            + table(("layer", "size", "base", "base check", "own config", "tensors"), rows)
        )

    __repr__ = __str__


def inspect(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file's header; prints as a summary. Loads no tensor and imports no torch.

    Raises AdapterFileError when the file is missing, cut short, or not a lora-lite adapter.
    """
    path = Path(path)
    metadata, tensors = _read_header(path)
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path} is a safetensors file but not a lora-lite adapter\n"
            f"  its {count(len(tensors), 'tensor')}: {listed(tensors, 3)}\n"
            "  adapters are written by save(model, path)"
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise AdapterFileError(
            f"{path} has adapter format {version}, this lora-lite-core reads {FORMAT_VERSION}; "
            "type: pip install --upgrade lora-lite-core"
        )
    try:
        file = AdapterFile(path=path, tensors=tensors, **json.loads(metadata["adapter"]))
        _check_fields(file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} has a damaged lora-lite header: {type(error).__name__}: {error}") from error
    return file


def _check_fields(file: AdapterFile) -> None:
    """Raise KeyError or TypeError where a field is not what AdapterFile says."""
    kinds = {"variant": str, "config": dict, "targets": dict, "seed": int, "core_version": str, "plugin": dict}
    found = [(name, getattr(file, name), kind) for name, kind in kinds.items()]
    for layer, target in file.targets.items():
        for name, kind in {"d_in": int, "d_out": int, "storage": str, "overrides": dict}.items():
            found.append((f"{layer}: {name}", target[name], kind))
        numbers = target["fingerprint"]
        found += [(f"{layer}: fingerprint", number, float) for number in (numbers if numbers is not None else ())]
    for name, value, kind in found:
        if not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name} is {value!r}, not a {kind.__name__}")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """Metadata and tensor list of a safetensors file: eight bytes of length, then JSON, then the data."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} is not a safetensors file, or its beginning is damaged")
    metadata = header.pop("__metadata__", None) or {}
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    except (IndexError, KeyError, TypeError):
        raise AdapterFileError(f"{path} is not a safetensors file, or its beginning is damaged") from None
    if size != 8 + length + end:
        raise AdapterFileError(
            f"{path} is cut short or damaged: {size:,} bytes where its header speaks of {8 + length + end:,}"
        )
    return metadata, tensors
