"""load: an adapter file onto a model, checked whole before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.adapter import Adapter
from ..attached.attach_detach import install
from ..attached.model_checks import (
    Reaction,
    check_attachable,
    check_behaviour,
    check_has_weights,
    check_reaction,
    check_takes_parameters,
)
from ..attached.records import (
    Record,
    Whole,
    check_name,
    check_one_owner,
    record_of,
)
from ..attached.targets.places import found_at
from ..attached.targets.targeting import located
from ..attached.tensors.declared import shared_key, specs_for
from ..contract.config import AdapterConfig, changed_by_file, config_from_file
from ..contract.errors import (
    AdapterFileError,
    BaseMismatch,
    ConfigError,
    did_you_mean,
    listed,
)
from ..contract.param_spec import ParamSpec
from ..contract.target import Target
from ..contract.text import count, plain
from ..contract.variant import Variant
from ..discovery.registry import variant_of_file
from ..layers.shards import is_in_shards
from .adapter_file import HEADER_TENSOR, AdapterFile, header_text, open_adapter


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = True,
    on_base_mismatch: Reaction = "error",
) -> Adapter:
    """Attach the adapter in `path` to the layers it was on, with the values it was saved with.

    path              an adapter file; the folder of a model: its adapter of that name, or the only one it has; or
                      "user/name", a repository of the hub (with lora-lite-transformers), where no such path is here
    name              the name it gets here, whatever it was called when it was saved
    trainable         False keeps its tensors out of training
    on_base_mismatch  "error", "warn" or "ignore", when the file remembers another base model

    Needs no calibration data, draws nothing at random, and runs no pattern of the file. Everything is checked before
    the model is touched. Raises AdapterFileError, BaseMismatch, MissingPlugin, BrokenPlugin, AdapterNameError,
    ModelStateError, UnsupportedLayer.
    """
    check_reaction(on_base_mismatch)
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        from .folders import file_of

        path = file_of(path, name)
    with open_adapter(path) as (file, opened):
        record, targets = _checked(file, model, name, trainable)
        base: Mapping[str, Tensor] = {}
        if record.cfg.train_modules:
            from .train_modules import trained_whole

            base = trained_whole(file, model, record.cfg)
        expected = expected_in(file, targets, base)
        check_base_of(file, model, name, targets, on_base_mismatch)
        tensors = opened.read()
        if HEADER_TENSOR in tensors and header_text(tensors) != opened.metadata["adapter"]:
            raise AdapterFileError(
                f"{file.path} has been edited: its header and {HEADER_TENSOR} differ; save the adapter anew"
            )
    values = values_of(file, tensors, expected)
    record.whole = {key: Whole.trained_from(tensor, tensors[key]) for key, tensor in base.items()}
    install(model, name, record, targets, values=values, trainable=trainable)
    record_of(model, name).step = record.step
    return Adapter(model, name)


def _checked(file: AdapterFile, model: nn.Module, name: str, trainable: bool) -> tuple[Record, list[Target]]:
    """What the file's header asks for, on this model, if that can be."""
    variant = variant_of_file(file.path, file.variant, file.plugin)
    cfg = config_of(file, variant)
    in_shards = is_in_shards(model)
    check_attachable(model, in_shards=in_shards)
    if trainable:
        check_takes_parameters(model)
    check_one_owner(model)
    check_name(model, name, variant)
    targets = targets_in(file, model, cfg, variant, name)
    check_has_weights(targets)
    if in_shards:
        from .shards import check_waiting

        check_waiting(file, model, name, targets)
    if trainable:
        check_behaviour(targets)
    return Record(variant, cfg, file.seed, step=file.step), targets


def check_base_of(
    file: AdapterFile, model: nn.Module, name: str, targets: Iterable[Target], reaction: Reaction
) -> None:
    """Compare the fingerprints that the file has with these layers."""
    saved = {path: (target["fingerprint"], target["storage"]) for path, target in file.targets.items()}
    if any(fingerprint for fingerprint, _ in saved.values()):
        from ..attached.model_hooks.base_check import check_base
        from .shards import readable

        check_base(plain(file.path), readable(model, name, list(targets)), saved, reaction)


