"""An adapter in the format that PEFT itself has for the method. A method's module tells how it maps: to_peft."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...attached.model_checks import GATHER, check_not_sharded
from ...attached.records import Record, check_outside, record_of, targets_of
from ...attached.targets.experts import single
from ...attached.targets.train_modules import current
from ...contract.errors import MergeError
from ...contract.target import Target
from ...contract.variant import Hook
from ...weights.probing import READING, adapters_alone, check_usable
from ..train_modules import whole_and_single
from .config_json.fields import PER_LAYER
from .config_json.layout import check_endings, check_read_back, layout_fields
from .folder_writing import checked_folder, write_folder
from .tensor_forms.biases import written_biases
from .tensor_forms.for_all import TOP, joined
from .tensor_forms.forms import keys_of, written_form
from .tensor_forms.tied_tokens import ROWS, leaders, tied_to

TARGETS = "$target_modules"  # in a field that to_peft returns: the list of the modules' names


def export_peft(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write the adapter in the format that PEFT itself has for the method (DoRA, IA3, HRA, OFT …), for PEFT to load.

    The model is not changed; the folder's parent must exist. Raises MergeError where PEFT has no such method or not
    this form of it (`export_lora` writes any low-rank adapter as a LoRA), AdapterNameError, ModelStateError, and
    AdapterFileError where the folder cannot be written: then it is as before.
    """
    record = record_of(model, name)
    if record.variant.to_peft is None:
        raise MergeError(
            f"variant '{record.variant.name}' has no form of its own in PEFT; export_lora writes a low-rank change as "
            "a LoRA, merge(model) writes any into the weights"
        )
    check_not_sharded(model, GATHER)
    check_outside(model, *READING)
    folder = checked_folder(directory)
    targets = leaders(targets_of(model, name))
    layout = layout_fields(model, targets)
    fields: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    keys, common = keys_of(targets), dict[str, list[Tensor]]()
    sizes = {path: (target.d_in, target.d_out) for path, target in targets.items()}
    for path, target in targets.items():
        adapters_alone(target, [name])
        check_usable(path, target, target.layer)
        each = [_asked(record.variant.to_peft, one, path, sizes) for one in single(target)]
        fields[path] = each[0][0]
        if target.experts and fields[path].get("lora_dropout"):
            raise MergeError(f"{path}: PEFT has no dropout for fused experts; set it to 0 in the config")
        for one in each:
            for key in [key for key in one[1] if key.startswith(TOP)]:
                common.setdefault(key, []).append(one[1].pop(key))
        made = written_form(target, [tensors for _, tensors in each])
        others = tied_to(model, path) if ROWS in made else []
        for key in (keys[path], *(f"{other}." for other in others)):
            tensors |= {f"{key}{kind}": tensor for kind, tensor in made.items()}
    tensors |= joined(common)
    config = {**layout, **_joined(fields, layout["target_modules"])}
    if record.whole:
        tensors |= _trained(model, record, config, targets)
    own = {path: {key: made[key] for key in PER_LAYER if key in made} for path, made in fields.items()}
    check_read_back(model, config, own)
    write_folder(folder, model, config, tensors, {"variant": record.variant.name})


def _trained(
    model: nn.Module, record: Record, config: dict[str, Any], targets: Mapping[str, Target]
) -> dict[str, Tensor]:
    """What is trained beside the adapter, by PEFT's names; the config says so."""
    trained = current(model, record)
    modules, biases = whole_and_single(model, record.whole)
    if modules:
        config["modules_to_save"] = modules
        check_endings(model, modules, "modules_to_save")
    if biases and config["peft_type"] != "LORA":
        raise MergeError(f"PEFT trains single parameters ({biases[0]}) beside a LoRA alone")
    names = dict[str, str]()
    if biases:
        config["bias"], names = written_biases(model, biases, targets)
    return {names.get(name, name): tensor for name, tensor in trained.items()}


@torch.no_grad()
def _asked(
    to_peft: Hook, target: Target, path: str, sizes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    params = {bare: tensor.detach() for bare, tensor in target.params.items()}
    given = {"params": params, "cfg": target.cfg, "layer": target.layer, "name": path, "sizes": sizes}
    fields, tensors = to_peft(given)
    return fields, tensors


def _joined(fields: Mapping[str, Mapping[str, Any]], targets: list[str]) -> dict[str, Any]:
    """One config of the modules' own: the commonest rank and alpha, the others as patterns."""
    first = dict(next(iter(fields.values())))
    for key, pattern in PER_LAYER.items():
        if key in first and pattern in first:
            first[key] = Counter(own[key] for own in fields.values()).most_common(1)[0][0]
            first[pattern] = {f"^{re.escape(path)}": own[key] for path, own in fields.items() if own[key] != first[key]}
    free = {key for key, pattern in PER_LAYER.items() if pattern in first}
    for path, own in fields.items():
        if differing := [key for key in own if key not in (*free, *PER_LAYER.values()) and own[key] != first[key]]:
            raise MergeError(f"{path} has {differing[0]}={own[differing[0]]!r}, and PEFT has one for all modules")
    return {key: targets if value == TARGETS else value for key, value in first.items()}
