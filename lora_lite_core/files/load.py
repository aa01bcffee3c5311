"""save and load: one adapter, one file, checked on the way in and out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..attached.adapter import Adapter
from ..attached.model_checks import check_attachable, check_behaviour, check_has_weights
from ..attached.placing import install, making_room
from ..attached.records import check_name, check_one_owner
from ..attached.targeting import Found, located
from ..attached.tensors import specs_for
from ..attached.whole_modules import trained_tensors
from ..contract.config import AdapterConfig
from ..contract.errors import (
    AdapterFileError,
    BaseMismatch,
    ConfigError,
    MissingPlugin,
    UnknownVariant,
    did_you_mean,
    listed,
)
from ..contract.param_spec import ParamSpec
from ..contract.text import count
from ..contract.variant import Variant
from ..discovery.registry import get_variant
from .base_check import Reaction, check_base
from .format import AdapterFile, inspect


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = True,
    on_base_mismatch: Reaction = "error",
) -> Adapter:
    """Attach the adapter in `path` to the layers it was on, with the values it was saved with.

    name              the name it gets here, whatever it was called when it was saved
    trainable         False keeps its tensors out of training
    on_base_mismatch  "error", "warn" or "ignore", when the file remembers another base model

    Needs no calibration data and draws nothing at random. Everything is checked before the model is touched. Raises
    AdapterFileError, BaseMismatch, MissingPlugin, BrokenPlugin, AdapterNameError, ModelStateError, UnsupportedLayer.
    """
    if on_base_mismatch not in ("error", "warn", "ignore"):
        raise ConfigError(f"on_base_mismatch={on_base_mismatch!r}; give 'error', 'warn' or 'ignore'")
    file = inspect(path)
    variant = _variant_of(file)
    cfg = _config_of(file, variant)
    check_attachable(model)
    with making_room(model, name, variant):
        check_one_owner(model)
        check_name(model, name)
        found = _targets_of(file, model, cfg)
        check_has_weights(found)
        if trainable:
            check_behaviour(found)
        whole = trained_tensors(model, cfg)
        values = _values_of(file, variant, found, whole)
        check_base(file, variant, found, on_base_mismatch)
        install(model, variant, cfg, name, file.seed, found, values=values)
    adapter = Adapter(model, name)
    if not trainable:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


def _variant_of(file: AdapterFile) -> Variant:
    try:
        return get_variant(file.variant)
    except UnknownVariant as error:
        package = file.plugin.get("distribution", "")
        if not package:
            raise MissingPlugin(
                f"{file.path} needs variant '{file.variant}', which was registered by hand; register it first"
            ) from error
        raise MissingPlugin(
            f"{file.path} needs variant '{file.variant}' of {package} {file.plugin.get('version', '')}; "
            f"type: pip install {package}"
        ) from error


def _config_of(file: AdapterFile, variant: Variant) -> AdapterConfig:
    fields = {key: value for key, value in file.config.items() if key != "variant"}
    try:
        return variant.Config(**fields)
    except ConfigError as error:
        raise AdapterFileError(
            f"{file.path}: its config does not fit variant '{variant.name}' of {variant.distribution} "
            f"{variant.version} (it was written with {file.plugin.get('version') or 'another version'}): {error}"
        ) from error


def _targets_of(file: AdapterFile, model: nn.Module, cfg: AdapterConfig) -> list[Found]:
    """The file's own targets in this model; its patterns are not run again."""
    layers = dict(model.named_modules())
    if not file.targets:
        raise AdapterFileError(f"{file.path} has no targets: it is an adapter on no layer")
    if missing := [name for name in file.targets if name not in layers]:
        raise AdapterFileError(
            f"{file.path}: {len(missing)} of {count(len(file.targets), 'target')} are not in this "
            f"{type(model).__name__}: {listed(missing, 3)}{did_you_mean(missing[0], layers)}"
        )
    found = [located(name, layers[name], _own(cfg, target["overrides"])) for name, target in file.targets.items()]
    for target in found:
        saved = file.targets[target.name]
        if (target.d_in, target.d_out) != (saved["d_in"], saved["d_out"]):
            raise BaseMismatch(
                f"{target.name} is {target.d_in} → {target.d_out} in this {type(model).__name__}, but "
                f"{saved['d_in']} → {saved['d_out']} in the model that {file.path} was made on"
            )
    return found


def _own(cfg: AdapterConfig, changes: Mapping[str, Any]) -> AdapterConfig:
    try:
        return replace(cfg, **changes) if changes else cfg
    except (ConfigError, TypeError) as error:
        raise AdapterFileError(
            f"a target's own config {dict(changes)} does not fit {type(cfg).__name__}: {error}"
        ) from error


def _values_of(
    file: AdapterFile, variant: Variant, found: Iterable[Found], whole: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by target and bare name, with names, shapes and kinds as the variant declares them; those of
    whole modules, by their full names, under ""."""
    expected: dict[str, ParamSpec] = {}
    for target in found:
        specs = specs_for(variant, target.name, target.layer, target.d_in, target.d_out, target.cfg)
        expected |= {f"{target.name}.{bare}": spec for bare, spec in specs.items() if spec.persistent}
    shapes = {key: spec.shape for key, spec in expected.items()} | {key: tuple(t.shape) for key, t in whole.items()}
    if shapes.keys() != file.tensors.keys():
        missing = [key for key in shapes if key not in file.tensors]
        unexpected = [key for key in file.tensors if key not in shapes]
        raise AdapterFileError(
            f"{file.path} does not hold the tensors of variant '{variant.name}'\n"
            f"  missing: {listed(missing, 4)}\n  unexpected: {listed(unexpected, 4)}"
        )
    for key, shape in shapes.items():
        if file.tensors[key][1] != shape:
            raise AdapterFileError(f"{file.path}: {key} has shape {file.tensors[key][1]}, this model needs {shape}")
    try:
        tensors = load_file(file.path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file.path} cannot be read: {error}") from error
    values = {"": {key: tensors[key] for key in whole}}
    for key, spec in expected.items():
        tensor = tensors[key]
        wanted = spec.dtype or torch.float32
        if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
            raise AdapterFileError(f"{file.path}: {key} is {tensor.dtype}, variant '{variant.name}' needs {wanted}")
        layer_name, _, bare = key.rpartition(".")
        values.setdefault(layer_name, {})[bare] = tensor
    return values
