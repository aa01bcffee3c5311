"""PEFT's own formats of the methods that it has, too. A method's module tells how it maps: to_peft and from_peft."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ...attached.adapter import Adapter
from ...attached.attach_detach import install
from ...attached.model_checks import check_attachable, check_behaviour, check_has_weights
from ...attached.records import Record, Whole, all_or_nothing, check_name, check_one_owner
from ...attached.targeting import located
from ...attached.tensors import specs_for
from ...attached.train_modules import check_trainable, tensors_in, trained_paths
from ...contract.errors import AdapterFileError, ConfigError, LoraLiteError, listed
from ...contract.target import Target
from ...contract.variant import Variant
from ...discovery.listing import list_variants
from ...discovery.registry import get_variant
from ...layers.layer_kinds import layer_sizes
from .exporting import PATTERNS
from .folder import CONFIG, read_directory

BASE_KEPT = ("gaussian", "eva", "orthogonal")  # named starts of PEFT's LoRA that leave the base as it is
UNREADABLE = (
    "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config",
    "alora_invocation_tokens", "corda_config", "loftq_config",
)  # fmt: skip


@dataclass
class _Read:
    """What one variant makes of a directory: per module the config and the tensors."""

    variant: Variant
    found: list[Target] = field(default_factory=list)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def import_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default", trainable: bool = True
) -> Adapter:
    """Attach an adapter that PEFT has saved: LoRA (rsLoRA and patterns, too), DoRA, IA3, HRA, OFT, RoAd or DeLoRA.

    directory  with adapter_config.json and adapter_model.safetensors; of another base model there is no way to tell
    trainable  False keeps its tensors out of training

    IA3 gates of inputs and of outputs are two variants here: then the second is called `{name}_{variant}`. All is
    checked before the model is touched. Raises AdapterFileError for what the installed variants cannot represent, with
    the field that is in the way; AdapterNameError; ModelStateError.
    """
    config, tensors = read_directory(directory)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in BASE_KEPT:
        raise AdapterFileError(
            f"{directory}: init_lora_weights={start!r}: these factors belong to a base that PEFT "
            "has changed; save it there in converted form, with path_initial_model_for_weight_conversion"
        )
    if bad := [key for key in UNREADABLE if config.get(key)]:
        raise AdapterFileError(
            f"{directory}: {bad[0]}={config[bad[0]]!r} in {CONFIG} is more than an adapter of layers"
        )
    check_attachable(model)
    check_one_owner(model)
    trained, patterns = _whole_modules(config, tensors)
    rest = {key: tensor for key, tensor in tensors.items() if key not in trained}
    reads = _read_all(str(directory), model, config, _by_module(str(directory), model, rest))
    reads[0].found = [replace(one, cfg=replace(one.cfg, train_modules=patterns)) for one in reads[0].found]
    whole = _check_whole(str(directory), model, reads[0], trained)
    names = [name, *(f"{name}_{read.variant.name}" for read in reads[1:])]
    for one, read in zip(names, reads, strict=True):
        check_name(model, one, read.variant)
        check_has_weights(read.found)
        if trainable:
            check_behaviour(read.found)
    heads = {key: Whole.trained_from(tensor, trained[key]) for key, tensor in whole.items()}
    with all_or_nothing(model):
        for one, read in zip(names, reads, strict=True):
            common = Counter(repr(target.cfg) for target in read.found).most_common(1)[0][0]
            cfg = next(target.cfg for target in read.found if repr(target.cfg) == common)
            record = Record(
                read.variant,
                cfg,
                seed=0,
                whole=heads if one == name else {},
            )
            targets = [replace(target, adapter=one) for target in read.found]
            install(model, one, record, targets, values=read.values, trainable=trainable)
    return Adapter(model, name)


def _whole_modules(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of PEFT's modules_to_save, and patterns for those of its names that have some: PEFT compares the ends
    of dotted names, also in the middle of a word."""
    patterns = [rf"{re.escape(name)}$" for name in config.get("modules_to_save") or ()]
    found: dict[str, Tensor] = {}
    used: dict[str, None] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        for pattern in patterns:
            if any(re.search(pattern, ".".join(parts[:size])) for size in range(1, len(parts))):
                found[key] = tensor
                used[pattern] = None
    return found, tuple(used)


def _check_whole(where: str, model: nn.Module, read: _Read, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        whole = tensors_in(model, trained_paths(model, read.found[0].cfg))
        check_trainable(model, whole)
    except LoraLiteError as error:
        raise AdapterFileError(f"{where}: modules_to_save: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    given = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    if given != wanted:
        raise AdapterFileError(f"{where}: modules_to_save holds {given}, this {type(model).__name__} has {wanted}")
    return whole


def _by_module(where: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers = dict(model.named_modules())
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        path = next((p for size in range(len(parts), 0, -1) if (p := ".".join(parts[:size])) in layers), "")
        if not path or layer_sizes(layers[path]) is None:
            raise AdapterFileError(f"{where}: {key} belongs to no linear layer of this {type(model).__name__}")
        found.setdefault(path, {})[key[len(path) + 1 :]] = tensor
    if not found:
        raise AdapterFileError(f"{where} holds no tensor")
    return {path: found[path] for path in layers if path in found}


def _read_all(
    where: str, model: nn.Module, config: dict[str, Any], modules: Mapping[str, dict[str, Tensor]]
) -> list[_Read]:
    variants = [get_variant(info.name) for info in list_variants(check=True) if info.state == "ok"]
    readers = [variant for variant in variants if variant.from_peft is not None]
    reads: dict[str, _Read] = {}
    for path, tensors in modules.items():
        layer = model.get_submodule(path)
        own = {**config, **_own_patterns(config, path)}
        for variant in readers:
            assert variant.from_peft is not None
            try:
                made = variant.from_peft({"config": own, "tensors": tensors, "layer": layer})
                if made is None:
                    continue
                target = located(path, layer, variant.Config(exclude_names=(), **made[0]), variant, "")
                values = _checked(path, variant, target, made[1])
            except LoraLiteError as error:
                raise AdapterFileError(f"{where}: {path}: {error}") from error
            except KeyError as error:
                raise AdapterFileError(
                    f"{where}: {path}: {error} is missing, in {CONFIG} or among its tensors {listed(tensors)}"
                ) from error
            read = reads.setdefault(variant.name, _Read(variant))
            read.found.append(target)
            read.values[path] = values
            break
        else:
            raise AdapterFileError(
                f"{where}: no installed variant reads peft_type {config['peft_type']!r} with {listed(tensors)}\n"
                f"  variants that read PEFT's files: {listed((v.name for v in readers), 20)}"
            )
    return list(reads.values())


def _own_patterns(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A module's own r and alpha, matched as PEFT does: the first pattern that ends its name."""
    found: dict[str, Any] = {}
    for key, pattern in PATTERNS.items():
        for ending, value in (config.get(pattern) or {}).items():
            if key not in found and re.match(rf"(.*\.)?({ending})$", path):
                found[key] = value
    return found


def _checked(path: str, variant: Variant, target: Target, values: dict[str, Tensor]) -> dict[str, Tensor]:
    specs = specs_for(target)
    wanted = {bare: spec.shape for bare, spec in specs.items() if spec.persistent}
    given = {bare: tuple(tensor.shape) for bare, tensor in values.items()}
    if given != wanted:
        raise ConfigError(f"its tensors are {given} for {variant.name}, which needs {wanted}")
    return values
