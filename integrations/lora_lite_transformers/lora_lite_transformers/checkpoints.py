"""The adapters of a model in a checkpoint: compared with those on the model before a value is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterFileError, ModelStateError, adapters
from lora_lite_core.attached.model_hooks.base_check import check_base
from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain
from lora_lite_core.files.adapter_file import CHOOSING, HEADER_TENSOR, AdapterFile, header_fields, open_adapter
from lora_lite_core.files.folders import adapters_in
from lora_lite_core.files.save import contents
from lora_lite_core.layers.kinds.layer_kinds import is_sharded


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give every adapter on the model the values that it has in the folder, and its count of steps.

    Either all of them or none. Raises AdapterFileError for adapters of other names, another variant, config or other
    layers, BaseMismatch for another base model, ModelStateError for a sharded model.
    """
    found, there = adapters_in(folder), list(adapters(model))
    if set(found) != set(there):
        raise AdapterFileError(
            f"{plain(folder)} was trained with other adapters than those on the model\n"
            f"  in it: {listed(map(plain, found))}\n  on the model: {listed(there)}\n"
            "  attach those that it was trained with, by their names, or begin in another folder"
        )
    values: list[tuple[Tensor, Tensor]] = []
    steps: dict[str, int] = {}
    for name, path in found.items():
        with open_adapter(path) as (file, opened):
            held = _compared(model, name, file)
            tensors = opened.read()
        values += [(tensor, tensors[key]) for key, tensor in held.items()]
        steps[name] = file.step
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
    for name, step in steps.items():
        adapters(model)[name].record.step = step


def _compared(model: nn.Module, name: str, file: AdapterFile) -> dict[str, Tensor]:
    """The adapter's tensors on the model by their names in the file, if that is of the same adapter."""
    adapter = adapters(model)[name]
    held, metadata = contents(model, adapter.record, adapter.layers())
    here = header_fields(metadata["adapter"], "the model")
    label = plain(file.path)
    _compare(label, name, file, here)
    if file.tensors.keys() != held.keys():
        missing = [key for key in held if key not in file.tensors]
        unexpected = [key for key in file.tensors if key not in held]
        raise AdapterFileError(
            f"{label} does not hold the tensors of adapter '{name}'\n"
            f"  missing: {listed(missing, 4)}\n  unexpected: {listed(map(plain, unexpected), 4)}"
        )
    for key, tensor in held.items():
        if is_sharded(tensor):
            raise ModelStateError(f"{key} is sharded; load the checkpoint before the model is sharded")
        if file.tensors[key][1] != tuple(tensor.shape):
            raise AdapterFileError(
                f"{label}: {key} has shape {list(file.tensors[key][1])}, and {list(tensor.shape)} in adapter '{name}'"
            )
    saved = {path: (target["fingerprint"], target["storage"]) for path, target in file.targets.items()}
    check_base(label, adapter.layers().values(), saved, "error")
    return {key: tensor for key, tensor in held.items() if key != HEADER_TENSOR}


def _compare(label: str, name: str, file: AdapterFile, here: Mapping[str, Any]) -> None:
    """AdapterFileError unless both are of the same adapter; how its layers were chosen does not matter."""
    way_out = "attach what the checkpoint was trained with, or begin in another folder"
    if file.variant != here["variant"]:
        raise AdapterFileError(
            f"{label} holds variant '{plain(file.variant)}', and adapter '{name}' is a '{here['variant']}'; {way_out}"
        )
    if file.targets.keys() != here["targets"].keys():
        more = [path for path in file.targets if path not in here["targets"]]
        less = [path for path in here["targets"] if path not in file.targets]
        raise AdapterFileError(
            f"{label} is on other layers than adapter '{name}'; {way_out}\n"
            f"  only in the checkpoint: {listed(map(plain, more), 3)}\n  only on the model: {listed(less, 3)}"
        )
    for path, target in file.targets.items():
        own = {**here["config"], **here["targets"][path]["overrides"]}
        saved = {**file.config, **target["overrides"]}
        for field in dict.fromkeys((*own, *saved)):
            if field not in CHOOSING and own.get(field) != saved.get(field):
                then = f"{plain(field)}={plain(repr(saved.get(field)))}"
                raise AdapterFileError(
                    f"{label} was trained with {then}, and adapter '{name}' has {plain(field)}={own.get(field)!r} "
                    f"(on {path}); {way_out}"
                )
