"""The adapter file: safetensors with a JSON header. Reading the header needs no torch.

tensors    "<layer>.<bare name>", as model.layers.0.self_attn.q_proj.lora_A; bare whatever the adapter's name was; those
           of modules that are trained whole by their full names, those that layers share as "lora_A_64x256"; perhaps
           HEADER_TENSOR: the text of "adapter" below in UTF-8, once more, for readers who are given tensors alone
metadata   {"format": "lora-lite", "format_version": "1", "adapter": JSON of the fields of AdapterFile below}
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..contract.errors import AdapterFileError, listed
from ..contract.text import count, is_variant_name, plain, table
from ..contract.untrusted_input import collector_paused, parse_json, typed
from .tensor_file.reading import TensorFile, open_tensors

FORMAT = "lora-lite"
FORMAT_VERSION = 1
HEADER_TENSOR = "lora_lite.header"  # no adapter's tensor: their bare names begin with lora_
# Fields that say which layers there are and which rank each has; the others say what an adapter computes.
CHOOSING = ("target_names", "exclude_names", "target_roles", "layers", "rank_pattern", "alpha_pattern", "train_modules")


@dataclass(frozen=True)
class AdapterFile:
    """What a file says of itself.

    targets  {layer: {"d_in", "d_out", "storage", "overrides": {…}, "fingerprint": […] or None}}
    tensors  {key: (dtype as safetensors writes it, shape)}
    size     of the file in bytes
    step     how many optimizer steps its variant has followed
    """

    path: Path
    variant: str
    config: dict[str, Any]
    targets: dict[str, dict[str, Any]]
    seed: int
    core_version: str
    plugin: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    size: int = 0
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "path": str(self.path),
            "variant": self.variant,
            "config": self.config,
            "plugin": self.plugin,
            "core_version": self.core_version,
            "seed": self.seed,
            "step": self.step,
            "targets": self.targets,
            "tensors": {key: {"dtype": dtype, "shape": list(shape)} for key, (dtype, shape) in self.tensors.items()},
        }

    def __str__(self) -> str:
        plugin = " ".join(part for part in self.plugin.values() if part) or "registered by hand"
        fields = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if key != "variant")
        numbers = sum(prod(shape) for _, shape in self.tensors.values())
        shapes: dict[str, list[str]] = {}
        for key, (dtype, shape) in self.tensors.items():
            layer, _, bare = key.rpartition(".")
            shapes.setdefault(layer, []).append(f"{bare}{list(shape)}:{dtype}")
        rows = []
        for name, target in self.targets.items():
            checked = "yes" if target["fingerprint"] else "no"
            own = " ".join(f"{key}={value}" for key, value in target["overrides"].items())
            held = " ".join(shapes.get(name, ()))
            rows.append((name, f"{target['d_in']} → {target['d_out']}", target["storage"], checked, own or "–", held))
        return (
            f"{plain(self.path)}: {self.variant} ({plain(plugin)}), {count(len(self.targets), 'layer')}, "
            f"{count(len(self.tensors), 'tensor')}, {numbers:,} numbers, {self.size:,} bytes\n"
            f"config: {plain(fields, 2000)}\n"
            f"written by lora-lite-core {plain(self.core_version)}, seed {self.seed}\n\n"
            + table(("layer", "size", "base", "base check", "own config", "tensors"), rows)
        )

    __repr__ = __str__


def inspect(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file's header; prints as a summary. Loads no tensor and imports no torch.

    Raises AdapterFileError when the file is missing, cut short, or not a lora-lite adapter.
    """
    with open_adapter(path) as (file, _):
        return file


@contextmanager
def open_adapter(path: str | os.PathLike[str]) -> Generator[tuple[AdapterFile, TensorFile], None, None]:
    """An adapter file, opened once: what its header says, and the open file, whose `read()` gives the tensors.

    Raises AdapterFileError for whatever stands at the path instead.
    """
    with open_tensors(path) as opened:
        yield _adapter_file(opened), opened


