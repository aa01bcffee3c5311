"""Folders that PEFT has saved, onto a model. A method's module tells how it maps: from_peft.

First everything is read and checked: the files, the config's fields, the modules that it selects, each layer's tensors,
whole modules. Only then is the model touched.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...attached.adapter import Adapter
from ...attached.attach_detach import install
from ...attached.model_checks import check_attachable, check_behaviour, check_has_weights, check_takes_parameters
from ...attached.records import Record, Whole, all_or_nothing, check_name, check_one_owner
from ...attached.targets.places import layer_or_norm, place_of
from ...attached.targets.train_modules import check_trainable, tensors_in
from ...contract.config import FLOAT_DTYPES, AdapterConfig
from ...contract.errors import AdapterFileError, LoraLiteError, ModelStateError
from ...contract.text import plain
from ...layers.kinds.layer_kinds import layer_device
from ..train_modules import exact_patterns
from .config_json.fields import check_fields, first_of
from .config_json.selection import Selection, check_complete
from .folder_reading import WEIGHTS, read_folder
from .readers import Part, read_parts
from .tensor_forms.base_tensors import without_base, without_copies
from .tensor_forms.biases import trained_biases, with_plain_biases
from .tensor_forms.for_all import common_tensors
from .tensor_forms.forms import as_stored, place_of_key, read_form
from .tensor_forms.starts import check_start, check_start_of_weights
from .tensor_forms.tied_tokens import leave_to_leaders

FLOATS = tuple(getattr(torch, name) for name in FLOAT_DTYPES)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def import_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default", trainable: bool = True
) -> Adapter:
    """Attach an adapter that PEFT has saved: LoRA (rsLoRA and patterns, too), DoRA, IA3, HRA, OFT, RoAd or DeLoRA.

    directory  with adapter_config.json and adapter_model.safetensors; of another base model there is no way to tell
    trainable  False keeps its tensors out of training. A dropout that the method has not here changes nothing in
               evaluation and is imported with False; with True it is refused

    IA3 gates of inputs and of outputs are two variants here: then the second is called `{name}_{variant}`. All is
    checked before the model is touched: what the config selects and what the file holds must be the same modules, and
    no field is dropped. Raises AdapterFileError for what the installed variants cannot represent, with the field that
    is in the way; AdapterNameError; ModelStateError.
    """
    check_attachable(model)
    if trainable:
        check_takes_parameters(model)
    check_one_owner(model)
    try:
        folder = Path(directory)
    except TypeError as error:
        raise AdapterFileError(f"{directory!r} is not a folder: {error}") from error
    try:
        parts, whole = _read(model, folder, trainable)
    except AdapterFileError as error:
        inside = str(error).startswith(plain(folder))  # of a file in it, which says so itself
        raise AdapterFileError(str(error) if inside else f"{plain(folder)}: {error}") from error
    return _attach(model, name, parts, whole, trainable)


def _read(model: nn.Module, folder: Path, trainable: bool) -> tuple[list[Part], dict[str, Whole]]:
    """What the folder holds by variant and layer, and of whole modules by the tensors' names in this model."""
    config, tensors = read_folder(folder, model)
    check_fields(config)
    check_start(config, trainable)
    selection = Selection(config, model)
    check_start_of_weights(config, selection.weights)
    tensors = without_copies(with_plain_biases(tensors), selection.whole())
    whole = {**_whole_modules(selection, tensors), **trained_biases(selection, tensors)}
    common = common_tensors(tensors, model)
    own = {key: tensor for key, tensor in tensors.items() if key not in whole and key not in common}
    own = without_base(config, own, model)
    layers = _by_layer(selection, own) if own or not common else _bare(selection)
    tied = leave_to_leaders(model, layers)
    check_complete(selection, layers)
    parts = read_parts(selection, layers, tied, common, trainable)
    return sorted(parts, key=lambda part: part.targets[0].name in selection.tokens), whole


