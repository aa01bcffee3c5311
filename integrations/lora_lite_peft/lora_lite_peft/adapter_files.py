"""An adapter's tensors as PEFT carries them about, and its folder.

PEFT hands adapters on as tensors by name and nothing else: to the file that it writes, and from a file to a model. So
ours take their header along, as a tensor of bytes: variant, config, targets and fingerprints are compared wherever
tensors come back, and the file that PEFT has written becomes one that `lora_lite.load` opens.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_lite_core import AdapterFileError, ModelStateError, adapters
from lora_lite_core.attached.model_hooks.base_check import check_base
from lora_lite_core.attached.targets.train_modules import tensor_at
from lora_lite_core.attached.tensors.declared import specs_for
from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain
from lora_lite_core.files.adapter_file import (
    FORMAT,
    FORMAT_VERSION,
    HEADER_TENSOR,
    check_same_adapter,
    check_same_tensors,
    header_fields,
    header_text,
)
from lora_lite_core.files.save import contents
from lora_lite_core.files.tensor_file.writing import write_tensors
from lora_lite_core.layers.kinds.layer_kinds import is_sharded

PREFIX = "base_model.model."  # of names in a PeftModel's state dict


class Saved(NamedTuple):
    """A tensor that goes into the adapter's file: its name in the model's state dict, and itself."""

    name: str
    tensor: Tensor


def saved_tensors(model: nn.Module, name: str) -> dict[str, Saved]:
    """The adapter's tensors by their names in its file, also where it is not active."""
    adapter, found = adapters(model)[name], dict[str, Saved]()
    for path, target in adapter.layers().items():
        params = target.params_on(target.layer)
        for bare in target.saved:
            found[f"{path}.{bare}"] = Saved(f"{path}.{target.attributes[bare]}", params[bare])
        for bare, shared in target.shared.items():
            if shared.key:
                found[shared.key] = Saved(shared.attribute, params[bare])
    for key, whole in adapter.record.whole.items():
        tensor = whole.trained if whole.trained is not None else tensor_at(model, key)
        if tensor is None:
            raise ModelStateError(f"{key}, trained whole by adapter '{name}', was removed from the model since")
        found[key] = Saved(key, tensor)
    return found


def state_of_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT is to write of an adapter: its tensors with the names that its file has, and its header. The values
    are those of the state dict, which may have been gathered from many processes; empty where that is."""
    if not adapters(model)[name].record.ready:
        raise ModelStateError(f"adapter '{name}' has no values yet: its base was on the meta device; load that first")
    saved = saved_tensors(model, name)
    if not state_dict and any(is_sharded(one.tensor) for one in saved.values()):
        return {}  # a process that writes nothing
    whole = adapters(model)[name].record.whole
    found = {key: one.tensor if key in whole else _given(state_dict, one) for key, one in saved.items()}
    shapes = _shapes(model, name)
    for key, tensor in found.items():
        if is_sharded(tensor) or tensor.shape != shapes.get(key, tensor.shape):  # FSDP2; FSDP1 and ZeRO-3
            raise ModelStateError(
                f"{key} is sharded; give the gathered values, as accelerator.get_state_dict(model) returns them: "
                "save_pretrained(folder, state_dict=…)"
            )
    return {**{key: tensor.detach() for key, tensor in found.items()}, HEADER_TENSOR: as_tensor(header(model, name))}


def _shapes(model: nn.Module, name: str) -> dict[str, tuple[int, ...]]:
    """What the variant declares, by the names in the file."""
    targets = adapters(model)[name].layers().items()
    return {f"{path}.{bare}": spec.shape for path, target in targets for bare, spec in specs_for(target).items()}


def _given(state_dict: Mapping[str, Tensor], one: Saved) -> Tensor:
    return state_dict.get(PREFIX + one.name, state_dict.get(one.name, one.tensor))


def header(model: nn.Module, name: str) -> str:
    """The header of the adapter's file."""
    adapter = adapters(model)[name]
    return contents(model, adapter.record, adapter.layers())[1]["adapter"]


def as_tensor(text: str) -> Tensor:
    """A text as a tensor of bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def as_adapter_file(folder: str) -> None:
    """Turn the file of tensors that PEFT has just written in this folder into an adapter file, whole or not at all;
    do nothing where there is none. Raises AdapterFileError when what PEFT has written is no file of that kind."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    tensors = _just_written(path)
    if tensors is None:
        if os.path.exists(os.path.join(folder, WEIGHTS_NAME)):
            raise AdapterFileError(
                f"adapters are saved as {SAFETENSORS_WEIGHTS_NAME}, not as {WEIGHTS_NAME}; "
                "leave safe_serialization=False out"
            )
        return
    text = header_text(tensors)
    if text is None:
        raise AdapterFileError(f"{plain(path)} was not written of a lora-lite adapter; give another folder")
    if more := [key for key in tensors if key.startswith(PREFIX)]:
        warnings.warn(
            f"{listed(more)}: PEFT saves embeddings that have another size than the base's, a lora-lite adapter does "
            "not; train them with modules_to_save, or say save_embedding_layers=False",
            stacklevel=4,
        )
    tensors = {key: tensor for key, tensor in tensors.items() if key not in more}
    write_tensors(path, tensors, {"format": FORMAT, "format_version": str(FORMAT_VERSION), "adapter": text})


def _just_written(path: str) -> dict[str, Tensor] | None:
    """The tensors of PEFT's own file; None where there is none, or an adapter file of an earlier save."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{plain(path)} cannot be read: {plain(error)}") from None


def restore(model: nn.Module, name: str, tensors: Mapping[str, Tensor], on_base_mismatch: Any) -> None:
    """Give an attached adapter the values of a checkpoint, after everything was compared. Raises AdapterFileError for
    another variant, config or set of tensors, BaseMismatch for another base model; then nothing has changed."""
    text, saved = header_text(tensors), saved_tensors(model, name)
    if text is None:
        raise AdapterFileError(
            "these tensors are no lora-lite adapter that PEFT has saved: their header is missing\n"
            f"  they are: {listed(map(plain, tensors), 3)}"
        )
    there, here = header_fields(text, "the checkpoint"), json.loads(header(model, name))
    for key, (_, tensor) in saved.items():
        if is_sharded(tensor):
            raise ModelStateError(f"{key} is sharded; load the checkpoint before the model is sharded")
    check_same_adapter("the checkpoint", name, there, here)
    shapes = {key: tensor.shape for key, tensor in tensors.items() if key != HEADER_TENSOR}
    check_same_tensors("the checkpoint", name, shapes, {key: tensor.shape for key, (_, tensor) in saved.items()})
    fingerprints = {path: (one["fingerprint"], one["storage"]) for path, one in there["targets"].items()}
    check_base("the checkpoint", adapters(model)[name].layers().values(), fingerprints, on_base_mismatch)
    with torch.no_grad():
        for key, (_, tensor) in saved.items():
            tensor.copy_(tensors[key])
    adapters(model)[name].record.step = there["step"]