def _adapter_file(opened: TensorFile) -> AdapterFile:
    path, metadata = plain(opened.path), opened.metadata
    if metadata.get("format") != FORMAT:
        of_peft = any(key.startswith("base_model.model.") for key in opened.entries)
        folder = plain(os.path.dirname(opened.path) or ".")
        raise AdapterFileError(
            f"{path} is a safetensors file but not a lora-lite adapter\n"
            f"  its {count(len(opened.entries), 'tensor')}: {listed(map(plain, opened.entries), 3)}\n"
            + (
                f"  this is PEFT's: import_peft(model, '{folder}')"
                if of_peft
                else "  adapters are written by save(model, path)"
            )
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise AdapterFileError(
            f"{path} has adapter format {plain(version)}, this lora-lite-core reads {FORMAT_VERSION}; "
            "type: pip install --upgrade lora-lite-core"
        )
    fields = header_fields(metadata.get("adapter"), path)
    tensors = {key: (entry.dtype, entry.shape) for key, entry in opened.entries.items() if key != HEADER_TENSOR}
    return AdapterFile(path=opened.path, tensors=tensors, size=opened.size, **fields)


def header_fields(text: str | None, path: str) -> dict[str, Any]:
    """The fields of AdapterFile that stand in a header's "adapter"; AdapterFileError where it is damaged."""
    try:
        if text is None:
            raise ValueError("the field 'adapter' is missing")
        with collector_paused():
            return _checked(parse_json(text))
    except (ValueError, MemoryError) as error:
        raise AdapterFileError(f"{path} has a damaged lora-lite header: {plain(error)}") from None


def header_text(tensors: Mapping[str, Any]) -> str | None:
    """What stands in HEADER_TENSOR of these tensors; None where it is none, or no text."""
    tensor = tensors.get(HEADER_TENSOR)
    try:
        return None if tensor is None else bytes(tensor.tolist()).decode()
    except (TypeError, ValueError):
        return None


def check_same_adapter(label: str, name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise AdapterFileError unless a header, called by its label, is that of adapter `name`, whose own is `here`; how
    its layers were chosen does not matter."""
    about, way_out = f"adapter '{name}'", "attach what the checkpoint was trained with, or begin in another folder"
    if there["variant"] != here["variant"]:
        raise AdapterFileError(
            f"{label} holds variant '{plain(there['variant'])}', and {about} is a '{here['variant']}'; {way_out}"
        )
    if differ := _differing("only in the checkpoint", there["targets"], "only on the model", here["targets"], 3):
        raise AdapterFileError(f"{label} is on other layers than {about}; {way_out}\n{differ}")
    for path, target in there["targets"].items():
        has = {**here["config"], **here["targets"][path]["overrides"]}
        had = {**there["config"], **target["overrides"]}
        for field in dict.fromkeys((*has, *had)):
            if field not in CHOOSING and has.get(field) != had.get(field):
                raise AdapterFileError(
                    f"{label} was trained with {plain(field)}={plain(repr(had.get(field)))}, and {about} has "
                    f"{plain(field)}={has.get(field)!r} (on {path}); {way_out}"
                )


def check_same_tensors(label: str, name: str, shapes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise AdapterFileError unless these shapes by the tensors' names in a file are those of adapter `name`."""
    if differ := _differing("unexpected", shapes, "missing", own, 4):
        raise AdapterFileError(f"{label} does not hold the tensors of adapter '{name}'\n{differ}")
    for key, shape in own.items():
        if tuple(shapes[key]) != tuple(shape):
            raise AdapterFileError(
                f"{label}: {key} has shape {list(shapes[key])}, and {list(shape)} in adapter '{name}'"
            )


def _differing(said: str, found: Mapping[str, Any], or_said: str, expected: Mapping[str, Any], most: int) -> str:
    """Two lines of the names that one has and the other lacks; "" where both have the same."""
    if found.keys() == expected.keys():
        return ""
    more, less = (plain(key) for key in found if key not in expected), (key for key in expected if key not in found)
    return f"  {said}: {listed(more, most)}\n  {or_said}: {listed(less, most)}"


_FIELDS: dict[str, type] = {
    "variant": str, "config": dict, "targets": dict, "seed": int, "core_version": str, "plugin": dict
}  # fmt: skip
_OF_A_TARGET: dict[str, type] = {"d_in": int, "d_out": int, "storage": str, "overrides": dict}


def _checked(fields: Any) -> dict[str, Any]:
    """The fields of AdapterFile that stand in the header; ValueError where one is missing or of another type."""
    fields = typed("adapter", fields, dict)
    for name, kind in _FIELDS.items():
        typed(name, fields.get(name), kind)
    if typed("step", fields.setdefault("step", 0), int) < 0:
        raise ValueError(f"step is {fields['step']}")
    if unknown := fields.keys() - _FIELDS.keys() - {"step"}:
        raise ValueError(f"unknown fields {listed(sorted(unknown), 4)}")
    if not is_variant_name(fields["variant"]):
        raise ValueError(f"variant is {fields['variant']!r}, which is no variant's name")
    for name, text in fields["plugin"].items():
        typed(f"plugin: {name}", text, str)
    for layer, target in fields["targets"].items():
        typed(layer, target, dict)
        for name, kind in _OF_A_TARGET.items():
            typed(f"{layer}: {name}", target.get(name), kind)
        for name in ("d_in", "d_out"):
            if not 0 < target[name] < 2**63:
                raise ValueError(f"{layer}: {name} is {target[name]}")
        if target["storage"] != plain(target["storage"], 100):  # it is shown in warnings
            raise ValueError(f"{layer}: storage is {target['storage']!r}")
        if "fingerprint" not in target:
            raise ValueError(f"{layer}: fingerprint is missing")
        target["fingerprint"] = _numbers(f"{layer}: fingerprint", target["fingerprint"])
    return fields


def _numbers(what: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    for number in typed(what, value, list):
        if type(number) not in (int, float):
            raise ValueError(f"{what} holds {number!r}, not a float")
    try:
        return [float(number) for number in value]
    except OverflowError:
        raise ValueError(f"{what} holds a number that no float is") from None
