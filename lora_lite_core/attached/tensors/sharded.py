"""Adapters on a model whose parameters are in shards (FSDP2): read whole, filled whole, on all processes together.

Every process calls these in the same order: a whole tensor is gathered from all, and what is made anew is the first
process's, so that shards of one tensor never come from two computations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.errors import ModelStateError, TargetError
from ...contract.target import Target
from ...layers.kinds.layer_kinds import is_a, is_sharded
from ...layers.shards import copy_shard, reshard, whole
from ...layers.twins import twin_of
from ..records import record_of, targets_of
from ..targets.experts import single
from .declared import generator_for, specs_for, take_fingerprint
from .made import copy_values, fill, make_tensors


def whole_targets(model: nn.Module, name: str) -> Iterator[Target]:
    """Each target on a twin of its layer with whole weights, one after the other; of tied layers the same weights."""
    held: dict[int, nn.Parameter] = {}
    for path, target in targets_of(model, name).items():
        if is_a(target.layer, "FSDPModule"):
            raise ModelStateError(
                f"{path} is sharded on its own; shard the blocks around layers, as fully_shard(block)"
            )
        twin = twin_of(target.layer)
        for module, original in zip(twin.modules(), target.layer.modules(), strict=True):
            for key, tensor in original._parameters.items():
                if tensor is not None and not key.startswith("lora_"):
                    if id(tensor) not in held:
                        held[id(tensor)] = nn.Parameter(whole(tensor), requires_grad=False)
                    module._parameters[key] = held[id(tensor)]
        yield replace(target, layer=twin)


@torch.no_grad()
def fill_shards(model: nn.Module, name: str, values: Mapping[str, Mapping[str, Tensor]] | None, data: Any) -> None:
    """Give a sharded adapter, attached on meta, its values: those of a file, or new ones. Then it is ready."""
    reshard(model)
    record = record_of(model, name)
    originals = targets_of(model, name)
    grouped = values is None and record.variant.group_init is not None
    kept: dict[str, tuple[Target, dict[str, Tensor]]] = {}
    shared: dict[str, Tensor] = {}
    for target in whole_targets(model, name):
        made = _made(target, record.seed, None if values is None else values[target.name], shared)
        fingerprint = take_fingerprint(target)
        originals[target.name].fingerprint = fingerprint
        if grouped:
            kept[target.name] = target, made
        else:
            _put(originals[target.name], made)
    if grouped:
        _group_init(model, name, kept, data)
        for path, (_, made) in kept.items():
            _put(originals[path], made)
    record.ready = True
    for target in originals.values():
        target.ready = True


def _made(
    target: Target, seed: int, values: Mapping[str, Tensor] | None, shared: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of one layer, whole; those that layers share are made once."""
    specs = specs_for(target)
    for bare, place in target.shared.items():
        if place.attribute not in shared:
            tensor = torch.zeros(specs[bare].shape, dtype=target.params[bare].dtype)
            if values is not None and bare in values:
                copy_values({bare: values[bare]}, {bare: tensor})
            else:
                key = place.attribute.partition("__")[0]
                fill(tensor, specs[bare], generator_for(seed, replace(target, name=key), "shared"), key)
            shared[place.attribute] = tensor
    common = {bare: shared[place.attribute] for bare, place in target.shared.items()}
    own = {bare: spec for bare, spec in specs.items() if not spec.shared}
    given = None if values is None else {bare: value for bare, value in values.items() if bare in own}
    return {**make_tensors(target, own, seed, given, common), **common}


def _group_init(model: nn.Module, name: str, kept: Mapping[str, tuple[Target, dict[str, Tensor]]], data: Any) -> None:
    record = record_of(model, name)
    assert record.variant.group_init is not None
    targets = [one for target, made in kept.values() for one in single(replace(target, placing=_Fixed()), made)]
    given = {"model": model, "targets": tuple(targets), "cfg": record.cfg}
    record.variant.group_init({**given, "calibration_data": data})


class _Fixed:
    """Shards keep their shapes."""

    def drop(self, target: Target) -> None:
        raise TargetError(f"{target.name}: a sharded model cannot lose tensors; initialize() before it is sharded")

    def place_anew(self, target: Target, cfg: Any) -> None:
        raise TargetError(f"{target.name}: a shard cannot change its shape; initialize() before the model is sharded")


def _put(target: Target, made: Mapping[str, Tensor]) -> None:
    """The first process's values in the tensors that are there, in place."""
    for bare, tensor in target.params.items():
        full = made[bare].to(tensor.device, tensor.dtype).contiguous()
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(full, src=0)
        if is_sharded(tensor):
            copy_shard(tensor, full)
        else:
            tensor.copy_(full)
