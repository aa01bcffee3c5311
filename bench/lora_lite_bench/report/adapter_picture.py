"""What an adapter file has done to singular values and directions, as a picture; without its base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from lora_lite_core.contract.config import changed_by_file
from lora_lite_core.contract.errors import AdapterFileError
from lora_lite_core.contract.text import plain
from lora_lite_core.discovery.registry import variant_of_file
from lora_lite_core.files.adapter_file import open_adapter
from lora_lite_core.files.load import config_of

from ..runs.model_state import Change, changes
from .spectra import layer_by_layer


def adapter_picture(path: Path) -> Figure:
    """Raises AdapterFileError for what is no adapter file, or of a variant that has no singular triplets."""
    with open_adapter(path) as (file, _):
        who = f"{plain(path.name)}: {file.variant}"
    return layer_by_layer(changes_in(path), who, "One row a layer.")


def changes_in(path: Path) -> Mapping[str, Change]:
    """(layer, shifts and angles) of all layers in the file."""
    with open_adapter(path) as (file, opened):
        variant = variant_of_file(file.path, file.variant, file.plugin)
        cfg, tensors = config_of(file, variant), opened.read()
    found: dict[str, Change] = {}
    for layer, target in file.targets.items():
        own = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == layer}
        try:
            found.update(changes(variant, layer, changed_by_file(cfg, target["overrides"]), own))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(
                f"{plain(path)}: the tensors of {plain(layer)} do not fit '{plain(file.variant)}': {plain(error)}"
            ) from error
    if not found:
        raise AdapterFileError(
            f"{plain(path)}: variant '{plain(file.variant)}' keeps no singular triplets, and there is nothing to draw"
        )
    return found
