"""Adapters of models in shards (FSDP2): what saving and loading ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..attached.records import records_of, targets_of
from ..attached.tensors.declared import check_not_flat
from ..attached.tensors.sharded import whole_targets
from ..contract.errors import AdapterFileError, ModelStateError, listed
from ..contract.target import Target
from ..layers.shards import is_in_shards, reshard
from .adapter_file import CHOOSING, AdapterFile


def prepared_to_gather(model: nn.Module, name: str) -> bool:
    """Whether the model is in shards, which are all in their places then; ModelStateError for shards of other kinds."""
    reshard(model)
    for target in targets_of(model, name).values():
        check_not_flat(target)
    return is_in_shards(model)


def check_waiting(file: AdapterFile, model: nn.Module, name: str, targets: Iterable[Target]) -> None:
    """Raise unless an adapter as that of the file was attached on meta, before the model was sharded: FSDP2 takes no
    parameters later."""
    there = records_of(model).adapters.get(name)
    if there is None or there.ready:
        raise ModelStateError(
            f"the model is sharded and has no adapter '{name}' that waits for its values; attach it on the meta "
            "device, shard, and load then, or load before the model is sharded"
        )
    own, wanted = _configs(targets_of(model, name).values()), _configs(targets)
    if differ := [path for path in {**own, **wanted} if own.get(path) != wanted.get(path)]:
        raise AdapterFileError(
            f"{file.path} is not of the adapter '{name}' that waits here: {listed(differ, 3)} have another config, or "
            "no adapter on one of the two"
        )


def _configs(targets: Iterable[Target]) -> dict[str, dict[str, Any]]:
    """Each target's own config, without what has chosen it."""
    return {
        target.name: {key: value for key, value in target.cfg.to_dict().items() if key not in CHOOSING}
        for target in targets
    }


def readable(model: nn.Module, name: str, targets: Iterable[Target]) -> Iterable[Target]:
    """The targets, with whole weights where the model is in shards."""
    if not is_in_shards(model):
        return targets
    reshard(model)
    return whole_targets(model, name)