def config_of(file: AdapterFile, variant: Variant) -> AdapterConfig:
    try:
        return config_from_file(variant.Config, file.config)
    except ConfigError as error:
        raise AdapterFileError(
            f"{file.path}: its config does not fit variant '{variant.name}' of {variant.distribution} "
            f"{variant.version} (it was written with {file.plugin.get('version') or 'another version'}): {error}"
        ) from error


def targets_in(file: AdapterFile, model: nn.Module, cfg: AdapterConfig, variant: Variant, name: str) -> list[Target]:
    """The file's own targets in this model; its patterns are not run again."""
    layers = _names(model)
    if not file.targets:
        raise AdapterFileError(f"{file.path} has no targets: it is an adapter on no layer")
    if missing := [path for path in file.targets if path not in layers]:
        raise AdapterFileError(
            f"{file.path}: {len(missing)} of {count(len(file.targets), 'target')} are not in this "
            f"{type(model).__name__}: {listed(missing, 3)}{did_you_mean(missing[0], layers)}"
        )
    targets = [
        located(path, found_at(model, path, variant), _own(cfg, saved["overrides"]), variant, name)
        for path, saved in file.targets.items()
    ]
    for target in targets:
        saved = file.targets[target.name]
        if (target.d_in, target.d_out) != (saved["d_in"], saved["d_out"]):
            raise BaseMismatch(
                f"{target.name} is {target.d_in} → {target.d_out} in this {type(model).__name__}, but "
                f"{saved['d_in']} → {saved['d_out']} in the model that {file.path} was made on"
            )
    return targets


def _names(model: nn.Module) -> set[str]:
    """Of all modules and parameters."""
    return {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}


def _own(cfg: AdapterConfig, changes: Mapping[str, Any]) -> AdapterConfig:
    try:
        return changed_by_file(cfg, changes)
    except ConfigError as error:
        raise AdapterFileError(
            f"a target's own config {dict(changes)} does not fit {type(cfg).__name__}: {error}"
        ) from error


def expected_in(
    file: AdapterFile, targets: Iterable[Target], whole: Mapping[str, Tensor]
) -> dict[str, dict[str, tuple[str, ParamSpec]]]:
    """What the variant declares for each target, with the name of it in the file, after names and shapes were compared
    with the header; those of whole modules, too."""
    declared = {target.name: specs_for(target) for target in targets}
    expected = {
        name: {
            bare: (shared_key(spec) if spec.shared else f"{name}.{bare}", spec)
            for bare, spec in specs.items()
            if spec.persistent
        }
        for name, specs in declared.items()
    }
    shapes = {key: spec.shape for specs in expected.values() for key, spec in specs.values()}
    shapes |= {key: tuple(tensor.shape) for key, tensor in whole.items()}
    if shapes.keys() != file.tensors.keys():
        missing = [key for key in shapes if key not in file.tensors]
        unexpected = [key for key in file.tensors if key not in shapes]
        raise AdapterFileError(
            f"{file.path} does not hold the tensors of variant '{file.variant}'\n"
            f"  missing: {listed(missing, 4)}\n  unexpected: {listed(unexpected, 4)}"
        )
    for key, shape in shapes.items():
        if file.tensors[key][1] != shape:
            raise AdapterFileError(f"{file.path}: {key} has shape {file.tensors[key][1]}, this model needs {shape}")
    return expected


def values_of(
    file: AdapterFile, tensors: Mapping[str, Tensor], expected: Mapping[str, Mapping[str, tuple[str, ParamSpec]]]
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by target and bare name, of the kinds that the variant declares."""
    for specs in expected.values():
        for key, spec in specs.values():
            tensor, wanted = tensors[key], spec.dtype or torch.float32
            if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
                raise AdapterFileError(f"{file.path}: {key} is {tensor.dtype}, variant '{file.variant}' needs {wanted}")
    return {name: {bare: tensors[key] for bare, (key, _) in specs.items()} for name, specs in expected.items()}
