"""Other values into the tensors of an adapter that is on a model: nothing is attached, compiled or sharded anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.model_checks import Reaction, check_reaction
from ..attached.records import check_outside, record_of, targets_of
from ..attached.targets.train_modules import current
from ..attached.tensors.declared import specs_for
from ..contract.errors import AdapterFileError, MergeError, ModelStateError, listed
from ..contract.target import Params, Target
from ..contract.text import plain
from ..layers.kinds.layer_kinds import is_sharded
from ..layers.shards import copy_shard, reshard
from .adapter_file import CHOOSING, HEADER_TENSOR, AdapterFile, open_adapter
from .load import check_base_of, config_of, expected_in, targets_in, values_of

SAME = 1e-5  # relative; padded tensors that compute another thing are off by more


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    on_base_mismatch: Reaction = "error",
) -> None:
    """Put the values of a file into the tensors of the adapter that is there under this name, after all checks of
    `load`: a hot swap, also on a model that is compiled (without compiling it anew), in DDP, or in shards (on all of
    the processes).

    path              an adapter file, or what else `load` takes
    on_base_mismatch  "error", "warn" or "ignore", when the file remembers another base model

    The file holds the same variant on the same layers. A smaller rank is padded with zeros where the layer then
    computes the same, which is measured; another config is refused. All tensors are replaced or none. Raises
    AdapterFileError, BaseMismatch, AdapterNameError, and ModelStateError for an adapter without values or inside
    `merged`.
    """
    check_reaction(on_base_mismatch)
    check_outside(model, "merged")
    record, here = record_of(model, name), targets_of(model, name)
    if not record.ready:
        raise ModelStateError(f"adapter '{name}' has no values yet; load(model, path, name='{name}') gives it some")
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        from .folders import file_of

        path = file_of(path, name)
    with open_adapter(path) as (file, opened):
        if file.variant != record.variant.name:
            raise AdapterFileError(
                f"{plain(file.path)} holds variant '{plain(file.variant)}', and adapter '{name}' is a "
                f"'{record.variant.name}'; values go only into one of the same variant"
            )
        cfg = config_of(file, record.variant)
        there = {target.name: target for target in targets_in(file, model, cfg, record.variant, name)}
        _check_places(file, name, here, there)
        whole = current(model, record)
        expected = expected_in(file, there.values(), whole)
        _check_seed(file, name, record.seed, there)
        check_base_of(file, model, name, here.values(), on_base_mismatch)
        tensors = {key: tensor for key, tensor in opened.read().items() if key != HEADER_TENSOR}
    values = values_of(file, tensors, expected)
    fitted = {one: _fitted(file, here[one], there[one], values[one]) for one in here}
    held = [(here[one].params[bare], value) for one in here for bare, value in fitted[one].items()]
    pairs = {id(tensor): (tensor, value) for tensor, value in held}  # those that layers share once
    _write(model, [*pairs.values(), *((tensor, tensors[key]) for key, tensor in whole.items())])
    record.step = file.step


def _check_places(file: AdapterFile, name: str, here: Mapping[str, Target], there: Mapping[str, Target]) -> None:
    if here.keys() != there.keys():
        more, less = [p for p in there if p not in here], [p for p in here if p not in there]
        raise AdapterFileError(
            f"{plain(file.path)} is on other layers than adapter '{name}'\n"
            f"  only in the file: {listed(map(plain, more), 3)}\n  only on the model: {listed(less, 3)}"
        )


def _check_seed(file: AdapterFile, name: str, seed: int, there: Mapping[str, Target]) -> None:
    """Tensors that are in no file are drawn by the seed, or computed from the weight."""
    made = any(not spec.persistent for target in there.values() for spec in specs_for(target).values())
    if made and file.seed != seed:
        raise AdapterFileError(
            f"{plain(file.path)} was attached with seed={file.seed}, adapter '{name}' with seed={seed}, and some of "
            "its tensors are made by that and not saved; attach it with the seed of the file"
        )


def _fitted(file: AdapterFile, own: Target, other: Target, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The values for the target that is there: as they are, or padded with zeros where another rank then computes the
    same, which is measured."""
    differing = [
        f"{f.name}={getattr(other.cfg, f.name)!r} (here {getattr(own.cfg, f.name)!r})"
        for f in fields(own.cfg)
        if f.name not in CHOOSING and getattr(own.cfg, f.name) != getattr(other.cfg, f.name)
    ]
    if not differing:
        return values
    problem = f"{plain(file.path)} has {listed(differing, 3)} on {own.name}"
    shapes = {bare: spec.shape for bare, spec in specs_for(own).items() if spec.persistent}
    padded: dict[str, Tensor] = {}
    for bare, value in values.items():
        wanted = shapes.get(bare, ())
        if value.dim() != len(wanted) or any(size > most for size, most in zip(value.shape, wanted, strict=True)):
            raise AdapterFileError(f"{problem}: {bare} {list(value.shape)} does not go into {list(wanted)}")
        sizes = [(0, most - size) for size, most in zip(value.shape, wanted, strict=True)]
        padded[bare] = nn.functional.pad(value, [number for pair in reversed(sizes) for number in pair])
    if (off := _difference(own, other, padded, values)) > SAME:
        raise AdapterFileError(
            f"{problem}, and computes another thing with zeros beside its values (off by {off:.1e} of the change); "
            "attach one with the fields of the file"
        )
    return padded


@torch.no_grad()
def _difference(own: Target, other: Target, padded: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
    """Of what the layer becomes in both ways, relative to the change."""
    from ..attached.targets.experts import single
    from ..weights.probing import adapted_map

    made: list[Any] = []
    for target, given in ((own, padded), (other, values)):
        kept = {bare: tensor for bare, tensor in own.params.items() if bare not in given}
        for one in single(replace(target, strength=None), {**kept, **given}):
            seen = replace(one, seen=Params(one.params))
            try:
                made.append(adapted_map(one.name, one.layer, [seen], inactive=True))
            except MergeError as error:
                raise AdapterFileError(f"whether another rank computes the same cannot be told: {error}") from error
    half = len(made) // 2
    differences = [float((a.weight - b.weight).norm()) for a, b in zip(made[:half], made[half:], strict=True)]
    sizes = [float((b.weight - b.base_weight).norm()) or 1.0 for b in made[half:]]
    return max(off / size for off, size in zip(differences, sizes, strict=True))


@torch.no_grad()
def _write(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """All of them or none."""
    if any(is_sharded(tensor) for tensor, _ in pairs):
        reshard(model)
    before = [tensor.to_local().clone() if is_sharded(tensor) else tensor.clone() for tensor, _ in pairs]
    try:
        for tensor, value in pairs:
            if is_sharded(tensor):
                copy_shard(tensor, value)
            else:
                tensor.copy_(value)
    except BaseException:
        for (tensor, _), old in zip(pairs, before, strict=True):
            (tensor.to_local() if is_sharded(tensor) else tensor).copy_(old)
        raise
