"""save and load: one adapter, one file, checked on the way in and out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from importlib_metadata import version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import Adapter
from .adapter_file import FORMAT, FORMAT_VERSION, AdapterFile, inspect
from .base_check import Reaction, check_base
from .checks import check_attachable, check_behaviour, check_has_weights, check_not_sharded
from .config import AdapterConfig, overrides
from .contract import Variant
from .errors import (
    AdapterFileError,
    BaseMismatch,
    ConfigError,
    MissingPlugin,
    ModelStateError,
    UnknownVariant,
    did_you_mean,
    listed,
)
from .install import install, making_room
from .modules import current, trained_tensors
from .records import Record, check_name, check_one_owner, check_outside, record_of
from .registry import get_variant
from .spec import ParamSpec
from .targets import Found, located
from .tensors import specs_for
from .text import count


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write the adapter called `name` to `path`, a .safetensors file; the base model's weights are not in it.

    The file appears whole or not at all. Raises AdapterNameError, ModelStateError (no values yet) or AdapterFileError.
    """
    record = record_of(model, name)
    if not record.ready:
        raise ModelStateError(f"adapter '{name}' has no values yet; call adapters(model)['{name}'].initialize() first")
    if record.originals:
        check_outside(model)  # the trained modules are not in their place there
    check_not_sharded(model, "gather it first (get_model_state_dict with full_state_dict=True)")
    path = Path(path).resolve()  # a link stays a link
    if path.suffix != ".safetensors":
        raise AdapterFileError(
            f"adapters are saved as .safetensors, not '{path.name}'; "
            f"type save(model, '{path.with_suffix('.safetensors')}')"
        )
    if not path.parent.is_dir():
        raise AdapterFileError(f"folder {path.parent} does not exist; make it first")
    tensors = {
        f"{layer_name}.{bare}": getattr(model.get_submodule(layer_name), target.attributes[bare])
        for layer_name, target in record.targets.items()
        for bare in target.saved
    } | current(model, record.originals)
    # A copy each: safetensors refuses tensors that share storage or are not contiguous.
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    _write(path, copies, _metadata(record))


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


def _metadata(record: Record) -> dict[str, str]:
    targets = {
        name: {
            "d_in": target.d_in,
            "d_out": target.d_out,
            "storage": target.storage,
            "overrides": overrides(record.cfg, target.cfg),
            "fingerprint": target.fingerprint,
        }
        for name, target in record.targets.items()
    }
    adapter = {
        "variant": record.variant.name,
        "config": record.cfg.to_dict(),
        "targets": targets,
        "seed": record.seed,
        "core_version": version("lora-lite-core"),
        "plugin": {"distribution": record.variant.distribution, "version": record.variant.version},
    }
    return {"format": FORMAT, "format_version": str(FORMAT_VERSION), "adapter": json.dumps(adapter)}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside the target first, synced, then renamed: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # temporary files are for their owner alone
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
