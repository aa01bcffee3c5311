"""save: one adapter into one file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from importlib_metadata import version
from torch import Tensor, nn

from ..attached.records import (
    Record,
    record_of,
    records_of,
    targets_of,
)
from ..contract.config import overrides
from ..contract.errors import (
    AdapterFileError,
    ModelStateError,
)
from ..contract.target import Target
from ..layers.shards import on_first_process, whole
from .adapter_file import FORMAT, FORMAT_VERSION
from .tensor_file.writing import real_path, write_tensors


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write the adapter called `name` to `path`, a .safetensors file; the base model's weights are not in it.

    The file appears whole or not at all. Of a model in shards (FSDP2) all processes call it: each tensor is gathered,
    and the first process writes. Raises AdapterNameError, ModelStateError (no values yet, or the flat shards of FSDP1
    and ZeRO-3) or AdapterFileError.
    """
    record = record_of(model, name)
    if not record.ready:
        raise ModelStateError(f"adapter '{name}' has no values yet; call adapters(model)['{name}'].initialize() first")
    targets = targets_of(model, name)
    in_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    in_shards = False
    if in_processes:
        from .shards import prepared_to_gather

        in_shards = prepared_to_gather(model, name)
    if "base" in records_of(model).handles and not in_shards:  # something was taken from the base
        from ..attached.model_hooks.base_check import warn_if_stale

        warn_if_stale(model, name, stacklevel=3)
    if record.variant.before_step is not None:
        from ..attached.model_hooks.training import remind

        remind(model, name, stacklevel=3)
    file = real_path(path)  # a link stays a link
    if file.suffix != ".safetensors":
        raise AdapterFileError(
            f"adapters are saved as .safetensors, not '{file.name}'; "
            f"type save(model, '{file.parent / (file.stem or 'adapter')}.safetensors')"
        )
    tensors, metadata = contents(model, record, targets)
    if in_shards:
        tensors = {key: whole(tensor) for key, tensor in tensors.items()}
        on_first_process(lambda: write_tensors(file, tensors, metadata))
    else:
        write_tensors(file, tensors, metadata)


def contents(
    model: nn.Module, record: Record, targets: Mapping[str, Target]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What stands in the adapter's file: its tensors, as they are, and the header's texts."""
    tensors: dict[str, Tensor] = {}
    for layer_name, target in targets.items():
        params = target.params_on(target.layer)
        tensors |= {f"{layer_name}.{bare}": params[bare] for bare in target.saved}
        tensors |= {shared.key: params[bare] for bare, shared in target.shared.items() if shared.key}
    if record.whole:
        from ..attached.targets.train_modules import current

        tensors |= current(model, record)
    return {key: tensor.detach() for key, tensor in tensors.items()}, _metadata(model, record, targets)


def _metadata(model: nn.Module, record: Record, targets: Mapping[str, Target]) -> dict[str, str]:
    described = {
        name: {
            "d_in": target.d_in,
            "d_out": target.d_out,
            "storage": target.storage,
            "overrides": overrides(record.cfg, target.cfg),
            "fingerprint": target.fingerprint,
        }
        for name, target in targets.items()
    }
    whole: list[str] = []
    if record.whole:
        from .train_modules import exact_patterns

        whole = exact_patterns(model, record.whole)  # names, not the patterns that have found them
    adapter = {
        "variant": record.variant.name,
        "config": {**record.cfg.to_dict(), "train_modules": whole},
        "targets": described,
        "seed": record.seed,
        "core_version": version("lora-lite-core"),
        "plugin": {"distribution": record.variant.distribution, "version": record.variant.version},
    }
    if record.step:
        adapter["step"] = record.step
    return {"format": FORMAT, "format_version": str(FORMAT_VERSION), "adapter": json.dumps(adapter)}