def _whole_modules(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Whole]:
    """The tensors of PEFT's modules_to_save. Of its names those that no module here has select nothing, for PEFT, too:
    it adds 'classifier' and 'score' to every config of a model that classifies."""
    paths = selection.whole()
    try:
        wanted = tensors_in(selection.model, paths)
        check_trainable(selection.model, wanted)
    except ModelStateError:
        raise
    except LoraLiteError as error:
        raise AdapterFileError(f"modules_to_save: {error}") from error
    inside = {key for key in tensors if any(key.startswith(f"{path}.") for path in paths)}
    if missing := [key for key in wanted if key not in tensors]:
        raise AdapterFileError(f"modules_to_save: {WEIGHTS} lacks {first_of(missing)}")
    if extra := [key for key in tensors if key in inside and key not in wanted]:
        raise AdapterFileError(f"modules_to_save: {first_of(extra)} is in {WEIGHTS} and not in the module here")
    for key, tensor in wanted.items():
        given = tensors[key]
        if given.shape != tensor.shape or not (given.dtype == tensor.dtype or {given.dtype, tensor.dtype} <= {*FLOATS}):
            raise AdapterFileError(
                f"modules_to_save: {key} is {tuple(given.shape)} of {given.dtype} in {WEIGHTS}, and "
                f"{tuple(tensor.shape)} of {tensor.dtype} in this {type(selection.model).__name__}"
            )
    return {key: Whole.trained_from(tensor, tensors[key]) for key, tensor in wanted.items()}


def _by_layer(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and by their names there, in the model's order."""
    modules, parameters = dict(selection.model.named_modules()), selection.parameters()
    deepest = max(name.count(".") for name in modules) + 1
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".", deepest)
        ends = range(len(parts) - 1, 0, -1)
        path = next((one for end in ends if (one := ".".join(parts[:end])) in modules), "")
        name = key[len(path) + 1 :]
        inside = [one.rpartition(".")[2] for one in parameters if one.rpartition(".")[0] == path]
        part, name = place_of_key(modules[path], inside, name) if path and inside else ("", name)
        place = layer_or_norm(selection.model, f"{path}.{part}" if part else path) if path else None
        if place is None:
            raise AdapterFileError(
                f"{first_of([key])} belongs to no layer of this {type(selection.model).__name__} that can be adapted"
            )
        if layer_device(modules[path]).type == "meta":
            raise ModelStateError(f"{path} is on the meta device; load the base model's weights first")
        if tensor.dtype not in FLOATS and not ("indices" in name and tensor.dtype in WHOLE):
            raise AdapterFileError(
                f"{first_of([key])} is {tensor.dtype}; an adapter's tensors are {', '.join(FLOAT_DTYPES)}"
            )
        read = as_stored if path in selection.weights else read_form
        name, tensor = read(place, name, tensor)
        found.setdefault(f"{path}.{part}" if part else path, {})[name] = tensor
    if not found:
        raise AdapterFileError(f"{WEIGHTS} holds no tensor of a layer")
    return {path: found[path] for path in (*modules, *parameters) if path in found}


def _bare(selection: Selection) -> dict[str, dict[str, Tensor]]:
    """The layers of a method that keeps no tensor of its own in any of them, as Uni-LoRA."""
    adapted = selection.adapted()
    return {path: {} for path in selection.names if path in adapted and place_of(selection.model.get_submodule(path))}


def _attach(model: nn.Module, name: str, parts: list[Part], whole: dict[str, Whole], trainable: bool) -> Adapter:
    """One adapter for each variant, all of them or none; the whole modules go with the first."""
    names = [name, *(f"{name}_{part.variant.name}" for part in parts[1:])]
    for one, part in zip(names, parts, strict=True):
        check_name(model, one, part.variant)
        check_has_weights(part.targets)
        if trainable:
            check_behaviour(part.targets)
        patterns = tuple(exact_patterns(model, whole)) if one == name else ()
        part.targets = [replace(t, adapter=one, cfg=replace(t.cfg, train_modules=patterns)) for t in part.targets]
    with all_or_nothing(model):
        for one, part in zip(names, parts, strict=True):
            record = Record(part.variant, _commonest(part), seed=0, whole=whole if one == name else {})
            install(model, one, record, part.targets, values=part.values, trainable=trainable)
    return Adapter(model, name)


def _commonest(part: Part) -> AdapterConfig:
    """The config that most of its layers have; the others become exceptions from it."""
    written = [repr(target.cfg) for target in part.targets]
    return part.targets[written.index(Counter(written).most_common(1)[0][0])].cfg
