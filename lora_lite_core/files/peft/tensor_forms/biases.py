"""Biases that PEFT trains beside an adapter: `bias` in its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ....attached.records import Whole
from ....contract.errors import AdapterFileError, MergeError
from ....contract.target import Target
from ..config_json.fields import first_of, named
from ..config_json.selection import Selection
from ..folder_reading import WEIGHTS

OF_ADAPTED = ".base_layer.bias"  # what PEFT calls it on a layer that it adapts


def with_plain_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, biases of adapted layers by the names that they have without an adapter."""
    return {key.replace(OF_ADAPTED, ".bias") if key.endswith(OF_ADAPTED) else key: t for key, t in tensors.items()}


def trained_biases(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Whole]:
    """The biases that the config says were trained, all of them or none."""
    kind = selection.config.get("bias") or "none"
    if kind == "none":
        return {}
    if kind != "all" and not kind.endswith("_only"):  # of any name: "lora_only", "boft_only"
        raise AdapterFileError(f"{named('bias', kind)}: it is 'none', 'all' or 'lora_only'")
    held = _biases(selection.model)
    if kind != "all":
        adapted = selection.adapted()
        held = {name: bias for name, bias in held.items() if name.rpartition(".")[0] in adapted}
    held = {name: bias for name, bias in held.items() if not name.startswith(tuple(f"{p}." for p in selection.whole()))}
    if missing := [name for name in held if name not in tensors]:
        raise AdapterFileError(f"{named('bias', kind)}: {WEIGHTS} lacks {first_of(missing)}")
    for name, bias in held.items():
        if tensors[name].shape != bias.shape:
            raise AdapterFileError(f"{name} is {tuple(tensors[name].shape)} in {WEIGHTS}, {tuple(bias.shape)} here")
    return {name: Whole.trained_from(bias, tensors[name]) for name, bias in held.items()}


def written_biases(model: nn.Module, names: Iterable[str], targets: Mapping[str, Target]) -> tuple[str, dict[str, str]]:
    """What `bias` is in a config for these trained parameters, and their names in PEFT's file."""
    names, held = set(names), set(_biases(model))
    adapted = {name for name in held if name.rpartition(".")[0] in targets}
    kinds = {"none": set[str](), "lora_only": adapted, "all": held}
    kind = next((kind for kind, those in kinds.items() if those == names), None)
    if kind is None:
        raise MergeError(
            f"the adapter trains {first_of(sorted(names))}; PEFT has all biases of the model, those of all adapted "
            "layers, or whole modules"
        )
    return kind, {name: name.removesuffix(".bias") + OF_ADAPTED if name in adapted else name for name in names}


def _biases(model: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"}
