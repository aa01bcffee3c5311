"""The directory format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...attached.records import Record
from ...contract.errors import AdapterFileError, MergeError, listed
from ...layers.layer_kinds import is_conv1d

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_directory(
    directory: str | os.PathLike[str], model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Both files, the weights first; each is complete or not there. `tensors` by module path and PEFT's own name."""
    folder = Path(directory)
    if not folder.parent.is_dir():
        raise AdapterFileError(f"folder {folder.parent} does not exist; make it first")
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; give a folder")
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {
        "base_model_name_or_path": str(base) if base else None,
        "task_type": None,
        "inference_mode": True,
        **fields,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(exist_ok=True)
    held = {PREFIX + key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    partial = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(held, partial, metadata={"format": "pt"})
        partial.replace(folder / WEIGHTS)
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / CONFIG)
    finally:
        partial.unlink(missing_ok=True)


def suffix_targets(model: nn.Module, targets: Collection[str]) -> list[str]:
    """The shortest endings of dotted names that select these modules and no other, as PEFT and servers read them."""
    modules = [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False) if path]
    paths = [path for path, _ in modules]
    wanted = set(targets)
    adapted = {key: path for path, key in modules if path in wanted}
    for path, key in modules:
        if path not in wanted and key in adapted:
            raise MergeError(f"{path} is the same layer as {adapted[key]}, and PEFT would adapt one of the two alone")
    chosen: dict[str, None] = {}
    for target in targets:
        parts = target.split(".")
        for size in range(1, len(parts) + 1):
            ending = ".".join(parts[-size:])
            if all(path in wanted for path in paths if path == ending or path.endswith("." + ending)):
                chosen[ending] = None
                break
        else:
            other = next(path for path in paths if path.endswith("." + target))
            raise MergeError(
                f"PEFT selects modules by the end of their names, and '{target}' is also the end of '{other}', "
                "which is not adapted; adapt both, or rename one"
            )
    return list(chosen)


def layout_fields(model: nn.Module, targets: Collection[str]) -> dict[str, Any]:
    """What every config says of the modules: their endings, and whether their weights are stored transposed."""
    transposed = {is_conv1d(model.get_submodule(target)) for target in targets}
    if len(transposed) > 1:
        raise MergeError("PEFT's fan_in_fan_out holds for all modules, and only some of these are transposed (Conv1D)")
    stored = {"fan_in_fan_out": True} if transposed == {True} else {}  # not every method has this field
    return {"target_modules": suffix_targets(model, targets), **stored}


def check_endings(model: nn.Module, whole: Collection[str], field: str) -> None:
    """PEFT takes every module whose name ends so, also in the middle of a word."""
    for path, _ in model.named_modules():
        for name in whole:
            if path.endswith(name) and not any(path == one or path.startswith(f"{one}.") for one in whole):
                raise MergeError(f"PEFT's {field} would take '{path}' for '{name}', too; it cannot tell them apart")


def refuse_whole_modules(record: Record) -> None:
    """A LoRA folder that servers read holds low-rank factors alone."""
    if record.whole:
        raise MergeError(
            f"the adapter trains whole modules ({listed(record.whole, 3)}), which servers do not take from such a "
            "folder; export_peft writes them as modules_to_save where PEFT has the method, merge(model) keeps them"
        )


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f"dtype={dtype!r}: an exported adapter is float32, float16 or bfloat16")
    return found
