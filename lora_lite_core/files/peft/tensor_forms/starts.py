"""Where a LoRA of PEFT began, as far as that says what the adapter computes: `init_lora_weights` in its config.

Some starts A0, B0 are not zero, and PEFT takes s B0 A0 out of the weight, to begin with the outputs of the base. Those
of PiSSA and OLoRA are made of the weight alone: PEFT makes them again when it opens a folder, and the variant that
reads it here does, too, from the weight, which stays as it is. The adapter then adds s (B A − B0 A0) to the base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ....attached.targets.places import Place
from ....contract.errors import AdapterFileError
from ....layers.kinds.layer_kinds import storage_of
from ..config_json.fields import BEGAN, CONFIG, first_of, named
from .tied_tokens import tied_to

BASE = "base_layer.weight"  # a head's own weight, which PEFT writes beside its adapter: here less the start
KEPT = ("gaussian", "eva", "orthogonal", "mica")  # starts that leave the weight as it is
ANY_CASE = ("gaussian", "olora", "mica")  # what PEFT compares without regard to case
ON_ITS_BASE = (
    "save the changed base where it was trained, model.unload().save_pretrained(…), write "
    f'"{BEGAN}": true into {CONFIG}, and open the folder on that base'
)
WAY_OUT = (
    "save it where it was trained in converted form, model.save_pretrained(folder, "
    f"path_initial_model_for_weight_conversion=…); or {ON_ITS_BASE}"
)
NOT_HELD = "PEFT took factors made of {} out of the base's weights, and the folder does not hold them: {}; " + WAY_OUT
REASONS = {
    r"pissa_niter_\d+": "PEFT draws this start at random, another one each time it opens the folder, so that not even "
    f"PEFT computes again what was trained; {WAY_OUT}",
    r"corda.*": NOT_HELD.format("data", "PEFT cannot open it either"),
    r"lora_ga": NOT_HELD.format("gradients", "PEFT opens it on a base with them, and computes something else"),
    r"loftq": "PEFT quantises the base's weights when it opens the folder, a change of full rank that no adapter "
    f"here is; {ON_ITS_BASE}",
}


def start_of(config: Mapping[str, Any]) -> str:
    """The start's name as PEFT understands it; "" where it has none. (AdaLoRA does not follow the field.)"""
    start = config.get(BEGAN) if config.get("peft_type") == "LORA" else None
    if not isinstance(start, str):
        return ""
    return start.lower() if start.lower() in ANY_CASE else start


def check_start(config: Mapping[str, Any], trainable: bool) -> None:
    """Raise AdapterFileError for a start with which a folder does not say what the adapter computes, or is trained."""
    start = start_of(config)
    if start == "mica" and trainable:
        raise AdapterFileError(
            f"{named(BEGAN, config[BEGAN])} keeps lora_B as it is in training; type import_peft(…, "
            f"trainable=False) to run the adapter, or set it to true in {CONFIG} to train both factors on"
        )
    if reason := next((why for pattern, why in REASONS.items() if re.fullmatch(pattern, start)), None):
        raise AdapterFileError(f"{named(BEGAN, config[BEGAN])}: {reason}")


def check_start_of_weights(config: Mapping[str, Any], layers: Collection[str]) -> None:
    """Raise AdapterFileError where the start is out of weights that target_parameters names, as they are stored."""
    if layers and changes_weight(config):
        raise AdapterFileError(
            f"{named(BEGAN, config[BEGAN])} with target_parameters: the start that is out of {first_of(layers)} is not "
            f"made again here; {WAY_OUT}"
        )


def changes_weight(config: Mapping[str, Any]) -> bool:
    """Whether PEFT takes the start out of linear layers."""
    return start_of(config) not in ("", *KEPT)


def with_start(
    config: Mapping[str, Any], model: nn.Module, path: str, place: Place, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's config, where the start has a name only if PEFT takes it out of this very weight, and its tensors.
    Raises AdapterFileError where it takes it out of another one, too, or the weight is not that which it was."""
    if not changes_weight(config) or place.kind != "linear":  # embeddings begin as the base
        return {**config, **({BEGAN: True} if config.get(BEGAN) else {})}, dict(tensors)
    if others := tied_to(model, path):
        raise AdapterFileError(
            f"{path}: {named(BEGAN, config[BEGAN])}: PEFT takes the start out of {', '.join(others)}, too, which is "
            f"tied to it; {WAY_OUT}"
        )
    if (storage := storage_of(place.layer)) != "dense":
        raise AdapterFileError(
            f"{path}: {named(BEGAN, config[BEGAN])}: the start is made of the weight as it was before it was "
            f"quantised, and this one is {storage}; give the base as it was, or {WAY_OUT}"
        )
    return {**config, BEGAN: start_of(config)}, {name: tensor for name, tensor in tensors.items() if name != BASE}


def check_start_read(config: Mapping[str, Any], variant: str, read: bool) -> None:
    """Raise AdapterFileError where a variant has read a layer without asking for the start that is out of it."""
    if changes_weight(config) and not read:
        raise AdapterFileError(
            f"{named(BEGAN, config[BEGAN])}: PEFT takes the start out of the weight, and variant '{variant}' has no "
            f"form for that; {WAY_OUT}"
        )
