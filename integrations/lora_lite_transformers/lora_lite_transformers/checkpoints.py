"""The adapters of a model in a checkpoint: compared with those on the model before a value is changed."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from lora_lite_core import AdapterFileError, ModelStateError, adapters
from lora_lite_core.attached.model_hooks.base_check import check_base
from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain
from lora_lite_core.files.adapter_file import (
    AdapterFile,
    check_same_adapter,
    check_same_tensors,
    header_fields,
    open_adapter,
)
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
    here, label = header_fields(metadata["adapter"], "the model"), plain(file.path)
    for key, tensor in held.items():
        if is_sharded(tensor):
            raise ModelStateError(f"{key} is sharded; load the checkpoint before the model is sharded")
    check_same_adapter(label, name, vars(file), here)
    shapes = {key: shape for key, (_, shape) in file.tensors.items()}
    check_same_tensors(label, name, shapes, {key: tensor.shape for key, tensor in held.items()})
    saved = {path: (target["fingerprint"], target["storage"]) for path, target in file.targets.items()}
    check_base(label, adapter.layers().values(), saved, "error")
    return held
